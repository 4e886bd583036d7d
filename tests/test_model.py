"""The cells taken one by one, without running the notebook: S1.2 to S5.2.

Each test is named for the line of the specification that it grades, and its sentences
stand in the grading sheet. Tests without a number ask more of this project's own
notebook than the specification does.
"""

import ast
import gzip
import hashlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    Watch,
    check,
    cross_entropy,
    normal_kl,
    run_cells,
    same,
    standard_normal,
    write_digits,
)
from IPython.core.inputtransformer2 import TransformerManager
from torch.distributions import Normal
from torch.nn import functional as F
from torchvision.datasets import MNIST

ACTIVATIONS = {
    "a ReLU": torch.relu,
    "a sigmoid": torch.sigmoid,
    "no activation": lambda a: a,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "exp of one half (a log variance)": lambda a: (a / 2).exp(),
    "softplus": F.softplus,
}
CONTRACT = {
    "parameters": "DATA_DIR FIGURES_DIR",
    "data": "load_binarized_mnist",
    "model": "CVAE",
    "loss": "loss_terms",
}


@pytest.fixture(scope="module")
def nb(cells, tmp_path_factory):
    """What the tagged cells define, run in their order as one module."""
    tagged = [cell for cell in cells if {"setup", *CONTRACT} & cell["tags"]]
    ran = run_cells(tagged, tmp_path_factory.mktemp("cells"))
    check(not ran.error, f"the tagged cells do not run by themselves: {ran.error!r}")
    return SimpleNamespace(**ran.ns)


def a_batch(n=6):
    g = torch.Generator().manual_seed(1)
    x = (torch.rand(n, 784, generator=g) < 0.3).float()
    return x, torch.eye(10)[torch.randint(10, (n,), generator=g)]


@pytest.mark.parametrize("tag", CONTRACT)
def test_S2_2_the_tagged_cells_offer_what_is_graded(cells, nb, tag):
    count = sum(tag in cell["tags"] for cell in cells)
    check(count == 1, f"{count} code cells are tagged `{tag}`, expected one")
    missing = [name for name in CONTRACT[tag].split() if not hasattr(nb, name)]
    check(not missing, f"the cell tagged `{tag}` defines no {', '.join(missing)}")


def test_S2_1_python_with_four_libraries(cells):
    code = "\n".join(TransformerManager().transform_cell(c["source"]) for c in cells)
    nodes = [*ast.walk(ast.parse(code))]
    found = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    found = {name.split(".")[0] for name in found} - sys.stdlib_module_names
    others = found - {"torch", "torchvision", "matplotlib", "numpy", "IPython"}
    check(not others, f"{', '.join(sorted(others))} imported, which S2.1 does not name")
    missing = {"torch", "torchvision", "matplotlib"} - found
    check(not missing, f"{', '.join(missing)} not imported")


def test_tagged_cells_only_define_and_the_model_cell_stands_alone(cells, own, tmp_path):
    tags = {*CONTRACT, "training"}
    code = "\n".join(c["source"] for c in cells if tags & c["tags"])
    kinds = ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef
    assert all(isinstance(node, kinds) for node in ast.parse(code).body)
    alone = run_cells([c for c in cells if "model" in c["tags"]], tmp_path).ns
    assert alone["CVAE"](latent=3, hidden=20)(*a_batch())[1].mean.shape == (6, 3)
    assert sum(p.numel() for p in alone["CVAE"]().parameters()) == 438_624


@pytest.fixture
def digits(tmp_path):
    return write_digits(tmp_path / "data")


@pytest.fixture(params=["train", "t10k"])
def loaded(nb, digits, request):
    """x and y of a part of the data: found and expected."""
    found = nb.load_binarized_mnist(str(digits.root), request.param == "train")
    return [*zip(found, getattr(digits, request.param))]


def test_S3_1_mnist_as_whole_tensors(loaded):
    for (found, expected), name in zip(loaded, "xy"):
        shape, kind = tuple(found.shape), found.dtype
        right = shape == expected.shape and kind == torch.float32
        check(right, f"{name}: {shape}, {kind}; expected float32 {(*expected.shape,)}")
        check(found.max() == 1, f"{name} has values up to {found.max():g}, expected 1")
    y, expected = loaded[1]
    check(torch.equal(y, expected), "y is not the one-hot class of each image")


def test_S3_2_every_pixel_is_rounded(loaded):
    (found, expected), _ = loaded
    values = len(found.unique())
    check(values == 2, f"pixels have {values} values, expected 0 and 1 (rounded) only")
    wrong = (found.view(-1, 784) != expected).sum()
    check(wrong == 0, f"{wrong} pixels are not what rounding their gray level gives")


@pytest.fixture
def refused(nb, digits, monkeypatch, own):
    """A function that expects an error, with these words in it, where data is bad."""
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # no network

    def refused(*words):
        with pytest.raises(RuntimeError, match="missing or damaged") as caught:
            nb.load_binarized_mnist(digits.root, train=True)
        assert all(str(word) in str(caught.value) for word in (*words, digits.raw))

    return refused


def test_missing_or_wrong_data_is_said_to_be(digits, refused):
    for file in sorted(digits.raw.glob("train*")):  # images, then labels
        content = file.read_bytes()
        for length in 0, 10, len(content) - 1:
            file.write_bytes(content[:length])
            refused()
        file.write_bytes(content)
    file.write_bytes(content[:-1] + b"\x0b")  # a label 11
    refused()
    file.write_bytes(content[:4] + (299).to_bytes(4, "big") + content[8:-1])
    refused("300 images, but 299 labels")
    for file in digits.raw.iterdir():
        file.unlink()
    refused(*(archive for archive, _ in MNIST.resources))


def test_a_damaged_file_is_extracted_again(nb, digits, refused, monkeypatch):
    resources = []
    for name, _ in MNIST.resources:
        content = gzip.compress((digits.raw / name.removesuffix(".gz")).read_bytes())
        (digits.raw / name).write_bytes(content)
        resources.append((name, hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    file = digits.raw / "train-images-idx3-ubyte"
    content = file.read_bytes()
    for damage in content[:-100], content[:5000] + b"\xff" * 784 + content[5784:]:
        file.write_bytes(damage)
        x, _ = nb.load_binarized_mnist(digits.root, train=True)
        assert torch.equal(x, digits.train[0])
    (digits.raw / resources[0][0]).write_bytes(b"not an archive")
    file.unlink()
    refused(f"({resources[0][0]})")


def test_S4_0_z_has_40_dimensions(nb):
    found = nb.CVAE()(*a_batch())[1].mean.shape[-1]
    check(found == 40, f"z has {found} dimensions, expected 40")


@pytest.fixture(scope="module")
def whole(nb):
    """One pass of 2,000 images: what goes in and comes out, and the layers' calls."""
    torch.manual_seed(0)
    model, (x, y) = nb.CVAE(), a_batch(2000)
    with torch.no_grad(), Watch().watching() as watch:
        for p in model.parameters():
            p.mul_(3)  # so that no activation is near its linear or constant part
        image, q = model(x, y)
    return SimpleNamespace(x=x, y=y, image=image, q=q, calls=watch.calls)


def calls(whole, *shapes):
    """The calls of the layers with these shapes, if they are called in this order."""
    layers = [call for call in whole.calls if call.layer.bias is not None]
    found = [call for call in layers if call.shape in shapes]
    right = tuple(call.shape for call in found) == shapes
    layers = [call.shape for call in layers]
    check(right, f"layers with bias are {layers}, expected {[*shapes]} among them")
    return found


def check_activation(what, call, values, expected="a sigmoid"):
    """Name the activation that leads from a layer's output to these values."""
    fits = lambda a: a.shape == values.shape and np.allclose(a, values, atol=1e-5)
    names = (name for name, f in ACTIVATIONS.items() if fits(f(call.output)))
    found = next(names, "something else")
    right = found == expected
    check(right, f"activation of {what}: found {found}, expected {expected}")


def test_S4_1_the_encoder(whole):
    hidden, *heads = calls(whole, (794, 256), (256, 40), (256, 40))
    right = torch.equal(hidden.given, torch.hstack([whole.x, whole.y]))
    check(right, "the encoder's input is not the image followed by the one-hot class")
    like = lambda head: np.corrcoef(head.output.flatten(), whole.q.mean.flatten())[0, 1]
    std, mean = sorted(heads, key=like)  # like the mean of z
    for head in heads:
        check_activation("the encoder's hidden layer", hidden, head.given, "a ReLU")
    check_activation("the mean of z", mean, whole.q.mean)
    check_activation("the standard deviation of z", std, whole.q.stddev)


def test_S4_2_the_decoder(whole):
    hidden, image = calls(whole, (50, 256), (256, 784))
    right = torch.equal(hidden.given[:, 40:], whole.y)
    check(right, "the decoder's input does not end with the one-hot class")
    check_activation("the decoder's hidden layer", hidden, image.given, "a ReLU")
    check_activation("the image", image, whole.image)


def test_S4_3_the_model_returns_an_image_and_a_normal(nb):
    image, q = nb.CVAE()(*a_batch())
    check(isinstance(q, Normal), f"the distribution of z is a {type(q).__name__}")
    check(image.shape == (6, 784), f"the image has shape {(*image.shape,)}")


def test_S4_3_z_is_drawn_with_the_reparameterization_trick(whole, nb):
    mean, std = whole.q.mean, whole.q.stddev
    z = whole.calls[-2].given[:, :40]
    noise = (z - mean) / std
    for part in noise[std < std.median()], noise[std > std.median()]:
        standard_normal(part, "(z - mean) / standard deviation")
    standard_normal(noise.sum(dim=1) / 40**0.5, "its sums over the dimensions, / √40,")
    model = nb.CVAE()
    model(*a_batch())[0].sum().backward()
    grads = [p.grad for p in model.parameters()]
    reached = all(grad is not None and grad.abs().max() > 0 for grad in grads)
    check(reached, "no gradient of the image reaches some weights, through z or else")


def test_wrong_input_is_refused_and_the_loss_stays_finite(nb, own):
    model, (x, y) = nb.CVAE(), a_batch()
    for labels in [10], [-1], [[1, 2]], [1.0], [True], [1j]:
        error = ValueError if labels in ([10], [-1], [[1, 2]]) else TypeError
        with pytest.raises(error, match="integers 0 to 9"):
            model.sample(torch.tensor(labels))
    for pair in (x[:, :783], y), (x, y[:, :9]), (x, y[:5]), (x.view(-1, 28, 28), y):
        with pytest.raises(ValueError, match="expected"):
            model(*pair)
    with pytest.raises(ValueError, match="expected"):
        model.decoder(torch.zeros(6, 39), y)
    assert nb.cross_entropy(1 - x, x).isfinite().all()


@pytest.fixture
@torch.no_grad()
def loss(nb):
    """Cross-entropy and KL of a batch, nats per image: found and expected."""
    model, (x, y) = nb.CVAE(), a_batch(7)
    with Watch().watching() as watch:
        terms = nb.loss_terms(model, x, y)
    check(len(terms) == 2, f"loss_terms returns {len(terms)} values, expected two")
    _, q = model(x, y)
    kl = normal_kl(q.mean.double(), q.stddev.double())
    expected = cross_entropy(watch.calls[-1].output.double(), x).mean(), kl.mean()
    return [(t.item(), e.item()) for t, e in zip(terms, expected)]


def test_S5_1_cross_entropy_is_summed_over_pixels(loss):
    same(*loss[0], "cross-entropy of the batch, nats per image,")


def test_S5_2_kl_to_the_standard_normal(loss):
    same(*loss[1], "KL of the batch, nats per image,")


@torch.no_grad()
def test_S1_2_a_batch_averages_over_its_examples(nb):
    model, (x, y) = nb.CVAE(), a_batch(7)
    for p in model.parameters():
        if p.dim() == 2 and len(p) == 784:  # images that do not depend on chance
            p.zero_()
    each = [nb.loss_terms(model, *pair) for pair in zip(x.split(1), y.split(1))]
    means = torch.tensor(each).mean(dim=0)
    for i, term in enumerate(nb.loss_terms(model, x, y)):
        same(term.item(), means[i].item(), f"term {i + 1} of the loss of 7 images")
