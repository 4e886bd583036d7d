"""Runs inside the kernel: writes down what a submission does, and judges nothing.

Each note is a dict of plain values and tensors; `what` says of what: a step of an
optimizer, the tensors of such a step, a picture, images that a decoder made.
"""

import ast
import contextlib
import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import resource
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
from ipykernel.kernelapp import IPKernelApp
from matplotlib import pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib_inline.backend_inline import configure_inline_support
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

GIB = 2**30
LAYERS = {"linear", "matmul", "mm", "addmm", "einsum"}
LAYERS |= {"conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"}
DRAWS = {"normal_", "normal", "randn", "randn_like"}
SUMS = {"add", "add_", "sub", "sub_"}
VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "to"}
NAMES = str, torch.device
SILENT = "pip", "conda", "mamba", "bash", "sh", "script", "system", "sx"
SILENT += "matplotlib", "load_ext"  # magics that do nothing here
SAVE = torch.save


class OutOfTime(BaseException):
    """No `except Exception` of a submission catches it."""


def looked_at(step):
    """Whether tensors are kept of a step: at primes, so that no period hides."""
    return step < 3 or not step % (13 if step < 200 else 97 if step < 2000 else 997)


class Watcher(TorchFunctionMode):
    """Notes steps of training, what the decoder is fed, and figures."""

    def __init__(self, notes, digits):
        super().__init__()
        self.path, self.buffer, self.count = notes, [], 0
        self.digits = Digits(digits)
        self.calls, self.edges = deque(maxlen=100), deque(maxlen=100)
        self.noise = deque(maxlen=16)
        self.products, self.sums = deque(maxlen=50), deque(maxlen=16)
        self.scalars, self.decoded, self.encoded = [], [], False
        self.tails, self.latents, self.inputs, self.last = {}, [], (), None
        self.steps, self.optimizers, self.detailed = {}, {}, True
        self.cell, self.probing, self.inner, self.troubled = 0, False, 0, False

    def new(self, what, **values):
        """A note; its number tells the order of events."""
        self.count += 1
        note = {"what": what, "number": self.count, "cell": self.cell}
        return note | values

    def write(self, what, **values):
        self.buffer.append(self.new(what, **values))

    def flush(self):
        if self.buffer:
            with open(self.path, "ab") as file:
                SAVE(self.buffer, file, _use_new_zipfile_serialization=False)
            self.buffer = []

    def safely(self, note, *args):
        """A failure of the grader's own leaves the submission alone, and is told."""
        try:
            with torch._C.DisableTorchFunction():
                return note(*args)
        except Exception as error:  # noqa: BLE001, the sheet tells of it
            if not self.troubled:
                self.troubled = True
                self.write("trouble", error=f"{type(error).__name__}: {error}"[:300])

    # Forward passes

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        if func is not torch.device and any(type(a) in NAMES for a in args):
            args = [on_cpu(value) for value in args]
        kwargs = {key: on_cpu(value) for key, value in (kwargs or {}).items()}
        out, name = func(*args, **kwargs), func.__name__
        if not isinstance(out, torch.Tensor) or name.startswith("_"):
            return out
        if out.requires_grad or name in LAYERS or name in DRAWS or self.tails:
            self.safely(self.note, name, [*args, *kwargs.values()], out)
        return out

    def note(self, name, args, out):
        tensors = [a for a in args if torch.is_tensor(a) and a.is_floating_point()]
        if name == "einsum" and len(tensors) < 2 and len(args) > 1:
            tensors = [a for a in args[1] if torch.is_tensor(a)]
        if name in LAYERS and len(tensors) > 1:
            self.note_layer(name, tensors, out)
            return
        first = tensors[0] if tensors else None
        call = self.tails.get(id(first), [None])[0]
        if call and out is not first:
            self.follow(call, out)
        added = name in SUMS and len(tensors) > 1 and is_leaf(tensors[1])
        if added and call and tensors[1].numel() == call.shape[1] and not call.bias:
            call.bias, call.value = True, flat(out).detach().clone()
        elif call and name not in VIEWS and len(call.then) < 6:
            call.then.append(name)
        if name in DRAWS and out.dim():
            self.note_draw(name, tensors, out)
        if out.requires_grad and len(tensors) > 1:
            self.note_latent(name, tensors, out)
        if out.numel() == 1 and out.requires_grad and len(self.scalars) < 50:
            self.scalars.append(out.detach().clone())  # among them the loss's terms

    def follow(self, call, out):
        """Know what is computed of a layer's output; few are kept, by their ids."""
        self.tails[id(out)] = call, out
        if len(self.tails) > 100:
            del self.tails[next(iter(self.tails))]

    def note_draw(self, name, tensors, out):
        """Standard normal numbers; z itself where mean and deviation are given."""
        values = out.detach().clone()
        if name == "normal" and len(tensors) > 1:
            mean, std = tensors[:2]
            values = ((out - mean) / std).detach()
            self.sums.append((mean, std, values, out))
        self.noise.append(values)

    def note_latent(self, name, tensors, out):
        """z = mean + deviation * noise, known by the noise: it needs no gradient."""
        if name in ("mul", "mul_", "matmul", "bmm"):
            std, noise = tensors[:2] if tensors[0].requires_grad else tensors[1::-1]
            if std.requires_grad and not noise.requires_grad and noise.numel() > 1:
                self.products.append((std, noise.detach().clone(), out))
        elif name == "addcmul" and len(tensors) > 2:
            mean, std, noise = tensors[:3]
            std, noise = (std, noise) if std.requires_grad else (noise, std)
            self.sums.append((mean, std, noise.detach().clone(), out))
        elif name in SUMS:
            for std, noise, product in self.products:
                for mean, other in (tensors[:2], tensors[1::-1]):
                    if other is product and mean is not product:
                        sign = -1 if name[:3] == "sub" and other is tensors[1] else 1
                        self.sums.append((mean, std, sign * noise, out))

    def note_layer(self, name, tensors, out):
        given, weight = tensors[:2]
        if name == "addmm":
            _, given, weight = tensors[:3]
        if name in ("matmul", "mm", "einsum") and not is_leaf(weight):
            given, weight = weight, given
        if name in ("matmul", "mm", "einsum") and not is_weight(weight):
            return  # of data alone, or of values computed in the forward pass
        call = SimpleNamespace(kind=name, weight=weight, then=[], touched=False)
        call.stale = False  # whether its gradient is not zero before the backward pass
        call.given, call.value = flat(given).detach(), flat(out).detach()
        call.shape = call.given.shape[1], call.value.shape[1]
        call.size = (*weight.shape[:2],) if "conv" in name else call.shape
        call.key, call.grad, call.given_grad = key_of(weight), None, None
        call.bias = name == "addmm" or len(tensors) > 2 and "conv" not in name
        call.bias |= "conv" in name and len(tensors) > 2
        before = self.steps.get(call.key)
        self.encoded |= call.shape[0] >= 784
        if call.shape[0] >= 784 or not self.calls:
            self.detailed = before is None or looked_at(len(before))
        if out.requires_grad:
            self.follow(call, out)
            # Not in the call, which hooks of the graph hold: such a ring is never freed.
            self.edges.append(torch.autograd.graph.get_gradient_edge(out))
            if self.detailed:
                call.given, call.value = call.given.clone(), call.value.clone()
            out.register_hook(lambda g: self.safely(self.add_gradient, call, g, "grad"))
            if self.detailed and given.requires_grad:
                given.register_hook(
                    lambda g: self.safely(self.add_gradient, call, g, "given_grad")
                )
            self.calls.append(call)
            if self.detailed and len(self.latents) < 8:
                self.find_latent(call)
        if call.shape[1] == 784:
            self.note_decoded(call)
        self.inputs = [*self.inputs, call.given][-4:]

    def add_gradient(self, call, gradient, name):
        if self.probing:
            return
        if self.detailed and not call.touched and is_leaf(call.weight):
            call.stale = not is_idle(call.weight)
        call.touched = True
        if self.detailed:
            before, gradient = getattr(call, name), flat(gradient).detach().clone()
            setattr(call, name, gradient if before is None else before + gradient)

    def note_decoded(self, call):
        """Keep what a layer with 784 outputs was fed, until it is known whether it is
        part of a step: of many rows some. plain: no image was encoded for it."""
        plain, self.encoded = not self.encoded, False
        kept = [each["given"] for _, each in self.decoded if each["plain"] == plain]
        room = 4000 - sum(len(given[0]) for given in kept if given)
        rows = [g for g in self.inputs if len(g) == len(call.given) and 1 < g.shape[1]]
        every = slice(None, None, 1 + len(call.given) // 500)
        given = [g[every].clone() for g in [*rows, call.given] if g.shape[1] < 300]
        if given and (room > 0 or kept[-1]):  # the first left out is noted
            values = {"given": given if room > 0 else [], "mark": mark(call.weight)}
            values["plain"] = plain
            self.decoded.append((call, self.new("decoded", **values)))

    def find_latent(self, first):
        """Whether a layer is fed a z that was seen, and what z is computed from."""
        for mean, std, noise, z in reversed(self.sums):
            z = flat(z.detach())
            size, wide = z.shape[1], first.given.shape[1]
            for start in dict.fromkeys((0, max(0, wide - size))):
                part = first.given[:, start : start + size]
                if part.shape == z.shape and part.equal(z):
                    found = {"start": start, "size": size, "first": first}
                    found |= {"mean": flat(mean), "std": flat(std), "noise": noise}
                    self.latents.append(found | self.heads_of(mean, std))
                    return

    def heads_of(self, mean, std):
        """The last layers that mean and deviation depend on, and their derivatives."""
        found, self.probing = {}, True
        calls, edges = [*self.calls][:-1], [*self.edges][:-1]  # without first
        for name, value in ("mean", mean), ("std", std):
            found |= {f"{name}_head": None, f"{name}_slope": None}
            if value.requires_grad and calls:
                slopes = torch.autograd.grad(
                    value.sum(),
                    edges,
                    retain_graph=True,
                    allow_unused=True,
                )
                for call, slope in zip(calls, slopes):
                    if slope is not None and slope.any():
                        found[f"{name}_head"] = call
                        found[f"{name}_slope"] = flat(slope)
        self.probing = False
        return found

    # Steps

    def after_step(self, optimizer, *_):
        """Note what led to a step. One without layers of its own adds to the last."""
        calls = [call for call in self.calls if call.touched]
        self.optimizers[optimizer] = None
        settings = [self.settings(optimizer, group) for group in optimizer.param_groups]
        if calls:
            self.note_step(calls, settings, optimizer)
        elif self.last:
            owned = addresses(optimizer)
            self.last["optimizers"] += settings
            self.last["mark"] = mark(self.out)
            for layer in self.last["layers"]:
                layer["owned"] |= layer["key"] in owned
        for each in self.calls, self.edges, self.noise, self.products:
            each.clear()
        self.sums.clear(), self.scalars.clear()
        self.tails, self.latents, self.inputs = {}, [], ()

    def settings(self, optimizer, group):
        serial = [*self.optimizers].index(optimizer)
        names = "lr", "betas", "weight_decay", "amsgrad", "maximize"
        found = {name: group[name] for name in names if name in group}
        found["lr"] = float(found.get("lr", 0))
        found["betas"] = [float(b) for b in found.get("betas", ())]
        return found | {"kind": type(optimizer).__name__, "serial": serial}

    def note_step(self, calls, settings, optimizer):
        entries = [call for call in calls if call.shape[0] >= 784] or calls[:1]
        entries = [call for call in entries if call.key == entries[0].key]
        given = torch.cat([call.given for call in entries])
        run, owned = entries[0].key, addresses(optimizer)
        before = self.steps.setdefault(run, [entries[0].weight])  # kept: for its id
        out = ([call for call in calls if call.shape[1] == 784] or calls[-1:])[-1]
        self.out = out.weight  # which a second optimizer may change
        layers = [
            {
                "key": call.key,
                "name": layer_name(call),
                "owned": call.key in owned or not is_leaf(call.weight),
                "frozen": not call.weight.requires_grad,
                "idle": is_idle(call.weight),
            }
            for call in {call.key: call for call in calls}.values()
        ]
        found = self.digits.find(given)
        self.end_step()
        self.last = self.new(
            "step",
            run=run,
            rows=len(given),
            scalars=torch.tensor([s.item() for s in self.scalars]).double(),
            optimizers=settings,
            layers=layers,
            mark=mark(out.weight),
            **found,
        )
        finite = all(c.grad is None or c.grad.isfinite().all() for c in calls)
        if self.detailed and finite and all(c.grad is not None for c in calls):
            self.note_detail(run, len(before) - 1, calls, entries[0], found)
        before.append(None)
        if len(self.buffer) > 200:
            self.flush()

    def note_detail(self, run, step, calls, entry, found):
        numbers = {id(call): n for n, call in enumerate(calls)}
        names = "kind", "shape", "key", "given", "value", "grad", "given_grad", "then"
        kept = [{name: getattr(call, name) for name in names} for call in calls]
        for each, call in zip(kept, calls):
            each |= {"name": layer_name(call), "bias": call.bias, "stale": call.stale}
            if call.value.numel() > 10**6:
                each |= dict.fromkeys(("given", "value", "grad", "given_grad"))
        latents = [each for each in self.latents if id(each["first"]) in numbers]
        latent = (
            latents
            and {
                name: value.detach().clone()
                if torch.is_tensor(value)
                else numbers.get(id(value))
                if isinstance(value, SimpleNamespace)
                else value
                for name, value in latents[0].items()
            }
            or None
        )
        noise = [n for n in self.noise if n.dim() == 2]
        values = {"calls": kept, "latent": latent, "noise": noise}
        values |= {"entry": numbers[id(entry)]} | found
        self.write("detail", run=run, step=step, **values)
        self.flush()

    # Pictures

    def note_picture(self, arrays, lines=()):
        arrays = [np.asarray(a) for a in arrays]
        arrays = [a for a in arrays if a.dtype.kind in "fiub" and a.size >= 784]
        lows = [float(np.nanmin(a)) for a in arrays]
        lines = [torch.from_numpy(line[:200_000].copy()) for line in lines]
        self.write("picture", images=len(arrays), low=min(lows, default=0), lines=lines)

    def note_figure(self, figure):
        lines = [line.get_ydata() for axes in figure.axes for line in axes.lines]
        for drawn in (each for axes in figure.axes for each in axes.collections):
            lines += [path.vertices[:, 1] for path in drawn.get_paths()]
            lines += [drawn.get_offsets()[:, 1]]
        lines = [np.array(line, np.float64) for line in lines]
        images = figure.findobj(lambda artist: hasattr(artist, "get_array"))
        arrays = [image.get_array() for image in images]
        arrays = [np.ma.filled(a.astype(float), 0) for a in arrays if a is not None]
        self.note_picture(arrays, [line for line in lines if line.size > 1][:200])

    def end_step(self):
        """What was decoded since the last step, and not in the next, is kept."""
        self.buffer += [self.last] if self.last else []
        self.buffer += [values for call, values in self.decoded if not call.touched]
        self.last, self.decoded = None, []

    def end_of_cell(self, *_):
        wide = [call for call in self.calls if call.shape[0] >= 784]
        if not self.steps and wide and self.latents:  # a forward pass shows something
            found = self.digits.find(wide[0].given)
            self.note_detail(0, -1, [*self.calls], wide[0], found)
        self.end_step()
        self.flush()


class Digits:
    """Which images of the data set a batch holds, by where they are light or dark."""

    def __init__(self, raw):
        images = [Path(raw, f"{n}-images-idx3-ubyte") for n in ("train", "t10k")]
        images = np.concatenate([np.fromfile(p, np.uint8)[16:] for p in images])
        self.gray = torch.from_numpy(images).view(-1, 784)
        numbers = torch.Generator().manual_seed(0)
        self.weights = torch.randint(2**40, (784,), generator=numbers).double()
        self.tables = [self.table(127)]
        self.few = len(self.gray) < 5000
        self.profiles = unit(self.gray).T if self.few else None

    def table(self, cut):
        """Keys of the images, where those above the cut are light, and their order."""
        parts = [(g > cut).double() @ self.weights for g in self.gray.split(5000)]
        return torch.cat(parts).sort()

    def find(self, given):
        """Their indices (None: not known), where they start in what a layer is given,
        how they differ from the rounded images; of which rows the index is sure, and
        whether that is so by each pixel, not by likeness."""
        for start in dict.fromkeys((0, given.shape[1] - 784)):
            images = given[:, start : start + 784]
            if start < 0 or images.shape[1] < 784:
                break
            found = self.look_up(images)
            if found:
                rounded = (self.gray[found["index"]] > 127).to(images)
                wrong = (images != rounded).double().mean().item()
                return found | {"start": start, "wrong": wrong}
        return dict.fromkeys(("index", "wrong", "sure", "exact")) | {"start": 0}

    def look_up(self, images):
        middle = (images.min() + images.max()) / 2
        for light in images > middle, images < middle:
            index, same, _ = self.match(light, *self.tables[0])
            if same.all():
                return {"index": index, "sure": same, "exact": True}
        if not self.few:
            return None
        likeness, indices = (unit(images) @ self.profiles).topk(2)
        (best, second), index = likeness.T, indices[:, 0]
        if best.median() <= 0.75:
            return None
        light = images > middle
        if len(self.tables) == 1:  # the cut may be another one; it is sought once
            tables = map(self.table, range(255))
            self.tables += [max(tables, key=lambda t: self.match(light, *t)[1].sum())]
        at, same, alone = self.match(light, *self.tables[1])
        if same.double().mean() > 0.9:
            index = torch.where(same, at, index)
            return {"index": index, "sure": same & alone, "exact": True}
        return {"index": index, "sure": best - second > 0.1, "exact": False}

    def match(self, light, known, order):
        """Indices by keys, whether these are the same, and no other image's."""
        keys = light.double() @ self.weights
        at = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
        after = known[(at + 1).clamp(max=len(known) - 1)]
        return order[at], known[at] == keys, after != keys


def on_cpu(value):
    name = value if isinstance(value, str) else getattr(value, "type", "")
    if isinstance(value, str | torch.device) and name.startswith(("cuda", "mps")):
        return "cpu"
    return value


def flat(tensor):
    """One row for each image."""
    if tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return tensor.flatten(1) if tensor.dim() == 4 else tensor.flatten(0, -2)


def base_of(weight):
    """What a transposed or cut weight is a view of."""
    return weight if weight._base is None else weight._base


def key_of(weight):
    """The address of a weight, or of what it is computed from (weight_norm)."""
    weight, node = base_of(weight), base_of(weight).grad_fn
    while node and node.next_functions and node.next_functions[0][0]:
        node = node.next_functions[0][0]
    return getattr(node, "variable", weight).data_ptr()


def is_leaf(value):
    """Whether it is a weight, a copy of one, or data: computed from nothing."""
    return base_of(value).is_leaf


def is_weight(value):
    return is_leaf(value) and value.dim() == 2


def addresses(optimizer):
    groups = optimizer.param_groups
    return {p.data_ptr() for group in groups for p in group["params"]}


def is_idle(weight):
    """Whether the step did nothing to it: no gradient, or one of zeros."""
    weight = base_of(weight)
    return weight.is_leaf and (weight.grad is None or not weight.grad.any().item())


def layer_name(call):
    kind = {"conv2d": "Conv2d", "conv_transpose2d": "ConvTranspose2d"}
    return f"{kind.get(call.kind, 'Linear')}({call.size[0]}, {call.size[1]})"


def mark(weight):
    """By it a copy of a model, or one that is loaded again, is known."""
    if not is_leaf(weight):
        return []
    return weight.detach().flatten()[:: max(1, weight.numel() // 6)][:6].tolist()


def unit(rows):
    rows = rows.float() - rows.float().mean(dim=1, keepdim=True)
    return rows / (rows.norm(dim=1, keepdim=True) + 1e-9)


# Running anywhere


class StandIn(mock.MagicMock):
    """For anything of a package that is not installed.

    Calling it hands back its first argument to loop over, as a progress bar does.
    """

    used = set()  # noqa: RUF012, of all packages

    def _get_child_mock(self, **names):
        magic = str(names.get("name")).startswith("__")
        return (mock.MagicMock if magic else StandIn)(**names)

    def __call__(self, first=(), *others, **_):
        name = self._extract_mock_name().split(".")[0]
        StandIn.used.add(name)
        if isinstance(first, type) or inspect.isfunction(first):
            return first  # as a decorator
        if isinstance(first, int):
            first = range(*[n for n in (first, *others[:2]) if isinstance(n, int)])
        shown = StandIn(name=name)
        shown.__iter__.side_effect = lambda: iter(first)
        shown.__len__.side_effect = lambda: len(first)
        shown.__enter__.return_value = shown
        return shown


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last to be asked for a module that the submission itself imports.

    What stands in a `try` is not found: the submission has an answer to that.
    """

    def __init__(self, folder, tried):
        self.callers = str(folder), "torch/utils/tensorboard"
        self.tried, self.tops = tried, set()

    def find_spec(self, name, path=None, target=None):
        top, frame = name.split(".")[0], sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        own = any(each in frame.f_code.co_filename for each in self.callers)
        if top in self.tops or (own and top not in self.tried and path is None):
            self.tops.add(top)
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(name=spec.name, __path__=[], __spec__=spec, __version__="99")

    def exec_module(self, module):
        pass


class DropAsserts(ast.NodeTransformer):
    """`assert torch.cuda.is_available()` passes: what follows runs on the CPU."""

    def visit_Assert(self, node):
        wanted = "is_available" in ast.unparse(node)
        return ast.copy_location(ast.Pass(), node) if wanted else node


def nothing(*args, **kwargs):
    return None


def before(owner, name, note):
    """Call note with a function's arguments first."""
    old = getattr(owner, name)

    @functools.wraps(old)
    def wrapped(*args, **kwargs):
        note(*args)
        return old(*args, **kwargs)

    setattr(owner, name, wrapped)


def watch_pictures(watcher):
    """Note each figure and picture as it is shown or saved, once."""

    def noted(owner, name, note):
        old = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if not watcher.inner:  # a figure is saved as a picture in turn
                watcher.safely(note, *args)
            watcher.inner += 1
            try:
                return old(*args, **kwargs)
            finally:
                watcher.inner -= 1

        setattr(owner, name, wrapped)

    noted(FigureCanvasBase, "print_figure", lambda c, *_: watcher.note_figure(c.figure))
    noted(Image.Image, "save", lambda image, *_: watcher.note_picture([image]))
    noted(mpl.image, "imsave", lambda path, array, *_: watcher.note_picture([array]))


def run_anywhere(watcher, shell, raw):
    """Give way where only this machine stops a submission: no GPU, no network, no
    package, no folder, no other program."""
    mnist, loader = torchvision.datasets.MNIST, torch.utils.data.DataLoader

    def note_dataset(self, *_):
        kinds = [
            kind for kind in type(self).__mro__ if "torchvision" in kind.__module__
        ]
        watcher.write("dataset", name=kinds[0].__name__)

    before(mnist, "__init__", note_dataset)
    mnist.raw_folder, mnist._check_legacy_exist = str(raw), nothing
    signature, old = inspect.signature(loader.__init__), loader.__init__

    def in_this_process(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        for option in (
            "num_workers",
            "timeout",
            "multiprocessing_context",
            "pin_memory",
        ):
            given.arguments.pop(option, None)
        for option in ("prefetch_factor", "persistent_workers", "pin_memory_device"):
            given.arguments.pop(option, None)
        old(*given.args, **given.kwargs)

    loader.__init__ = in_this_process
    mpl.use, plt.switch_backend = nothing, nothing
    torch.cuda.is_available = torch.backends.mps.is_available = lambda: False
    torch.set_default_device = torch.cuda.synchronize = torch.cuda.set_device = nothing
    torch.compile = torch.jit.script = lambda model=None, **k: model or (lambda m: m)

    def make_folder(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(args[0], str) and not os.path.isabs(args[0]):
            Path(args[0]).parent.mkdir(parents=True, exist_ok=True)

    sys.addaudithook(make_folder)
    before(torch, "save", lambda _, file="", *__: make_folder("open", (file, "w", 1)))
    shell.ast_transformers.append(DropAsserts())
    shell.system, shell.getoutput = nothing, lambda *_, **__: []
    line, cell = shell.run_line_magic, shell.run_cell_magic
    for name in SILENT:
        shell.register_magic_function(nothing, "line_cell", name)

    def run_plainly(line, cell=None):
        """What measures memory or lines runs the code, by a package not here."""
        shell.run_cell(line if cell is None else cell)

    for name in "memit", "mprun", "lprun", "snakeviz":
        shell.register_magic_function(run_plainly, "line_cell", name)

    def run_line_magic(name, text, _stack_depth=1):
        if shell.find_line_magic(name):  # others do nothing
            return line(name, text, _stack_depth=_stack_depth + 1)
        return None

    def run_cell_magic(name, text, body):
        return cell(name, text, body) if shell.find_cell_magic(name) else None

    shell.run_line_magic, shell.run_cell_magic = run_line_magic, run_cell_magic


def bound(seconds, memory):
    """Bounds of this process: time in cells, memory, the size of a file."""
    for kind, size in (resource.RLIMIT_DATA, memory), (resource.RLIMIT_FSIZE, GIB):
        with contextlib.suppress(OSError, ValueError):  # not every system has it
            resource.setrlimit(kind, (size, size))
    busy = []

    def stop(*_):
        if busy:
            raise OutOfTime(f"stopped after {seconds:g} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    return busy


def start(plan):
    """Be the kernel that plan describes, until it is killed."""
    os.setsid()
    os.chdir(plan["folder"])
    places = dict.fromkeys(("HOME", "IPYTHONDIR", "TMPDIR"), plan["folder"])
    os.environ |= places | {"PIP_NO_INDEX": "1"}
    tempfile.tempdir, sys.dont_write_bytecode = plan["folder"], True
    here = str(Path(__file__).parent.parent)
    sys.path[:] = ["", *(p for p in sys.path if p and not p.startswith(here))]
    sys.meta_path.append(StandIns(plan["folder"], plan["tried"]))
    torch.set_num_threads(1)
    watcher = Watcher(plan["notes"], plan["raw"])
    app = IPKernelApp.instance(parent_handle=os.getppid(), log_level=50)
    app.initialize(["-f", plan["connection"], "--HistoryManager.enabled=False"])
    plt.switch_backend("module://matplotlib_inline.backend_inline")
    configure_inline_support(app.shell, "inline")
    shell = app.shell
    sys.argv = [plan["name"]]
    shell.user_ns["__file__"] = plan["name"]
    run_anywhere(watcher, shell, plan["raw"])
    watch_pictures(watcher)
    register_optimizer_step_post_hook(lambda *a: watcher.safely(watcher.after_step, *a))
    busy = bound(plan["seconds"], plan["memory"])

    def begin(*_):
        watcher.cell += not busy  # not for a cell in a cell, as by %%capture
        busy.append(True)

    def end(*_):
        busy.pop()
        for name in StandIn.used:
            watcher.write("stand-in", name=name)
        watcher.safely(watcher.end_of_cell)

    shell.events.register("pre_run_cell", begin)
    shell.events.register("post_run_cell", end)
    shell.execution_count = 1
    watcher.__enter__()
    Path(plan["notes"]).touch()  # the kernel is ready
    app.start()
