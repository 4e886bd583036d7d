"""The whole notebook, run once on synthetic digits: S2, S5.3, S6 and the evidence.

What is measured is recomputed from the weights that the run leaves, by the formulas of
conftest.py or by functions of the notebook that another test here grades. What is shown
is compared with the committed run: the saved tables, verdicts and figures must be what
the notebook's cells make of figures/results.json and figures/run.pt.
"""

import base64
import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import (
    EPOCHS,
    ITERATIONS,
    ROOT,
    check,
    cross_entropy,
    decode,
    encode,
    normal_kl,
    parameters,
    rerun,
    roles,
    run_cells,
    same,
    standard_normal,
)
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

STEPS = EPOCHS * ITERATIONS
WEIGHTS = {"w = 1": 1, "w = 2": 2, "w = 4": 4, "w = 8": 8, "w = 19.6": 784 / 40}
HEADS = {name: {"mean": torch.nn.Identity()} for name in "CEF"}  # no sigmoids there
HEADS |= {"G": {"std": F.softplus}, "H": {"mean": torch.tanh}}
approx = pytest.approx


# S2 Form


def test_S2_2_cells_run_from_top_to_bottom(attempt):
    check(not attempt.error, f"the run stops: {attempt.error!r}")


def test_S2_2_saved_outputs_are_those_of_one_run(cells):
    counts = [cell["execution_count"] for cell in cells]
    ran = counts == [*range(1, len(cells) + 1)]
    check(ran, f"the saved notebook was not run top to bottom: {counts[:4]} ...")
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    check("error" not in kinds, "a cell left an error")


# S5 Training


@pytest.fixture(scope="module")
def record(executed):
    """The first optimizer that steps."""
    if not executed.watch.optimizers:
        pytest.skip("no optimizer of PyTorch takes a step")
    return next(iter(executed.watch.optimizers.values()))


def prepared(step):
    """A step with its layers and what went in, by role."""
    step.roles = roles(step.layers, step.q)
    step.xy, step.zy = step.roles["enter"].input, step.roles["leave"].input
    notes = {note.module: note for pair in step.layers.values() for note in pair}
    step.weights = {role: notes[at.module].before for role, at in step.roles.items()}
    return step


@pytest.fixture(scope="module")
def steps(record):
    return [prepared(step) for step in record.steps.values()]


def gradients(step, heads=(), sampled=False):
    """Those of cross-entropy and KL, and the two, nats per image, by our formulas."""
    w = {k: [p.clone().requires_grad_() for p in v] for k, v in step.weights.items()}
    x, y = step.xy.split([784, 10], dim=1)
    mean, std = encode(w, x, y, **dict(heads))
    noise = (step.zy[:, :40] - mean.detach()) / std.detach()
    z = mean + std * noise
    kl = normal_kl(mean, std, torch.zeros(40), torch.ones(40))
    if sampled:  # log q - log p at the sample drawn
        kl = ((z**2 - ((z - mean) / std) ** 2) / 2 - std.log()).sum(dim=1)
    terms = cross_entropy(decode(w, z, y), x).mean(), kl.mean()
    leaves = [p for role in step.roles for p in w[role]]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    found = [torch.autograd.grad(term, leaves, **options) for term in terms]
    return [torch.cat([g.flatten() for g in grads]) for grads in found], terms


def gradient_weights(step, **kind):
    """With which weights a step's gradient adds those of cross-entropy and KL."""
    parts = torch.stack(gradients(step, **kind)[0], dim=1).numpy()
    grad = torch.cat([g.flatten() for r in step.roles.values() for g in r.grad]).numpy()
    found, *_ = np.linalg.lstsq(parts, grad, rcond=None)
    return [*found, np.linalg.norm(grad - parts @ found) / np.linalg.norm(grad)]


def test_S1_1_every_step_follows_the_gradient_of_the_negative_bound(steps):
    for t, step in enumerate(steps, start=1):
        bce, kl, rest = gradient_weights(step)
        same(bce, 1, f"weight of the cross-entropy in step {t}", rel=1e-3)
        same(kl, 1, f"weight of the KL in step {t}", rel=1e-2)
        check(rest < 1e-3, f"{rest:.1%} of the gradient of step {t} is something else")


def test_S5_3_every_step_is_one_of_adam(record, steps):
    for role in "enter", "mean", "std", "leave", "image":
        layers = [step.roles[role] for step in steps]
        last = record.after[layers[-1].module]
        for i in range(2):
            first = second = 0.0
            after = [*(layer.before[i] for layer in layers[1:]), last[i]]
            for t, (layer, new) in enumerate(zip(layers, after), start=1):
                first = 0.9 * first + 0.1 * layer.grad[i]
                second = 0.999 * second + 0.001 * layer.grad[i] ** 2
                scale = (second / (1 - 0.999**t)).sqrt() + 1e-8
                expected = -0.001 * first / (1 - 0.9**t) / scale
                off = (new - layer.before[i] - expected).abs().max().item()
                what = f"step {t} moves a weight {off:.2g} away from where Adam does"
                check(off < 1e-7, what)


def as_bytes(rows):
    return [*map(bytes, rows.numpy())]


def test_S5_3_11_epochs_of_all_images_in_batches_of_64(executed, steps):
    sizes = [len(step.xy) for step in steps]
    check(len(steps) == STEPS, f"{len(steps)} steps, expected {STEPS} for 300 images")
    check(max(sizes) == 64, f"the largest batch has {max(sizes)} images, expected 64")
    check(sum(sizes) == 3300, f"11 epochs show {sum(sizes)} images, expected 3300")
    expected, orders = sorted(as_bytes(torch.hstack(executed.digits.train))), set()
    for i, epoch in enumerate(torch.cat([step.xy for step in steps]).split(300)):
        right = sorted(as_bytes(epoch)) == expected
        check(right, f"epoch {i + 1} is not every training image once")
        orders.add(tuple(as_bytes(epoch)))
    check(len(orders) == EPOCHS, f"{len(orders)} orders of the images, expected 11")


def test_S5_3_parameters(executed):
    expected = {"EPOCHS": 11, "BATCH_SIZE": 64, "LEARNING_RATE": 0.001, "LATENT": 40}
    expected |= {"HIDDEN": 256, "SNAPSHOT_EPOCHS": [1, 6, 11]}
    for name, value in expected.items():
        found = executed.ns.get(name)
        check(found == value, f"{name} is {found}, expected {value}")


# S6 Results


@pytest.fixture(scope="module")
def losses(steps):
    """Cross-entropy and KL of every iteration, recomputed."""
    with torch.enable_grad():
        terms = [gradients(step)[1] for step in steps]
    return np.array([[term.item() for term in pair] for pair in terms])


def test_S6_1_figure_1_shows_the_losses_of_every_iteration(executed, losses):
    figure = executed.watch.figures.get("losses.png")
    check(figure, "the run saves no losses.png")
    lines = [line for line in figure.lines if len(line) == STEPS]
    shown = [[np.allclose(line, v, 1e-4) for line in lines] for v in losses.T]
    total = [np.allclose(line, losses.sum(axis=1), 1e-4) for line in lines]
    right = all(map(any, shown)) or any(total)
    check(right, f"no line shows the loss of each of the {STEPS} iterations")


def shows(figure, image):
    """Whether a figure shows an image (784)."""
    image = image.reshape(28, 28)
    for sheet in (sheet for sheet in figure.images if min(sheet.shape[:2]) >= 28):
        sheet = sheet[..., 0] if sheet.ndim == 3 else sheet
        tiles = np.lib.stride_tricks.sliding_window_view(sheet, (28, 28))
        near = tiles[np.abs(tiles[:, :, 14, 14] - image[14, 14]) < 1e-5]
        if (np.abs(near - image).max(axis=(1, 2)) < 1e-4).any():
            return True
    return False


def weights_after(record, layers, epoch):
    """Weights by role after an epoch."""
    now = record.after
    if epoch * ITERATIONS in record.steps:
        notes = record.steps[epoch * ITERATIONS].layers.values()
        now = {note.module: note.before for pair in notes for note in pair}
    return {role: now[layer.module] for role, layer in layers.items()}


@pytest.mark.parametrize("epoch", [1, 6, 11])
def test_S6_2_figures_2_to_4_show_ten_samples_of_each_digit(
    executed, record, steps, epoch
):
    name = f"samples_epoch_{epoch:02d}.png"
    figure = executed.watch.figures.get(name)
    check(figure, f"the run saves no {name}")
    weights = weights_after(record, steps[0].roles, epoch)
    drawn = {}
    for zy, images in figure.drawn:
        right = torch.sigmoid(decode(weights, zy[:, :40], zy[:, 40:]))
        for row, image, far in zip(zy, images, (images - right).abs().amax(dim=1)):
            if far < 1e-5:
                drawn[row.numpy().tobytes()] = row, image.numpy()
    check(drawn, f"{name} is not drawn with the weights after epoch {epoch}")
    found = [row for row, image in drawn.values() if shows(figure, image)]
    for digit in range(10):
        n = sum(int(row[40 + digit] == 1) for row in found)
        check(n == 10, f"{name} shows {n} samples of {digit}, expected 10")
    standard_normal(torch.stack(found)[:, :40], "z of the samples", 0.06)


# The evidence: what was trained


@pytest.fixture(scope="module")
def ns(executed, own):
    return executed.ns


def trained(executed, name):
    """What was trained with a weight of the KL or for a row of the ladder."""
    if name in WEIGHTS:
        model, snapshots, row = executed.ns["readings"][WEIGHTS[name]]
    else:
        variants = executed.ns["variants"].items()
        model, snapshots, row = next(v for k, v in variants if k[0] == name[0])
    (record,) = (
        record
        for optimizer, record in executed.watch.optimizers.items()
        if optimizer.param_groups[0]["params"][0] is next(model.parameters())
    )
    first, heads = prepared(record.steps[0]), HEADS.get(name, {})

    def after(epoch):
        """Put the weights after an epoch into the model: by role."""
        model.load_state_dict(snapshots[epoch])
        return {role: parameters(layer.module) for role, layer in first.roles.items()}

    return SimpleNamespace(**locals())


@pytest.fixture(params=[*WEIGHTS, *"CDEFGH"])
def subject(executed, own, request):
    return trained(executed, request.param)


def test_each_model_trains_as_its_row_says(executed, subject):
    record, first, model = subject.record, subject.first, subject.model
    assert type(record.optimizer) is torch.optim.Adam and len(record.settings) == STEPS
    expected = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    for group in record.settings:
        assert {**expected, "amsgrad": False}.items() <= group.items()
    (group,) = record.optimizer.param_groups
    assert {*map(id, group["params"])} == {*map(id, model.parameters())}
    torch.manual_seed(0)
    fresh = executed.ns["CVAE"](40, 256)
    known = {p.detach().double().numpy().tobytes() for p in fresh.parameters()}
    assert {p.numpy().tobytes() for v in first.weights.values() for p in v} == known
    sampled, weight = subject.name in ("E", "F"), WEIGHTS.get(subject.name, 1)
    found = gradient_weights(first, heads=subject.heads, sampled=sampled)
    assert found == approx([1, weight, 0], rel=1e-2, abs=2e-3)
    assert {*as_bytes(first.xy)} <= {*as_bytes(torch.hstack(executed.digits.train))}
    assert [*subject.snapshots] == [1, 6, 11]
    for epoch in subject.snapshots:
        kept, then = subject.after(epoch), weights_after(record, first.roles, epoch)
        assert all(all(map(torch.equal, kept[role], then[role])) for role in kept)
    one, last = subject.snapshots[1], subject.snapshots[11]
    assert not any(torch.equal(one[k], last[k]) for k, _ in model.named_parameters())


# The evidence: numbers


def estimate(found, values):
    """A mean over images of one random draw each, by many draws (draws, images)."""
    spread = values.var(dim=0).mean().sqrt().item() / values.shape[1] ** 0.5
    assert found == approx(values.mean().item(), abs=6 * spread, rel=1e-4)


def judged(ns, images, labels):
    """By digit: read as asked, as they are and rounded; variety; pixel entropy."""
    p, found = images.double(), {}
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).sum(dim=1)
    for digit in range(10):
        own = labels == digit
        with torch.no_grad():
            read, rounded = (
                100 * (ns["classifier"](t[own]).argmax(dim=1) == digit).double().mean()
                for t in (images, images.round())
            )
        values = read, rounded, p[own].std(dim=0).mean(), entropy[own].mean()
        names = "fidelity", "fidelity_rounded", "variety", "pixel_entropy"
        for name, value in zip(names, values):
            found.setdefault(name, []).append(value.item())
    return found


def test_each_row_holds_what_its_model_gives(executed, ns, subject):
    row, w, model, name = subject.row, subject.after(11), subject.model, subject.name
    x, y = executed.digits.t10k
    mean, std = encode(w, x, y, **subject.heads)
    z = mean + std * torch.randn(20, *mean.shape, dtype=torch.double)
    estimate(
        row["bce"], torch.stack([cross_entropy(decode(w, one, y), x) for one in z])
    )
    with torch.no_grad():
        log_p = torch.stack([model.prior(y).log_prob(one.float()) for one in z])
    log_q = torch.distributions.Normal(mean, std).log_prob(z)
    estimate(row["kl"], (log_q - log_p).sum(dim=2))
    if name not in ("E", "F"):
        learned = [y.double() @ p.double() for p in model.parameters() if len(p) == 10]
        to_mean, log_std = learned or (0 * mean, 0 * mean)
        kl = normal_kl(mean, std, to_mean, log_std.exp()).mean().item()
        assert row["kl"] == approx(kl, rel=1e-3, abs=1e-5)
    assert row["bound"] == row["bce"] + row["kl"]
    labels = torch.arange(10).repeat_interleave(1000)
    for epoch in subject.snapshots:
        subject.after(epoch)
        torch.manual_seed(0)
        for key, values in ns["judge"](model.sample(labels), labels).items():
            assert row[f"{key}_per_digit"][str(epoch)] == values
            assert row[key][str(epoch)] == approx(np.mean(values))
    assert row["usefulness"] == ns["usefulness"](model)
    assert row["claims"] == ns["verdicts"](row)


def test_results_hold_the_numbers_of_the_run(executed, ns, losses):
    results = json.loads((executed.figures / "results.json").read_text("utf-8"))
    assert results == json.loads(json.dumps(ns["results"]))
    run = torch.load(executed.figures / "run.pt", weights_only=True)
    for epoch, state in ns["run"]["weights"].items():
        assert all(torch.equal(run["weights"][epoch][key], state[key]) for key in state)
    assert results["parameters"]["epochs"] == 11 and results["parameters"]["seed"] == 0
    assert np.allclose(torch.cat(run["losses"]), losses, rtol=1e-3)
    means = losses.reshape(EPOCHS, ITERATIONS, 2).mean(axis=1)
    for part, terms in ("train", means), ("test", torch.stack(run["test"]).numpy()):
        for key, values in zip(("bce", "kl", "bound"), [*terms.T, terms.sum(axis=1)]):
            assert np.allclose(results[part][key], values, rtol=1e-3)
    faithful, *_ = readings = [row for _, _, row in ns["readings"].values()]
    assert [faithful[key] for key in ("bce", "kl")] == run["test"][-1].tolist()
    expected = [{"kl_weight": w, **r} for w, r in zip(WEIGHTS.values(), readings)]
    assert results["weights"] == json.loads(json.dumps(expected)) == run["readings"]
    x, y = executed.digits.t10k
    for key, values in ns["judge"](x, y.argmax(dim=1)).items():
        assert results[key] == faithful[key] | {"real": approx(np.mean(values))}
        expected = faithful[f"{key}_per_digit"] | {"real": values}
        assert results[f"{key}_per_digit"] == expected
    assert run["real_variety"] == results["variety"]["real"]
    assert results["classifier_accuracy"] == ns["accuracy"](ns["classifier"])
    assert results["usefulness"].pop("real") == results["classifier_accuracy"]
    for epoch, state in run["weights"].items():
        ns["model"].load_state_dict(state)
        assert results["usefulness"][str(epoch)] == ns["usefulness"](ns["model"])
    again = ns["train_classifier"](*executed.digits.train)
    assert torch.equal(again[0].weight, ns["classifier"][0].weight)


@pytest.mark.parametrize("letter", "ABCDEFGH")
def test_rows_of_the_ladder(executed, ns, letter):
    s = trained(executed, letter)
    (entry,) = (r for r in ns["results"]["ablation"] if r["name"].startswith(letter))
    s.after(11)
    torch.manual_seed(0)
    few = s.model, ns["x_test"], ns["y_test"]
    bound = ns["evaluate"](*few, ns["sampled_loss_terms"]).sum()
    gap = (ns["log_likelihood"](*few).mean() + bound).item()
    if letter == "A":
        gap = ns["results"]["test_log_likelihood"] + s.row["bound"]
    assert entry["gap"] == approx(gap, abs=1e-3)
    assert entry == {
        key: s.row[key] for key in ("bce", "kl", "bound", "usefulness")
    } | {
        "name": entry["name"],
        "parameters": sum(p.numel() for p in s.model.parameters()),
        "log_likelihood": entry["gap"] - entry["bound"],
        "gap": entry["gap"],
        "fidelity_first": s.row["fidelity"]["1"],
        "fidelity_last": s.row["fidelity"]["11"],
        "variety": s.row["variety"]["11"],
    }


def test_log_likelihoods_are_those_of_their_images_and_samples(ns):
    results, estimates = ns["results"], ns["log_likelihood"]
    x, y = ns["x_test"], ns["y_test"]
    ns["model"].load_state_dict(ns["run"]["weights"][11])
    found = estimates(ns["model"], x, y).mean().item()
    assert results["test_log_likelihood"] == approx(found, abs=0.3)
    by_samples = results["log_likelihood_by_samples"]
    for k in 10, 100:
        found = estimates(ns["model"], x[:300], y[:300], k).mean().item()
        assert by_samples[str(k)] == approx(found, abs=0.3)
    assert by_samples["10"] < by_samples["100"] < by_samples["1000"]


def exact(model, x, y):
    """log p(x|y) of a model with one latent dimension, by quadrature."""
    z = torch.linspace(-8, 8, 801, dtype=torch.double)[:, None]
    linear = (m for m in model.decoder.modules() if isinstance(m, torch.nn.Linear))
    w = dict(zip(("leave", "image"), map(parameters, linear), strict=True))
    log_prior = -(z[:, 0] ** 2) / 2 - math.log(2 * math.pi) / 2
    pairs = ((image, label.expand(801, -1)) for image, label in zip(x, y))
    log_p = [log_prior - cross_entropy(decode(w, z, c), image) for image, c in pairs]
    return torch.stack(log_p).logsumexp(dim=1) + math.log(0.02)


def test_importance_sampling_against_the_exact_integral(ns):
    x, y = ns["x_test"][:200], ns["y_test"][:200]
    checks = ns["results"]["importance_sampling_check"]
    assert checks["exact"] == approx(exact(ns["small"], x, y).mean().item(), abs=0.02)
    for k in 1, 10, 100:
        draws = [ns["log_likelihood"](ns["small"], x, y, k).mean() for _ in range(3)]
        assert checks[k] == approx(np.mean(draws), abs=1.5)
    assert checks[1] < checks[10] < checks[100] < checks["exact"]
    torch.manual_seed(0)
    model = ns["CVAE"](latent=1)
    for p in model.parameters():
        p.data.mul_(1.5)
    expected = exact(model, x[:20], y[:20])
    found = ns["log_likelihood"](model, x[:20], y[:20], 2000)
    assert torch.allclose(found.double(), expected, atol=0.5)
    assert found.mean().item() == approx(expected.mean().item(), abs=0.1)


def test_what_the_figures_show_was_computed(executed, ns):
    run, (x, y) = ns["run"], executed.digits.t10k
    real, faithful = y.argmax(dim=1), trained(executed, "w = 1")
    first = [x[real == digit][:4] for digit in range(10)]
    assert torch.equal(run["digits"].view(4, 10, 784), torch.stack(first, dim=1))
    for row, digit in zip(run["styles"].view(10, 11, 784), range(10)):
        w, hand = faithful.after(11), first[digit][:1]
        mean, _ = encode(w, hand, torch.eye(10)[[digit]])
        images = decode(w, mean.expand(10, -1), torch.eye(10)).sigmoid().float()
        assert torch.allclose(row, torch.cat([hand, images]), atol=1e-5)

    def drawn(model, state, each):
        model.load_state_dict(state)
        torch.manual_seed(0)
        return model.sample(torch.arange(10).repeat_interleave(each))

    for epoch in 1, 11:
        strips = [drawn(m, state[epoch], 1) for m, state, _ in ns["readings"].values()]
        assert all(map(torch.equal, run["strips"][epoch], strips))
    best = min(ns["results"]["ablation"], key=lambda row: row["bound"])["name"]
    assert [*run["closing"]] == ["A: as specified", best]
    for name, images in run["closing"].items():
        model, state, _ = ns["variants"][name]
        assert torch.equal(images, drawn(model, state[11], 10))
    torch.manual_seed(0)
    others = (real + torch.randint(1, 10, real.shape)) % 10
    for epoch in 1, 6, 11:
        w = faithful.after(epoch)
        images = decode(w, encode(w, x, y)[0], F.one_hot(others, 10)).sigmoid().float()
        read = np.mean(ns["judge"](images, others)["fidelity"])
        assert ns["results"]["styles"][str(epoch)] == approx(read, abs=0.3)


@pytest.mark.parametrize("name", ["A, epoch 1", "A, epoch 6", "A", "C"])
def test_latent_numbers_are_of_the_subjects_and_sources_named(executed, ns, name):
    one, (x, y) = trained(executed, name), executed.digits.train
    one.after(int(name.partition("epoch ")[2] or EPOCHS))
    torch.manual_seed(0)
    with torch.no_grad():
        z = one.model.encoder(x, y).sample()
    moments = torch.stack([z.mean(dim=0), z.std(dim=0)])
    assert torch.equal(ns["run"]["latent"][name], moments)
    numbers = ns["results"]["latent"][name]
    assert numbers["negative"] == approx((z < 0).sum(dim=1).double().mean().item())
    labels = torch.arange(10).repeat_interleave(1000)
    for source, values in ns["latent_sources"](z, y).items():
        with torch.no_grad():
            images = one.model.decoder(values, F.one_hot(labels, 10).float())
        found = ns["judge"](images, labels)
        for key in "fidelity", "variety":
            assert numbers[key][source] == approx(np.mean(found[key]))


# The evidence: how it is measured


def test_usefulness_learns_from_bernoulli_draws_of_the_model(ns, monkeypatch):
    fake = SimpleNamespace(sample=lambda labels: (0.2 + labels / 20).repeat(784, 1).T)
    calls = []
    monkeypatch.setitem(ns, "train_classifier", lambda *a: calls.append(a))
    monkeypatch.setitem(ns, "accuracy", lambda student: 12.5)
    assert ns["usefulness"](fake) == 12.5
    ((x, y),) = calls
    assert x.unique().tolist() == [0, 1] and y.sum(dim=0).tolist() == 10 * [30]
    shares = 0.2 + 0.05 * y.argmax(dim=1)
    assert (x.mean(dim=1) - shares).abs().max() < 0.1


def test_judge_and_accuracy_on_made_up_images(ns, monkeypatch):
    reads = lambda images: images[:, :10] * 2 + (images[:, :10] > 0.5)
    monkeypatch.setitem(ns, "classifier", reads)
    torch.manual_seed(0)
    images, labels = torch.rand(50, 784), torch.arange(10).repeat(5)
    expected = judged(ns, images, labels)
    found = ns["judge"](images, labels)
    assert {*found} == {*expected}
    for key, values in found.items():
        assert values == approx(expected[key], rel=1e-4)
    always_three = lambda x: F.one_hot(torch.full((len(x),), 3), 10)
    share = 100 * ns["y_test"][:, 3].mean().item()
    assert ns["accuracy"](always_three) == approx(share)


def test_latent_sources_are_what_their_labels_say(ns):
    torch.manual_seed(3)
    y = torch.eye(10)[torch.arange(2000) % 10]
    z = torch.randn(2000, 40) @ torch.randn(40, 40) / 4 + 3 * torch.randn(40)
    z += 2 * y @ torch.randn(10, 40)
    center, scale, cov = z.mean(dim=0), z.std(dim=0), torch.cov(z.T)
    one, diagonal = torch.eye(40), torch.diag(scale**2)
    known = {
        "prior": [(0, one)] * 10,
        "shift": [(center, one)] * 10,
        "scale": [(0, diagonal)] * 10,
        "normal": [(center, diagonal)] * 10,
        "posteriors_of_all": [(center, cov)] * 10,
    }
    own = [z[y[:, digit] == 1] for digit in range(10)]
    normals = [(t.mean(dim=0), torch.diag(t.var(dim=0))) for t in own]
    full = [(t.mean(dim=0), torch.cov(t.T)) for t in own]
    known |= {"normal_per_class": normals, "full_normal_per_class": full}
    sources, known["posteriors"] = ns["latent_sources"](z, y), full
    assert {*sources} == {*known} == {*ns["SOURCES"]}
    for name, moments in known.items():
        for part, (mean, cov) in zip(sources[name].split(1000), moments, strict=True):
            scale = cov.diagonal().sqrt()
            assert ((part.mean(dim=0) - mean) / scale).abs().max() < 0.2
            off = (torch.cov(part.T) - cov) / scale / scale[:, None]
            assert off.abs().max() < 0.35 and off.square().mean().sqrt() < 0.06
    for part, z in zip(sources["posteriors"].split(1000), own):
        assert {*map(bytes, part.numpy())} <= {*map(bytes, z.numpy())}


@pytest.mark.parametrize("kind", ["NormalPrior", "FlowPrior"])
def test_learned_priors_are_densities_and_sample_from_themselves(ns, kind):
    count = {"NormalPrior": 800, "FlowPrior": 6 * (51 * 128 + 129 * 80)}[kind]
    assert sum(p.numel() for p in ns[kind](40).parameters()) == count
    torch.manual_seed(0)
    y, z = torch.eye(10), torch.randn(10, 40)
    log_p = ns[kind](40)(y).log_prob(z).sum(dim=1)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum(dim=1)
    assert torch.allclose(log_p, expected)  # at first the standard normal
    prior = ns[kind](2)
    with torch.no_grad():
        for p in prior.parameters():
            p.normal_(std=0.2)
        axis = torch.linspace(-12, 12, 401)
        z = torch.cartesian_prod(axis, axis)
        y = torch.eye(10)[3:4]
        p = prior(y.expand(len(z), -1)).log_prob(z).sum(dim=1).exp() * (24 / 400) ** 2
        draws = prior(y.expand(40_000, -1)).sample()
    assert p.sum().item() == approx(1, abs=1e-2)
    mean = (p[:, None] * z).sum(dim=0)
    cov = (p[:, None] * (z - mean)).T @ (z - mean)
    assert torch.allclose(draws.mean(dim=0), mean, atol=0.05)
    assert torch.allclose(torch.cov(draws.T), cov, atol=0.05)


# The evidence: what follows


@pytest.mark.parametrize(
    ("read", "entropy", "expected"),
    [
        ([90, 95, 97], [50, 60, 61], ["held", "held", "did not hold"]),
        ([89, 45, 37], [200, 77, 51], ["held in part", "did not hold", "held"]),
        ([50, 54, 55.1], [60, 58, 49.9], ["held in part", "held", "held"]),
        ([51, 54, 55.9], [60, 58, 50.1], ["held in part", "no change", "no change"]),
        (
            [49, 60, 54.9],
            [60, 71, 49],
            ["did not hold", "held in part", "held in part"],
        ),
        ([95, 89, 95], [50, 20, 61], ["held", "no change", "did not hold"]),
    ],
)
def test_S6_3_S6_4_verdicts_by_their_criteria(ns, read, entropy, expected):
    row = {"fidelity": dict(zip(["1", "6", "11"], read))}
    row["pixel_entropy"] = dict(zip(["1", "6", "11"], entropy))
    found = ns["verdicts"](row)
    assert [*found] == ["S6.3", "S6.4 clearer", "S6.4 better defined"]
    assert [*found.values()] == expected
    late = {key: {"2": values["6"]} for key, values in row.items()}
    assert [*ns["verdicts"](late).values()] == 3 * ["not measured"]


@pytest.mark.parametrize(
    ("name", "key", "value", "failing"),
    [
        ("A", "kl", 30, []),
        ("B", "kl", 1.1, [0]),
        ("C", "bound", 91, [1]),
        ("G", "bound", 89, [1, 3]),
        ("D", "usefulness", 49, [2, 3]),
        ("E", "usefulness", 59, [2, 3]),
        ("F", "usefulness", 69, [3]),
    ],
)
def test_claims_about_the_ladder(ns, executed, cells, name, key, value, failing):
    bounds, useful = (100, 110, 80, 95, 75, 70, 99), (50, 40, 60, 55, 70, 80, 51)
    made = {
        letter: {"name": letter, "kl": 0.9, "bound": bound, "usefulness": use}
        for letter, bound, use in zip("ABCDEFG", bounds, useful)
    }
    made[name][key] = value
    results = {"ablation": [*made.values()], "claims": []}
    claims = rerun(executed, cells, "ladder-claims", results=results).results["claims"]
    verdicts = [claim["verdict"] for claim in claims]
    assert [i for i in range(4) if verdicts[i] != "held"] == failing


# The committed run


@pytest.fixture
def committed():
    return json.loads((ROOT / "figures" / "results.json").read_text("utf-8"))


REPLAYED = ["measure-work", "measure-claims", "seeds", "weights-table", "ladder-claims"]
REPLAYED += ["ladder-table", "intervention", "held", "own"]


def test_saved_tables_and_claims_are_what_cells_make_of_the_results(
    ns, executed, cells, committed
):
    shown, as_table = [], ns["table"]

    def table(*args, **kwargs):
        shown.append(as_table(*args, **kwargs).data)

    faithful = committed["weights"][0]
    changes = {"FIGURES_DIR": ROOT / "figures", "faithful": faithful, "table": table}
    changes |= {"display": lambda *a: None, "measure": lambda *a: faithful}
    keys = "fidelity", "fidelity_rounded", "variety", "pixel_entropy"
    real = {key: committed[f"{key}_per_digit"]["real"] for key in keys}
    changes |= {"judge": lambda *a: real}
    for name in REPLAYED:
        shown.clear()
        results = copy.deepcopy(committed)
        scope = rerun(executed, cells, name, results=results, **changes)
        changes["seeds"] = scope.seeds
        verdicts = {claim["claim"]: claim for claim in committed["claims"]}
        assert {claim["claim"]: claim for claim in results["claims"]} == verdicts
        (cell,) = (cell for cell in cells if name in cell["tags"])
        text = "".join("".join(o["text"]) for o in cell["outputs"] if "text" in o)
        tables = [
            o["data"].get("text/markdown", ()) for o in cell["outputs"] if "data" in o
        ]
        assert (scope.printed, shown) == (text, ["".join(t) for t in tables]), name


def test_saved_figures_are_those_of_the_saved_run(cells, own, tmp_path):
    (tmp_path / "figures").mkdir()
    saved = (ROOT / "figures" / "run.pt").read_bytes()
    (tmp_path / "figures" / "run.pt").write_bytes(saved)
    again = run_cells([c for c in cells if "work" not in c["tags"]], tmp_path)
    assert not again.error and not (tmp_path / "data").exists()
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert names == {path.name for path in (ROOT / "figures").glob("*.png")}
    for name in names:
        redrawn, drawn = (plt.imread(at / "figures" / name) for at in (tmp_path, ROOT))
        assert redrawn.shape == drawn.shape and np.abs(redrawn - drawn).max() < 0.1
    pictures = {(ROOT / "figures" / name).read_bytes() for name in names}
    for data in (o["data"] for c in cells for o in c["outputs"] if "data" in o):
        if "image/png" in data:
            assert base64.b64decode("".join(data["image/png"])) in pictures
            assert re.search(r'alt="[^"]{30,}"', "".join(data["text/html"]))


def test_seeds_of_other_parameters_say_nothing(
    executed, cells, ns, committed, tmp_path
):
    committed["parameters"]["epochs"] = 12
    (tmp_path / "seeds.json").write_text(json.dumps([committed]), "utf-8")
    scope = rerun(executed, cells, "seeds", FIGURES_DIR=tmp_path)
    assert scope.seeds == []


# What stops a run


def test_files_get_their_names_when_they_are_whole(
    executed, cells, ns, tmp_path, monkeypatch
):
    def half(path):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setitem(ns, "FIGURES_DIR", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ns["write_whole"]("name", half)
    assert not Path(tmp_path, "name").exists()
    names, whole = [], ns["write_whole"]
    record = lambda name, write: names.append(name) or whole(name, write)
    rerun(executed, cells, "saving", write_whole=record)
    assert names == ["run.pt", "results.json"]


@pytest.mark.parametrize("epochs", [[12], [0], [1, 6, 13]])
def test_a_snapshot_that_will_not_come_is_refused(executed, cells, ns, epochs):
    with pytest.raises(ValueError, match="EPOCHS = 11"):
        rerun(executed, cells, "data-load", SNAPSHOT_EPOCHS=epochs)


def test_a_loss_that_is_not_finite_names_epoch_and_iteration(ns):
    calls = iter(range(100))

    def loss(model, x, y):
        bce, kl = ns["loss_terms"](model, x, y)
        return bce, kl * (math.nan if next(calls) == 7 else 1)

    model, data = ns["CVAE"](), (ns["x_train"], ns["y_train"])
    with pytest.raises(FloatingPointError, match="epoch 2, iteration 3"):
        [*ns["train"](model, ns["adam"](model), *data, 3, 64, loss)]


def test_an_interrupted_training_keeps_the_epochs_completed(executed, cells, ns):
    steps = iter(range(100))

    def interrupt(optimizer, args, kwargs):
        if next(steps) == 2 * ITERATIONS + 1:
            raise KeyboardInterrupt

    hook, run = register_optimizer_step_pre_hook(interrupt), {}
    with pytest.raises(KeyboardInterrupt):
        rerun(executed, cells, "training-run", run=run)
    hook.remove()
    assert [len(losses) for losses in run["losses"]] == [5, 5] and len(run["test"]) == 2
    assert [*run["weights"]] == [1]
    assert all(map(torch.equal, run["losses"], ns["run"]["losses"]))


def test_a_data_set_averages_over_its_examples(ns):
    terms = iter([(float(n), 2.0 * n) for n in (3, 3, 1)])
    fake = lambda model, x, y: tuple(torch.tensor(v) for v in next(terms))
    total = 7 * ns["evaluate"](None, torch.zeros(7, 784), torch.zeros(7, 10), fake, 3)
    assert total.tolist() == approx([3 * 3 + 3 * 3 + 1, 2 * 19])
