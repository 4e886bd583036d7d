"""The whole notebook, run once on synthetic digits: S6 and the evidence."""

import copy
import io
import math
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NUMBER, check_tables, prints, read_results
from extract import CODE, run
from matplotlib.figure import Figure
from torch.distributions import Normal
from torch.nn import functional as F

EYE, AS = torch.eye(10), "as specified"
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def nb(mnist, tmp_path_factory):
    """What all cells leave behind; seen: what they print, draw, train and measure.

    Of 10,000 samples every ninth is judged, to be quick.
    """
    nb = ModuleType("cvae_mnist")
    nb.seen = seen = SimpleNamespace(printed={}, figures={}, trained=[], z={})

    def savefig(figure, path, **_):
        seen.figures[Path(path).name] = figure
        Path(path).write_bytes(b"")

    def train(model, kl, then):
        seen.trained.append((kl, copy.deepcopy(model), torch.get_rng_state()))
        return then(model, kl)

    def measure(*key_and_z, then):
        seen.z[key_and_z[:3]] = key_and_z[3:]
        then(*key_and_z)

    def judge(*pair, then):
        return then(*(each[:: 9 if len(each) == 10_000 else 1] for each in pair))

    constants = {"DATA_DIR": mnist.root, "FIGURES_DIR": tmp_path_factory.mktemp("f")}
    constants |= {"SEED": 2, "BATCH_SIZE": 32}  # so, some coordinates are informative
    hooks = {"train": train, "measure": measure, "judge": judge}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        for cell in CODE:
            with redirect_stdout(io.StringIO()) as out:
                run(nb, cell, **constants)
            seen.printed[cell] = out.getvalue()
            for name in [name for name in hooks if hasattr(nb, name)]:
                each, then = hooks.pop(name), getattr(nb, name)
                setattr(nb, name, lambda *a, e=each, t=then: e(*a, then=t))
    return nb


def noise(nb, *shape):
    torch.manual_seed(nb.SEED)
    return torch.randn(*shape)


@torch.no_grad()
def z_and_kl(nb, name, epoch):
    """A draw of z for each training image, and the KL of each coordinate."""
    q = nb.models[name, epoch].encoder(nb.x_train, nb.y_train)
    return q.mean + q.stddev * noise(nb, *q.mean.shape), kl_of(q).mean(dim=0)


def kl_of(q, swapped=False):
    """KL(q || N(0, I)) of each coordinate, or KL(N(0, I) || q)."""
    if swapped:
        return q.stddev.log() + (1 + q.mean**2) / (2 * q.variance) - 0.5
    return (q.mean**2 + q.variance - 1) / 2 - q.stddev.log()


def sheet(nb, name):
    """The images on a sheet of digits (N, 784), and the labels of its columns and rows.

    These labels are content: the digits that were asked for.
    """
    (axes,) = nb.seen.figures[name].axes
    (image,) = axes.images
    ink = 1 - image.cmap(image.norm([0, 0.5, 1]))[:, :3].mean(axis=1)
    assert ink == pytest.approx([0, 0.5, 1], abs=0.01)
    assert image.origin == "upper" and axes.yaxis.get_inverted()
    tiles = torch.tensor(image.get_array())[2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30)
    labels = []
    for axis in axes.xaxis, axes.yaxis:
        texts = [" ".join(t.get_text().split()) for t in axis.get_ticklabels()]
        places = np.asarray(axis.get_majorticklocs()) // 30
        labels.append(dict(zip(places.astype(int).tolist(), texts)))
    return tiles.flatten(0, 1).flatten(1), *labels


def check_label(text, own, others):
    """A label, however it is worded, does not name another than its own."""
    named = [other for other in others if other in " ".join(text.split())]
    assert not named or max(named, key=len) == own, text


def check_line(axes, x, y, own, others):
    """A line is drawn through these points; returns its color."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(x)]
    lines = [line for line in lines if np.allclose(line.get_xydata().T, [x, y])]
    assert lines and axes.get_ylim()[0] <= min(y) <= max(y) <= axes.get_ylim()[1]
    check_label(lines[0].get_label(), own, others)
    return lines[0].get_color()


def test_S6_1_figure_1_shows_both_terms_and_the_loss_of_every_iteration(nb):
    (axes,) = nb.seen.figures["losses.png"].axes
    losses, test = torch.cat(nb.run["losses"]), torch.stack(nb.run["test"])
    x, ends, names = range(1, 210), range(19, 210, 19), ("sum", "cross-entropy", "KL")
    for name, weights in zip(names, ([1, 1], [1, 0], [0, 1])):
        one, other = (each @ torch.tensor(weights).float() for each in (losses, test))
        colors = [check_line(axes, ends, other, name, names)]
        assert colors == [check_line(axes, x, one, name, names)]
    for epoch in nb.snapshots:
        close(test[epoch - 1], nb.test_terms(nb.models[AS, epoch]))
        close(test[epoch - 1], nb.terms[AS, epoch])


@torch.no_grad()
def test_S6_2_sheets_of_digits_show_what_was_asked_for(nb):
    def draw(z, digits, epoch=11, name=AS):
        return nb.models[name, epoch].decoder(z, EYE[digits])

    ten, asked, own = (
        torch.arange(10),
        torch.arange(10).repeat_interleave(10),
        z_and_kl(nb, AS, 11)[0],
    )
    x = [nb.x_test[nb.y_test[:, digit] == 1] for digit in range(10)]
    z, firsts = noise(nb, 100, 40), torch.stack([each[0] for each in x])
    sheets = {f"samples_epoch_{e:02d}.png": draw(z, asked, e) for e in nb.snapshots}
    assert {1, 6, 11} <= {*nb.snapshots} == {*nb.run["samples"]}
    mended, normal = own.mean(0) + own.std(0) * z, nb.normal_per_digit(own, z, asked)
    sheets |= {"moved_and_scaled.png": draw(mended, asked)}
    sheets |= {"normal_per_digit.png": draw(normal, asked)}
    digits = dict(enumerate("0123456789"))
    left, above = {key: digits for key in sheets}, {"digits.png": digits}
    sheets["digits.png"] = torch.stack([each[:3] for each in x], dim=1).flatten(0, 1)
    mean = nb.models[AS, 11].encoder(firsts, EYE).mean
    hand = [(firsts[[i]], draw(mean[[i] * 10], ten)) for i in range(10)]
    sheets["handwriting.png"] = torch.cat([torch.cat(row) for row in hand])
    left["handwriting.png"] = digits
    above["handwriting.png"] = dict(enumerate("x0123456789"))
    readings, z = [AS, *nb.INTERPRETATIONS], noise(nb, 10_000, 40)[::1000]
    pairs = [draw(z, ten, epoch, name) for name in readings for epoch in (1, 11)]
    sheets["interpretations.png"] = torch.cat(pairs)
    above["interpretations.png"] = digits
    left["interpretations.png"] = {2 * i + 1: name for i, name in enumerate(readings)}
    own, asked = z_and_kl(nb, AS, 11)[0], torch.tensor([2, 0, 2, 3])
    z = torch.randn(4, 40)
    normal = nb.normal_per_digit(own, z, asked)
    ways = [(z, asked, 1), (z, asked), (own.mean(0) + own.std(0) * z, asked)]
    rows = [draw(*way) for way in [*ways, (normal, asked)]]
    sheets["number.png"] = torch.cat(rows)
    names = "epoch 1", "epoch 11", "moved and scaled", "normal per digit"
    left["number.png"] = dict(enumerate(names))
    for name, expected in sheets.items():
        tiles, *labels = sheet(nb, name)
        close(tiles, expected, msg=name)
        for found, wanted in zip(labels, (above.get(name, {}), left.get(name, {}))):
            assert found.keys() == wanted.keys(), name
            for place, label in found.items():
                check_label(label, wanted[place], wanted.values())
                assert not wanted[place].isdecimal() or label == wanted[place]
    close(torch.stack(nb.run["z"]), torch.stack([own.mean(dim=0), own.std(dim=0)]))
    weights = nb.models[AS, 11].state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in nb.run["weights"].items())


def test_S6_3_S6_4_verdicts_beside_the_interpretations(nb):
    (table,) = nb.seen.figures["interpretations.png"].axes[0].tables
    for row, name in enumerate([AS, *nb.INTERPRETATIONS], start=1):
        found = nb.verdicts(nb.results, name)
        for column, claim in enumerate(found):
            head, cell = (
                table[place, column].get_text().get_text() for place in (0, row)
            )
            check_label(head.replace("-\n", ""), claim, found)
            assert " ".join(cell.split()) == found[claim]


def test_where_z_was_and_what_the_samples_do(nb):
    for axes, name in zip(nb.seen.figures["where_z_was.png"].axes, [AS, "free mean"]):
        (z, kl), labels = z_and_kl(nb, name, 11), ["prior", "training"]
        check_label(
            axes.get_title(loc="left") + axes.get_title(), name, [AS, "free mean"]
        )
        for points, each, label in zip(
            axes.collections, (noise(nb, 10_000, 40), z), labels
        ):
            found = points.get_offsets().data
            assert len(found) == min(2000, len(each))
            two = each[: len(found), kl.argsort(descending=True)[:2]]
            np.testing.assert_allclose(found, two, rtol=1e-5)
            check_label(points.get_label(), label, labels)
            low, high = np.transpose([axes.get_xlim(), axes.get_ylim()])
            assert ((low < found) & (found < high)).mean() > 0.99
    (axes,) = nb.seen.figures["recognized.png"].axes
    lines = [(AS, "moved and scaled")]
    lines += [(name, "prior") for name in (AS, "free mean", "wide mean")]
    for name, z_from in lines:
        y = [nb.results[name, epoch, z_from]["recognized"] for epoch in nb.snapshots]
        own, *others = (", ".join(line) for line in [(name, z_from), *lines])
        check_line(axes, nb.snapshots, y, own, others)


@torch.no_grad()
def test_printed_numbers_are_those_of_the_cells(nb):
    out = nb.seen.printed
    assert sum(len(check_tables(text, nb.results)) for text in out.values()) > 9
    shares = " ".join(re.findall(rf"({NUMBER}) ?%", out["data-check"]))
    assert prints(shares, [100 * x.mean() for x in (nb.x_train, nb.x_test)])
    torch.manual_seed(nb.SEED)
    x, y = nb.x_test[:64], nb.y_test[:64]
    image, q = nb.CVAE()(x, y)
    bce = F.binary_cross_entropy(image, x, reduction="sum") / 64
    expected = [784, 2, bce, kl_of(q).sum(dim=1).mean(), 784 * math.log(2)]
    assert prints(out["loss-check"], expected)
    for epoch, line in enumerate(out["training-run"].splitlines()):
        losses, (bce, kl) = nb.run["losses"][epoch].sum(dim=1), nb.run["test"][epoch]
        assert prints(line, [epoch + 1, losses.mean(), bce, kl, bce + kl])
    torch.manual_seed(nb.SEED)
    bound = nb.log_likelihood(nb.models[AS, 11], nb.x_test, nb.y_test).mean()
    assert f"{-bound:.1f}" in out["likelihood-run"]
    assert str(nb.verdicts(nb.results, AS)) in out["verdicts-print"]
    expected = [nb.real[c] for c in ("recognized", "log_loss", "variety")]
    assert prints(out["real"], [*expected, nb.known["frechet"]])


def test_S6_3_S6_4_verdicts(nb):
    columns = "recognized", "log_loss", "pixel_entropy"
    for last, shares, words in [
        (0.949, [90, 89.9, 50, 49.9], ["yes", "partly", "partly", "no"]),
        (0.951, [90], ["yes"]),
        (1.049, [90], ["yes"]),
        (1.051, [90], ["yes"]),
    ]:
        change = "no" if last > 1.05 else "yes" if last < 0.95 else "no change"
        for share, word in zip(shares, words):
            results = {("m", 6, "prior"): None, (AS, 11, "prior"): None}
            results["m", 1, "prior"] = dict(zip(columns, (share, 2, 100)))
            results["m", 11, "prior"] = dict(zip(columns, (60, 2 * last, 100 * last)))
            assert [*nb.verdicts(results, "m").values()] == [word, change, change]


def test_the_classifier_learns_from_training_images_alone(nb):
    score = nb.judge(nb.x_test, nb.digits_test)
    assert score["recognized"] > 97 and score == nb.real
    again = ModuleType("again")
    vars(again).update(vars(nb), x_test=None, y_test=None, digits_test=None)
    run(again, "classifier")
    steps = again.optimizer.state_dict()["state"][0]["step"]
    assert steps == 4 * math.ceil(600 / 256)
    for one, other in zip(again.classifier.parameters(), nb.classifier.parameters()):
        assert torch.equal(one, other)


def root(A):
    """The square root of a covariance."""
    values, vectors = np.linalg.eigh(A)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


@cache
def components(nb):
    return np.linalg.eigh(np.cov(nb.x_train.numpy().T)).eigenvectors[:, -50:]


def frechet(nb, *pair):
    """Heusel et al. (2017), eq. 6, in the principal components of training images."""
    a, b = (each.double().numpy() @ components(nb) for each in pair)
    A, B, gap = np.cov(a.T), np.cov(b.T), a.mean(0) - b.mean(0)
    return gap @ gap + np.trace(A + B - 2 * root(root(A) @ B @ root(A)))


@torch.no_grad()
def judged(nb, images, digits):
    """What judge() says, by formula."""
    rounded, p = (images > 0.5).float(), images.double()
    scores = nb.classifier(rounded).double()
    own = scores.gather(1, digits[:, None])[:, 0]
    pairs = [(rounded[digits == d], nb.x_test[nb.digits_test == d]) for d in range(10)]
    entropy = -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)
    return {
        "recognized": 100 * (own == scores.amax(dim=1)).double().mean().item(),
        "log_loss": (scores.exp().sum(dim=1).log() - own).mean().item(),
        "frechet": np.mean([frechet(nb, *pair) for pair in pairs]),
        "variety": np.mean([np.std(e.numpy(), 0, ddof=1).mean() for e, _ in pairs]),
        "pixel_entropy": entropy.sum(dim=1).mean().item(),
    }


@torch.no_grad()
def test_every_result_is_what_its_z_gives(nb):
    asked = torch.arange(10).repeat_interleave(1000)
    found = [(nb.real, judged(nb, nb.x_test, nb.digits_test))]
    found += [(nb.known, judged(nb, nb.x_train, nb.digits_train))]
    for (name, epoch, z_from), (z, *others) in nb.seen.z.items():
        part, model = [*others, asked][0][::9], nb.models[name, epoch]
        expected = judged(nb, model.decoder(z[::9], EYE[part]), part)
        q = model.encoder(nb.x_test, nb.y_test)
        image = model.decoder(q.mean + q.stddev * noise(nb, 300, 40), nb.y_test)
        expected["kl"] = kl_of(q).sum(dim=1).mean().item()
        bce = F.binary_cross_entropy(image, nb.x_test, reduction="sum") / 300
        expected["loss"] = bce.item() + expected["kl"]
        found.append((nb.results[name, epoch, z_from], expected))
    for one, other in found:
        assert {c: one[c] for c in other} == pytest.approx(other, rel=1e-3, abs=1e-4)
    (rows,) = read_results(nb.FIGURES_DIR / "results.csv").values()
    assert rows.keys() == nb.results.keys() == nb.seen.z.keys()
    for key, row in rows.items():
        assert row == pytest.approx(nb.results[key], rel=1e-5, abs=1e-9)


PENALTIES = {  # the weight of a KL, which of two, and the mean of z
    AS: (1, False, torch.sigmoid),
    "KL weight 1/40": (1 / 40, False, torch.sigmoid),
    "KL weight 3": (3, False, torch.sigmoid),
    "KL weight 19.6": (19.6, False, torch.sigmoid),
    "KL arguments swapped": (1, True, torch.sigmoid),
    "free mean": (1, False, lambda a: a),
    "wide mean": (1, False, lambda a: 6 / (1 + (-a).exp()) - 3),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_S1_1_models_are_trained_as_their_names_say(nb, name):
    weight, swapped, activation = PENALTIES[name]
    place = [*dict.fromkeys(name for name, _ in nb.models)].index(name)
    kl, start, random = nb.seen.trained[place]
    torch.manual_seed(nb.SEED)
    same = zip(start.parameters(), nb.CVAE().parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in same)
    assert torch.equal(random, torch.get_rng_state())
    q = Normal(torch.randn(7, 40), torch.rand(7, 40) + 0.1)
    close(kl(q), weight * kl_of(q, swapped).sum(dim=1).mean())
    for encoder in start.encoder, nb.models[name, 11].encoder:
        h = encoder.hidden(torch.cat([nb.x_test, nb.y_test], dim=1))
        q, (W, b), (V, c) = (
            encoder(nb.x_test, nb.y_test),
            *(head[0].parameters() for head in (encoder.mean, encoder.std)),
        )
        close(q.mean, activation(h @ W.T + b))
        close(q.stddev, torch.sigmoid(h @ V.T + c))


SOURCES = {  # of z: from training's z, the prior's, and which are informative
    "prior": lambda z, prior, good: prior,
    "moved": lambda z, prior, good: z.mean(0) + prior,
    "scaled": lambda z, prior, good: z.std(0) * prior,
    "moved and scaled": lambda z, prior, good: z.mean(0) + z.std(0) * prior,
    "the informative only": lambda z, prior, good: prior.where(
        ~good, z.mean(0) + z.std(0) * prior
    ),
    "the others only": lambda z, prior, good: prior.where(
        good, z.mean(0) + z.std(0) * prior
    ),
    "the informative clipped": lambda z, prior, good: prior.where(
        ~good, prior.clamp(0, 1)
    ),
}
FITS = "normal per digit", "training images", "training images of the digit"
NAMED = {(name, epoch, "prior") for name in PENALTIES for epoch in (1, 6, 11)}
NAMED |= {(AS, epoch, z_from) for epoch in (1, 6, 11) for z_from in (*SOURCES, *FITS)}
NAMED |= {
    (f"{w} mean", 11, f) for w in ("free", "wide") for f in (*FITS, "moved and scaled")
}


def test_z_comes_from_where_its_name_says(nb):
    assert NAMED <= nb.results.keys()
    prior, asked = noise(nb, 10_000, 40), torch.arange(10).repeat_interleave(1000)
    for (name, epoch, z_from), (found, *digits) in nb.seen.z.items():
        z, kl = z_and_kl(nb, name, epoch)
        if z_from in SOURCES:
            close(found, SOURCES[z_from](z, prior, kl > 0.5))
        elif z_from == "normal per digit":
            close(found, nb.normal_per_digit(z, prior, asked))
        elif z_from in FITS:
            places = (found[:, None, :2] == z[:, :2]).all(dim=2).int().argmax(dim=1)
            assert torch.equal(found, z[places]) and len(places.unique()) == len(z)
            own = (nb.digits_train[places] == [*digits, asked][0]).float().mean()
            assert own == 1 if z_from.endswith("of the digit") else 0.05 < own < 0.15


def test_a_normal_per_digit_has_the_means_and_covariance_of_the_digit(nb):
    """Whichever root of a covariance is taken, products of two draws are the same."""
    z = torch.randn(600, 40) @ torch.randn(40, 40) + 5 * nb.digits_train[:, None]
    prior, asked = torch.randn(200, 40), torch.randint(10, (200,))
    found = nb.normal_per_digit(z, prior, asked).double()
    for digit in range(10):
        own, chosen = z[nb.digits_train == digit].double(), asked == digit
        gap, drawn = found[chosen] - own.mean(dim=0), prior[chosen].double()
        products = gap @ torch.linalg.solve(own.T.cov(), gap.T)
        close(products, drawn @ drawn.T, rtol=1e-3, atol=0.05)


def test_informative_coordinates_and_how_many_draws_are_in_their_range(nb):
    rows = re.findall(r"(.{20}) +(\d+)  (.*)", nb.seen.printed["where-numbers"])
    rows = {(name.strip(), int(epoch)): rest for name, epoch, rest in rows}
    assert rows.keys() >= {(AS, 1), *((name, 11) for name in PENALTIES)}
    for key, rest in rows.items():
        z, kl = (each.numpy() for each in z_and_kl(nb, *key))
        good, (low, high) = kl > 0.5, np.quantile(z, [0.005, 0.995], axis=0)
        expected = [good.sum(), z.std(axis=0, ddof=1).min()]
        if good.any():
            prior, own = (((low < each) & (each < high))[:, good]
                          for each in (noise(nb, 10_000, 40).numpy(), z))  # fmt: skip
            shares = prior.mean(), prior.all(axis=1).mean(), own.all(axis=1).mean()
            expected += [100 * share for share in shares]
        assert prints(rest, expected), key


def test_so_many_informative_coordinates_are_outside_their_range(nb):
    (z, kl), cdf = z_and_kl(nb, AS, 11), Normal(0.0, 1.0).cdf
    good = kl > 0.5
    low, high = (cdf(z[:, good].quantile(p, dim=0)) for p in (0.005, 0.995))
    for misses in range(0, good.sum() + 1, 2):
        drawn, *_ = nb.seen.z[AS, 11, f"{misses} outside"]
        assert torch.equal(drawn[:, ~good], noise(nb, 10_000, 40)[:, ~good])
        u = cdf(drawn[:, good])
        outside = (u < low - 1e-5) | (u > high + 1e-5)
        assert (outside.sum(dim=1) == misses).float().mean() > 0.999
        assert (outside.float().mean(dim=0) - misses / good.sum()).abs().max() < 0.03
        within = ((u - low) / (high - low))[~outside]
        beyond = ((u - high) % 1 / (1 - high + low))[outside]
        for each in [each for each in (within, beyond) if len(each) > 1000]:
            assert each.histc(10, 0, 1) / len(each) == pytest.approx(0.1, abs=0.02)
    assert good.sum() > 2


@torch.no_grad()
def test_importance_sampling_against_the_integral(nb):
    """With one coordinate of z, p(x|y) can be integrated on a grid."""
    torch.manual_seed(0)
    model, x, y = nb.CVAE(latent=1), nb.x_test[:50], nb.y_test[:50]
    grid = torch.linspace(-8, 8, 401)[:, None, None].expand(-1, 50, 1)
    image = model.decoder(grid.flatten(0, 1), y.repeat(401, 1))
    bce = F.binary_cross_entropy(image, x.repeat(401, 1), reduction="none").sum(dim=1)
    log_p = Normal(0.0, 1.0).log_prob(grid[..., 0]) - bce.view(401, 50)
    exact = log_p.logsumexp(dim=0) + math.log(16 / 400)
    assert nb.log_likelihood.__wrapped__.__defaults__ == (50,)  # as the appendix says
    gap = {k: (exact - nb.log_likelihood(model, x, y, k)).mean() for k in (1, 1000)}
    assert abs(gap[1000]) < 0.15 and gap[1] > 0.4
