"""The whole notebook, run once on synthetic digits: S6 and the evidence."""

import csv
import io
import math
import re
from contextlib import redirect_stdout
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from extract import CODE, OUTPUTS, extract, run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F


@pytest.fixture(scope="module")
def nb(mnist, tmp_path_factory):
    """What all cells leave behind; what they print, and the figures they show."""
    figures, alts = {}, []

    def show(name, alt):
        figures[name] = plt.gcf()
        alts.append(alt)
        plt.close()

    folder = tmp_path_factory.mktemp("figures")
    with redirect_stdout(io.StringIO()) as printed:
        nb = extract(DATA_DIR=mnist.root, FIGURES_DIR=folder, show=show, SEED=1)
    nb.figures, nb.alts = figures, alts
    nb.printed = printed.getvalue().replace(str(folder), "figures")
    return nb


def tiles(nb, name, columns=10):
    """The images of a sheet of digits (N, 784) and its axes; black is 1."""
    (axes,) = nb.figures[name].axes
    (sheet,) = axes.images
    assert sheet.get_cmap().name == "gray_r" and sheet.get_clim() == (0, 1)
    assert sheet.origin == "upper" and sheet.get_interpolation() == "nearest"
    tiles = torch.tensor(sheet.get_array())[2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30)
    assert tiles.shape[1] == columns
    return tiles.flatten(2).flatten(0, 1), axes


def texts(figure):
    found = [text for text in figure.findobj(Text) if text.get_visible()]
    return " ".join(text.get_text() for text in found if text.get_text())


DIGITS, EYE = "0 1 2 3 4 5 6 7 8 9 ", torch.eye(10)
TEXTS = {
    "digits.png": f"{DIGITS}Binarized images",
    "losses.png": "iteration nats per image 5 10 20 50 100 200 500 Figure 1: losses over "
    "the training iterations (dots: test set) loss: their sum cross-entropy KL",
    "samples_epoch_01.png": f"{DIGITS}Figure 2: samples after 1 epoch, by digit asked for",
    "samples_epoch_06.png": f"{DIGITS}Figure 3: samples after 6 epochs, by digit asked for",
    "samples_epoch_11.png": f"{DIGITS}Figure 4: samples after 11 epochs, by digit asked for",
    "number.png": "2023, after epoch 11",
    "interpretations.png": f"{DIGITS}{DIGITS}as specified KL weight 1/40 KL weight 3 "
    "KL weight 19.6 KL arguments swapped Samples after epoch 1 (left) and after epoch 11 "
    "(right)",
    "handwriting.png": f"x {DIGITS}{DIGITS}One handwriting, ten digits (x: the test image)",
    "coordinate.png": "as specified: one coordinate of z training prior free mean: one "
    "coordinate of z",
    "spread.png": "spread of z (1: as in training) 0.33 0.5 0.7 1 1.5 2 3 recognized, % "
    "Samples recognized against the spread of z as specified free mean",
}


def test_figures_say_what_they_show(nb):
    assert {name: texts(figure) for name, figure in nb.figures.items()} == TEXTS
    html = [o["data"]["text/html"] for o in OUTPUTS if "data" in o]
    assert nb.alts == [re.search('alt="(.*?)"', "".join(h))[1] for h in html]
    for name, labels in {
        "digits": 10,
        "handwriting": 11,
        "interpretations": 21,
    }.items():
        ticks = nb.figures[f"{name}.png"].axes[0].get_xticks()
        assert [*ticks] == [16 + 30 * n for n in range(labels)]


def test_S6_1_figure_1_shows_both_terms_and_the_loss_of_every_iteration(nb):
    (axes,) = nb.figures["losses.png"].axes
    losses, test = torch.cat(nb.run["losses"]), torch.stack(nb.run["test"])
    iterations, ends = range(1, 111), range(10, 111, 10)  # batches: 9 of 64, 1 of 24
    expected = {"loss: their sum": [1, 1], "cross-entropy": [1, 0], "KL": [0, 1]}
    drawn, colors = iter(axes.lines), []
    for name, terms in expected.items():
        for each, x in (losses, iterations), (test, ends):
            line = next(drawn)
            y = each @ torch.tensor(terms, dtype=torch.float)
            np.testing.assert_allclose(line.get_ydata(), y, rtol=1e-6)
            assert [*line.get_xdata()] == [*x]
            colors.append(line.get_color())
        assert line.get_label() == name
    assert colors[::2] == colors[1::2] and len({*colors}) == 3


@pytest.mark.parametrize("epoch", [1, 6, 11])
def test_S6_2_figures_2_to_4_show_ten_samples_of_each_digit(nb, epoch):
    images, _ = tiles(nb, f"samples_epoch_{epoch:02d}.png")
    torch.manual_seed(nb.SEED)
    z, y = torch.randn(100, 40), EYE.repeat_interleave(10, dim=0)
    assert torch.equal(images, nb.snapshots[epoch].decoder(z, y))


@torch.no_grad()
def test_pictures_of_digits_show_what_they_say(nb):
    last = nb.snapshots[11]
    of_digit = [nb.x_test[nb.digits_test == digit] for digit in range(10)]
    images, _ = tiles(nb, "digits.png")
    assert torch.equal(
        images, torch.cat([d[i : i + 1] for i in range(3) for d in of_digit])
    )
    torch.manual_seed(nb.SEED)
    assert torch.equal(tiles(nb, "number.png", 4)[0], last.sample([2, 0, 2, 3]))
    exec(CODE["play"].replace("max(snapshots)", "1"), vars(nb))  # noqa: S102
    torch.manual_seed(nb.SEED)
    assert torch.equal(nb.images, nb.snapshots[1].sample([2, 0, 2, 3]))
    x = torch.stack([d[0] for d in of_digit])
    z = last.encoder(x, EYE).mean
    images, _ = tiles(nb, "handwriting.png", 11)
    for row in range(10):
        drawn = last.decoder(z[row].expand(10, 40), EYE)
        assert torch.equal(images[11 * row], x[row])
        torch.testing.assert_close(images[11 * row + 1 : 11 * row + 11], drawn)
    images, axes = tiles(nb, "interpretations.png", 21)
    names = [*PENALTIES][:5]
    for row, name in enumerate(names):
        before, after = images[21 * row : 21 * row + 10], images[21 * row + 11 :][:10]
        z = noise(nb)[::1000]
        torch.testing.assert_close(before, nb.models[name][1].decoder(z, EYE))
        torch.testing.assert_close(after, nb.models[name][11].decoder(z, EYE))
        for i, (claim, word) in enumerate(nb.verdicts(nb.results, name).items()):
            head, cell = axes.tables[0][0, i], axes.tables[0][row + 1, i]
            assert [c.get_text().get_text() for c in (head, cell)] == [claim, word]
            assert cell.get_facecolor() == to_rgba(nb.COLORS[word])
    digits = [label.get_text() for label in axes.get_xticklabels()]
    assert digits == [*DIGITS.split(), "", *DIGITS.split()]
    FigureCanvasAgg(axes.figure).draw()  # the table's rows are beside the sheet's
    assert cell.get_window_extent().height * 5 == pytest.approx(axes.bbox.height, 0.01)
    yes, no = to_rgba(nb.COLORS["yes"]), to_rgba(nb.COLORS["no"])
    assert yes[1] > yes[0] and no[0] > no[1]  # green and red


def test_the_histograms_and_the_spread_show_what_they_say(nb):
    for axes, name in zip(
        nb.figures["coordinate.png"].axes, ["as specified", "free mean"]
    ):
        z, kl = z_and_kl(nb, nb.models[name][11])
        height, _ = np.histogram(z[:, kl.argmax()], 100, density=True)
        found = [patch.get_height() for patch in axes.patches]
        np.testing.assert_allclose(found, height, rtol=1e-3)
        t, curve = axes.lines[0].get_data()
        assert (t[0], t[-1]) == axes.get_xlim() == (-3, 3)
        np.testing.assert_allclose(
            curve, np.exp(-t * t / 2) / math.sqrt(2 * math.pi), rtol=1e-4
        )
    (axes,) = nb.figures["spread.png"].axes
    assert [line.get_label() for line in axes.lines] == ["as specified", "free mean"]
    assert axes.get_xscale() == "log" and axes.get_ylim() == (0, 102)
    for line in axes.lines:
        for spread, share in zip(*line.get_data(), strict=True):
            key = line.get_label(), 11, f"spread {spread:g}"
            assert share == nb.results[key]["recognized"]


ROW = re.compile(r"(.{20}) +(\d+)  (\S.*?)((?:  +-?\d+(?:\.\d+)?)+)")


def wording(printed):
    """Printed lines without what other data changes; of rows of results the keys."""
    found = []
    for line in printed.split("figures/seeds.csv")[0].splitlines():
        row = ROW.fullmatch(line)
        masked = re.sub(r"-?\d+\.\d+|\(\d+,|\d+ coordinates|nan|^\{.*", "#", line)
        found.append(row.groups()[:3] if row else masked)
    return found


def test_the_committed_outputs_are_what_the_cells_print(nb):
    """All but the numbers, which tests on other data cannot know."""
    committed = ["".join(o["text"]) for o in OUTPUTS if "text" in o]
    printed = re.sub(r"\r(.*\r)?", "", nb.printed)  # the last state of progress
    assert wording(printed) == wording("".join(committed[:-2]))  # without the seeds


def test_printed_tables_are_rows_of_results(nb):
    count, columns = 0, []
    for line in nb.printed.splitlines():
        columns = line.split()[4:] if line.startswith("model  ") else columns
        row = ROW.fullmatch(line)
        if row and columns:
            found = nb.results[row[1].strip(), int(row[2]), row[3].strip()]
            for column, value in zip(columns, row[4].split(), strict=True):
                assert value == f"{found[column]:.{2 * (column != 'recognized')}f}"
            count += 1
    assert count == 3 + 10 + 2 + 13 + 5 + 4
    torch.manual_seed(nb.SEED)
    estimate = nb.log_likelihood(nb.snapshots[11], nb.x_test, nb.y_test, 100).mean()
    torch.manual_seed(nb.SEED)
    image, q = nb.CVAE()(nb.x_test[:64], nb.y_test[:64])
    untrained = nb.cross_entropy(image, nb.x_test[:64]), nb.kl_to_prior(q)
    (bce, kl), losses = nb.run["test"][10], nb.run["losses"][10].sum(dim=1)
    for expected in [
        "training: x (600, 784) of [0.0, 1.0], y (600, 10)",
        "untrained: {:.1f} + {:.1f} nats; 784 log 2 = 543.4 nats".format(*untrained),
        f"epoch 11: training {losses.mean():.1f}, test {bce:.1f} + {kl:.1f} = {bce + kl:.1f}",
        f"epoch 11: -log p(x|y) at most {-estimate:.1f} nats",
        "{recognized:.1f} % recognized, log_loss {log_loss:.2f} nats".format(**nb.real),
        str(nb.verdicts(nb.results, "as specified")),
    ]:
        assert nb.printed.count(expected) == 1, expected


@pytest.mark.parametrize(
    ("recognized", "log_loss", "entropy", "expected"),
    [
        ((90, 50), (1, 0.949), (100, 94.9), ["yes", "yes", "yes"]),
        ((89.9, 99), (1, 0.951), (100, 95.1), ["partly", "no change", "no change"]),
        ((50, 99), (1, 1.049), (100, 104.9), ["partly", "no change", "no change"]),
        ((49.9, 99), (1, 1.051), (100, 105.1), ["no", "no", "no"]),
        ((96, 1), (0.1, 0.2), (90, 9), ["yes", "no", "yes"]),
    ],
)
def test_S6_3_S6_4_verdicts(nb, recognized, log_loss, entropy, expected):
    columns = "recognized", "log_loss", "pixel_entropy"
    first, last = (dict(zip(columns, v)) for v in zip(recognized, log_loss, entropy))
    results = {("m", 1, "prior"): first, ("m", 6, "prior"): None}
    results |= {("m", 11, "prior"): last, ("other", 20, "prior"): None}
    assert [*nb.verdicts(results, "m").values()] == expected


def test_judge_by_images_made_for_it(nb, monkeypatch):
    monkeypatch.setattr(nb, "classifier", lambda images: 9 * images[:, :10])
    digits = torch.arange(10).repeat_interleave(4)
    images = torch.full((40, 784), 0.25)
    images[:, :10] = 0.4 + 0.4 * torch.eye(10)[digits]  # what this classifier sees
    images[::4, :10] = 0.4 + 0.4 * torch.eye(10)[(digits[::4] + 1) % 10]
    found = nb.judge(images, digits)
    entropy = sum(n * -(p * math.log(p) + (1 - p) * math.log(1 - p))
                  for n, p in [(774, 0.25), (9, 0.4), (1, 0.8)])  # fmt: skip
    assert found["recognized"] == 75
    assert found["log_loss"] == pytest.approx(math.log(math.exp(9) + 9) - 9 * 0.75)
    assert found["pixel_entropy"] == pytest.approx(entropy, rel=1e-5)
    spread = 2 * torch.tensor([1.0, 0, 0, 0]).std().item() / 784
    assert found["variety"] == pytest.approx(spread, rel=1e-5)


def test_the_classifier_learns_from_training_images_alone(nb):
    assert nb.real == nb.judge(nb.x_test, nb.y_test.argmax(dim=1))
    assert nb.real["recognized"] > 97 and not nb.layers[2].training
    again = ModuleType("again")
    vars(again).update(vars(nb), x_test=None)
    run(again, "classifier")
    optimizer = again.optimizer.state_dict()
    assert optimizer["state"][0]["step"] == 4 * 3 and again.layers[2].p == 0.3
    assert optimizer["param_groups"][0]["lr"] == 0.003
    for one, other in zip(again.classifier.parameters(), nb.classifier.parameters()):
        assert torch.equal(one, other)


def standard(q):
    """KL(q || N(0, I)) by coordinate, by the library."""
    return kl_divergence(q, Normal(0.0, 1.0))


def swapped(q):
    """KL(N(0, I) || q) by coordinate, by formula."""
    return q.stddev.log() + (1 + q.mean**2) / (2 * q.variance) - 0.5


PENALTIES = {
    "as specified": (1, standard),
    "KL weight 1/40": (1 / 40, standard),
    "KL weight 3": (3, standard),
    "KL weight 19.6": (19.6, standard),
    "KL arguments swapped": (1, swapped),
    "free mean": (1, standard),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_models_and_their_rows_are_what_their_names_say(nb, name, monkeypatch):
    weight, kl = PENALTIES[name]
    penalty = nb.INTERPRETATIONS.get(name, nb.kl_to_prior)
    q = Normal(torch.randn(7, 40), torch.rand(7, 40) + 0.1)
    torch.testing.assert_close(penalty(q), weight * kl(q).sum(dim=1).mean())
    found, made, adam = nb.models[name], [], torch.optim.Adam

    def spy(*args, **settings):
        made.append((adam(*args, **settings), settings))
        return made[-1][0]

    assert [*found] == [1, 6, 11]
    torch.manual_seed(nb.SEED)
    model = nb.CVAE()
    if name == "free mean":
        model.encoder.mean = model.encoder.mean[0]
    monkeypatch.setattr(torch.optim, "Adam", spy)
    for epoch, (losses, test) in enumerate(nb.train(model, penalty), start=1):
        if name == "as specified":
            assert torch.equal(losses, nb.run["losses"][epoch - 1])
            assert torch.equal(test, nb.run["test"][epoch - 1])
        if epoch in found:
            pairs = zip(model.parameters(), found[epoch].parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
            with torch.random.fork_rng():
                check_row(nb, (name, epoch, "prior"), model, noise(nb))
    ((optimizer, settings),) = made
    assert settings == {"lr": 0.001, "fused": True}
    assert optimizer.param_groups[0]["lr"] == 0.001  # to the end


def noise(nb):
    torch.manual_seed(nb.SEED)
    return torch.randn(10_000, 40)


@torch.no_grad()
def z_and_kl(nb, model):
    """A draw of z for each training image, and the KL of each coordinate."""
    torch.manual_seed(nb.SEED)
    q = model.encoder(nb.x_train, nb.y_train)
    return q.sample(), kl_divergence(q, Normal(0.0, 1.0)).mean(dim=0)


@torch.no_grad()
def check_row(nb, key, model, z, digits=None):
    """A row of results holds what judge() says of z decoded, and the model's loss."""
    assert torch.equal(nb.digits, torch.arange(10).repeat_interleave(1000))
    digits = nb.digits if digits is None else digits
    expected = nb.judge(model.decoder(z, torch.eye(10)[digits]), digits)
    torch.manual_seed(nb.SEED)
    image, q = model(nb.x_test, nb.y_test)
    expected["kl"] = kl_divergence(q, Normal(0.0, 1.0)).sum(1).mean().item()
    bce = F.binary_cross_entropy(image, nb.x_test, reduction="sum") / 300
    expected["loss"] = bce.item() + expected["kl"]
    assert nb.results[key] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "epoch"),
    [("as specified", 1), ("as specified", 11), ("free mean", 11)]
    + [("KL weight 3", 11), ("KL arguments swapped", 11)],
)
def test_z_comes_from_where_its_name_says(nb, name, epoch):
    model = nb.models[name][epoch]
    z, kl = z_and_kl(nb, model)
    found, prior, center, scale = nb.sources(model), noise(nb), z.mean(0), z.std(0)
    fitted, informative = center + scale * prior, kl > 0.5
    by_kl, permuted = kl.argsort(), torch.empty(40)
    permuted[by_kl] = scale[by_kl].flip(0)
    for source, expected in {
        "prior": prior,
        "moved": center + prior,
        "scaled": scale * prior,
        "moved and scaled": fitted,
        "moved and scaled: informative only": torch.where(informative, fitted, prior),
        "moved and scaled: the others only": torch.where(informative, prior, fitted),
        "scales permuted": center + permuted * prior,
    }.items():
        torch.testing.assert_close(found[source], expected)
    rows = {*map(tuple, z.tolist())}
    assert {*map(tuple, found["any training images"].tolist())} == rows
    for digit in range(10):
        own, part = (
            z[nb.digits_train == digit],
            slice(1000 * digit, 1000 * digit + 1000),
        )
        picked = found["training images of the digit"][part].tolist()
        assert {*map(tuple, picked)} == {*map(tuple, own.tolist())}
        normal = found["normal per digit"][part]
        root = torch.linalg.cholesky(own.T.cov())
        white = torch.linalg.solve(root, (normal - own.mean(0)).T)
        assert white.mean(1).abs().max() < 0.2
        assert (white.cov() - torch.eye(40)).abs().max() < 0.3
    for source, drawn in found.items():
        check_row(nb, (name, epoch, source), model, drawn)
    if not name.startswith("KL"):
        inside = (prior > z.amin(dim=0)) & (prior < z.amax(dim=0))
        share = 100 * inside[:, informative].all(dim=1).float().mean()
        assert (
            f"{name}, epoch {epoch}: {informative.sum()} coordinates have "
            f"{kl[informative].sum():.1f} of {kl.sum():.1f} nats of KL.\n"
            f"    Standard deviation {scale[informative].mean():.2f}; {share:.1f} % of"
        ) in nb.printed
    if not name.startswith("KL") and epoch == 11:
        for spread in 0.33, 0.5, 0.7, 1, 1.5, 2, 3:
            drawn = center + spread * scale * prior
            check_row(nb, (name, epoch, f"spread {spread}"), model, drawn)


@pytest.mark.parametrize("epoch", [1, 11])
def test_a_test_image_lends_its_z_to_another_digit(nb, epoch):
    assert {*((nb.others - nb.digits_test) % 10).tolist()} == {*range(1, 10)}
    model = nb.snapshots[epoch]
    z = model.encoder(nb.x_test, nb.y_test).mean
    key = "as specified", epoch, "test image of another digit"
    check_row(nb, key, model, z, nb.others)


def test_results_csv_holds_every_row(nb):
    with open(nb.FIGURES_DIR / "results.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    found = {(r["model"], int(r["epoch"]), r["z_from"]): r for r in rows}
    assert found.keys() == nb.results.keys() and len(rows) == 79
    for key, values in nb.results.items():
        row = {column: float(found[key][column]) for column in values}
        assert row == pytest.approx(values, rel=1e-5, abs=1e-9)


def test_seeds_are_summed_up(nb):
    """From a file of three seeds that recognize 40, 50 and 96 %."""
    columns = nb.results["as specified", 11, "prior"]
    lines = [",".join(["seed", "model", "epoch", "z_from", *columns])]
    for seed, share in enumerate([40, 50, 96]):
        for key, values in nb.results.items():
            row = values | {"recognized": share}
            lines.append(",".join(map(str, [seed, *key, *row.values()])))
    (nb.FIGURES_DIR / "seeds.csv").write_text("\n".join(lines))
    with redirect_stdout(io.StringIO()) as printed:
        run(nb, "seeds", "seeds-verdicts")
    for key in [
        "free mean               11  prior           ",
        "as specified            11  normal per digit",
        "as specified             1  moved and scaled",
    ]:
        assert f"{key}      62.0 ± 29.9 %" in printed.getvalue()
    for name in nb.models:
        clearer = nb.verdicts(nb.results, name)["clearer"]
        expected = (
            f"recognizable: 1 no, 1 partly, 1 yes  clearer: 3 {clearer}  better d"
        )
        assert f"{name:20}  {expected}" in printed.getvalue()


@torch.no_grad()
def test_importance_sampling_against_the_integral(nb):
    """With one coordinate of z, p(x|y) can be integrated on a grid."""
    torch.manual_seed(0)
    model, x, y = nb.CVAE(latent=1), nb.x_test[:100], nb.y_test[:100]
    grid = torch.linspace(-8, 8, 801)[:, None, None].expand(-1, 100, 1)
    bce = F.binary_cross_entropy(
        model.decoder(grid.flatten(0, 1), y.repeat(801, 1)),
        x.repeat(801, 1),
        reduction="none",
    ).sum(dim=1)
    log_p = Normal(0.0, 1.0).log_prob(grid[..., 0]) - bce.view(801, 100)
    exact = log_p.logsumexp(dim=0) + math.log(16 / 800)
    gap = {k: (exact - nb.log_likelihood(model, x, y, k)).mean() for k in (1, 1000)}
    assert abs(gap[1000]) < 0.15 and gap[1] > 0.4
