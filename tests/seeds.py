"""Run the notebook with five seeds and write figures/seeds.csv: python tests/seeds.py

All rows of results.csv, with the seed before them; 20 to 40 minutes on two cores.
"""

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from extract import ROOT, extract


def run(seed):
    """The lines of results.csv that the notebook writes with this seed."""
    with tempfile.TemporaryDirectory() as folder:
        extract(SEED=seed, DATA_DIR=ROOT / "data", FIGURES_DIR=folder)
        return Path(folder, "results.csv").read_text("utf-8").splitlines()


if __name__ == "__main__":
    with ProcessPoolExecutor(min(5, os.cpu_count())) as pool:
        runs = [*pool.map(run, range(5))]
    lines = [f"seed,{runs[0][0]}"]
    for seed, (_, *rows) in enumerate(runs):
        lines += [f"{seed},{row}" for row in rows]
    path = ROOT / "figures" / "seeds.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{path}: {len(lines) - 1} rows")
