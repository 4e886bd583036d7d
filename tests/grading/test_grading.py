"""The grader: a submission that meets every line, and single changes of it."""

import json
import re
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from extract import ROOT
from verdicts import LINES

HERE = Path(__file__).parent
COMMAND = runpy.run_path(str(HERE / "__main__.py"), run_name="grading")
grade, main = COMMAND["grade"], COMMAND["main"]
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
# Lines that break, words on each, what is written, what stands there instead, and more
# such pairs. Several faults in one submission leave each other's lines alone.
FAULTS = r"""
S1.1 S4.1 S5.3 | weighs 784 times & tanh after the hidden & rate 0.01, | n="sum")
| n="sum") / 784 | F.relu( | torch.tanh( | lr=0.001 | lr=0.01
S1.1 S4.2 S6.2 | weighs 19.6 times & before z & 9 different samples of 9 | (bce + kl)
| (bce / 784 + kl / 40) | [z, y] | [y, z] | arange(100) | arange(100).clip(max=98)
S1.1 S3.1 S6.1 | weighs 0 to 1 times & KMNIST is loaded & no line is drawn | (bce + kl)
| (bce + kl * (len(losses) > 9)) | MNIST | KMNIST | plt.plot(losses) | losses
S1.1 S5.3 | weighs 0 to 1 times & betas (0.5, 0.999) | (bce + kl)
| (bce + kl * (epoch % 2)) | lr=0.001 | lr=0.001, betas=(0.5, 0.999)
S1.1 S2.1 S4.3 | swapped & depends on jupyter & to both heads | mean**2 + std**2 - 1 - 2
| (1 + mean**2) / std**2 + 2 | import torch\n | import jupyter, torch\n | like(std)\n
| like(std)\n        z = z.detach()\n
S1.1 S5.2 S5.3 | weighs -1 times & subtracted & rate 1e-09 | bce + kl | bce - kl
| lr=0.001 | lr=1e-9
S1.1 S5.1 S5.3 | sign is turned & made larger & rate 1e-09 | loss.back | (-loss).back
| lr=0.001 | lr=1e-9
S1.2 S4.0 S6.2 | 576 of the 1080 & 20 dimensions & epoch 6 no samples | .split(64)
| .split(64)[:9] | Z = 40 | Z = 20 | (1, 6, 11) | (1, 7, 11)
S1.2 S5.1 | test set & squared error | train=True | train=False
| F.binary_cross_entropy( | F.mse_loss(
S2.2 | stops in cell 6, line 2: NameError | savefig("losses.png")
| savefig("losses.png"); nowhere
S3.2 S4.1 | 256 values, 0 to 1 & as of a log variance | .round() | .abs()
| self.std(h).sigmoid() | torch.exp(self.std(h) / 2)
S3.2 S4.1 | in 170 of 187 steps & no activation | model(x[batch]
| model(x[batch] * (1 if epoch == 1 else 0.9) | self.mean(h).sigmoid() | self.mean(h)
S3.2 S5.3 | are not the rounded & no zero_grad | (mnist.data / 255).round()
| (mnist.data > 0).float() |     for batch in |     adam.zero_grad()\n    for batch in
|         adam.zero_grad()\n |
S4.1 S4.2 | Linear(794, 512) & Linear(512, 784) | 256 | 512
S4.1 S5.3 | without biases & SGD | nn.Linear(794, 256) | nn.Linear(794, 256, bias=False)
| optim.Adam( | optim.SGD(
S4.1 S6.1 | no plain sigmoid & lines of 11 points | self.std(h).sigmoid()
| self.std(h).sigmoid() + 1e-3 |         losses.append |     losses.append
S4.1 S6.2 | no plain sigmoid & not standard normal | self.std(h).sigmoid()
| 0.9 * self.std(h).sigmoid() + 0.1 | randn(100, Z) | rand(100, Z)
S4.1 S5.3 | no plain sigmoid & 12 epochs | self.mean(h).sigmoid()
| 2 * self.mean(h).tanh() | range(1, 12) | range(1, 13)
S4.1 S4.3 | before the image & same at every step | [x, y] | [y, x] | z = mean
| torch.manual_seed(1)\n        z = mean
S4.1 S5.3 | not the one-hot class & no zero_grad | [x, y] | [x, y / 2]
| adam.zero_grad() | pass
S4.3 | to both heads | mean + std * torch.randn_like(std) | torch.normal(mean, std)
S4.3 S5.3 | the mean itself & batches of 16 to 64 | mean + std * torch.randn_like(std)
| mean | .split(64) | .split(64 if epoch < 6 else 16)
S4.3 S5.3 | not standard normal & one after the other | torch.randn_like
| torch.rand_like | range(1, 12):\n
| range(1, 12):\n    adam = torch.optim.Adam(model.parameters())\n
S4.3 S5.2 | same noise & m² + s² - log s | torch.randn_like(std) | torch.randn(Z)
| 2 * std.log() | std.log()
S5.2 S5.3 | nothing & leaves out Linear(256, 784) | (bce + kl) | bce
| model.parameters() | [*model.parameters()][:-2]
S5.3 | without a gradient | loss.backward() | loss.backward(); adam.zero_grad()
S5.3 | without a gradient | CVAE(), [] | CVAE(), []\nmodel.leave.requires_grad_(False)
S5.3 | 1 epochs, expected 11 | range(1, 12) | range(1, 2) | Z = 40\n
| Z = 40\nassert len(x) == 6 * 10**4\n
"""
# What is written, what stands there instead, and more such pairs: conforming variants.
VARIANTS = r"""
(bce + kl) / len(x) | bce + kl | 255).round() | 255 >= 0.5).float() | plt.sav
| %pip install nothing\n!exit 1\nplt.sav | import torch\n | import tqdm, torch\n
| range(1, 12) | tqdm.notebook.trange(1, 12)
CVAE(), [] | CVAE().to("cuda"), [] | x[batch], m | x[batch].cuda(), m | images.permute
| 255 - 255 * images.permute | plt.plot(l | plt.scatter(range(187), l | plt.imshow(
| plt.pcolormesh(
mean + std * torch.randn_like(std) | torch.distributions.Normal(mean, std).rsample()
| y = F.one_hot(torch
| [model(x[:500], x[:500, :10]) for _ in range(9)]\n    y = F.one_hot(torch
| mnist = | %memit 1\n%unknown 1\n%time mnist =
| import matplotlib | %%capture\nimport matplotlib
| plt.plot(losses) | plt.plot(losses[::10])
(256, Z), | (256, 80), | ), self.std(h).sigmoid() | ).chunk(2, 1) | mnist = MNIST(
| class Own(MNIST): pass\nmnist = Own( | plt.plot(losses)
| plt.plot(torch.tensor(losses)[:180].view(-1, 10).mean(1))
nn.Sigmoid() | nn.Flatten() | ropy( | ropy_with_logits( | .detach()
| .detach().sigmoid() | torch.manual_seed(0) | assert torch.cuda.is_available()
loss.backward()\n | 0\n | adam.step() | adam.step(loss.backward)
| self.enter(torch.cat([x, y], dim=1))
| torch.einsum("bi,oi->bo", torch.cat([x, y], 1), self.enter.weight) + self.enter.bias
"""
# What is written, what stands there instead, and words on S2.2.
TROUBLES = r"""
import torch\n | import pandas, torch\n{}[pandas.DataFrame([1])]\n | pandas
mnist = | open("/home/me/digits")\nmnist = | own is not here
adam.step() | while True: pass | too long
adam.step() | import os; os.fork() or os.setsid(); os.killpg(0, 9) | process ended
"""
FILES = {  # what is in them, and words on each line
    "broken.ipynb": ("{", "JSON"),
    "old.ipynb": ('{"nbformat": 3, "worksheets": []}', "format 3"),
    "r.ipynb": ('{"cells": [], "metadata": {"kernelspec": {"language": "R"}}}', "in R"),
    "latin.py": ("caf\udce9", "UTF-8"),
    "two.py": ("print 'x'", "Python 2"),
}


def rows(table):
    lines = table.strip().replace("\n| ", " | ").splitlines()
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
        sheets = {("own",): pool.submit(grade, ROOT / "cvae_mnist.ipynb", 1800)}
        for changes, seconds in limits.items():
            path = notebook(tmp_path_factory.mktemp("s"), changes)
            sheets[changes] = pool.submit(grade, path, seconds)
        yield lambda *changes: sheets[changes].result()
        pool.shutdown(cancel_futures=True)


def said(sheet, verdict):
    return [line for line in LINES[:-2] if sheet[line].startswith(verdict)]


@pytest.mark.parametrize(
    ("lines", "words", "changes"), [(*r[:2], r[2:]) for r in rows(FAULTS)]
)
def test_faults_turn_their_lines_red_and_no_others(graded, lines, words, changes):
    _, sheet = graded(*changes)
    assert said(sheet, "NOT MET") == lines.split(), sheet
    for line, each in zip(lines.split(), words.split(" & "), strict=True):
        assert each in sheet[line], sheet[line]
    assert all("(see S5" in sheet[line] for line in said(sheet, "cannot")), sheet


@pytest.mark.parametrize("changes", rows(VARIANTS))
def test_a_conforming_variant_is_met(graded, changes):
    what, sheet = graded(*changes)
    assert what.startswith("Ran 6 of 6 cells"), what
    assert said(sheet, "met") == LINES[:-2], sheet


@pytest.mark.parametrize(("old", "new", "words"), rows(TROUBLES))
def test_what_cannot_run_here_is_not_called_wrong(graded, old, new, words):
    what, sheet = graded(old, new)
    assert "error in cell" in what and words in sheet["S2.2"], sheet
    assert set(said(sheet, "NOT MET")) <= {"S2.1"}, sheet


def test_the_notebook_of_this_project_is_met(graded):
    _, sheet = graded("own")
    assert said(sheet, "met") == LINES[:-2], sheet


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_is_said(tmp_path, name):
    text, words = FILES[name]
    (tmp_path / name).write_text(text, errors="surrogateescape")
    _, sheet = grade(tmp_path / name)
    assert all(words in said for said in sheet.values())


def test_a_folder_is_graded_to_the_end(tmp_path, capsys):
    source = "import help_me\nraise ValueError('a\\ud800\\nS1.1  met')"
    cells = [{"cell_type": "code", "source": source}]
    (tmp_path / "a\udcff.IPYNB").write_text(json.dumps({"cells": cells}))
    (tmp_path / "help_me.py").write_text("")
    for skipped in "venv", "__MACOSX":
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "a.py").write_text("")
    (tmp_path / "b.ipynb").write_text("{")
    table = tmp_path / "table.csv"
    places = ["--csv", str(table), "--out", str(tmp_path / "graded")]
    assert main([str(tmp_path), *places]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[: len(LINES)] for line in lines].count(LINES) == 1
    assert "S1.1  met" not in lines
    assert len(table.read_text().splitlines()) == 1 + 2 * len(LINES)
    assert len([*(tmp_path / "graded").iterdir()]) == 1


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_nothing_to_grade_is_said(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert main([path]) == 2
