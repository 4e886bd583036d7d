"""Data, model, loss and training, taken out of the notebook: S1, S3 to S5 by formula.

A test is named for the lines of the specification that it checks.
"""

import pytest
import torch
from extract import extract

CELLS = "imports", "constants", "data", "model", "loss", "training"


@pytest.fixture
def nb(mnist, monkeypatch):
    monkeypatch.setenv("HOME", str(mnist.root.parent))
    return extract(*CELLS, DATA_DIR=f"~/{mnist.root.name}")


@pytest.fixture
def model(nb):
    torch.manual_seed(0)
    return nb.CVAE()


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    x = (torch.rand(50, 784, generator=random) < 0.3).float()
    return x, torch.eye(10)[torch.randint(10, (50,), generator=random)]


@pytest.fixture
def noise():
    """The standard normal numbers that will be drawn next."""
    torch.manual_seed(2)
    noise = torch.randn(50, 40)
    torch.manual_seed(2)
    return noise


def sigmoid(a):
    return 1 / (1 + (-a).exp())


def decode(model, z, y):
    """S4.2: the image, from the model's last four parameters."""
    *_, V, c, V_image, c_image = (p.double() for p in model.parameters())
    h = (torch.cat([z, y], dim=1).double() @ V.T + c).clamp(min=0)
    return sigmoid(h @ V_image.T + c_image)


def formulas(model, x, y, noise):
    """S4.1 to S5.2: mean and standard deviation of z, image, cross-entropy, KL."""
    W, b, W_mean, b_mean, W_std, b_std, *_ = (p.double() for p in model.parameters())
    h = (torch.cat([x, y], dim=1).double() @ W.T + b).clamp(min=0)
    mean, std = sigmoid(h @ W_mean.T + b_mean), sigmoid(h @ W_std.T + b_std)
    image = decode(model, mean + std * noise, y)
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
def test_S3_1_S3_2_mnist_with_every_pixel_rounded(nb, mnist, part):
    gray, labels = getattr(mnist, part)
    x, y = nb.load_binarized_mnist(str(mnist.root), train=part == "train")
    assert torch.equal(x, (gray > 127).float())
    assert torch.equal(y, torch.eye(10)[labels])
    loaded = (nb.x_train, nb.y_train) if part == "train" else (nb.x_test, nb.y_test)
    assert torch.equal(x, loaded[0]) and torch.equal(y, loaded[1])


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


def test_S4_0_S4_1_S4_2_S4_3_layers_image_and_distribution(model, batch, noise):
    encoder = [(256, 794), (256,), *[(40, 256), (40,)] * 2]
    decoder = [(256, 50), (256,), (784, 256), (784,)]
    assert [tuple(p.shape) for p in model.parameters()] == encoder + decoder
    image, q = model(*batch)
    same([q.mean, q.stddev, image], formulas(model, *batch, noise)[:3])
    assert (image - 0.5).abs().max() < 0.2  # before training


def test_S6_2_samples_take_z_from_the_standard_normal(model, noise):
    labels = torch.arange(50) % 10
    same(model.sample(labels.tolist()), decode(model, noise, torch.eye(10)[labels]))
    with pytest.raises(RuntimeError):
        model.sample([10])


def test_S5_1_S5_2_S1_1_loss_and_its_gradient(nb, model, batch, noise):
    image, q = model(*batch)
    expected = formulas(model, *batch, noise)[3:]
    found = [nb.cross_entropy(image, batch[0]), nb.kl_to_prior(q)]
    same(found, expected)
    parameters = [*model.parameters()]
    gradient = torch.autograd.grad(sum(found), parameters)
    same(gradient, torch.autograd.grad(sum(expected), parameters))


def test_S5_3_S4_0_constants():
    nb = extract("imports", "constants")
    assert (nb.EPOCHS, nb.BATCH_SIZE, nb.LEARNING_RATE) == (11, 64, 0.001)
    assert (nb.LATENT, nb.HIDDEN, nb.SNAPSHOTS, nb.SEED) == (40, 256, [1, 6, 11], 0)


def test_S5_3_S6_1_S1_2_training_is_adam_on_every_image(nb):
    """Against Adam written out, with constants changed after train() was defined."""
    vars(nb).update(EPOCHS=3, BATCH_SIZE=50, LEARNING_RATE=0.002)
    torch.manual_seed(3)
    found = [*nb.train(nb.CVAE(), lambda q: 3 * nb.kl_to_prior(q))]
    torch.manual_seed(3)
    model = nb.CVAE()
    parameters = [*model.parameters()]
    m, v, t = [0] * len(parameters), [0] * len(parameters), 0
    for losses, test in found:
        expected = []
        for batch in torch.randperm(600).split(50):
            image, q = model(nb.x_train[batch], nb.y_train[batch])
            terms = nb.cross_entropy(image, nb.x_train[batch]), 3 * nb.kl_to_prior(q)
            expected.append(torch.stack(terms))
            t += 1
            for i, g in enumerate(torch.autograd.grad(sum(terms), parameters)):
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
                step = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
                parameters[i].data -= 0.002 * step
        same(losses, expected)
        with torch.random.fork_rng():
            torch.manual_seed(nb.SEED)
            noise = torch.randn(300, 40)
        same(test, formulas(model, nb.x_test, nb.y_test, noise)[3:])
    assert len(found) == 3
