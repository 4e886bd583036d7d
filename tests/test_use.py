"""What users do to the notebook: change constants, stop it, redraw, read its numbers."""

import base64
import csv
import io
import re
import shutil
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from extract import CELLS, OUTPUTS, ROOT, SETUP, extract, run

TRAINING = *SETUP, "data", "model", "loss", "training", "training-run"
FIGURES = "run", "losses-figure", "samples-figure"


@pytest.fixture
def short(mnist, tmp_path):
    """Sections 1 to 5 with two epochs, in a folder of their own."""
    folder = tmp_path / "figures"
    return extract(*TRAINING, DATA_DIR=mnist.root, FIGURES_DIR=folder, EPOCHS=2)


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_figures_1_to_4_are_redrawn_from_the_last_training(short):
    run(short, *FIGURES)
    before = contents(short.FIGURES_DIR)
    names = {"losses.png", "samples_epoch_01.png", "samples_epoch_02.png"}
    assert {path.name for path in before} == {*names, "run.pt"}
    plt.rcParams.update({"savefig.dpi": 50, "axes.grid": True, "font.family": "serif"})
    for path in short.FIGURES_DIR.glob("*.png"):
        path.unlink()
    extract(*SETUP, *FIGURES, FIGURES_DIR=short.FIGURES_DIR)  # as after a restart
    assert contents(short.FIGURES_DIR) == before


def test_the_committed_figures_1_to_4_are_drawn_by_the_cells(tmp_path):
    shutil.copy(ROOT / "figures" / "run.pt", tmp_path)
    extract(*SETUP, *FIGURES, FIGURES_DIR=tmp_path)
    for path in tmp_path.glob("*.png"):
        drawn, committed = plt.imread(path), plt.imread(ROOT / "figures" / path.name)
        assert drawn.shape == committed.shape and abs(drawn - committed).mean() < 1e-3


def test_a_figure_is_shown_with_its_alternative_text(short, monkeypatch):
    shown = []
    monkeypatch.setattr(short, "get_ipython", lambda: True)
    monkeypatch.setattr(short, "display", lambda data, raw: shown.append(data))
    plt.figure()
    short.show("empty.png", "An empty figure.")
    assert base64.b64decode(shown[0]["image/png"]).startswith(b"\x89PNG")
    assert 'alt="An empty figure." src="data:image/png' in shown[0]["text/html"]
    assert (short.FIGURES_DIR / "empty.png").exists() and not plt.get_fignums()


def test_every_cell_follows_the_constants(mnist, tmp_path):
    constants = {"EPOCHS": 2, "SNAPSHOTS": [1], "LATENT": 3, "HIDDEN": 20}
    nb = extract(DATA_DIR=mnist.root, FIGURES_DIR=tmp_path, **constants)
    assert len(nb.models) == 6 and all(
        [*found] == [1, 2] for found in nb.models.values()
    )
    for model in (model for found in nb.models.values() for model in found.values()):
        assert model.latent == 3 and model.decoder.hidden[0].weight.shape == (20, 13)


def test_the_trained_model_is_loaded_as_the_readme_says(short, monkeypatch):
    code = re.search(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    monkeypatch.chdir(short.FIGURES_DIR.parent)
    again = extract(*SETUP, "model")
    exec(code[1], vars(again))  # noqa: S102
    weights = short.snapshots[2].state_dict()
    assert all(torch.equal(w, weights[k]) for k, w in again.model.state_dict().items())
    plt.close()


def test_stopped_training_draws_its_epochs_and_goes_no_further(short, monkeypatch):
    def stopped(model, kl, epochs=short.train):
        yield next(epochs(model, kl))
        raise KeyboardInterrupt

    monkeypatch.setattr(short, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(short, "training-run")
    run(short, *FIGURES, "likelihood")
    assert len(short.run["test"]) == 1 and [*short.run["samples"]] == [1]
    with pytest.raises(RuntimeError, match="run section 5 to its end"):
        run(short, "classifier")
    monkeypatch.setattr(short, "train", lambda model, kl: iter(()))
    run(short, "training-run")  # stopped before the first epoch ended
    with pytest.raises(RuntimeError, match="run.pt is missing or damaged: run section"):
        run(short, "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [("EPOCHS", 1), ("BATCH_SIZE", 7), ("LEARNING_RATE", 0.01), ("SEED", 5)]
    + [("LATENT", 3), ("HIDDEN", 20), ("SNAPSHOTS", range(1, 9))],
)
def test_a_changed_constant_counts_when_training_runs_again(short, name, value):
    before, snapshots = short.run, [1] if name == "EPOCHS" else [1, 2]
    setattr(short, name, value)
    run(short, "training-run", *FIGURES)
    assert [*short.snapshots] == snapshots
    same = torch.equal(before["losses"][0], short.run["losses"][0])
    assert same == (name in ("EPOCHS", "SNAPSHOTS"))


def test_a_damaged_or_unwritable_run_is_named(short):
    file = short.FIGURES_DIR / "run.pt"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(RuntimeError, match=f"{file} is missing or damaged"):
        run(short, "run")
    run(short, "training-run", "run")  # training needs no saved file

    def full(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = contents(short.FIGURES_DIR)
    with pytest.raises(OSError, match=f"{file} cannot be written.*No space left"):
        short.save("run.pt", full)
    assert contents(short.FIGURES_DIR) == before


def test_the_home_folder_may_be_written_as_a_tilde(short, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    short.FIGURES_DIR = "~/figures"
    short.save("a.txt", lambda path: path.write_text("a"))
    assert (tmp_path / "figures" / "a.txt").read_text() == "a"


@pytest.fixture(scope="module")
def committed():
    """The committed numbers: those of the run, and of each of five seeds."""

    def rows(name):
        with open(ROOT / "figures" / name, encoding="utf-8", newline="") as file:
            return [*csv.DictReader(file)]

    return SimpleNamespace(run=rows("results.csv"), seeds=rows("seeds.csv"))


def shares(rows, model, epoch, z_from="prior"):
    """What is recognized, %, in the rows of this name: one, or one for each seed."""
    key = model, str(epoch), z_from
    return [
        float(row["recognized"])
        for row in rows
        if (row["model"], row["epoch"], row["z_from"]) == key
    ]


HEADLINES = [  # those of the opening, in its order
    ("as specified", 1),
    ("as specified", 11),
    ("as specified", 11, "moved and scaled"),
]


def test_the_opening_quotes_the_committed_run(committed):
    quoted = re.findall(r"(\d+) %", "".join(CELLS[0]["source"]))
    found = [shares(committed.run, *key)[0] for key in HEADLINES]
    assert all(abs(a - float(b)) < 3 for a, b in zip(found, quoted, strict=True))


@pytest.mark.parametrize("epoch", ["01", "11"])
def test_the_opening_shows_the_committed_figures(epoch):
    name = f"samples_epoch_{epoch}.png"
    shown = base64.b64decode(CELLS[0]["attachments"][name]["image/png"])
    shown, figure = plt.imread(io.BytesIO(shown)), plt.imread(ROOT / "figures" / name)
    assert shown.shape == figure.shape and abs(shown - figure).mean() < 0.05


def test_the_readme_quotes_the_five_seeds(committed):
    keys = [*HEADLINES, ("KL weight 3", 11), ("KL arguments swapped", 11)]
    lines = []
    for key in keys:
        found = shares(committed.seeds, *key)
        assert len(found) == 5
        lines.append(f"{np.mean(found):.1f} ± {np.std(found, ddof=1):.1f} %")
    quoted = re.findall(r"[\d.]+ ± [\d.]+ %", (ROOT / "README.md").read_text("utf-8"))
    assert quoted == lines


def test_a_seed_is_what_the_notebook_finds(committed):
    """The rows of seed 0 are those of the run, but for another machine's rounding."""
    assert len(committed.seeds) == 5 * len(committed.run)
    for row, of_seed in zip(committed.run, committed.seeds):
        assert of_seed.pop("seed") == "0" and [*row] == [*of_seed]
        assert [*row.values()][:3] == [*of_seed.values()][:3]
        assert abs(float(row["recognized"]) - float(of_seed["recognized"])) < 8
    assert len({*shares(committed.seeds, "as specified", 11)}) == 5


def test_the_committed_notebook_is_clean():
    assert not {o["output_type"] for o in OUTPUTS} - {"stream", "display_data"}
    assert not [o for o in OUTPUTS if o.get("name") == "stderr"]
    pictures = [o["data"] for o in OUTPUTS if "data" in o]
    assert len(pictures) == 10 and all(
        'alt="' in "".join(p["text/html"]) for p in pictures
    )
