"""Runs a notebook or script and watches what it does: see grade.py, which judges it."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib as mpl
import numpy as np
import torch
import torchvision
from digits import write_digits
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib import pyplot as plt
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from traitlets.config import Config


class Note(SimpleNamespace):
    """Values by name. Two notes are equal only if they are one."""

    __eq__ = object.__eq__


class OutOfTime(BaseException):
    """No `except Exception` of a submission catches it."""


class Watch(TorchFunctionMode):
    """Notes what happens while cells run: steps of training, images, figures."""

    def __init__(self, digits):
        super().__init__()
        self.gray, self.labels = map(torch.cat, zip(digits.train, digits.t10k))
        self.profiles, self.size = unit(self.gray).T, len(digits.train[0])
        self.calls, self.inputs, self.noise = [deque(maxlen=n) for n in (100, 8, 16)]
        self.runs, self.run, self.scalars, self.product = {}, None, [], (None, None)
        self.decoded, self.pictures, self.datasets, self.cell = [], [], [], 0
        self.trouble, self.inner = None, 0

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        if func is not torch.device:
            args = [on_cpu(value) for value in args]
            kwargs = {key: on_cpu(value) for key, value in (kwargs or {}).items()}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.__name__.startswith("_"):
            with contextlib.suppress(Exception):  # the submission's run goes on
                self.note(func.__name__, [*args, *kwargs.values()], out)
        return out

    def note(self, name, args, out):
        if name == "linear" or (name in ("matmul", "mm") and is_leaf(args[1])):
            self.note_layer(args[0], args[1], out)
        elif name == "addmm" or name.startswith("conv"):
            self.note_layer(*args[name == "addmm" :][:2], out)
        elif name == "add" and args[0] is self.product[0] and is_leaf(args[1]):
            self.product[1].value = flat(out).detach().clone()  # with its bias
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
        call.shape, call.grad = (call.given.shape[1], call.value.shape[1]), None
        call.weight, call.key = weight, source_of(weight).data_ptr()
        call.given_grad, self.product = None, (out, call)
        self.inputs.append(call.given)
        if out.requires_grad:
            self.calls.append(call)
            out.register_hook(lambda gradient: add_gradient(call, "grad", gradient))
            if given.requires_grad:
                given.register_hook(lambda g: add_gradient(call, "given_grad", g))
        if call.shape[1] == 784 and len(call.value) <= self.room():
            note = Note(call=call, mark=mark(weight), inputs=[*self.inputs])
            self.decoded.append(note)

    def room(self):
        """How many images a call may have to be kept: fewer when many are."""
        return 1000 if sum(len(e.call.value) for e in self.decoded) < 5000 else 100

    def after_step(self, optimizer, *_):
        """Note what led to a step. One without layers of its own adds to the last."""
        calls = [call for call in self.calls if call.grad is not None]
        if calls:
            self.note_step(calls)
        if self.run:
            step, groups = self.run.steps[-1], optimizer.param_groups
            step.owned |= {p.data_ptr() for group in groups for p in group["params"]}
            known = is_leaf(step.out.weight)  # not if it is computed anew each time
            step.mark = mark(step.out.weight) if known else None
            for group in groups:
                values = group["lr"], group.get("weight_decay", 0)
                step.optimizers.append((type(optimizer).__name__, *values))
        self.calls.clear(), self.noise.clear(), self.scalars.clear()

    def note_step(self, calls):
        entries = [call for call in calls if call.shape[0] >= 784] or calls[:1]
        entries = [call for call in entries if call.key == entries[0].key]
        given = torch.cat([call.given for call in entries])
        out = ([call for call in calls if call.shape[1] == 784] or calls[:1])[-1]
        new = Note(steps=[], details=[], kept=entries[0].weight)  # no other has its key
        self.run = self.runs.setdefault(entries[0].key, new)
        step = Note(cell=self.cell, rows=len(given), index=None, start=0, owned=set())
        step.scalars, step.optimizers = [s.item() for s in self.scalars], []
        step.out = out
        for start in (0, given.shape[1] - 784) if given.numel() >= 784 else ():
            likeness = unit(given[:, start:][:, :784]) @ self.profiles
            if likeness.max(dim=1).values.median() > 0.75:
                step.index, step.start = likeness.argmax(dim=1), start
                break
        self.decoded = [each for each in self.decoded if each.call not in calls]
        for before in self.run.steps[-1:]:
            before.out = None  # keeps little
        self.run.steps.append(step)
        if len(given) and all(call.grad.isfinite().all() for call in calls):
            detail = Note(calls=calls, noise=[*self.noise], step=step, entry=entries[0])
            weight, expected = base_of(out.weight), out.grad.T @ out.given
            alike = weight.grad is not None and weight.grad.shape == expected.shape
            detail.stale = ratio(expected, weight.grad)[1] if alike else 0
            del self.run.details[2:]  # the first two stay, and the last
            self.run.details.append(detail)

    def note_picture(self, arrays, lines=()):
        sheets = [np.ma.filled(np.asarray(a, np.float32), 0) for a in arrays]
        sheets = [a[..., 0] if a.ndim == 3 and a.shape[-1] < 5 else a for a in sheets]
        sheets = [a[0] if a.ndim == 3 else a for a in sheets]
        sheets = [a for a in sheets if a.ndim == 2 and min(a.shape) >= 28]
        self.pictures.append(Note(cell=self.cell, sheets=sheets, lines=lines))

    def note_figure(self, figure):
        lines = [line.get_ydata() for axes in figure.axes for line in axes.lines]
        for drawn in (each for axes in figure.axes for each in axes.collections):
            lines += [path.vertices[:, 1] for path in drawn.get_paths()]
            lines += [drawn.get_offsets()[:, 1]]
        images = figure.findobj(lambda artist: hasattr(artist, "get_array"))
        images = [image.get_array() for image in images]
        self.note_picture(images, [np.array(line, float) for line in lines])

    def safely(self, note, *args):
        """A failure of the grader's own leaves the submission alone."""
        try:
            with torch._C.DisableTorchFunction():
                note(*args)
        except Exception as error:  # noqa: BLE001, verdicts tell of it
            self.trouble = error


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


def source_of(weight):
    """The weight itself, or a parameter that it is computed from (weight_norm)."""
    weight, node = base_of(weight), base_of(weight).grad_fn
    while node and node.next_functions and node.next_functions[0][0]:
        node = node.next_functions[0][0]
    return getattr(node, "variable", weight)


def is_leaf(value):
    """Whether it is a weight, a copy of one, or data: computed from nothing."""
    return base_of(value).is_leaf


def add_gradient(call, name, gradient):
    before, gradient = getattr(call, name), flat(gradient).detach().clone()
    setattr(call, name, gradient if before is None else before + gradient)


def mark(weight):
    """By it a copy of a model, or one that is loaded again, is known."""
    return tuple(weight.detach()[:2, :3].flatten()[:6].tolist())


def unit(rows):
    rows = rows.float() - rows.float().mean(dim=1, keepdim=True)
    return rows / (rows.norm(dim=1, keepdim=True) + 1e-9)


def ratio(a, b):
    """The factor r of the nearest r * a to b, and how far off that is, as a share."""
    a, b = (torch.as_tensor(each).double().flatten() for each in (a, b))
    r = (a @ b / (a @ a + 1e-30)).item()
    return r, ((b - r * a).norm() / (b.norm() + 1e-30)).item()


# Running a submission


def forbid(folder):
    """Let this process write into a folder only; no network, no other programs."""
    changes = "mkdir remove rename rmdir link symlink truncate chmod chown utime chdir"
    changes = {f"os.{name}" for name in changes.split()}
    refused = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
    refused |= {"socket.connect", "socket.getaddrinfo", "socket.sendto"}

    def audit(event, args):
        if event in refused:
            raise PermissionError("no network and no other programs: the grader's rule")
        opens = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        for path in args[:1] if opens else args if event in changes else ():
            if not isinstance(path, str | bytes | os.PathLike):
                continue
            path = Path(os.path.realpath(os.fsdecode(path)))
            if not path.is_relative_to(folder) and str(path) != os.devnull:
                raise PermissionError(f"no writing outside of the run's folder: {path}")
            if opens and not path.parent.exists():  # the folder was not handed in
                path.parent.mkdir(parents=True)

    sys.addaudithook(audit)


def prepare(watch, raw):
    """Replace, in this process, what reaches out of it and what has to be seen."""
    mnist, loader = torchvision.datasets.MNIST, torch.utils.data.DataLoader

    def nothing(*args, **kwargs):
        return None

    def wrap(owner, name, note=nothing):
        """Call note first; leave out what must not be written."""
        old = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if not watch.inner:  # what a noted call calls is not noted once more
                watch.safely(note, *args)
            watch.inner += 1
            try:
                return old(*args, **kwargs)
            except PermissionError:
                return None
            finally:
                watch.inner -= 1

        setattr(owner, name, wrapped)

    def show(*args, **kwargs):
        for number in plt.get_fignums():
            watch.safely(watch.note_figure, plt.figure(number))
        plt.close("all")

    def bar(iterable=(), *args, **kwargs):
        shown = mock.MagicMock()
        shown.__iter__.side_effect = lambda: iter(iterable)
        shown.__enter__.return_value = shown
        return shown

    wrap(plt.Figure, "savefig", lambda figure, *_: watch.note_figure(figure))
    wrap(Image.Image, "save", lambda image, *_: watch.note_picture([image]))
    wrap(mpl.image, "imsave", lambda path, array, *_: watch.note_picture([array]))
    wrap(mnist, "__init__", lambda self, *_: watch.datasets.append(type(self)))
    for owner, name in (torch, "save"), (os, "mkdir"), (os, "chdir"):
        wrap(owner, name)
    mnist.raw_folder, mnist._check_legacy_exist = str(raw), nothing
    loader.num_workers = property(lambda self: 0, nothing)  # all in this process
    plt.show, mpl.use, plt.switch_backend = show, nothing, nothing
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
    text, cells = path.read_text("utf-8-sig"), []
    script = [{"cell_type": "code", "source": text}]
    for cell in script if path.suffix == ".py" else json.loads(text)["cells"]:
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip():
            cells.append(("".join(cell["source"]), cell.get("execution_count")))
    sources, counts = zip(*cells) if cells else ((), ())
    end = Note(path=path, sources=sources, counts=counts, error=None, ran=0)
    digits = write_digits(folder / "digits")
    os.chdir(folder)
    os.environ |= dict.fromkeys(("HOME", "IPYTHONDIR"), str(folder))
    tempfile.tempdir, sys.dont_write_bytecode = str(folder), True
    sys.argv, sys.path[:0] = [str(path)], [str(folder), str(path.parent)]
    plt.switch_backend("Agg")
    torch.set_num_threads(1)
    watch = Watch(digits)
    show = prepare(watch, digits.raw)
    forbid(folder)
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    shell.user_ns["__file__"], shell.showtraceback = str(path), lambda *a, **k: None
    shell.system = shell.getoutput = lambda command, **k: []
    magics = {"time", "timeit", "capture", "writefile"}  # the others do nothing
    line, cell = shell.run_line_magic, shell.run_cell_magic
    shell.run_line_magic = lambda n, *a, **k: line(n, *a, **k) if n in magics else None
    shell.run_cell_magic = lambda n, *a: cell(n, *a) if n in magics else None
    text = shell.display_formatter.formatters["text/plain"]
    text.for_type(
        plt.Figure, lambda figure, *_: watch.safely(watch.note_figure, figure)
    )
    register_optimizer_step_post_hook(lambda *a: watch.safely(watch.after_step, *a))

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
    torch.set_default_dtype(torch.float32)
    return watch, end
