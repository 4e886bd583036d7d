"""Data, model, loss and training, taken out of the notebook: S1, S3 to S5 by formula.

A test is named for the lines of the specification that it checks.
"""

import pytest
import torch
from conftest import through
from extract import extract


@pytest.fixture(scope="module")
def nb(mnist, tmp_path_factory):
    folders = {"DATA_DIR": mnist.root, "FIGURES_DIR": tmp_path_factory.mktemp("f")}
    return extract(*through("training"), **folders)


@pytest.fixture
def model(nb):
    torch.manual_seed(0)
    return nb.CVAE()


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    x = (torch.rand(50, 784, generator=random) < 0.3).float()
    return x, torch.eye(10)[torch.randint(10, (50,), generator=random)]


def noise(seed, *shape):
    """The standard normal numbers that will be drawn next."""
    torch.manual_seed(seed)
    noise = torch.randn(*shape)
    torch.manual_seed(seed)
    return noise


def formulas(model, x, y, noise):
    """S4.1 to S5.2: mean and standard deviation of z, image, cross-entropy, KL."""
    W, b, M, m, S, s, V, c, U, u = (p.double() for p in model.parameters())
    h = (torch.cat([x, y], dim=1).double() @ W.T + b).relu()
    mean, std = torch.sigmoid(h @ M.T + m), torch.sigmoid(h @ S.T + s)
    h = (torch.cat([mean + std * noise, y], dim=1) @ V.T + c).relu()
    image = torch.sigmoid(h @ U.T + u)
    bce = -(x * image.log() + (1 - x) * (1 - image).log()).sum(dim=1).mean()
    kl = 0.5 * (mean**2 + std**2 - 1 - (std**2).log()).sum(dim=1).mean()
    return mean, std, image, bce, kl


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-6)


def test_the_model_cell_stands_alone(batch):
    image, q = extract("model").CVAE(latent=3, hidden=20)(*batch)
    assert image.shape == (50, 784) and q.mean.shape == (50, 3)


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_S3_1_S3_2_mnist_with_every_pixel_rounded(nb, mnist, monkeypatch, part):
    monkeypatch.setenv("HOME", str(mnist.root.parent))
    gray, labels = getattr(mnist, part)
    name = part.replace("t10k", "test")
    loaded = [getattr(nb, f"{each}_{name}") for each in ("x", "y", "digits")]
    for folder in str(mnist.root), f"~/{mnist.root.name}":
        x, y = nb.load_binarized_mnist(folder, train=part == "train")
        assert torch.equal(x, (gray > 127).float()) and torch.equal(x, loaded[0])
        assert torch.equal(y, torch.eye(10)[labels]) and torch.equal(y, loaded[1])
    assert torch.equal(loaded[2], labels.long())


@pytest.mark.parametrize("content", [b"", b"no gzip", b"\0" * 20])
def test_S3_1_damaged_data_names_its_folder(nb, tmp_path, monkeypatch, content):
    monkeypatch.setattr(nb.MNIST, "mirrors", [])  # no network
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, _ in nb.MNIST.resources:
        (raw / name).with_suffix("" if content else ".gz").write_bytes(content)
    with pytest.raises(RuntimeError, match="MNIST cannot be loaded") as error:
        nb.load_binarized_mnist(tmp_path, train=True)
    assert str(raw) in str(error.value) and "download=True" not in str(error.value)


def test_S4_0_S4_1_S4_2_S4_3_layers_image_and_distribution(model, batch):
    shapes = [(256, 794), (256,), *[(40, 256), (40,)] * 2]
    shapes += [(256, 50), (256,), (784, 256), (784,)]
    assert [tuple(p.shape) for p in model.parameters()] == shapes
    expected = formulas(model, *batch, noise(2, 50, 40))
    image, q = model(*batch)
    same([q.mean, q.stddev, image], expected[:3])
    assert (image - 0.5).abs().max() < 0.2  # before training, as PyTorch starts


def test_S5_1_S5_2_S1_1_loss_and_its_gradient(nb, model, batch):
    expected = formulas(model, *batch, noise(2, 50, 40))[3:]
    image, q = model(*batch)
    found = [nb.cross_entropy(image, batch[0]), nb.kl_to_prior(q)]
    same(found, expected)
    terms, parameters = (sum(found), sum(expected)), [*model.parameters()]
    same(*(torch.autograd.grad(each, parameters) for each in terms))
    q = torch.distributions.Normal(3 * torch.randn(7, 5), 4 * torch.rand(7, 5) + 0.01)
    kl = torch.distributions.kl_divergence(q, nb.standard_normal).sum(dim=1).mean()
    same([nb.kl_to_prior(q)], [kl])  # of means and deviations above 1, too


def test_S5_3_S4_0_S6_2_constants():
    nb = extract("imports", "constants")
    assert (nb.EPOCHS, nb.BATCH_SIZE, nb.LEARNING_RATE) == (11, 64, 0.001)
    assert (nb.LATENT, nb.HIDDEN, nb.SEED) == (40, 256, 0)
    assert {1, 6, 11} <= {*nb.SNAPSHOTS}


def test_S1_1_terms_of_the_test_set_leave_the_random_numbers_alone(nb, model):
    expected = formulas(model, nb.x_test, nb.y_test, noise(nb.SEED, 300, 40))[3:]
    drawn = noise(4, 3)
    same(nb.test_terms(model), expected)
    assert torch.equal(torch.randn(3), drawn)


def test_S5_3_S6_1_S1_2_training_is_adam_on_every_image(nb, monkeypatch):
    """Against Adam written out, with constants changed after train() was defined."""
    for name, value in {"EPOCHS": 3, "BATCH_SIZE": 64, "LEARNING_RATE": 0.002}.items():
        monkeypatch.setattr(nb, name, value)
    torch.manual_seed(3)
    found = [*nb.train(nb.CVAE(), lambda q: 3 * nb.kl_to_prior(q))]
    torch.manual_seed(3)
    model, m, v, t = nb.CVAE(), [0] * 10, [0] * 10, 0
    parameters = [*model.parameters()]
    for number, (epoch, losses, test) in enumerate(found, start=1):
        expected = []
        for batch in torch.randperm(600).split(64):  # nine of 64 and one of 24
            image, q = model(nb.x_train[batch], nb.y_train[batch])
            terms = nb.cross_entropy(image, nb.x_train[batch]), 3 * nb.kl_to_prior(q)
            expected.append(torch.stack(terms))
            t += 1
            for i, g in enumerate(torch.autograd.grad(sum(terms), parameters)):
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
                step = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
                parameters[i].data -= 0.002 * step
        same(losses, expected)
        same([test], [nb.test_terms(model)])
        assert epoch == number and len(found) == 3


def test_S5_3_a_diverged_training_is_named_with_its_rate(nb, model, monkeypatch):
    monkeypatch.setattr(nb, "LEARNING_RATE", 12345)
    with pytest.raises(RuntimeError, match="diverged.*12345"):
        next(nb.train(model, lambda q: q.stddev.sum()))
