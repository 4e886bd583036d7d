"""Run the notebook with five seeds: python tests/seeds.py

Writes figures/seeds.csv, all rows of results.csv with the seed before them, and
figures/seeds.txt, which sums them up. 20 to 40 minutes on two cores. Each seed's rows
are replaced when it is done, so the script can be stopped.
"""

import contextlib
import csv
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import numpy as np
from extract import ROOT, extract

SEEDS = range(5)


def run(seed, **constants):
    """The seed and the lines of results.csv that it gives, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        try:
            extract(SEED=seed, FIGURES_DIR=folder, **constants)
            return seed, Path(folder, "results.csv").read_text("utf-8").splitlines()
        except Exception:  # noqa: BLE001, the other seeds go on
            return seed, traceback.format_exc()


def write(path, seed, lines):
    """Put a seed's lines in place of those that path holds of it."""
    header, *rows = [f"seed,{lines[0]}", *(f"{seed},{line}" for line in lines[1:])]
    before = path.read_text("utf-8").splitlines()
    if before[:1] == [header]:
        rows += [row for row in before[1:] if not row.startswith(f"{seed},")]
    rows.sort(key=lambda row: row.split(",")[0])  # keeps the order of a seed's rows
    path.write_text("\n".join([header, *rows]) + "\n", "utf-8")


def read(path):
    """The results of each seed: seed -> (model, epoch, z_from) -> column -> value."""
    seeds = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = row.pop("model"), int(row.pop("epoch")), row.pop("z_from")
            seeds.setdefault(row.pop("seed"), {})[key] = {c: float(row[c]) for c in row}
    return seeds


def summary(seeds):
    """In words: recognized after the first and the last epoch, and the verdicts."""
    runs, lines = [*seeds.values()], []
    last = max(epoch for _, epoch, _ in runs[0])
    verdicts = extract("constants", "verdicts", EPOCHS=last).verdicts
    rows = [(name, z_from) for name, epoch, z_from in runs[0] if epoch == 1]
    for name, z_from in rows:
        line = f"{name:20} {z_from:27}"
        for epoch in 1, last:
            shares = [found[name, epoch, z_from]["recognized"] for found in runs]
            deviation = np.std(shares, ddof=min(1, len(shares) - 1))
            line += f"  {np.mean(shares):5.1f} ± {deviation:.1f} %"
            line += f" ({min(shares):.1f} to {max(shares):.1f})"
        lines.append(line)
    lines.append("")
    for name in dict.fromkeys(name for name, _ in rows):
        words = [verdicts(found, name) for found in runs]
        claims = {claim: sorted({each[claim] for each in words}) for claim in words[0]}
        told = ", ".join(f"{claim}: {'/'.join(claims[claim])}" for claim in claims)
        lines.append(f"{name:20} {told}")
    return "\n".join(lines)


def main(folder=ROOT / "figures", **constants):
    """Run all seeds, as many at once as there are cores; returns how many failed."""
    path, failed = Path(folder, "seeds.csv"), 0
    path.open("a").close()  # fails now, not after the runs, if it cannot be written
    constants = {"DATA_DIR": ROOT / "data"} | constants
    with contextlib.redirect_stdout(None):  # extract the archives only once
        extract("imports", "constants", "drawing", "data", "data-check", **constants)
    with multiprocessing.get_context("spawn").Pool(
        min(len(SEEDS), os.cpu_count()),
        initializer=signal.signal,  # Ctrl-C is for the parent, which then ends all
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        for seed, lines in pool.imap_unordered(partial(run, **constants), SEEDS):
            if isinstance(lines, str):
                failed += 1
                print(f"seed {seed} failed:\n{lines}", file=sys.stderr)
                continue
            write(path, seed, lines)
            print(f"seed {seed}: {len(lines) - 1} rows in {path}", flush=True)
    if not failed:
        Path(folder, "seeds.txt").write_text(summary(read(path)) + "\n", "utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main())
