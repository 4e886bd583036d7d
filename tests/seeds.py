"""Run the notebook with four other seeds; collect all results in figures/seeds.json.

Usage: .venv/bin/python tests/seeds.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def results_of(seed):
    """The results of the notebook run with another seed, its files left nowhere."""
    notebook = json.loads(Path(ROOT, "cvae_mnist.ipynb").read_text("utf-8"))
    (cell,) = (cell for cell in notebook["cells"] if cell["id"] == "parameters")
    cell["source"] += [f"\nSEED = {seed}\nDATA_DIR = {str(ROOT / 'data')!r}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cvae_mnist.ipynb")
        path.write_text(json.dumps(notebook), "utf-8")
        command = [sys.executable, "-m", "nbconvert", "--config", ".nbconvert.py"]
        command += ["--to", "notebook", "--inplace", "--execute", path]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(Path(folder, "figures", "results.json").read_text("utf-8"))


runs = [json.loads(Path(ROOT, "figures", "results.json").read_text("utf-8"))]
runs += [results_of(seed) for seed in range(1, 5)]
lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
Path(ROOT, "figures", "seeds.json").write_text(f"[\n{lines}\n]\n", "utf-8")
