"""What users do to the notebook: change constants, stop it, redraw, read its numbers."""

import re
import runpy
from unittest.mock import MagicMock

import extract as cells
import matplotlib.pyplot as plt
import numpy as np
import pytest
import seeds
import torch
from conftest import read_results, through
from extract import CODE, ROOT, extract, run

FIGURES = "run", "losses-figure", "samples-figure"
COLUMNS = "recognized", "log_loss", "frechet", "variety", "pixel_entropy"


def quick_judge(images, digits):
    """In place of judge(), which takes most of the time."""
    return dict.fromkeys(COLUMNS, images.mean().item())


def quick_show(name, alt):
    plt.close()


@pytest.fixture
def short(mnist, tmp_path):
    """Sections 1 to 5 with two epochs, in a folder of their own."""
    folders = {"DATA_DIR": mnist.root, "FIGURES_DIR": tmp_path / "figures"}
    return extract(*through("training-run"), **folders, EPOCHS=2)


@pytest.fixture(scope="module")
def tiny(mnist, tmp_path_factory):
    """The whole notebook with the smallest constants."""
    constants = {"EPOCHS": 1, "SNAPSHOTS": [], "LATENT": 1, "HIDDEN": 20, "SEED": 4}
    constants |= {"DATA_DIR": mnist.root, "BATCH_SIZE": 1000, "judge": quick_judge}
    folder = tmp_path_factory.mktemp("tiny") / "new"
    return extract(**constants, FIGURES_DIR=folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_cell_follows_the_constants(tiny):
    for (_, epoch), model in tiny.models.items():
        shapes = {tuple(p.shape) for p in model.parameters()}
        assert shapes >= {(20, 794), (1, 20), (20, 11), (784, 20)} and epoch == 1
    assert len(tiny.run["losses"][0]) == 1  # one batch
    words = tiny.verdicts(tiny.results, "as specified")
    assert words["clearer"] == words["better defined"] == "cannot tell"


def test_figures_are_redrawn_from_the_last_training(short, monkeypatch, tmp_path):
    run(short, *FIGURES)
    drawn = contents(short.FIGURES_DIR)
    del drawn["digits.png"]
    assert {"losses.png", "samples_epoch_01.png", "samples_epoch_02.png"} < {*drawn}
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    monkeypatch.chdir(ROOT / "tests")  # from any folder
    for _ in range(2):
        for path in short.FIGURES_DIR.glob("*.png"):
            path.unlink()
        runpy.run_path(str(ROOT / "tests" / "redraw.py"))
        assert contents(short.FIGURES_DIR) == drawn


def test_the_trained_model_is_loaded_as_the_readme_says(tiny, monkeypatch):
    code = re.search(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    monkeypatch.setitem(CODE, "drawing", "%matplotlib inline\n" + CODE["drawing"])
    constants = {c: getattr(tiny, c) for c in ("FIGURES_DIR", "LATENT", "HIDDEN")}
    again = extract(*through("data")[:-1], "model", "run", **constants)
    torch.manual_seed(0)
    exec(code[1], vars(again))  # noqa: S102
    torch.manual_seed(0)
    tiny.CVAE(tiny.LATENT, tiny.HIDDEN)
    z, y = tiny.center + tiny.scale * torch.randn(4, 1), torch.eye(10)[[2, 0, 2, 3]]
    (image,) = plt.gcf().axes[0].images
    found = np.ravel(image.get_array().data[2:30, 32:60])
    assert found == pytest.approx(tiny.decoder(z, y)[1].detach().numpy(), abs=1e-5)
    plt.close()


def test_stopped_training_draws_its_epochs_and_goes_no_further(short, monkeypatch):
    def stopped(model, kl, epochs=short.train):
        yield next(epochs(model, kl))
        raise KeyboardInterrupt

    monkeypatch.setattr(short, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(short, "training-run")
    run(short, *FIGURES)
    assert len(short.run["test"]) == 1 and [*short.run["samples"]] == [1]
    with pytest.raises(RuntimeError, match="epoch 2: not trained"):
        run(short, "classifier", "frechet", "judge", "measure", "printing", "claims")
    short.LEARNING_RATE = 0.002
    with pytest.raises(RuntimeError, match="epoch 1: not trained with these constants"):
        short.measure("as specified", 1, "prior", short.noise)


def test_a_mistyped_constant_leaves_the_last_training(short, monkeypatch):
    before = contents(short.FIGURES_DIR)
    for name, value in [("EPOCHS", 2.0), ("BATCH_SIZE", 0), ("LEARNING_RATE", "0.001"),
                        ("SNAPSHOTS", 2), ("SNAPSHOTS", ["x"])]:  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(short, name, value)
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                run(short, "training-run")
        assert contents(short.FIGURES_DIR) == before
    short.EPOCHS, short.SNAPSHOTS = 4, torch.tensor([3])
    run(short, "training-run")
    assert short.snapshots == [1, 3, 4]


def test_a_damaged_or_unwritable_file_is_named(short, monkeypatch, tmp_path):
    def full(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    file = short.FIGURES_DIR / "run.pt"
    file.write_bytes(file.read_bytes()[:5000])
    before = contents(short.FIGURES_DIR)
    with pytest.raises(RuntimeError, match=f"{file} is missing or damaged"):
        run(short, "run")
    for name, write in ("run.pt", full), ("no.png", full), ("run.pt/a", open):
        with pytest.raises(OSError, match=f"{name} cannot be written"):
            short.save(name, write)
    assert contents(short.FIGURES_DIR) == before
    monkeypatch.setenv("HOME", str(tmp_path))
    short.FIGURES_DIR = "~/new/figures"
    assert short.save("a.txt", lambda path: path.write_text("a")).read_text() == "a"
    assert (tmp_path / "new" / "figures" / "a.txt").exists()


def test_a_number_to_draw_may_be_any_digits(tiny):
    def draw(number):
        exec(CODE["play"].replace('"2023"', repr(number)), vars(tiny))  # noqa: S102

    for number in 2023, "7", "0012345678987":
        draw(number)
        assert tiny.asked.tolist() == [*map(int, str(number))]
    for number in "", "a7", -1:
        with pytest.raises(ValueError, match="not made of digits"):
            draw(number)


def test_a_notebook_that_cannot_be_saved_is_not_run(monkeypatch):
    def read_only(*_):
        raise PermissionError(13, "Permission denied")

    code = (ROOT / ".nbconvert.py").read_text("utf-8")
    monkeypatch.setattr(
        "sys.argv", ["nbconvert", "--inplace", str(ROOT / "cvae_mnist.ipynb")]
    )
    exec(code, {"get_config": MagicMock()})  # noqa: S102
    with pytest.raises(SystemExit, match="Permission denied"):
        exec(code, {"get_config": MagicMock(), "open": read_only})  # noqa: S102


def test_the_seeds_are_run_and_kept_one_by_one(mnist, tmp_path, monkeypatch, capsys):
    constants = {"EPOCHS": 1, "LATENT": 2, "HIDDEN": 8, "DATA_DIR": mnist.root}
    monkeypatch.setattr(seeds, "SEEDS", (3,))
    path, quick = tmp_path / "seeds.csv", {"judge": quick_judge, "show": quick_show}
    assert seeds.main(tmp_path, **constants, **quick) == 0
    ((seed, rows),) = read_results(path).items()
    folder = {"FIGURES_DIR": tmp_path}
    nb = extract(*through("training-run"), **constants, **folder, SEED=int(seed))
    loss = nb.terms["as specified", 1].sum().item()
    assert rows["as specified", 1, "prior"]["loss"] == pytest.approx(loss, rel=1e-5)
    capsys.readouterr()
    run(nb, "seeds")
    assert (
        capsys.readouterr().out.strip() == (tmp_path / "seeds.txt").read_text().strip()
    )
    header, *lines = path.read_text().splitlines()
    seeds.write(path, 0, [header.removeprefix("seed,"), "kept"])
    assert path.read_text().splitlines() == [header, "0,kept", *lines]
    seeds.write(path, 3, [header.removeprefix("seed,"), "again"])
    assert path.read_text().splitlines() == [header, "0,kept", "3,again"]
    assert "TypeError" in seeds.run(5, **constants | {"EPOCHS": "2"})[1]
    with pytest.raises(OSError):
        seeds.main(tmp_path / "missing", EPOCHS="2")
