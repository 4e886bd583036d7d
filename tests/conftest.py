"""Cells of the graded notebook, a run of it on synthetic digits, the grading sheet.

`pytest tests --notebook PATH` grades another notebook. It offers cells tagged `parameters`,
`data`, `model`, `loss` and, if it likes, `setup`; layers are found by their shapes.
"""

import contextlib
import copy
import importlib.util
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
EPOCHS, ITERATIONS = 11, 5  # 300 synthetic images: 4 batches of 64 and one of 44


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


def read_cells(path):
    """The code cells: source, tags (the id is one of them), and what was saved."""
    cells = json.loads(Path(path).read_text("utf-8"))["cells"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
        cell["tags"] = {cell.get("id"), *cell["metadata"].get("tags", ())}
    return [cell for cell in cells if cell["cell_type"] == "code"]


def load_cells(tags, folder, path=NOTEBOOK):
    """Write the cells that carry one of the tags to a file and import it."""
    sources = [cell["source"] for cell in read_cells(path) if tags & cell["tags"]]
    file = Path(folder, "_".join(sorted(tags)) + ".py")
    file.write_text("\n\n\n".join(sources), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def notebook(request):
    return Path(request.config.getoption("--notebook")).resolve()


@pytest.fixture(scope="session")
def cells(notebook):
    return read_cells(notebook)


@pytest.fixture(scope="session")
def own(cells):
    """Ask something of notebooks with evidence that the specification does not."""
    if not any("results.json" in cell["source"] for cell in cells):
        pytest.skip("the notebook writes no results.json, the mark of sections 7 to 9")


# Synthetic digits


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_digits(root, train=300, test=400):
    """Synthetic digits of all gray levels as extracted IDX files, where MNIST puts them.

    train, t10k: binarized x (N, 784) and one-hot y (N, 10).
    """
    digits = SimpleNamespace(root=root, raw=Path(root, "MNIST", "raw"))
    digits.raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in ("train", train), ("t10k", test):
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


# The reference, in double precision. w: the weights and biases of each layer by role


def encode(w, x, y, mean=torch.sigmoid, std=torch.sigmoid):
    """S4.1: mean and standard deviation of z."""
    h = F.linear(torch.hstack([x, y]).double(), *w["enter"]).relu()
    return mean(F.linear(h, *w["mean"])), std(F.linear(h, *w["std"]))


def decode(w, z, y):
    """S4.2: the logits of the image."""
    h = F.linear(torch.hstack([z, y]).double(), *w["leave"]).relu()
    return F.linear(h, *w["image"])


def cross_entropy(logits, x):
    """S5.1, nats per image."""
    x = x.double()
    return -(x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)).sum(dim=-1)


def normal_kl(mean, std, to_mean, to_std):
    """S5.2, nats per image: between diagonal normals."""
    ratio = (std**2 + (mean - to_mean) ** 2) / to_std**2
    return 0.5 * (ratio - 1 - 2 * (std / to_std).log()).sum(dim=-1)


# Watching models, optimizers and figures at work


def roles(layers, q):
    """The layers of S4 by what they do, found by their shapes; the mean's head by q."""
    heads = layers.get((256, 40), ())
    enter, image = layers.get((794, 256)), layers.get((256, 784))
    leave = layers.get((50, 256)) or layers.get((40, 256))
    if len(heads) != 2 or not (enter and image and leave) or q is None:
        pytest.skip(f"S4 asks for other layers than {list(layers)}")
    mean = q.mean.detach().cpu().flatten()
    heads = sorted(heads, key=lambda h: -np.corrcoef(h.output.flatten(), mean)[0, 1])
    found = {"enter": enter[-1], "mean": heads[0], "std": heads[1]}
    return found | {"leave": leave[-1], "image": image[-1]}


def parameters(layer):
    return [p.detach().cpu().double() for p in (layer.weight, layer.bias)]


class Watch:
    """Notes what fully connected layers, optimizers and figures do.

    layers: (inputs, outputs) -> the last two calls of such layers, since an encoder's
    first layer (794 inputs) was called; q: the first normal since then; drawn: inputs
    and images of decoders since the last figure; optimizers: optimizer -> settings and
    weights after each step, and the calls of its layers before some steps; figures.
    """

    def __init__(self):
        self.layers, self.q, self.drawn = {}, None, []
        self.optimizers, self.figures, savefig = {}, {}, Figure.savefig

        def save_noted(figure, path, *args, **kwargs):
            self.note_figure(figure, Path(path).name)
            return savefig(figure, path, *args, **kwargs)

        self.patch = mock.patch.object(Figure, "savefig", save_noted)

    @contextlib.contextmanager
    def watching(self):
        hooks = (
            register_module_forward_hook(self.note_forward),
            register_optimizer_step_pre_hook(self.note_step),
            register_optimizer_step_post_hook(self.note_stepped),
        )
        with self.patch, contextlib.ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook.remove)
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
        note = SimpleNamespace(module=module, input=args[0].detach().clone())
        note.output = output.detach().clone()
        self.layers[shape] = [*self.layers.get(shape, ()), note][-2:]
        if shape == (256, 784) and len(output) <= 100:
            entered = [pair for n in (50, 40) for pair in self.layers.get((n, 256), ())]
            images = note.output.sigmoid()
            self.drawn += [(entered[-1].input, images)] if entered else []

    def note_step(self, optimizer, args, kwargs):
        new = SimpleNamespace(optimizer=optimizer, settings=[], steps={}, after={})
        record = self.optimizers.setdefault(optimizer, new)
        t = len(record.settings)
        record.settings += [{**g, "params": None} for g in optimizer.param_groups]
        if len(self.optimizers) > 1 and t not in (0, ITERATIONS, 6 * ITERATIONS):
            return
        for note in (note for notes in self.layers.values() for note in notes):
            note.before = parameters(note.module)
            grads = note.module.weight.grad, note.module.bias.grad
            note.grad = [None if g is None else g.double() for g in grads]
        q = self.q and Normal(self.q.mean.detach(), self.q.stddev.detach())
        record.steps[t] = SimpleNamespace(layers={**self.layers}, q=q)

    def note_stepped(self, optimizer, args, kwargs):
        modules = [note.module for notes in self.layers.values() for note in notes]
        self.optimizers[optimizer].after = {m: parameters(m) for m in modules}

    def note_figure(self, figure, name):
        name = name.removeprefix(".").removesuffix(".part")
        images = [
            np.array(image.get_array()) for a in figure.axes for image in a.images
        ]
        lines = [np.asarray(line.get_ydata()) for a in figure.axes for line in a.lines]
        self.figures[name] = SimpleNamespace(
            images=images, lines=lines, drawn=self.drawn
        )
        self.drawn = []


# The run


def run_cells(cells, folder):
    """Run cells in a fresh shell of this process: its namespace, notes and error."""
    InteractiveShell.clear_instance()
    config = Config({"HistoryManager": {"enabled": False}})
    shell, error = InteractiveShell.instance(config=config), None
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch().watching())
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(mpl.rc_context({"backend": "Agg"}))
        stack.enter_context(capture_output())
        for cell in cells:
            result = shell.run_cell(cell["source"])
            if "parameters" in cell["tags"]:
                places = {"DATA_DIR": "data", "FIGURES_DIR": "figures"}
                shell.user_ns.update(places, DEVICE="cpu")
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
    attempt.digits, attempt.figures = digits, folder / "figures"
    return attempt


@pytest.fixture(scope="session")
def executed(attempt):
    if attempt.error:
        pytest.skip("the notebook does not run to its end")
    return attempt


def rerun(executed, cells, name, **changes):
    """Run one cell again, other values behind some names: what it leaves and prints."""
    (source,) = (cell["source"] for cell in cells if name in cell["tags"])
    ns, before = executed.ns, {**executed.ns}
    ns |= {"run": {**ns["run"]}, "results": copy.deepcopy(ns["results"]), **changes}
    try:
        with contextlib.chdir(executed.folder), capture_output() as printed:
            # Compiled first: exec of a text remembers an interrupt until Python exits.
            exec(compile(source, name, "exec"), ns)  # noqa: S102, the notebook's cell
    finally:
        after = {**ns}
        ns.clear()
        ns.update(before)
    return SimpleNamespace(printed=printed.stdout, **after)
