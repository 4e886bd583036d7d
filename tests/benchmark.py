"""Time an epoch of the notebook's training against the loop people would write instead.

    .venv/bin/python tests/benchmark.py

That is the same model, loss and optimizer in their usual form, fed image by image
through a DataLoader. The two alternate; seconds mean little on a shared machine, the
ratio does. Needs MNIST in data/.
"""

import statistics
import time
from types import SimpleNamespace

import torch
from conftest import NOTEBOOK, ROOT, code_cells, run_cells
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, ToTensor

tags = {"parameters", "data", "model", "loss", "training", "definitions"}
defining = [cell for cell in code_cells(NOTEBOOK) if tags & cell["tags"]]
nb = SimpleNamespace(**run_cells(defining, ROOT).ns)
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


seconds = {notebook: [], usual: []}
for _ in range(5):
    for epoch, times in seconds.items():
        start = time.perf_counter()
        epoch()
        times.append(time.perf_counter() - start)
ours, theirs = (statistics.median(times) for times in seconds.values())
print(f"{ours:.2f} s per epoch, {ours / theirs:.2f} of the usual loop (medians of 5)")
