"""Take cells out of the notebook, and run all of it on synthetic digits."""

import importlib.util
import struct
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FAITHFUL = {"parameters", "data", "model", "loss", "training"}


def read_notebook():
    return nbformat.read(ROOT / "cvae_mnist.ipynb", as_version=4)


def load_cells(tags, folder):
    """Write the cells that carry one of the tags to a file and import it."""
    cells = [c for c in read_notebook().cells if tags & set(c.metadata.get("tags", []))]
    path = Path(folder, "_".join(sorted(tags)) + ".py")
    path.write_text("\n\n\n".join(c.source for c in cells), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_digits(root, train=300, test=120):
    """Synthetic digits of all gray levels as extracted IDX files, where MNIST puts them."""
    raw = Path(root, "MNIST", "raw")
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sets = {}
    for name, count in ("train", train), ("t10k", test):
        labels = rng.permutation(np.arange(count) % 10)
        images = np.zeros((count, 28, 28))
        for image, label, place in zip(images, labels, rng.integers(0, 20, count)):
            image[2 + label] = 255  # a bar that tells the class, a blob that does not
            image[14:22, place : place + 8] = rng.integers(0, 256, (8, 8))
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
        sets[name] = images.astype(np.uint8), labels
    return SimpleNamespace(root=root, raw=raw, **sets)


@pytest.fixture(scope="session")
def nb(tmp_path_factory):
    """Everything that the notebook defines, as a module."""
    return load_cells(FAITHFUL | {"definitions"}, tmp_path_factory.mktemp("cells"))


@pytest.fixture
def digits(tmp_path):
    return write_digits(tmp_path / "data")


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """The whole notebook, run as it is on synthetic digits, watched by probe.py."""
    folder = tmp_path_factory.mktemp("run")
    digits = write_digits(folder / "data")
    notebook = read_notebook()
    probe = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(probe))
    notebook.cells.append(nbformat.v4.new_code_cell("torch.save(seen, 'seen.pt')"))
    run_notebook(notebook, folder)
    figures = folder / "figures"
    return SimpleNamespace(
        digits=digits,
        notebook=notebook,
        figures=figures,
        seen=torch.load(folder / "seen.pt", weights_only=False),
        run=torch.load(figures / "run.pt", weights_only=True),
    )


def run_notebook(notebook, folder):
    NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    ).execute()
