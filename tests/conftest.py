"""The grading sheet, synthetic digits, one run on them, and formulas to compare with.

`pytest tests --notebook PATH` grades another notebook: the README says what it offers.
"""

import contextlib
import copy
import json
import textwrap
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib as mpl
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import optimizer as optim
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "cvae_mnist.ipynb"
PARTS = {"S1": "12", "S2": "12", "S3": "12", "S4": "0123", "S5": "123", "S6": "1234"}
LINES = [f"{part}.{number}" for part in PARTS for number in PARTS[part]]
torch.set_num_threads(1)  # threads of small products only wait for each other


def pytest_addoption(parser):
    parser.addoption("--notebook", default=NOTEBOOK, help="the notebook to grade")


def pytest_terminal_summary(terminalreporter):
    """The grading sheet: one line for each line of the specification."""
    terminalreporter.section("grading sheet")
    for line in LINES:
        verdict = "not graded: none of its tests was run"
        for outcome in "passed", "skipped", "error", "failed":  # the last found stays
            for report in reversed(terminalreporter.stats.get(outcome, ())):
                if f"_{line.replace('.', '_')}_" in report.nodeid:
                    verdict = words(outcome, report.longrepr)
        terminalreporter.write_line(textwrap.shorten(f"{line}: {verdict}", 300))


def words(outcome, why):
    if outcome == "passed":
        return "met"
    if outcome == "skipped":
        return "not graded: " + why[2].removeprefix("Skipped: ")
    message = why.reprcrash.message if hasattr(why, "reprcrash") else str(why)
    return "NOT MET: " + message.removeprefix("Failed: ").splitlines()[0]


def check(condition, sentence):
    """Fail with a sentence that can stand in the grading sheet."""
    if not condition:
        pytest.fail(sentence, pytrace=False)


def same(found, expected, what, rel=1e-4):
    near = found == pytest.approx(expected, rel=rel, abs=1e-7)
    check(near, f"{what} is {found:.5g}, expected {expected:.5g}")


def standard_normal(values, what):
    """Many independent values, by their quartiles and tails."""
    shares = torch.tensor([0.025, 0.25, 0.5, 0.75, 0.975])
    found, expected = np.quantile(values, shares), Normal(0, 1).icdf(shares).numpy()
    sentence = f"quantiles of {what}: {found.round(2)}, expected {expected.round(2)}"
    check(np.abs(found - expected).max() < 12 / len(values) ** 0.5, sentence)


@pytest.fixture(scope="session")
def cells(request):
    """The code cells: source, tags (the id is one of them), and what was saved."""
    path = Path(request.config.getoption("--notebook"))
    cells = json.loads(path.read_text("utf-8"))["cells"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
        cell["tags"] = {cell.get("id"), *cell["metadata"].get("tags", ())}
    return [c for c in cells if c["cell_type"] == "code" and c["source"].strip()]


@pytest.fixture(scope="session")
def own(cells):
    """Ask something of notebooks with evidence that the specification does not."""
    if not any("results.json" in cell["source"] for cell in cells):
        pytest.skip("the notebook writes no results.json, the mark of sections 7 to 9")


def write_digits(root):
    """Synthetic digits of all gray levels as extracted IDX files, where MNIST puts them.

    train, t10k: binarized x (N, 784) and one-hot y (N, 10).
    """
    digits = SimpleNamespace(root=root, raw=Path(root, "MNIST", "raw"))
    digits.raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in ("train", 300), ("t10k", 1010):
        labels = rng.permutation(np.arange(count) % 10)
        images = np.zeros((count, 28, 28))
        for image, label in zip(images, labels):
            image[2 * label : 2 * label + 3] = 255  # a bar that tells the class,
            top, left = rng.integers(0, 18, 2)  # a gray patch that does not
            image[top : top + 10, left : left + 10] = rng.integers(0, 256, (10, 10))
        for kind, array in ("images", images), ("labels", labels):
            sizes = np.array([2048 + array.ndim, *array.shape], ">i4").tobytes()
            path = digits.raw / f"{name}-{kind}-idx{array.ndim}-ubyte"
            path.write_bytes(sizes + array.astype(np.uint8).tobytes())
        x = torch.tensor(images.reshape(-1, 784) > 127.5).float()
        setattr(digits, name, (x, torch.eye(10)[labels]))
    return digits


def cross_entropy(logits, x):
    """S5.1, nats per image."""
    x = x.double()
    return -(x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)).sum(dim=-1)


def normal_kl(mean, std):
    """S5.2, nats per image: to the standard normal."""
    return 0.5 * (std**2 + mean**2 - 1 - 2 * std.log()).sum(dim=-1)


class Watch:
    """Notes what fully connected layers, the first optimizer and figures do.

    calls: the last eight of such layers: layer, shape (inputs, outputs), given, output;
    steps: of the optimizer: calls before it, and by parameter before, gradient, after;
    drawn: z and class, image, sum of the last weights, of each call of a decoder;
    figures: name -> what it shows.
    """

    def __init__(self):
        self.calls, self.drawn, self.figures = deque(maxlen=8), [], {}
        self.optimizer, self.steps = None, []

    @contextlib.contextmanager
    def watching(self):
        savefig = Figure.savefig

        def save_noted(figure, path, *args, **kwargs):
            self.note_figure(figure, Path(str(path)).name)
            return savefig(figure, path, *args, **kwargs)

        with (
            mock.patch.object(Figure, "savefig", save_noted),
            register_module_forward_hook(self.note_forward),
            optim.register_optimizer_step_pre_hook(self.note_step),
            optim.register_optimizer_step_post_hook(self.note_stepped),
        ):
            yield self

    def note_forward(self, layer, args, output):
        if isinstance(layer, nn.Linear):
            call = SimpleNamespace(layer=layer, given=args[0], output=output)
            call.shape = layer.in_features, layer.out_features
            for tensor in (t for t in (call.given, output) if t.requires_grad):
                tensor.retain_grad()
            self.calls.append(call)
            if call.shape == (256, 784) and output.numel() <= 100 * 784:
                given = torch.atleast_2d(self.calls[-2].given.detach())
                image = torch.atleast_2d(output.detach().sigmoid())
                self.drawn.append((given, image, layer.weight.detach().sum().item()))
            return output.clone()  # what is noted stays, even under a ReLU in place

    def note_step(self, optimizer, args, kwargs):
        self.optimizer = self.optimizer or optimizer
        if optimizer is self.optimizer:
            step = SimpleNamespace(calls=[*self.calls][-5:], before=copies(optimizer))
            step.gradient = copies(optimizer, grad)
            self.steps.append(step)

    def note_stepped(self, optimizer, args, kwargs):
        if optimizer is self.optimizer:
            self.steps[-1].after = copies(optimizer)

    def note_figure(self, figure, name):
        note = SimpleNamespace(drawn=[*self.drawn])
        self.figures[name.removeprefix(".").removesuffix(".part")] = note
        note.images = [np.array(i.get_array()) for a in figure.axes for i in a.images]
        note.lines = [np.asarray(at.get_ydata()) for a in figure.axes for at in a.lines]


def copies(optimizer, of=lambda p: p):
    """Parameter -> a copy of it, or of what belongs to it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: of(p).detach().clone() for p in parameters}


def grad(tensor):
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def run_cells(cells, folder):
    """Run cells in a fresh shell of this process: namespace, notes, outputs, error."""
    InteractiveShell.clear_instance()
    config = Config({"HistoryManager": {"enabled": False}})
    shell, ran = InteractiveShell.instance(config=config), SimpleNamespace(error=None)
    ran.ns, ran.folder, ran.shown = shell.user_ns, folder, []
    with (
        Watch().watching() as ran.watch,
        mock.patch.object(InteractiveShell, "enable_gui"),  # for %matplotlib
        contextlib.chdir(folder),
        mpl.rc_context({"backend": "Agg"}),
    ):
        for cell in cells:
            with capture_output() as shown:
                result = shell.run_cell(cell["source"])
            ran.shown.append(shown)
            if "parameters" in cell["tags"]:
                here = {"DATA_DIR": "data", "FIGURES_DIR": "figures", "DEVICE": "cpu"}
                ran.ns |= {k: here[k] for k in here if k in ran.ns}
            ran.error = result.error_before_exec or result.error_in_exec
            if ran.error:
                break
    return ran


@pytest.fixture(scope="session")
def attempt(cells, tmp_path_factory):
    """The whole notebook, run once as it is on synthetic digits."""
    folder = tmp_path_factory.mktemp("run")
    digits = write_digits(folder / "data")
    attempt = run_cells(cells, folder)
    attempt.digits = digits
    return attempt


@pytest.fixture(scope="session")
def executed(attempt):
    if attempt.error:
        pytest.skip("the notebook does not run to its end")
    return attempt


@pytest.fixture
def rerun(executed, cells, own):
    """Run one cell again, other values behind some names: what it leaves behind."""

    def rerun(name, **changes):
        (source,) = (cell["source"] for cell in cells if name in cell["tags"])
        ns, there = executed.ns, contextlib.chdir(executed.folder)
        values = {"run": {**ns["run"]}, "results": copy.deepcopy(ns["results"])}
        with there, mock.patch.dict(ns, values | changes), capture_output():
            # Compiled first: exec of a text would let Python itself exit as interrupted.
            exec(compile(source, name, "exec"), ns)  # noqa: S102, the notebook's cell
            return SimpleNamespace(**ns)

    return rerun
