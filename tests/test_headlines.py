"""The headline numbers: where they stand, how far another machine may move them."""

import json
import re
import statistics
from functools import reduce
from operator import getitem

from conftest import NOTEBOOK, ROOT

HEADLINES = {  # name: the keys that lead to it in results.json
    "negative bound after 11 epochs, nats per image": ("weights", 0, "bound"),
    "read as asked after epoch 1, %": ("weights", 0, "fidelity", "1"),
    "read as asked after epoch 11, %": ("weights", 0, "fidelity", "11"),
    "the same, z moved and scaled, %": ("latent", "A", "fidelity", "normal"),
    "redrawn as another digit and read as it, %": ("styles", "11"),
    "KL weighs 2: read as asked after epoch 11, %": ("weights", 1, "fidelity", "11"),
    "unbounded mean: read as asked after epoch 11, %": ("ablation", 2, "fidelity_last"),
    "flow prior: negative bound, nats per image": ("ablation", 5, "bound"),
    "flow prior: read as asked after epoch 11, %": ("ablation", 5, "fidelity_last"),
}


def test_readme_and_first_screen_quote_the_headlines():
    """The first of the seeds is the committed run; a new run is to stay near it."""
    results, seeds = (
        json.loads((ROOT / "figures" / name).read_text("utf-8"))
        for name in ("results.json", "seeds.json")
    )
    rows, spreads = [], set()
    for name, path in HEADLINES.items():
        new, *found = (reduce(getitem, path, run) for run in (results, *seeds))
        limit = 1 if "nats" in name else 4
        assert abs(new - found[0]) <= limit, f"{name}: {found[0]:.1f} -> {new:.1f}"
        spread = f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"
        rows.append(f"| {name} | {found[0]:.1f} | {spread} |")
        spreads.add(spread)
    assert "\n".join(rows) in (ROOT / "README.md").read_text("utf-8")
    opening = "".join(json.loads(NOTEBOOK.read_text("utf-8"))["cells"][0]["source"])
    quoted = re.findall(r"[\d.]+ ± [\d.]+", opening)
    assert len(quoted) >= 4 and {*quoted} <= spreads
