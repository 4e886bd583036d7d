"""Run the notebook with four other seeds; collect all results in figures/seeds.json.

    .venv/bin/python tests/seeds.py

Seed 0 is the committed run, figures/results.json. Two runs at a time, one thread each.
"""

import json
import os
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

FIGURES = Path(__file__).resolve().parent.parent / "figures"
start = time.monotonic()


def results_of(seed):
    """The results of the notebook run with another seed, its files left nowhere."""
    notebook = nbformat.read(FIGURES.with_name("cvae_mnist.ipynb"), as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))

    def announce(cell, cell_index):
        heading = re.match("#+ (.*)", cell.source)
        if cell.cell_type == "markdown" and heading:
            minutes = (time.monotonic() - start) / 60
            print(f"{minutes:3.0f} min  seed {seed}: {heading[1]}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        cell.source += f"\nSEED = {seed}\nFIGURES_DIR = {folder!r}"
        # Windows lacks the interprocess transport; each run has sockets of its own.
        sockets = {"transport": "ipc", "ip": str(Path(folder, "kernel"))}
        NotebookClient(
            notebook,
            kernel_name="python3",
            on_cell_start=announce,
            config=Config({"KernelManager": {} if os.name == "nt" else sockets}),
            resources={"metadata": {"path": FIGURES.parent}},
        ).execute()
        return json.loads(Path(folder, "results.json").read_text("utf-8"))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # two runs share two cores
    committed = json.loads(Path(FIGURES, "results.json").read_text("utf-8"))
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = [committed, *pool.map(results_of, range(1, 5))]
    lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
    Path(FIGURES, "seeds.json").write_text(f"[\n{lines}\n]\n", "utf-8")
