"""The grading sheet, synthetic digits, one run on them, and formulas to compare with.

`pytest tests --notebook PATH` grades another notebook: the README says what it offers.
"""

import contextlib
import copy
import json
import struct
import textwrap
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
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "cvae_mnist.ipynb"
PARTS = {"S1": "12", "S2": "12", "S3": "12", "S4": "0123", "S5": "123", "S6": "1234"}
LINES = [f"{part}.{number}" for part in PARTS for number in PARTS[part]]


def pytest_addoption(parser):
    parser.addoption("--notebook", default=NOTEBOOK, help="the notebook to grade")


def pytest_configure():
    torch.set_num_threads(1)  # threads of small products only wait for each other


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


def standard_normal(values, what, limit=0.02):
    """Many independent values: their mean, spread, quartiles and tails."""
    found = {"mean": (values.mean(), 0), "standard deviation": (values.std(), 1)}
    for share, expected in (0.025, -1.96), (0.25, -0.674), (0.75, 0.674):
        found[f"{share:.1%} quantile"] = np.quantile(values, share), expected
    for name, (value, expected) in found.items():
        near = abs(value - expected) < limit * (3 if "quantile" in name else 1)
        check(near, f"{name} of {what} is {value:.3f}, expected {expected}")


# Cells


def code_cells(path):
    """The code cells: source, tags (the id is one of them), and what was saved."""
    cells = json.loads(Path(path).read_text("utf-8"))["cells"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
        cell["tags"] = {cell.get("id"), *cell["metadata"].get("tags", ())}
    return [c for c in cells if c["cell_type"] == "code" and c["source"].strip()]


@pytest.fixture(scope="session")
def cells(request):
    return code_cells(request.config.getoption("--notebook"))


@pytest.fixture(scope="session")
def own(cells):
    """Ask something of notebooks with evidence that the specification does not."""
    if not any("results.json" in cell["source"] for cell in cells):
        pytest.skip("the notebook writes no results.json, the mark of sections 7 to 9")


# Synthetic digits


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_digits(root):
    """Synthetic digits of all gray levels as extracted IDX files, where MNIST puts them.

    train, t10k: binarized x (N, 784) and one-hot y (N, 10).
    """
    digits = SimpleNamespace(root=root, raw=Path(root, "MNIST", "raw"))
    digits.raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in ("train", 300), ("t10k", 400):
        labels = rng.permutation(np.arange(count) % 10)
        images = np.zeros((count, 28, 28))
        for image, label in zip(images, labels):
            image[2 * label : 2 * label + 3] = 255  # a bar that tells the class,
            top, left = rng.integers(0, 18, 2)  # a gray patch that does not
            image[top : top + 10, left : left + 10] = rng.integers(0, 256, (10, 10))
        write_idx(digits.raw / f"{name}-images-idx3-ubyte", images)
        write_idx(digits.raw / f"{name}-labels-idx1-ubyte", labels)
        x = torch.tensor(images.reshape(-1, 784) > 127.5).float()
        setattr(digits, name, (x, torch.eye(10)[labels]))
    return digits


@pytest.fixture
def digits(tmp_path):
    return write_digits(tmp_path / "data")


# The reference, in double precision


def cross_entropy(logits, x):
    """S5.1, nats per image."""
    x = x.double()
    return -(x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)).sum(dim=-1)


def normal_kl(mean, std):
    """S5.2, nats per image: to the standard normal."""
    return 0.5 * (std**2 + mean**2 - 1 - 2 * std.log()).sum(dim=-1)


# Watching models, optimizers and figures at work


class Watch:
    """Notes what fully connected layers, optimizers and figures do.

    layers: (inputs, outputs) -> the last two calls of such layers, since an encoder's
    first layer (794 inputs) was called; q: the first normal since then; steps:
    optimizer -> its steps, of all but the first optimizer one; drawn: inputs and images
    of decoders since the last figure; figures: name -> what it shows.
    """

    def __init__(self):
        self.layers, self.q, self.steps = {}, None, {}
        self.drawn, self.figures = [], {}

    @contextlib.contextmanager
    def watching(self):
        savefig = Figure.savefig

        def save_noted(figure, path, *args, **kwargs):
            self.note_figure(figure, Path(path).name)
            return savefig(figure, path, *args, **kwargs)

        with (
            mock.patch.object(Figure, "savefig", save_noted),
            register_module_forward_hook(self.note_forward),
            register_optimizer_step_pre_hook(self.note_step),
            register_optimizer_step_post_hook(self.note_stepped),
        ):
            yield self

    def note_forward(self, module, args, output):
        found = output[1] if isinstance(output, tuple) else output
        if isinstance(found, Normal):
            self.q = self.q or found
        if not isinstance(module, nn.Linear):
            return
        shape = module.in_features, module.out_features
        if shape[0] == 794:
            self.layers, self.q = {}, None
        if shape == (40, 256):  # a decoder without class
            shape = 50, 256
        note = SimpleNamespace(module=module, input=args[0].detach().clone())
        note.output = output.detach().clone()
        self.layers[shape] = [*self.layers.get(shape, ()), note][-2:]
        if shape == (256, 784) and len(output) <= 100 and (50, 256) in self.layers:
            images = note.output.sigmoid()
            self.drawn.append((self.layers[50, 256][-1].input, images))

    def roles(self):
        """The layers of S4 by what they do, found by their shapes; the mean's by q."""
        heads = self.layers.get((256, 40), ())
        shapes = (794, 256), (50, 256), (256, 784)
        enter, leave, image = (self.layers.get(shape) for shape in shapes)
        if len(heads) != 2 or not (enter and leave and image and self.q):
            return {}
        mean = self.q.mean.detach().flatten()
        like_mean = lambda head: np.corrcoef(head.output.flatten(), mean)[0, 1]
        std_head, mean_head = sorted(heads, key=like_mean)
        notes = enter[-1], mean_head, std_head, leave[-1], image[-1]
        roles = dict(zip(("enter", "mean", "std", "leave", "image"), notes))
        return {} if any(note.module.bias is None for note in notes) else roles

    def note_step(self, optimizer, args, kwargs):
        steps = self.steps.setdefault(optimizer, [])
        if steps and optimizer is not next(iter(self.steps)):
            return
        step = SimpleNamespace(roles=self.roles())
        step.before = steps[-1].after if steps else tensors(step.roles)
        gradient = lambda p: 0 * p if p.grad is None else p.grad
        step.gradient = tensors(step.roles, gradient)
        steps.append(step)

    def note_stepped(self, optimizer, args, kwargs):
        step = self.steps[optimizer][-1]
        if "after" not in vars(step):
            step.after = tensors(step.roles)

    def note_figure(self, figure, name):
        note = SimpleNamespace(drawn=self.drawn)
        self.figures[name.removeprefix(".").removesuffix(".part")] = note
        note.images = [np.array(i.get_array()) for a in figure.axes for i in a.images]
        note.lines = [np.asarray(at.get_ydata()) for a in figure.axes for at in a.lines]
        self.drawn = []


def tensors(roles, of=lambda p: p):
    """A copy of weight and bias of each layer in turn, or of what belongs to them."""
    pairs = [(at.module.weight, at.module.bias) for at in roles.values()]
    return [of(p).detach().to(torch.float64, copy=True) for pair in pairs for p in pair]


# The run


def run_cells(cells, folder):
    """Run cells in a fresh shell of this process: its namespace, notes and error."""
    InteractiveShell.clear_instance()
    config = Config({"HistoryManager": {"enabled": False}})
    shell, error = InteractiveShell.instance(config=config), None
    with (
        Watch().watching() as watch,
        contextlib.chdir(folder),
        mpl.rc_context({"backend": "Agg"}),
        capture_output(),
    ):
        for cell in cells:
            result = shell.run_cell(cell["source"])
            if "parameters" in cell["tags"]:
                here = {"DATA_DIR": "data", "FIGURES_DIR": "figures", "DEVICE": "cpu"}
                shell.user_ns |= {k: here[k] for k in here if k in shell.user_ns}
            if not result.success:
                error = result.error_before_exec or result.error_in_exec
                break
    return SimpleNamespace(ns=shell.user_ns, watch=watch, error=error, folder=folder)


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


def rerun(executed, cells, name, **changes):
    """Run one cell again, other values behind some names: what it leaves and prints."""
    (source,) = (cell["source"] for cell in cells if name in cell["tags"])
    ns, there = executed.ns, contextlib.chdir(executed.folder)
    changes = {"run": {**ns["run"]}, "results": copy.deepcopy(ns["results"]), **changes}
    with there, mock.patch.dict(ns, changes), capture_output() as printed:
        # Compiled first: exec of a text remembers an interrupt until Python exits.
        exec(compile(source, name, "exec"), ns)  # noqa: S102, the notebook's cell
        left = SimpleNamespace(**ns)
    left.printed = printed.stdout
    return left
