"""The headline numbers: where they stand, how far another machine may move them.

    .venv/bin/python tests/test_headlines.py OLD.json NEW.json

compares two results.json and fails if a headline number has moved further than that.
"""

import json
import re
import statistics
import sys
from functools import reduce
from operator import getitem
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
A, W2 = ("weights", 0), ("weights", 1)
UNBOUNDED, FLOW = ("ablation", 2), ("ablation", 5)
HEADLINES = {  # name: the keys that lead to it in results.json
    "negative bound after 11 epochs, nats per image": (*A, "bound"),
    "read as asked after epoch 1, %": (*A, "fidelity", "1"),
    "read as asked after epoch 6, %": (*A, "fidelity", "6"),
    "read as asked after epoch 11, %": (*A, "fidelity", "11"),
    "the same, z moved and scaled, %": ("latent", "A", "fidelity", "normal"),
    "redrawn as another digit and read as it, %": ("styles", "11"),
    "usefulness, %": (*A, "usefulness"),
    "KL weighs 2: read as asked after epoch 1, %": (*W2, "fidelity", "1"),
    "KL weighs 2: read as asked after epoch 11, %": (*W2, "fidelity", "11"),
    "unbounded mean: read as asked after epoch 11, %": (*UNBOUNDED, "fidelity_last"),
    "flow prior: negative bound, nats per image": (*FLOW, "bound"),
    "flow prior: read as asked after epoch 11, %": (*FLOW, "fidelity_last"),
    "flow prior: usefulness, %": (*FLOW, "usefulness"),
}


def read(path):
    return json.loads(Path(path).read_text("utf-8"))


def values(results):
    return {name: reduce(getitem, path, results) for name, path in HEADLINES.items()}


def moved(old, new):
    """Headlines further apart than another machine may put them: 1 nat or 4 points."""
    for name, before in old.items():
        if not abs(new[name] - before) <= (1 if "nats" in name else 4):
            yield f"{name}: {before:.1f} -> {new[name]:.1f}"


def test_readme_and_first_screen_quote_the_headlines():
    runs = [*map(values, read(ROOT / "figures" / "seeds.json"))]
    assert not [*moved(runs[0], values(read(ROOT / "figures" / "results.json")))]
    rows, spreads = [], set()
    for name, number in runs[0].items():
        found = [run[name] for run in runs]
        spread = f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"
        rows.append(f"| {name} | {number:.1f} | {spread} |".replace("-", "−"))
        spreads.add(spread)
    assert "\n".join(rows) in (ROOT / "README.md").read_text("utf-8")
    opening = "".join(read(ROOT / "cvae_mnist.ipynb")["cells"][0]["source"])
    quoted = re.findall(r"[\d.]+ ± [\d.]+", opening)
    assert len(quoted) >= 4 and {*quoted} <= spreads


if __name__ == "__main__":
    changes = "; ".join(moved(*(values(read(path)) for path in sys.argv[1:])))
    print("headline numbers:", changes or "all where the committed run has them")
    sys.exit(bool(changes))
