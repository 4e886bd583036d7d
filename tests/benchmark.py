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
from conftest import ROOT, load_cells
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, ToTensor

with tempfile.TemporaryDirectory() as folder:
    tags = {"parameters", "data", "model", "loss", "training", "definitions"}
    nb = load_cells(tags, folder)
x, y = nb.load_binarized_mnist(ROOT / "data", train=True)
images = MNIST(ROOT / "data", transform=Compose([ToTensor(), torch.round]))
loader = DataLoader(images, batch_size=nb.BATCH_SIZE, shuffle=True)
model = nb.CVAE()


def notebook():
    next(nb.train(model, nb.adam(model), x, y, epochs=1, batch_size=nb.BATCH_SIZE))


def usual():
    optimizer = torch.optim.Adam(model.parameters(), lr=nb.LEARNING_RATE)
    for images, labels in loader:
        x, y = images.view(-1, 784), F.one_hot(labels, 10).float()
        image, q = model(x, y)
        bce = F.binary_cross_entropy(image, x, reduction="sum")
        kl = kl_divergence(q, Normal(0.0, 1.0)).sum()
        optimizer.zero_grad()
        ((bce + kl) / len(x)).backward()
        optimizer.step()


def products():
    layers = [(794, 256), (256, 40), (256, 40), (50, 256), (256, 784)]
    weights = [torch.randn(outputs, inputs) for inputs, outputs in layers]
    values = [torch.randn(nb.BATCH_SIZE, inputs) for inputs, _ in layers]
    gradients = [torch.randn(nb.BATCH_SIZE, outputs) for _, outputs in layers]
    for _ in range(len(loader)):
        for i, (w, a, g) in enumerate(zip(weights, values, gradients)):
            a @ w.T  # forward
            g.T @ a  # backward, to the weights
            if i > 0:  # backward, to the layer's input; images need no gradient
                g @ w


seconds = {notebook: [], usual: [], products: []}
for _ in range(5):
    for epoch, times in seconds.items():
        start = time.perf_counter()
        epoch()
        times.append(time.perf_counter() - start)
ours, *yardsticks = (statistics.median(times) for times in seconds.values())
print(f"notebook: {ours:.2f} s per epoch, median of 5")
for name, median in zip(("DataLoader loop", "matrix products"), yardsticks):
    print(f"notebook / {name}: {ours / median:.2f}")
