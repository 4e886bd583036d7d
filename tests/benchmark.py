"""Time the notebook's training against two yardsticks, in one interleaved run.

    .venv/bin/python tests/benchmark.py

One epoch of (a) the notebook's loop, (b) the loop that people would write instead, the
same model, loss and optimizer in their usual form, fed image by image through a
DataLoader, and (c) nothing but the matrix products of the forward and backward passes
of the same iterations. Needs MNIST in data/. Seconds mean little on a shared machine;
the ratios do.
"""

import statistics
import tempfile
import time

import torch
from conftest import FAITHFUL, ROOT, load_cells
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, ToTensor

ROUNDS = 5


def notebook_epoch(nb, model, x, y):
    record = nb.Record()
    nb.train(model, nb.adam(model), x, y, record, epochs=1, batch_size=nb.BATCH_SIZE)


def dataloader_epoch(nb, model, loader):
    optimizer = torch.optim.Adam(model.parameters(), lr=nb.LEARNING_RATE)
    for images, labels in loader:
        x, y = images.view(-1, 784), F.one_hot(labels, 10).float()
        image, q = model(x, y)
        bce = F.binary_cross_entropy(image, x, reduction="sum")
        kl = kl_divergence(q, Normal(0.0, 1.0)).sum()
        optimizer.zero_grad()
        ((bce + kl) / len(x)).backward()
        optimizer.step()


def matrix_products(iterations, batch_size):
    layers = [(794, 256), (256, 40), (256, 40), (50, 256), (256, 784)]
    weights = [torch.randn(outputs, inputs) for inputs, outputs in layers]
    values = [torch.randn(batch_size, inputs) for inputs, _ in layers]
    gradients = [torch.randn(batch_size, outputs) for _, outputs in layers]
    for _ in range(iterations):
        for i, (w, a, g) in enumerate(zip(weights, values, gradients)):
            a @ w.T  # forward
            g.T @ a  # backward, to the weights
            if i > 0:  # backward, to the layer's input; images need no gradient
                g @ w


def main():
    with tempfile.TemporaryDirectory() as folder:
        nb = load_cells(FAITHFUL | {"definitions"}, folder)
    x, y = nb.load_binarized_mnist(ROOT / "data", train=True)
    images = MNIST(
        ROOT / "data", train=True, transform=Compose([ToTensor(), torch.round])
    )
    loader = DataLoader(images, batch_size=nb.BATCH_SIZE, shuffle=True)
    model = nb.CVAE()
    contestants = {
        "notebook": lambda: notebook_epoch(nb, model, x, y),
        "DataLoader loop": lambda: dataloader_epoch(nb, model, loader),
        "matrix products": lambda: matrix_products(len(loader), nb.BATCH_SIZE),
    }
    seconds = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:16} {median:6.2f} s per epoch, median of {ROUNDS}")
    ours = medians["notebook"]
    print(f"notebook / DataLoader loop: {ours / medians['DataLoader loop']:.2f}")
    print(f"notebook / matrix products: {ours / medians['matrix products']:.2f}")


if __name__ == "__main__":
    main()
