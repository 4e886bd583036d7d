"""Grade notebooks or scripts against the homework's specification, as they are.

Usage: grade.py [--timeout SECONDS] submission.ipynb [more.ipynb or .py or folders ...]

Each runs on synthetic digits, in a process and a temporary folder of its own. Layers,
noise, gradients, steps and figures are watched: what was trained is graded.
"""

import argparse
import ast
import contextlib
import copy
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter, deque
from functools import cached_property
from pathlib import Path
from unittest import mock

import matplotlib as mpl
import numpy as np
import torch
import torchvision
from digits import write_digits
from IPython.core.formatters import DisplayFormatter
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib import pyplot as plt
from PIL import Image
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from traitlets.config import Config

COUNTS = {"S1": "12", "S2": "12", "S3": "12", "S4": "0123", "S5": "123", "S6": "1234"}
LINES = [f"{part}.{number}" for part in COUNTS for number in COUNTS[part]]
EXPECTED = {"torch", "torchvision", "matplotlib", "numpy"}
ALLOWED = {"IPython", "ipywidgets", "PIL", "google", "tqdm"}  # add nothing to a result
ACTIVATIONS = {
    "no activation": lambda a: a,
    "sigmoid": torch.sigmoid,
    "ReLU": torch.relu,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "exp(a / 2), as of a log variance": lambda a: (a / 2).exp(),
    "softplus": F.softplus,
    "exp(sigmoid / 2), as of a log variance": lambda a: (a.sigmoid() / 2).exp(),
    "the root of a sigmoid, as of a variance": lambda a: a.sigmoid().sqrt(),
    "leaky ReLU": F.leaky_relu,
    "ELU": F.elu,
    "the absolute value": torch.abs,
}


def slope(a):
    """The derivative of a sigmoid."""
    return a.sigmoid() * (1 - a.sigmoid())


CROSS_ENTROPY = "binary cross-entropy"
TWICE = f"{CROSS_ENTROPY} with a second sigmoid"
RECONSTRUCTIONS = {  # gradients at the decoder's last layer, before its activation
    CROSS_ENTROPY: lambda a, x: a.sigmoid() - x,
    "squared error": lambda a, x: 2 * (a.sigmoid() - x) * slope(a),
    "absolute error": lambda a, x: (a.sigmoid() - x).sign() * slope(a),
    "squared error without a sigmoid": lambda a, x: 2 * (a - x),
    "squared error after tanh": lambda a, x: (a.tanh() - x) * (1 - a.tanh() ** 2),
    TWICE: lambda a, x: (a.sigmoid().sigmoid() - x) * slope(a),
}
REGULARIZERS = {  # of mean, standard deviation and noise; constants do not matter
    "the KL": lambda m, s, e: (m**2 + s**2) / 2 - s.log(),
    "a sample's estimate of the KL": lambda m, s, e: (m + s * e) ** 2 / 2 - s.log(),
    "the swapped KL": lambda m, s, e: (1 + m**2) / s**2 / 2 + s.log(),
    "the KL of a log variance s": lambda m, s, e: (m**2 + s.exp() - s) / 2,
    "the KL of a variance s": lambda m, s, e: (m**2 + s - s.log()) / 2,
    "m² + s² - log s": lambda m, s, e: (m**2 + s**2 - s.log()) / 2,
    "m² + s - log s²": lambda m, s, e: (m**2 + s) / 2 - s.log(),
    "m²": lambda m, s, e: m**2 + 0 * s,
}
KLS = [*REGULARIZERS][:3]
MEMORY = 8 * 2**30  # bytes for each submission


class NotMet(Exception):
    """Says what was found and what was expected."""


class CannotTell(Exception):
    """Says what was looked for."""


class OutOfTime(BaseException):
    """No `except Exception` of a submission catches it."""


class Note:
    """Values by name. Two notes are equal only if they are one."""

    def __init__(self, **values):
        vars(self).update(values)


class Watch(TorchFunctionMode):
    """Notes what happens while cells run: steps of training, decoded images, figures.

    Copies of a model are known again by a mark, six weights of their last layer.
    """

    def __init__(self, digits):
        super().__init__()
        self.gray = torch.cat([digits.train[0], digits.t10k[0]]).double()
        self.labels = torch.cat([digits.train[1], digits.t10k[1]])
        self.profiles = unit(self.gray).T
        self.calls, self.inputs, self.noise = [deque(maxlen=n) for n in (100, 8, 16)]
        self.runs, self.run, self.scalars, self.product = {}, None, [], None
        self.decoded, self.pictures, self.sources, self.cell = [], [], [], 0
        self.inner, self.trouble, self.size = 0, None, len(digits.train[0])

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.device:
            args = [on_cpu(value) for value in args]
            kwargs = {key: on_cpu(value) for key, value in kwargs.items()}
        if func is torch.Tensor.cuda:
            return args[0]
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and not func.__name__.startswith("_"):
            with contextlib.suppress(Exception):  # the submission's run goes on
                self.note(func.__name__, [*args, *kwargs.values()], out)
        return out

    def note(self, name, args, out):
        if name == "linear" or (name in ("matmul", "mm") and is_weight(args[1])):
            self.note_layer(args[0], args[1], out)
        elif name == "addmm" or name.startswith("conv"):
            self.note_layer(*args[1 if name == "addmm" else 0 :][:2], out)
        elif name == "add" and self.product and args[0] is self.product[0]:
            if is_weight(args[1]):  # a bias
                self.product[1].value = flat(out).detach().clone()
        elif name in ("mul", "addcmul") and out.requires_grad:
            given = [a for a in args if torch.is_tensor(a) and not a.requires_grad]
            given = [a.expand(out.shape) if a.dim() == 1 else a for a in given]
            self.noise.extend(a for a in given if is_matrix(a))
        elif name in ("normal_", "normal", "randn", "randn_like") and is_matrix(out):
            drawn = name == "normal" and all(map(is_matrix, args[:2]))
            noise = (out - args[0]) / args[1] if drawn else out
            self.noise.append(noise.detach().clone())
        elif out.numel() == 1 and out.requires_grad and len(self.scalars) < 50:
            self.scalars.append(out.detach())  # among them the loss and its terms

    def note_layer(self, given, weight, out):
        call = Note(given=flat(given).detach(), value=flat(out).detach().clone())
        call.weight, call.pointer = weight, base_of(weight).data_ptr()
        call.shape, call.grad = (call.given.shape[1], call.value.shape[1]), None
        self.product, call.given_grad = (out, call), None
        self.inputs.append(call.given)
        if out.requires_grad:
            self.calls.append(call)
            out.register_hook(lambda gradient: add_gradient(call, "grad", gradient))
            if given.requires_grad:
                given.register_hook(lambda g: add_gradient(call, "given_grad", g))
        room = 40_000 > sum(len(each.call.value) for each in self.decoded)
        if call.shape[1] == 784 and len(call.value) <= (1000 if room else 100):
            note = Note(call=call, mark=mark(weight), inputs=[*self.inputs])
            self.decoded.append(note)

    def after_step(self, optimizer, *_):
        """Note what led to a step. One without layers of its own adds to the last."""
        groups = optimizer.param_groups
        owned = {p.data_ptr(): p for group in groups for p in group["params"]}
        calls = [call for call in self.calls if call.grad is not None]
        if calls:
            entries = [c for c in calls if c.shape[0] >= 784] or calls[:1]
            owner = owned.get(entries[0].pointer, groups[0]["params"][0])
            new = Note(owner=owner, steps=[], details=[])
            self.run = self.runs.setdefault(id(owner), new)
            entries = [c for c in entries if c.pointer == entries[0].pointer]
            self.note_step(calls, entries, owned)
        if self.run:
            step = self.run.steps[-1]
            step.owned |= owned.keys()
            step.mark = mark(step.out.weight)
            for group in groups:
                values = group["lr"], group.get("weight_decay", 0)
                step.optimizers.append((type(optimizer).__name__, *values))
        self.calls.clear(), self.noise.clear(), self.scalars.clear()

    def safely(self, note, *args):
        """A failure of the grader's own leaves the submission alone."""
        try:
            with torch._C.DisableTorchFunction():
                note(*args)
        except Exception as error:  # noqa: BLE001, verdicts tell of it
            self.trouble = error

    def note_step(self, calls, entries, owned):
        given = torch.cat([call.given for call in entries])
        step = Note(cell=self.cell, rows=len(given), index=None, start=0, owned=set())
        step.scalars, step.optimizers = [s.item() for s in self.scalars], []
        for start in (0, given.shape[1] - 784) if given.numel() >= 784 else ():
            likeness = unit(given[:, start:][:, :784]) @ self.profiles
            if likeness.max(dim=1).values.median() > 0.75:
                step.index, step.start = likeness.argmax(dim=1), start
                break
        step.out = [*calls[:1], *(c for c in calls if c.shape[1] == 784)][-1]
        self.decoded = [each for each in self.decoded if each.call not in calls]
        if self.run.steps:
            self.run.steps[-1].out = None  # keeps little
        self.run.steps.append(step)
        if len(given) and all(call.grad.isfinite().all() for call in calls):
            detail = Note(calls=calls, noise=[*self.noise], step=step, entry=entries[0])
            weight, expected = owned.get(step.out.pointer), step.out.grad.T
            expected, detail.stale = expected @ step.out.given, 0
            if weight is not None and weight.grad.shape == expected.shape:
                detail.stale = ratio(expected, weight.grad)[1]
            del self.run.details[2:]  # the first two stay, and the last
            self.run.details.append(detail)

    def note_picture(self, arrays, lines=()):
        sheets = [np.ma.filled(np.asarray(a, np.float32), 0) for a in arrays]
        last = [a.ndim == 3 and a.shape[-1] in (1, 3, 4) for a in sheets]
        sheets = [a[..., 0] if at else a for a, at in zip(sheets, last)]
        sheets = [a[0] if a.ndim == 3 else a for a in sheets]
        sheets = [a for a in sheets if a.ndim == 2 and min(a.shape) >= 28]
        self.pictures.append(Note(cell=self.cell, sheets=sheets, lines=lines))

    def note_figure(self, figure):
        lines = [line.get_ydata() for axes in figure.axes for line in axes.lines]
        dots = [dots.get_offsets() for a in figure.axes for dots in a.collections]
        lines += [np.asarray(each)[:, 1] for each in dots if np.ndim(each) == 2]
        areas = [each for a in figure.axes for each in a.collections]
        areas = [a for a in areas if isinstance(a, mpl.collections.PolyCollection)]
        lines += [path.vertices[:, 1] for each in areas for path in each.get_paths()]
        images = [image.get_array() for axes in figure.axes for image in axes.images]
        self.note_picture(images, [np.array(line, float) for line in lines])


def on_cpu(value):
    if isinstance(value, (str, torch.device)) and re.match("cuda|mps", str(value)):
        return "cpu"
    return value


def flat(tensor):
    """One row for each image."""
    return tensor.flatten(1) if tensor.dim() == 4 else tensor.flatten(0, -2)


def is_matrix(value):
    return torch.is_tensor(value) and value.dim() == 2 and value.is_floating_point()


def base_of(weight):
    """What a transposed or cut weight is a view of."""
    return weight if weight._base is None else weight._base


def is_weight(value):
    return value.requires_grad and base_of(value).is_leaf


def add_gradient(call, name, gradient):
    before, gradient = getattr(call, name), flat(gradient).detach().clone()
    setattr(call, name, gradient if before is None else before + gradient)


def mark(weight):
    return tuple(weight.detach()[:2, :3].flatten()[:6].tolist())


def unit(rows):
    rows = rows.float() - rows.float().mean(dim=1, keepdim=True)
    return rows / (rows.norm(dim=1, keepdim=True) + 1e-9)


def ratio(a, b):
    """The factor r of the nearest r * a to b, and how far off that is, as a share."""
    a, b = (torch.as_tensor(each).double().flatten() for each in (a, b))
    r = (a @ b / (a @ a + 1e-30)).item()
    return r, ((b - r * a).norm() / (b.norm() + 1e-30)).item()


def unlike_normal(values):
    """How independent values differ from standard normal ones, in words, if they do."""
    v = values.double().flatten()
    n, mean, square, fourth = len(v), v.mean(), (v**2).mean(), (v**4).mean()
    wide = abs(mean) > 6 / n**0.5 or abs(square - 1) > 6 * (2 / n) ** 0.5
    if wide or abs(fourth - 3) > 6 * (96 / n) ** 0.5:
        return f"mean {mean:.2f}, deviation {v.std():.2f}, largest {v.abs().max():.2f}"
    return ""


# Running a submission


def forbid(folder):
    """Let this process write into a folder only; no network, no other programs."""
    changes = "mkdir remove rename rmdir link symlink truncate chmod chown utime"
    changes = {f"os.{name}" for name in changes.split()}
    refused = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
    refused |= {"socket.connect", "socket.getaddrinfo", "socket.sendto"}

    def refuse(event, args):
        if event in refused:
            raise PermissionError("no network and no other programs: the grader's rule")
        paths = args if event in changes else ()
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths = args[:1]
        for path in paths:
            if is_path(path) and outside(path, folder):
                raise PermissionError(f"no writing outside of the run's folder: {path}")

    sys.addaudithook(refuse)


def is_path(value):
    return isinstance(value, str | bytes | os.PathLike)


def outside(path, folder):
    path = Path(os.path.realpath(os.fsdecode(path)))
    return not path.is_relative_to(folder) and str(path) != os.devnull


def prepare(watch, folder, raw):
    """Replace, in this process, what reaches out of it and what has to be seen."""

    def wrap(owner, name, note, writes=True):
        """Call note first; skip what would write outside of the folder."""
        old = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if not watch.inner:  # what a noted call calls is not noted once more
                watch.safely(note, *args)
            paths = [a for a in (*args, *kwargs.values()) if is_path(a) and writes]
            if any(outside(path, folder) for path in paths):
                return None
            for path in paths:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            watch.inner += 1
            try:
                return old(*args, **kwargs)
            finally:
                watch.inner -= 1

        setattr(owner, name, wrapped)

    def display(formatter, thing, *_):
        if isinstance(thing, plt.Figure):
            watch.note_figure(thing)

    def show(*args, **kwargs):
        for number in plt.get_fignums():
            watch.safely(watch.note_figure, plt.figure(number))
        plt.close("all")

    def one_process(self, *args, num_workers=0, **kwargs):
        for name in "persistent_workers", "prefetch_factor", "multiprocessing_context":
            kwargs.pop(name, None)
        make_loader(self, *args, **kwargs)

    def bar(iterable=(), *args, **kwargs):
        shown = mock.MagicMock()
        shown.__iter__.side_effect = lambda: iter(iterable)
        shown.__enter__.return_value = shown
        return shown

    def nothing(*args, **kwargs):
        return None

    mnist, loader = torchvision.datasets.MNIST, torch.utils.data.DataLoader
    wrap(plt.Figure, "savefig", lambda figure, *_: watch.note_figure(figure))
    wrap(Image.Image, "save", lambda image, *_: watch.note_picture([image]))
    wrap(mpl.image, "imsave", lambda path, array, *_: watch.note_picture([array]))
    wrap(torch, "save", nothing)
    wrap(DisplayFormatter, "format", display, writes=False)
    kinds, mnist._check_legacy_exist = watch.sources, nothing
    wrap(mnist, "__init__", lambda self, *_: kinds.append(type(self).__name__), False)
    mnist.raw_folder = property(lambda self: str(raw))
    make_loader, loader.__init__ = loader.__init__, one_process
    plt.show, mpl.use, plt.switch_backend = show, nothing, nothing
    make, go = os.mkdir, os.chdir
    os.mkdir = lambda path, *a, **k: outside(path, folder) or make(path, *a, **k)
    os.chdir = lambda path: outside(path, folder) or go(path)
    os.system = lambda command: 0
    torch.cuda.is_available = torch.backends.mps.is_available = lambda: False
    torch.set_default_device = torch.cuda.synchronize = torch.cuda.set_device = nothing
    torch.compile = torch.jit.script = lambda model=None, **k: model or (lambda m: m)
    bar.write = print
    stubs = ["google", "google.colab"]
    if not importlib.util.find_spec("tqdm"):
        stubs += ["tqdm", "tqdm.auto", "tqdm.notebook", "tqdm.std"]
    for name in stubs:
        sys.modules[name] = mock.MagicMock(__path__=[], __spec__=None, tqdm=bar)
        sys.modules[name].trange = lambda *args, **kwargs: bar(range(*args[:3]))
    return show


def run(path, folder, timeout):
    """Run a submission's cells: what was seen, and what became of them."""
    text = path.read_text("utf-8-sig")
    script = [{"cell_type": "code", "source": text}]
    cells = script if path.suffix == ".py" else json.loads(text)["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    cells = [(cell, "".join(cell["source"])) for cell in cells]
    counts = [cell.get("execution_count") for cell, source in cells if source.strip()]
    sources = [source for _, source in cells if source.strip()]
    end = Note(path=path, sources=sources, counts=counts, error=None, ran=0)
    digits = write_digits(folder / "digits")
    os.chdir(folder)
    os.environ |= dict.fromkeys(("HOME", "IPYTHONDIR"), str(folder))
    tempfile.tempdir, sys.dont_write_bytecode = str(folder), True
    sys.argv, sys.path[:0] = [str(path)], [str(folder), str(path.parent)]
    plt.switch_backend("Agg")
    torch.set_num_threads(1)
    watch = Watch(digits)
    show = prepare(watch, folder, digits.raw)
    forbid(folder)
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    shell.user_ns["__file__"], shell.showtraceback = str(path), lambda *a, **k: None
    shell.system = shell.getoutput = lambda command, **k: []
    magics = {"time", "timeit", "capture", "writefile"}  # the others do nothing
    line, cell = shell.run_line_magic, shell.run_cell_magic
    shell.run_line_magic = lambda n, *a, **k: line(n, *a, **k) if n in magics else None
    shell.run_cell_magic = lambda n, *a: cell(n, *a) if n in magics else None
    register_optimizer_step_post_hook(
        lambda *args: watch.safely(watch.after_step, *args)
    )

    def stop(*_):
        raise OutOfTime(f"stopped after {timeout} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, timeout, 5)
    for watch.cell, source in enumerate(sources, start=1):
        with watch, capture_output():
            result = shell.run_cell(source)
            show()
        end.error = result.error_before_exec or result.error_in_exec
        if isinstance(end.error, SystemExit) and not end.error.code:
            end.error = None
        if end.error:
            break
        end.ran += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    return watch, end


# What was seen, in the specification's terms


def heads_of(calls):
    """Pairs of outputs that may be the heads': two layers', or the halves of one's."""
    for (_, a), (j, b) in itertools.combinations(enumerate(calls), 2):
        if a.value.shape == b.value.shape:
            yield j, (a, a.value, a.grad), (b, b.value, b.grad)
    for j, b in enumerate(calls):
        half = b.shape[1] // 2
        parts = slice(half), slice(half, 2 * half)
        yield j, *((b, b.value[:, part], b.grad[:, part]) for part in parts)


def find_latent(detail):
    """The layer that is fed z = f(mean) + g(deviation) * noise, and all of these."""
    functions = [*ACTIVATIONS.values()]
    for j, *heads in heads_of(detail.calls):
        size, later = heads[0][1].shape[1], detail.calls[j + 1 :]
        for first, start, turn in itertools.product(later, (0, 10), (1, -1)):
            mean, std = heads[::turn]
            z = first.given[:, start : start + size]
            noises = [e for e in detail.noise if e.shape == z.shape]
            if mean[0] is not std[0] and mean[0].given.equal(std[0].given):
                noises.append(torch.zeros_like(z))  # z may be the mean itself
            for noise in noises if z.shape == mean[1].shape else ():
                m, s = (
                    torch.stack([f(a) for f in functions]) for a in (mean[1], std[1])
                )
                off = (m[:, None] + s * noise - z).abs().amax((2, 3)).nan_to_num(1e9)
                if off.min() < 1e-4 * (1 + z.abs().max()):
                    f, g = divmod(off.argmin().item(), len(functions))
                    f, g = [*ACTIVATIONS][f], [*ACTIVATIONS][g] if noise.any() else None
                    found = {"mean": mean, "std": std, "f": f, "g": g, "first": first}
                    return Note(**found, noise=noise, start=start, size=size)
    raise CannotTell("z = f(mean) + g(deviation) · noise was looked for at all layers")


def find_reconstruction(detail, x, gray):
    """Kind of the reconstruction term, its factor, and whose pixels are the target."""
    last = [call for call in detail.calls if call.value.shape == x.shape]
    if not last:
        raise CannotTell("a trained layer with an output for each pixel was looked for")
    targets = ("input", x), ("gray", gray / 255), ("rounded", (gray / 255).round())
    fits = []
    for name, (whose, y) in itertools.product(RECONSTRUCTIONS, targets):
        gradient = RECONSTRUCTIONS[name](last[-1].value.double(), y)
        factor, off = ratio(gradient, last[-1].grad)
        fits.append((off, len(fits), factor, name, whose))
    off, _, factor, name, whose = min(fits)
    if off > 0.01:
        raise CannotTell(
            "the gradient at the decoder's outputs is that of no known loss"
        )
    return Note(name=name, factor=factor, whose=whose, rows=len(x))


def find_regularizer(at):
    """What is added to the reconstruction: kind, factor, how z has gradients."""
    mean, std = (each[1].double().requires_grad_() for each in (at.mean, at.std))
    whole = torch.cat([at.mean[2], at.std[2]]).double()
    through = at.first.given_grad
    through = 0 if through is None else through[:, at.start : at.start + at.size]

    def back(value):
        ones = torch.autograd.grad(value.sum(), (mean, std), allow_unused=True)
        return torch.cat([torch.zeros_like(mean) if g is None else g for g in ones])

    fits = []
    for g in [at.g] if at.g else ACTIVATIONS:
        for path in "both", "mean":
            m, s, e = ACTIVATIONS[at.f](mean), ACTIVATIONS[g](std), at.noise.double()
            noise = s * e if path == "both" else (s * e).detach()
            rest = whole - back((m + noise) * through)
            if rest.norm() < max(1e-4 * whole.norm(), 1e-12):
                name = "nothing" if whole.norm() > 1e-9 else "lost in saturation"
                return Note(name=name, factor=0, off=0, path=path, g=at.g)
            for name, formula in REGULARIZERS.items():
                m, s = ACTIVATIONS[at.f](mean), ACTIVATIONS[g](std)
                factor, off = ratio(back(formula(m, s, e)), rest)
                fits.append((off, len(fits), factor, name, path, g))
    off, _, factor, name, path, g = min(fits)
    name = name if off < 0.02 else f"not the KL ({off:.0%} off)"
    return Note(name=name, factor=factor, off=off, path=path, g=g)


def activation(before, after):
    """The name of what was applied to a layer's output."""
    if before.value.shape == after.given.shape:
        for name, f in ACTIVATIONS.items():
            if f(before.value).allclose(after.given, atol=1e-5, rtol=1e-4):
                return name
    return "something else"


def reduction(factor, rows, size, items):
    """How a term is summed or averaged, by its factor."""
    known = {1: "summed", 1 / rows: f"summed over the {items}, averaged over the batch"}
    known |= {1 / size: f"averaged over the {items}, summed over the batch"}
    known |= {1 / rows / size: f"averaged over {items} and batch"}
    near = [words for value, words in known.items() if abs(factor / value - 1) < 0.02]
    return near[0] if near else f"multiplied by {factor:.3g}"


def require(*checks):
    """Pairs of what has to hold, and what is said where it does not."""
    faults = [said for holds, said in checks if not holds]
    if faults:
        raise NotMet("; ".join(faults))


def find_tiles(sheets, images, tolerance):
    """Which of the images (N, 28, 28) stand somewhere in the sheets."""
    found, blank = np.zeros(len(images), bool), np.ptp(images, axis=(1, 2)) == 0
    probe = np.random.default_rng(0).normal(size=(28, 28)).astype(np.float32)
    wanted, near = (images * probe).sum((1, 2)), 80 * tolerance
    for sheet in sheets:
        tiles = np.lib.stride_tricks.sliding_window_view(sheet, (28, 28))
        seen = F.conv2d(*(torch.tensor(a)[None, None] for a in (sheet, probe)))
        seen = seen.numpy().ravel()
        order = seen.argsort()
        bounds = seen[order].searchsorted([wanted - near, wanted + near])
        for n in np.flatnonzero(~found & ~blank & (bounds[0] < bounds[1])):
            at = np.unravel_index(order[slice(*bounds[:, n])], tiles.shape[:2])
            for pixel in zip((14, 7, 21, 5, 23), (14, 20, 6, 11, 17)):  # spares copies
                off = np.abs(
                    sheet[at[0] + pixel[0], at[1] + pixel[1]] - images[n][pixel]
                )
                at = at[0][off < tolerance], at[1][off < tolerance]
            found[n] = (np.abs(tiles[at] - images[n]).max((1, 2)) < tolerance).any()
    return found


class Judge:
    """What one run of training, the figures and the cells say of each line.

    A line's method returns what is to be said where the line is met.
    """

    def __init__(self, watch, end, trained):
        self.watch, self.end = watch, end
        self.steps = trained.steps if trained else []
        self.details = trained.details if trained else []
        self.stop = f"cell {end.ran + 1}" if end.error else ""

    def verdict(self, line):
        """met, NOT MET or cannot tell; the last too where the grader itself fails."""
        stopped = f"; the run stopped in {self.stop}" if self.stop else ""
        try:
            if not self.details and line not in ("S2.1", "S2.2", "S3.1"):
                raise CannotTell("no step of an optimizer of PyTorch was seen")
            said = getattr(self, line.replace(".", "_"))()
            return f"met: {said}" if said else "met"
        except NotMet as fault:
            if not self.watch.trouble:
                return f"NOT MET: {fault}"
            return f"cannot tell: the grader itself failed, {self.watch.trouble!r}"
        except CannotTell as why:
            return f"cannot tell: {why}{stopped}"
        except Exception as error:  # noqa: BLE001, says nothing of the line
            return f"cannot tell: the grader itself fails here, {error!r}{stopped}"

    latents = cached_property(lambda self: [*map(find_latent, self.details)])
    regularizers = cached_property(lambda self: [*map(find_regularizer, self.latents)])

    @cached_property
    def entries(self):
        """Of each step looked at: what is given for each image, which image it is."""
        found = []
        for step, given in ((d.step, d.entry.given.double()) for d in self.details):
            if step.index is None:
                raise CannotTell(
                    "images of the data set at a trained layer were looked for"
                )
            index = step.index[: len(given)]
            image, gray = given[:, step.start :][:, :784], self.watch.gray[index]
            onehot = F.one_hot(self.watch.labels[index], 10).double()
            found.append(Note(given=given, image=image, gray=gray, onehot=onehot))
        return found

    @cached_property
    def reconstructions(self):
        pairs = zip(self.details, self.entries)
        return [find_reconstruction(d, each.image, each.gray) for d, each in pairs]

    @cached_property
    def epochs(self):
        """Last step and number of images of each epoch.

        An epoch ends where an image would be seen again; where batches are drawn with
        replacement, with the number of images.
        """
        found, seen, total = [], set(), 0
        for t, step in enumerate(self.steps):
            if step.index is None:
                self.check_sizes()
                raise CannotTell("which images the batches hold is not seen")
            batch = {*step.index.tolist()}
            again = (
                total // self.watch.size > len(found) if self.repeated else seen & batch
            )
            if again:
                found.append((t - 1, len(seen)))
                seen = set()
            seen, total = seen | batch, total + step.rows
        return [*found, (t, len(seen))]

    @cached_property
    def repeated(self):
        known = [step for step in self.steps if step.index is not None]
        return any(len({*step.index.tolist()}) < step.rows for step in known)

    def check_sizes(self):
        """Where sizes of the real data are written in, numbers of steps say little."""
        code = re.sub("#.*", "", "\n".join(self.end.sources))
        if re.search(r"\b(60_?000|50_?000|93[78])\b", code):
            raise CannotTell(
                "the code has sizes of the real data written in; these differ"
            )

    @property
    def regularizer(self):
        """The first that is a KL: its weight may grow from nothing."""
        kls = [found for found in self.regularizers if found.name in KLS]
        return kls[0] if kls else self.regularizers[0]

    def S1_1(self):
        name, first, weights = self.regularizer.name, self.latents[0], []
        term, kl = self.reconstructions[0], self.regularizers[0]
        for one, two, at in zip(self.reconstructions, self.regularizers, self.latents):
            if (at.f, at.g) == (first.f, first.g) and two.name in (name, "nothing"):
                weights.append(two.factor / one.factor)
        equal = all(abs(weight - 1) < 0.02 for weight in weights)
        if name not in KLS:
            raise CannotTell("the regularizer is not the KL (see S5.2)")
        if not equal and term.name != CROSS_ENTROPY:
            raise CannotTell(f"{term.name} and KL have no common scale (see S5.1)")
        words = f"cross-entropy {reduction(term.factor, term.rows, 784, 'pixels')}; "
        words += f"KL {reduction(kl.factor, term.rows, first.size, 'dimensions')}"
        swapped = "KL(p ‖ q), the arguments are swapped; expected KL(q ‖ p)"
        require(
            (equal, f"the KL weighs {spread(weights)} times, expected once: {words}"),
            ("swapped" not in name, swapped),
        )
        return words

    def S1_2(self):
        sizes = [size for _, size in self.epochs]
        sizes = {*(sizes[:-1] or sizes)}  # the last may be unfinished: see S5.3
        if self.stop and len(self.epochs) == 1:
            raise CannotTell("not one epoch was finished")
        if sizes != {self.watch.size}:
            self.check_sizes()
        tested = any((step.index >= self.watch.size).any() for step in self.steps)
        said = f"an epoch has {' or '.join(map(str, sizes))} of the {self.watch.size}"
        require(
            (not tested, "images of the test set are trained on"),
            (not self.repeated, "a batch holds an image more than once"),
            (
                self.repeated or tested or sizes == {self.watch.size},
                f"{said} images, expected all",
            ),
        )

    def S2_1(self):
        names = set()
        for source in self.end.sources:
            with contextlib.suppress(SyntaxError):
                tree = ast.parse(TransformerManager().transform_cell(source))
                for node in ast.walk(tree):
                    if isinstance(node, ast.Import):
                        names |= {each.name.split(".")[0] for each in node.names}
                    elif isinstance(node, ast.ImportFrom) and not node.level:
                        names.add(node.module.split(".")[0])
        own = {each.stem for each in self.end.path.parent.iterdir()}
        others = ", ".join(
            sorted(names - EXPECTED - ALLOWED - sys.stdlib_module_names - own)
        )
        expected = "expected are PyTorch, Torchvision, Matplotlib and NumPy"
        require(
            (not others, f"also depends on {others}; {expected}"),
            ("torch" in names, f"does not import PyTorch; {expected}"),
        )

    def S2_2(self):
        error, counts = self.end.error, [c for c in self.end.counts if c is not None]
        require((self.end.path.suffix != ".py", "a script, expected one notebook"))
        said = f"{type(error).__name__}: {error}"
        if outer(error):
            raise CannotTell(f"{outer(error)} ({said})")
        if isinstance(error, IndexError | ValueError | RuntimeError):
            self.check_sizes()
        ordered = all(b == a + 1 for a, b in itertools.pairwise(counts))
        require(
            (not error, f"stops in {self.stop}: {said}"),
            (ordered, f"not run from top to bottom: the saved counts are {counts}"),
        )

    def S3_1(self):
        kinds = {*self.watch.sources}
        if not kinds:
            raise CannotTell(
                "torchvision.datasets.MNIST was looked for; it is not loaded"
            )
        require(("MNIST" in kinds, f"{', '.join(kinds)} is loaded, expected MNIST"))

    def S3_2(self):
        image, expected = self.entries[0].image, (self.entries[0].gray / 255).round()
        values, wrong = image.unique(), (image != expected).double().mean()
        said = f"images, {wrong:.1%} of whose pixels are not the rounded ones"
        if {*values.tolist()} - {0, 1}:
            said = f"{len(values)} values, {values[0]:.3g} to {values[-1]:.3g}"
        require(
            (not wrong, f"the first layer is given {said}; expected 0 and 1, rounded")
        )

    def S4_0(self):
        try:
            size = self.latents[0].size
        except CannotTell:
            pairs = [pair for _, *pair in heads_of(self.details[0].calls)]
            pairs = [(a, b) for (a, *_), (b, *_) in pairs if a is not b]
            sizes = {a.shape[1] for a, b in pairs if a.given.equal(b.given)}
            if len(sizes) != 1:
                raise
            (size,) = sizes
        require((size == 40, f"z has {size} dimensions, expected 40"))

    def block(self, calls, after, expected, what, start, size):
        """Checks of two layers: their sizes, ReLU, what is joined by the class."""
        shapes = "-".join(f"({c.shape[0]}, {c.shape[1]})" for c in calls)
        given, onehot = calls[0].given.double(), self.entries[0].onehot
        rest = torch.cat([given[:, :start], given[:, start + size :]], dim=1)
        joined = rest.shape == onehot.shape and rest.equal(onehot)
        hidden = activation(calls[0], after)
        other = (
            f"{what} is joined by {rest.shape[1]} values that are not the one-hot class"
        )
        two = [call.shape for call in calls[:2]]
        if len(two) == 2 and two[0][1] == two[1][1] and two[1][0] == 10:
            raise CannotTell(f"{what} and class enter by layers of their own: {shapes}")
        return [
            (shapes == expected, f"layers {shapes}, expected {expected}"),
            (hidden == "ReLU", f"{hidden} after the hidden layer, expected ReLU"),
            (
                joined,
                f"{other}, expected 10 that are"
                if rest.numel()
                else f"{what} is not joined by the class",
            ),
            (not start, f"the class stands before {what}, expected after it"),
        ]

    def S4_1(self):
        at, calls, entry = self.latents[0], self.details[0].calls, self.details[0].entry
        end = min(calls.index(at.mean[0]), calls.index(at.std[0]))
        before = calls[calls.index(entry) : end] or calls[:1]
        start = self.details[0].step.start
        g = at.g or self.regularizers[0].g or "sigmoid"
        require(
            *self.block(before, at.mean[0], "(794, 256)", "the image", start, 784),
            (at.f == "sigmoid", f"the mean has {at.f}, expected a sigmoid"),
            (g == "sigmoid", f"the standard deviation has {g}, expected a sigmoid"),
        )

    def S4_2(self):
        at, calls = self.latents[0], self.details[0].calls
        after = calls[calls.index(at.first) :]
        ends = [n for n, call in enumerate(after, start=1) if call.shape[1] == 784]
        after = after[: ends[0]] if ends else after
        expected = f"({at.size + 10}, 256)-(256, 784)"
        require(
            *self.block(
                after, after[min(1, len(after) - 1)], expected, "z", at.start, at.size
            )
        )
        found = self.reconstructions[0].name
        sigmoid = "without" not in found and "tanh" not in found
        bare = any(picture.bare for picture in self.shown)
        require(
            (sigmoid, f"the outputs have no sigmoid: {found}"),
            (not bare, "the outputs have no sigmoid: samples are shown without it"),
        )

    def S4_3(self):
        at, noise = self.latents[0], torch.cat([each.noise for each in self.latents])
        same = noise.any() and any(
            len(n) > 1 and (n == n[0]).all() for n in (at.noise for at in self.latents)
        )
        odd = unlike_normal(noise) if noise.any() and not same else ""
        through = at.first.given_grad is not None
        if through and noise.any():
            through = (
                self.regularizers[0].path == "both" or self.regularizers[0].off > 0.02
            )
        trick = "which the reparameterization trick lets pass"
        require(
            (noise.any(), "z is the mean itself, expected mean + deviation · noise"),
            (through, f"z does not pass the gradient on to both heads, {trick}"),
            (not same, "all images of a batch have the same noise"),
            (not odd, f"the noise is not standard normal: {odd}"),
        )
        return "z = mean + deviation · noise; what the model returns is for the reader"

    def S5_1(self):
        found = self.reconstructions[0]
        whose = f"compared with the {found.whose} images, expected the input images"
        require(
            (found.name == CROSS_ENTROPY, f"{found.name}, expected {CROSS_ENTROPY}"),
            (found.whose == "input", whose),
        )
        return f"{found.name}, {reduction(found.factor, found.rows, 784, 'pixels')}"

    def S5_2(self):
        found = self.regularizer
        expected = "expected the KL divergence to the standard normal"
        said = f"what is added to the cross-entropy is {found.name}, {expected}"
        require((found.name in KLS, said))
        return found.name

    def S5_3(self):
        settings = [each for step in self.steps for each in step.optimizers]
        kinds, rates, decays = (sorted({*each}) for each in zip(*settings))
        largest = max(step.rows for step in self.steps)
        first, last = self.details[0], self.details[-1]
        left = [c for c in last.calls if is_weight(c.weight)]
        left = [c.shape for c in left if c.pointer not in last.step.owned]
        stale = last.stale > 0.01 > first.stale
        checks = [
            (kinds == ["Adam"], f"{' and '.join(kinds)}, expected Adam"),
            (rates == [0.001], f"learning rate {spread(rates)}, expected 0.001"),
            (decays == [0], f"weight decay {spread(decays)}, expected none"),
            (largest == 64, f"batches of {largest}, expected 64"),
            (not left, f"the optimizer leaves out layers {left}"),
            (not stale, "gradients of earlier batches are added: no zero_grad"),
        ]
        try:
            n = self.epochs_done()
            if n != 11:
                self.check_sizes()
                if self.stop and self.steps[-1].cell == self.end.ran + 1:
                    raise CannotTell(
                        f"the run stopped in training, after {n:.3g} epochs"
                    )
            checks.append((n == 11, f"{n:.3g} epochs, expected 11"))
        except CannotTell:
            require(*checks)
            raise
        require(*checks)

    def epochs_done(self):
        *before, (_, size) = self.epochs
        whole = before[-1][1] if before else self.watch.size
        return len(before) + (1 if self.repeated else min(1, size / whole))

    def S6_1(self):
        rows = np.array([step.rows for step in self.steps], float)
        count = min(len(step.scalars) for step in self.steps)
        ends = slice(count), slice(-count, None)
        terms = np.hstack([[s.scalars[end] for s in self.steps] for end in ends]).T
        terms = np.vstack([terms, terms / np.maximum(rows, 1), terms * rows])
        lines = [line for p in self.watch.pictures for line in p.lines if len(line) > 1]
        for line in (line for line in lines if len(line) == len(rows)):
            if any(ratio(term, line)[1] < 1e-3 for term in terms):
                return
        expected = f"expected the loss of each of {len(rows)} iterations"
        sizes = sorted({len(line) for line in lines})
        if self.stop:
            raise CannotTell(f"a graph of the losses was looked for, {expected}")
        if sizes and sizes[-1] >= len(rows):
            raise CannotTell(
                f"a line of {sizes[-1]} points is none that was recognized, {expected}"
            )
        self.check_sizes()
        if sizes:
            raise NotMet(f"lines of {spread(sizes)} points are drawn, {expected}")
        raise NotMet(f"no line is drawn, {expected}")

    @cached_property
    def shown(self):
        """For each picture: the samples found in it, as step, digit and z."""
        at, steps = self.latents[0], {s.mark: t for t, s in enumerate(self.steps)}
        found, images = [], [torch.empty(0, 784)]
        for each in self.watch.decoded:
            rows, width = len(each.call.value), at.first.shape[0]
            given = [g for g in each.inputs if g.shape == (rows, width)]
            if each.mark in steps and given:
                z = given[-1][:, at.start : at.start + at.size]
                ends = given[-1][:, : at.start], given[-1][:, at.start + at.size :]
                onehot = torch.cat(ends, dim=1)
                known = (
                    onehot.shape[1] == 10 and (onehot.amax(1) == onehot.sum(1)).all()
                )
                digit = onehot.argmax(1).tolist() if known else [None] * rows
                z = map(tuple, z.tolist())
                found += zip([steps[each.mark]] * rows, digit, z)
                images.append(each.call.value)
        bare = torch.cat(images).reshape(-1, 28, 28)
        gray, bare = bare.sigmoid().numpy(), bare.numpy()
        pictures = [copy.copy(each) for each in self.watch.pictures]  # others judge too
        for picture in pictures:
            bytes_ = [sheet / 255 for sheet in picture.sheets if sheet.max() > 1.5]
            exact = [sheet for sheet in picture.sheets if sheet.max() <= 1.5]
            seen = np.zeros(len(found), bool)
            for wanted in (gray, 1 - gray, gray.round(), 1 - gray.round()):
                if not seen.any():
                    seen |= find_tiles(bytes_, wanted, 0.0045)
                    seen |= find_tiles(exact, wanted, 1e-4)
            picture.bare = False
            if not seen.any():
                seen = find_tiles(picture.sheets, bare, 1e-4)
                picture.bare = seen.any()
            picture.samples = [found[n] for n in np.flatnonzero(seen)]
        return pictures

    def S6_2(self):
        ends = {epoch: t for epoch, (t, _) in enumerate(self.epochs, start=1)}
        normal, every, odd = {}, {}, {}
        for picture in self.shown:
            for t in {t for t, *_ in picture.samples}:
                own = {(digit, z) for step, digit, z in picture.samples if step == t}
                said = unlike_normal(torch.tensor([*{z for _, z in own}]))
                odd[t] = said or odd.get(t)
                every.setdefault(t, set()).update(own)
                normal.setdefault(t, set()).update(() if said else own)
        cells = sorted({p.cell for p in self.watch.pictures if p.sheets})
        if not every and (cells or self.stop):
            raise CannotTell(
                f"what the decoder returned was looked for in cells {cells}"
            )
        if any(None in dict(own) for own in every.values()):
            raise CannotTell("which digits the samples are: no one-hot class beside z")
        names = {t: f"epoch {epoch}" for epoch, t in ends.items()}
        at = ", ".join(names.get(t, f"step {t + 1}") for t in sorted(every)) or "none"
        faults = []
        for epoch in 1, 6, 11:
            good, found = (
                Counter(digit for digit, _ in each.get(ends.get(epoch), ()))
                for each in (normal, every)
            )
            few, fewer = (min(range(10), key=lambda d: c[d]) for c in (found, good))
            if epoch not in ends and not self.stop:
                if faults:
                    break
                raise CannotTell(f"there is no epoch {epoch} (see S5.3)")
            if not found:
                faults.append(f"no samples after epoch {epoch} (shown: {at})")
            elif found[few] < 10:
                faults.append(
                    f"{found[few]} different samples of {few} after epoch {epoch}"
                )
            elif good[fewer] < 10:
                faults.append(
                    f"z after epoch {epoch} is not standard normal: {odd[ends[epoch]]}"
                )
        if faults and self.stop:
            raise CannotTell("; ".join(faults))
        if faults:
            self.check_sizes()
        require((not faults, f"{'; '.join(faults)}; expected 10 of each digit"))

    def S6_3(self):
        cells = sorted({picture.cell for picture in self.shown if picture.samples})
        cells = (
            f"the samples in what cells {cells} show" if cells else "no samples found"
        )
        raise CannotTell(f"a claim for the reader to judge, by {cells}")

    S6_4 = S6_3


def spread(values):
    ends = f"{min(values):.3g}", f"{max(values):.3g}"
    return " to ".join(dict.fromkeys(ends))


def outer(error):
    """In words, what an error says of the place of the run, not of the submission."""
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed here"
    if isinstance(error, OSError):
        return "a file, a network or a program of the submission's own is not here"
    if isinstance(error, OutOfTime | MemoryError):
        return "the run was too long or too large"
    if isinstance(error, SystemExit):
        return "arguments are wanted, or the code exits"
    wanted = re.search(
        "cuda|nvidia|can't allocate memory|raw_input", str(error), re.IGNORECASE
    )
    return f"{wanted[0]} is not here" if wanted else ""


def happened(judge, runs):
    """What became of the run, and what it trained."""
    end, said = judge.end, ""
    if end.error:
        said = f"; stopped in {judge.stop}: {type(end.error).__name__}: {end.error}"
    said = f"Ran {end.ran} of {len(end.sources)} cells{said}."
    if not judge.details:
        return f"{said} No training with an optimizer of PyTorch was seen."
    sizes = ", ".join(f"{c.shape[0]}-{c.shape[1]}" for c in judge.details[0].calls)
    kind, rate, _ = judge.steps[0].optimizers[0]
    said += (
        f" Trained{' before that' * bool(end.error)}: layers {sizes}; {kind} {rate:g}, "
    )
    said += (
        f"batches of {max(step.rows for step in judge.steps)}, {len(judge.steps)} steps"
    )
    with contextlib.suppress(Exception):
        said += f", {judge.epochs_done():.3g} epochs"
    if runs > 1:
        said += (
            f". {runs} models were trained: this one is nearest to the specification"
        )
    return f"{said}."


def grade_here(path, folder, timeout, pipe):
    """Grade in this process, which is good for nothing else then."""
    warnings.simplefilter("ignore")  # whatever the grader itself was started with
    with contextlib.suppress(OSError, ValueError):  # not every system has it
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    try:
        watch, end = run(path, folder, timeout)
        judges = [Judge(watch, end, each) for each in [*watch.runs.values()] or [None]]
        sheets = [{line: j.verdict(line) for line in LINES[:13]} for j in judges]
        met = [sum(said.startswith("met") for said in s.values()) for s in sheets]
        best = judges[met.index(max(met))]  # the first of equals
        sheet = {line: best.verdict(line) for line in LINES}
        pipe.send((happened(best, len(watch.runs)), sheet))
    except BaseException as error:  # noqa: BLE001, it has to be told
        said = f"cannot tell: it could not be run or graded: {error!r}"
        pipe.send((f"Not graded: {error!r}.", dict.fromkeys(LINES, said)))


def grade(path, timeout=300):
    """Grade a submission: what happened, and for each line a sentence."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "matplotlib.pyplot"])
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe(duplex=False)
        args = Path(path).resolve(), Path(folder).resolve(), timeout, theirs
        process = context.Process(target=grade_here, args=args)
        process.start()
        theirs.close()
        said = f"its process did not end within {timeout + 60} seconds"
        try:
            if ours.poll(timeout + 60):
                return ours.recv()
        except EOFError:
            said = "its process ended early, by itself or for want of memory"
        finally:
            process.kill()
            process.join()
    return f"Not graded: {said}.", dict.fromkeys(LINES, f"cannot tell: {said}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "paths", nargs="+", type=Path, help="notebooks, scripts, folders"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each")
    options, rows = parser.parse_args(), []
    files = [[p, *p.rglob("*.ipynb"), *p.rglob("*.py")] for p in options.paths]
    files = [path for each in files for path in each if path.is_file()]
    for path in sorted(p for p in files if ".ipynb_checkpoints" not in p.parts):
        what, sheet = grade(path, options.timeout)
        print(
            path, what, *(f"{line}  {said}" for line, said in sheet.items()), sep="\n"
        )
        print(flush=True)
        marks = {"met": "+", "NOT MET": "-", "cannot tell": "?"}
        rows.append([*(marks[said.split(":")[0]] for said in sheet.values()), path])
    if len(rows) > 1:
        print(*LINES, "(+ met, - NOT MET, ? cannot tell)")
        for marks in rows:
            print(*(f"{mark!s:4}" for mark in marks))


if __name__ == "__main__":
    main()
