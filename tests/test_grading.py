"""Other notebooks: what the grading sheet says of a submission, right and wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import LINES, ROOT

SUBMISSION = """
# parameters
EPOCHS, BATCH_SIZE, LEARNING_RATE, LATENT, HIDDEN = 11, 64, 0.001, 40, 256
SNAPSHOT_EPOCHS, SEED, DATA_DIR, FIGURES_DIR = [1, 6, 11], 7, "mnist", "plots"
# setup
import os
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, transforms
# data
def load_binarized_mnist(root, train):
    data = datasets.MNIST(root, train, transforms.ToTensor(), download=True)
    x = torch.stack([image.view(-1) for image, _ in data]).round()
    return x, F.one_hot(data.targets, 10).float()
# model
class CVAE(torch.nn.Module):
    def __init__(self, latent=40, hidden=256):
        super().__init__()
        self.fc1 = torch.nn.Linear(784 + 10, hidden)
        self.fc21 = torch.nn.Linear(hidden, latent)
        self.fc22 = torch.nn.Linear(hidden, latent)
        self.fc3 = torch.nn.Linear(latent + 10, hidden)
        self.fc4 = torch.nn.Linear(hidden, 784)
    def decode(self, z, y):
        h = F.relu(self.fc3(torch.cat([z, y], 1)))
        return torch.sigmoid(self.fc4(h))
    def forward(self, x, y):
        h = F.relu(self.fc1(torch.cat([x, y], 1)))
        std = torch.sigmoid(self.fc22(h))
        q = torch.distributions.Normal(torch.sigmoid(self.fc21(h)), std)
        return self.decode(q.rsample(), y), q
    def sample(self, labels):
        return self.decode(torch.randn(len(labels), LATENT), torch.eye(10)[labels])
# loss
def loss_terms(model, x, y):
    image, q = model(x, y)
    bce = F.binary_cross_entropy(image, x, reduction="sum")
    kl = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum()
    return bce / len(x), kl / len(x)
# run
os.makedirs(FIGURES_DIR, exist_ok=True)
data = TensorDataset(*load_binarized_mnist(DATA_DIR, True))
model, losses = CVAE(LATENT, HIDDEN), []
optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
for epoch in range(1, EPOCHS + 1):
    for x, y in DataLoader(data, BATCH_SIZE, shuffle=True):
        loss = sum(loss_terms(model, x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if epoch in SNAPSHOT_EPOCHS:
        images = model.sample(torch.arange(10).repeat_interleave(10)).detach()
        plt.imshow(images.view(10, 10, 28, 28).transpose(1, 2).reshape(280, 280))
        plt.savefig(f"{FIGURES_DIR}/samples_epoch_{epoch:02d}.png")
        plt.close()
plt.plot(losses)
plt.savefig(f"{FIGURES_DIR}/losses.png")
"""
MISTAKES = {  # what is written, what a student may write
    ".view(-1) for image, _ in data]).round()": ".view(-1) for image, _ in data])",
    "torch.sigmoid(self.fc22(h))": "torch.exp(self.fc22(h) / 2)",
    "Linear(latent + 10,": "Linear(latent,",
    "self.fc3(torch.cat([z, y], 1))": "self.fc3(z)",
    'x, reduction="sum")': "x) * len(x)",
    "kl = 0.5 *": "kl =",
}
WORDS = {
    "S3.2": "values, expected 0 and 1 (rounded) only",
    "S4.1": "standard deviation of z: found exp of one half (a log variance), expected",
    "S4.2": "0 layers 50 -> 256, expected 1",
    "S5.1": "cross-entropy of the batch, nats per image, is",
    "S5.2": "KL of the batch, nats per image, is",
}


def sheet_of(source, folder, *files):
    """Grade a notebook: the exit status, and line -> what the sheet says."""
    _, *parts = re.split(r"(?m)^# (\w+)\n", source)
    cells = [
        {"metadata": {"tags": [tag]}, "source": text, "execution_count": i}
        for i, (tag, text) in enumerate(zip(parts[::2], parts[1::2]), start=1)
    ]
    cells = [{"cell_type": "code", "outputs": [], **cell} for cell in cells]
    path = folder / "submission.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    command = [sys.executable, "-m", "pytest", "-q", "-k", "test_S", "--notebook", path]
    command += ["-p", "no:cacheprovider", *map(Path(__file__).with_name, files)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, dict(re.findall(r"(?m)^(S\d\.\d): (.*)$", done.stdout))


def test_a_submission_in_another_style_is_met(tmp_path):
    files = "test_model.py", "test_notebook.py"
    status, sheet = sheet_of(SUBMISSION, tmp_path, *files)
    assert status == 0
    assert [sheet[line] for line in LINES[:-2]] == ["met"] * 15, sheet
    assert all(sheet[line].startswith("not graded") for line in LINES[-2:])


def test_usual_mistakes_are_said_in_words(tmp_path):
    source = SUBMISSION
    for right, wrong in MISTAKES.items():
        assert right in source
        source = source.replace(right, wrong)
    _, sheet = sheet_of(source, tmp_path, "test_model.py")
    assert {k for k, v in sheet.items() if v.startswith("NOT MET")} == {*WORDS}, sheet
    assert all(words in sheet[line] for line, words in WORDS.items()), sheet
