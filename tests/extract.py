"""The notebook's code cells, taken out so that they can be imported and tested."""

import json
from pathlib import Path
from types import ModuleType

import matplotlib

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
CELLS = json.loads((ROOT / "cvae_mnist.ipynb").read_text("utf-8"))["cells"]
if not all("id" in cell for cell in CELLS):
    raise SystemExit(
        "The notebook's cells lost their ids: git checkout cvae_mnist.ipynb"
    )
CODE = {c["id"]: "".join(c["source"]) for c in CELLS if c["cell_type"] == "code"}
SETUP = [*CODE][: [*CODE].index("data")]  # the cells of Setup


def extract(*names, **others):
    """A module of the cells with these ids (none: all).

    others: values that replace those which a cell gives to these names.
    """
    module = ModuleType("cvae_mnist")
    run(module, *(names or CODE), **others)
    return module


def run(module, *names, **others):
    """Run cells in a module, as one does in a notebook, but for its magics."""
    for name in names:
        lines = CODE[name].splitlines()
        code = "\n".join("" if line[:1] in ("%", "!") else line for line in lines)
        exec(compile(code, name, "exec"), vars(module))  # noqa: S102
        vars(module).update({k: others[k] for k in others if k in vars(module)})
