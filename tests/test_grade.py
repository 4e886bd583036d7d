"""The grader: a submission that meets every line, and single changes of it."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from extract import ROOT
from grade import LINES, grade, main

SUBMISSION = """import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import MNIST
# %%
mnist = MNIST("data", train=True, download=True)
x = (mnist.data / 255).round().flatten(1)
labels = mnist.targets
# %%
Z = 40

class CVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(794, 256)
        self.mean, self.std = nn.Linear(256, Z), nn.Linear(256, Z)
        self.leave = nn.Sequential(
            nn.Linear(Z + 10, 256), nn.ReLU(), nn.Linear(256, 784), nn.Sigmoid())

    def encode(self, x, y):
        h = F.relu(self.enter(torch.cat([x, y], dim=1)))
        return self.mean(h).sigmoid(), self.std(h).sigmoid()

    def decode(self, z, y):
        return self.leave(torch.cat([z, y], dim=1))

    def forward(self, x, y):
        mean, std = self.encode(x, y)
        z = mean + std * torch.randn_like(std)
        return self.decode(z, y), mean, std
# %%
def loss_of(image, x, mean, std):
    bce = F.binary_cross_entropy(image, x, reduction="sum")
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum()
    return (bce + kl) / len(x)

def show_samples(model, epoch):
    y = F.one_hot(torch.arange(100) % 10, 10)
    images = model.decode(torch.randn(100, Z), y).detach().view(10, 10, 28, 28)
    plt.imshow(images.permute(0, 2, 1, 3).reshape(280, 280), cmap="gray")
    plt.title(f"epoch {epoch}")
    plt.show()
# %%
torch.manual_seed(0)
model, losses = CVAE(), []
adam = torch.optim.Adam(model.parameters(), lr=0.001)
for epoch in range(1, 12):
    for batch in torch.randperm(len(x)).split(64):
        image, mean, std = model(x[batch], F.one_hot(labels[batch], 10))
        loss = loss_of(image, x[batch], mean, std)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    if epoch in (1, 6, 11):
        show_samples(model, epoch)
# %%
plt.plot(losses)
plt.savefig("losses.png")
"""
# The lines it breaks, words of the sheet, what is written, what stands there instead.
FAULTS = r"""
S1.1 | weighs 784 times | n="sum") | n="sum") / 784
S1.1 | weighs 19.6 times | (bce + kl) | (bce / 784 + kl / 40)
S1.1 | weighs 0 to 1 times | (bce + kl) | (bce + kl * (len(losses) > 9))
S1.1 | swapped | mean**2 + std**2 - 1 - 2 | (1 + mean**2) / std**2 + 2
S1.2 | 576 of the 600 | .split(64) | .split(64)[:9]
S1.2 | test set | train=True | train=False
S2.1 | depends on jupyter | import torch\n | import jupyter, torch\n
S2.2 | stops in cell 6: NameError | savefig("losses.png") | savefig(name)
S3.1 | KMNIST is loaded | MNIST | KMNIST
S3.2 | 256 values, 0 to 1 | .round() | .abs()
S4.0 | 20 dimensions | Z = 40 | Z = 20
S4.1 S4.2 | (794, 512) | 256 | 512
S4.1 | as of a log variance | self.std(h).sigmoid() | torch.exp(self.std(h) / 2)
S4.1 | mean has no activation | self.mean(h).sigmoid() | self.mean(h)
S4.1 | tanh after the hidden layer | F.relu( | torch.tanh(
S4.1 | before the image | [x, y] | [y, x]
S4.1 | not the one-hot class | [x, y] | [x, y / 2]
S4.2 | before z | [z, y] | [y, z]
S4.3 | to both heads | like(std)\n | like(std)\n        z = z.detach()\n
S4.3 | to both heads | mean + std * torch.randn_like(std) | torch.normal(mean, std)
S4.3 | the mean itself | mean + std * torch.randn_like(std) | mean
S4.3 | not standard normal | torch.randn_like | torch.rand_like
S5.1 | squared error | F.binary_cross_entropy( | F.mse_loss(
S5.2 | nothing | (bce + kl) | bce
S5.2 | m² + s² - log s | 2 * std.log() | std.log()
S5.3 | SGD | optim.Adam( | optim.SGD(
S5.3 | rate 0.01, expected 0.001 | lr=0.001 | lr=0.01
S5.3 | 12 epochs | range(1, 12) | range(1, 13)
S5.3 | zero_grad | adam.zero_grad() | pass
S6.1 | no line is drawn | plt.plot(losses) | losses
S6.1 | lines of 11 points |         losses.append |     losses.append
S6.2 | 9 different samples of 9 | arange(100) | arange(100).clip(max=98)
S6.2 | no samples after epoch 6 | (1, 6, 11) | (1, 7, 11)
S6.2 | not standard normal | randn(100, Z) | rand(100, Z)
"""
# What is written, what stands there instead, and more such pairs: conforming variants.
VARIANTS = r"""
(bce + kl) / len(x) | bce + kl | 255).round() | 255 >= 0.5).float()
plt.sav | %pip install nothing\n!exit 1\nplt.sav | import torch\n | import tqdm, torch\n
CVAE(), [] | CVAE().to("cuda"), [] | x[batch], m | x[batch].cuda(), m
images.permute | 255 - 255 * images.permute | plt.plot(l | plt.scatter(range(110), l | plt.imshow( | plt.pcolormesh(
mean + std * torch.randn_like(std) | torch.distributions.Normal(mean, std).rsample()
(256, Z), | (256, 80), | ), self.std(h).sigmoid() | ).chunk(2, 1)
nn.Sigmoid() | nn.Flatten() | ropy( | ropy_with_logits( | .detach() | .detach().sigmoid()
loss.backward()\n | 0\n | adam.step() | adam.step(loss.backward)
"""


# What is written, what stands there instead, and words on S2.2.
TROUBLES = r"""
import torch\n | import pandas, torch\n | pandas is not installed
mnist = | open("/home/me/digits")\nmnist = | own is not here
torch.randperm(len(x)) | torch.randperm(60000) | written in
adam.step() | while True: pass | stopped after 8 seconds
adam.step() | open("/left", "w") | no writing outside
"""


def rows(table):
    lines = table.strip().splitlines()
    fields = [re.split(r" \| ?", line) for line in lines]
    return [[text.replace(r"\n", "\n") for text in row] for row in fields]


def notebook(folder, changes):
    """A notebook of the submission, with what is written and what stands instead."""
    text = SUBMISSION
    for old, new in zip(changes[::2], changes[1::2]):
        assert old in text
        text = text.replace(old, new)
    cells = [
        {"cell_type": "code", "source": source, "execution_count": count}
        for count, source in enumerate(text.split("# %%\n"), start=5)
    ]
    path = folder / "submission.ipynb"
    path.write_text(json.dumps({"cells": cells}), "utf-8-sig")
    return path


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """What happened and the sheet, by changes: all are graded, two at a time."""
    limits = {tuple(row[2:]): 300 for row in rows(FAULTS)}
    limits |= {tuple(row): 300 for row in rows(VARIANTS)}
    limits |= {tuple(row[:2]): 8 for row in rows(TROUBLES)}
    with ThreadPoolExecutor(2) as pool:
        sheets = {("own",): pool.submit(grade, ROOT / "cvae_mnist.ipynb", 900)}
        for changes, seconds in limits.items():
            path = notebook(tmp_path_factory.mktemp("s"), changes)
            sheets[changes] = pool.submit(grade, path, seconds)
        yield lambda *changes: sheets[changes].result()
        pool.shutdown(cancel_futures=True)


def said(sheet, verdict):
    return [line for line in LINES[:-2] if sheet[line].startswith(verdict)]


@pytest.mark.parametrize(("lines", "words", "old", "new"), rows(FAULTS))
def test_a_fault_turns_its_line_red_and_no_other(graded, lines, words, old, new):
    _, sheet = graded(old, new)
    assert said(sheet, "NOT MET") == lines.split(), sheet
    assert words in sheet[lines[:4]], sheet
    assert all("(see S5" in sheet[line] for line in said(sheet, "cannot")), sheet


@pytest.mark.parametrize("changes", rows(VARIANTS))
def test_a_conforming_variant_is_met(graded, changes):
    what, sheet = graded(*changes)
    assert what.startswith("Ran 6 of 6 cells; trained layers ")
    assert said(sheet, "met") == LINES[:-2], sheet


@pytest.mark.parametrize(("old", "new", "words"), rows(TROUBLES))
def test_what_cannot_run_here_is_not_called_wrong(graded, old, new, words):
    what, sheet = graded(old, new)
    assert "stopped in cell" in what and words in sheet["S2.2"]
    assert len(said(sheet, "cannot tell")) > 4
    assert set(said(sheet, "NOT MET")) <= {"S2.1"}, sheet


def test_the_notebook_of_this_project_is_met(graded):
    _, sheet = graded("own")
    assert said(sheet, "met") == LINES[:-2], sheet


def test_several_files_end_in_a_table(tmp_path, monkeypatch, capsys):
    notebook(tmp_path, ())
    (tmp_path / "broken.ipynb").write_text("no JSON")
    monkeypatch.setattr("sys.argv", ["grade.py", str(tmp_path)])
    main()
    *_, head, broken, whole = capsys.readouterr().out.splitlines()
    assert head.split()[: len(LINES)] == LINES
    assert broken.split()[:-1] == ["?"] * len(LINES)
    assert whole.split()[:-1] == ["+"] * (len(LINES) - 2) + ["?"] * 2
