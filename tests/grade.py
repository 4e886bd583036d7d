"""Grade notebooks or scripts against the homework's specification, as they are.

Usage: grade.py [--timeout SECONDS] submission.ipynb [more.ipynb or .py or folders ...]

Each runs on synthetic digits, in a process and a temporary folder of its own. Layers,
noise, gradients, steps and figures are watched: what was trained is graded.
"""

import argparse
import ast
import contextlib
import faulthandler
import itertools
import multiprocessing
import re
import resource
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from IPython.core.inputtransformer2 import TransformerManager
from torch.nn import functional as F
from watch import Note, OutOfTime, is_leaf, ratio, run, unit

COUNTS = {"S1": "12", "S2": "12", "S3": "12", "S4": "0123", "S5": "123", "S6": "1234"}
LINES = [f"{part}.{number}" for part in COUNTS for number in COUNTS[part]]
PACKAGES = "PyTorch, Torchvision, Matplotlib and NumPy"
ALLOWED = {"torch", "torchvision", "matplotlib", "mpl_toolkits", "numpy"}
ALLOWED |= {"IPython", "ipywidgets", "PIL", "google", "tqdm"}  # add nothing to a result
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
CROSS_ENTROPY = "binary cross-entropy"
RECONSTRUCTIONS = {  # of the decoder's last layer, before its activation, and the image
    CROSS_ENTROPY: F.binary_cross_entropy_with_logits,
    "squared error": lambda a, x, **r: F.mse_loss(a.sigmoid(), x, **r),
    "absolute error": lambda a, x, **r: F.l1_loss(a.sigmoid(), x, **r),
    "squared error without a sigmoid": F.mse_loss,
    "squared error after tanh": lambda a, x, **r: F.mse_loss(a.tanh(), x, **r),
    f"{CROSS_ENTROPY} with a second sigmoid": lambda a, x, **r: (
        F.binary_cross_entropy_with_logits(a.sigmoid(), x, **r)
    ),
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


class CannotTell(Exception):
    """Says what was looked for."""


def heads_of(calls):
    """Pairs of outputs that may be the heads': two layers', or the halves of one's."""
    for (_, a), (j, b) in itertools.combinations(enumerate(calls), 2):
        if a.value.shape == b.value.shape:
            yield j, (a, a.value, a.grad), (b, b.value, b.grad)
    for j, b in enumerate(calls):
        yield j, *zip((b, b), b.value.chunk(2, dim=1), b.grad.chunk(2, dim=1))


def find_latent(detail):
    """The layer that is fed z = f(mean) + g(deviation) * noise, and all of these."""
    names, functions = zip(*ACTIVATIONS.items())
    for j, *heads in heads_of(detail.calls):
        later, size = detail.calls[j + 1 :], heads[0][1].shape[1]
        for first, start, turn in itertools.product(later, (0, 10), (1, -1)):
            mean, std = heads[::turn]
            z = first.given[:, start : start + size]
            noises = [e for e in detail.noise if e.shape == z.shape]
            if mean[0] is not std[0] and mean[0].given.equal(std[0].given):
                noises.append(torch.zeros_like(z))  # z may be the mean itself
            for noise in noises if z.shape == mean[1].shape else ():
                m, s = ([f(a) for f in functions] for _, a, _ in (mean, std))
                m, s = torch.stack(m), torch.stack(s)
                off = (m[:, None] + s * noise - z).abs().amax((2, 3)).nan_to_num(1e9)
                if off.min() < 1e-4 * (1 + z.abs().max()):
                    f, g = (names[n] for n in divmod(off.argmin().item(), len(names)))
                    found = {"f": f, "g": g if noise.any() else None, "noise": noise}
                    found |= {"mean": mean, "std": std, "start": start, "size": size}
                    keys = [call.key for call in detail.calls]
                    draws = keys.count(first.key) / keys.count(mean[0].key)
                    return Note(first=first, draws=draws, **found)
    raise CannotTell("z = f(mean) + g(deviation) · noise was looked for at all layers")


def gradient(value, *inputs):
    grads = {"allow_unused": True, "materialize_grads": True}  # zeros for the unused
    return torch.cat(torch.autograd.grad(value.sum(), inputs, **grads))


def find_reconstruction(detail, x, gray):
    """Kind of the reconstruction term, its factor, and whose pixels are the target."""
    last = [call for call in detail.calls if call.value.shape == x.shape]
    if not last:
        raise CannotTell("a trained layer with an output for each pixel was looked for")
    a, fits = last[-1].value.double().requires_grad_(), []
    targets = ("input", x), ("gray", gray / 255), ("rounded", (gray / 255).round())
    for (name, loss), (whose, y) in itertools.product(RECONSTRUCTIONS.items(), targets):
        factor, off = ratio(gradient(loss(a, y, reduction="none"), a), last[-1].grad)
        fits.append((off, len(fits), factor, name, whose))
    off, _, factor, name, whose = min(fits)
    if off > 0.01:
        raise CannotTell("the gradient at the decoder's outputs fits no known loss")
    return Note(name=name, factor=factor, whose=whose, rows=len(x))


def find_regularizer(at):
    """What is added to the reconstruction: kind, factor, what z passes gradients to."""
    if at.draws > 1:
        raise CannotTell("z is drawn more than once for each image")
    mean, std = (each[1].double().requires_grad_() for each in (at.mean, at.std))
    whole = torch.cat([at.mean[2], at.std[2]]).double()
    through = at.first.given_grad
    through = 0 if through is None else through[:, at.start : at.start + at.size]
    fits = []
    paths = "both", "mean", "none"
    for g, path in itertools.product([at.g] if at.g else ACTIVATIONS, paths):
        m, s, e = ACTIVATIONS[at.f](mean), ACTIVATIONS[g](std), at.noise.double()
        z = m * (path != "none") + s * e * (path == "both")
        rest = whole - gradient(z * through, mean, std)
        if rest.norm() < max(1e-4 * whole.norm(), 1e-12):
            name = "nothing" if whole.norm() > 1e-9 else "lost in saturation"
            return Note(name=name, factor=0, off=0, path=path, g=at.g)
        for name, formula in REGULARIZERS.items():
            m, s = ACTIVATIONS[at.f](mean), ACTIVATIONS[g](std)
            factor, off = ratio(gradient(formula(m, s, e), mean, std), rest)
            fits.append((off, len(fits), factor, name, path, g))
    off, _, factor, name, path, g = min(fits)
    name = name if off < 0.02 else f"not the KL ({off:.0%} off)"
    return Note(name=name, factor=factor, off=off, path=path, g=g)


def activation(before, after):
    """The name of what was applied to a layer's output."""
    for name, f in ACTIVATIONS.items() if before.value.shape == after.shape else ():
        if f(before.value).allclose(after, rtol=1e-4, atol=1e-5):
            return name
    return "something else"


def reduction(factor, rows, size, items):
    """How a term is summed or averaged, by its factor."""
    known = {1: "summed", 1 / rows: f"summed over the {items}, averaged over the batch"}
    known |= {1 / size: f"averaged over the {items}, summed over the batch"}
    known |= {1 / rows / size: f"averaged over {items} and batch"}
    near = [words for value, words in known.items() if abs(factor / value - 1) < 0.02]
    return near[0] if near else f"times {factor:.3g}"


def unlike_normal(values):
    """How independent values differ from standard normal ones, in words, if they do."""
    v = values.double().flatten()
    n, mean, square, fourth = len(v), v.mean(), (v**2).mean(), (v**4).mean()
    wide = abs(mean) > 6 / n**0.5 or abs(square - 1) > 6 * (2 / n) ** 0.5
    if wide or abs(fourth - 3) > 6 * (96 / n) ** 0.5:
        return f"mean {mean:.2f}, deviation {v.std():.2f}, largest {v.abs().max():.2f}"
    return ""


def find_shown(sheets, images):
    """Which images (N, 784) stand in the sheets, inverted or in other grays as well.

    Compared are projections of unit vectors, which keep distances nearly.
    """
    probes = torch.randn(16, 784, generator=torch.Generator().manual_seed(0))
    probes -= probes.mean(dim=1, keepdim=True)
    wanted, contrast = unit(images) @ probes.T, images.std(dim=1)
    found = torch.zeros(len(images), dtype=bool)
    for sheet in map(torch.tensor, sheets):
        to_bytes = (0.004 / contrast).clamp(max=0.2) if sheet.max() > 1.5 else 0
        sheet = (sheet - sheet.mean())[None, None]
        sums, squares = F.conv2d(torch.cat([sheet, sheet**2]), torch.ones(1, 1, 28, 28))
        norms = (squares - sums**2 / 784).clamp(min=1e-8).sqrt()
        tiles = (F.conv2d(sheet, probes.view(-1, 1, 28, 28))[0] / norms).flatten(1).T
        near = [torch.cdist(each, tiles).amin(1) for each in wanted.split(250)]
        inverted = [torch.cdist(-each, tiles).amin(1) for each in wanted.split(250)]
        near = torch.minimum(torch.cat(near), torch.cat(inverted)) / len(probes) ** 0.5
        found |= (near < 0.03 + to_bytes) & (contrast > 1e-4)
    return found.tolist()


def spread(values):
    ends = f"{min(values):.3g}", f"{max(values):.3g}"
    return " to ".join(dict.fromkeys(ends))


# Judging


class Judge:
    """What one run of training, the figures and the cells say of each line.

    A line's method yields, for each thing that has to hold, True or what is wrong.
    """

    def __init__(self, watch, end, trained):
        self.watch, self.end = watch, end
        self.steps = trained.steps if trained else []
        self.details = trained.details if trained else []
        self.stop = f"cell {end.ran + 1}" if end.error else ""

    def verdict(self, line):
        """met, NOT MET or cannot tell; the last too where the grader itself fails."""
        stopped, said = f"; the run stopped in {self.stop}" if self.stop else "", []
        try:
            if not self.details and line not in ("S2.1", "S2.2", "S3.1"):
                if self.stop:
                    self.check_sizes()
                raise CannotTell("no step of an optimizer of PyTorch was seen")
            for each in getattr(self, line.replace(".", "_"))():
                said += [each] * (each is not True)
        except CannotTell as why:
            if not said:
                return f"cannot tell: {why}{stopped}"
        except Exception as error:  # noqa: BLE001, says nothing of the line
            return f"cannot tell: the grader itself fails here, {error!r}{stopped}"
        if said and self.watch.trouble:
            return f"cannot tell: the grader itself failed, {self.watch.trouble!r}"
        return f"NOT MET: {'; '.join(said)}" if said else "met"

    latents = cached_property(lambda self: [*map(find_latent, self.details)])
    regularizers = cached_property(lambda self: [*map(find_regularizer, self.latents)])

    @cached_property
    def entries(self):
        """Of each step looked at: the images given, as they are in MNIST, their class."""
        found = []
        for step, given in ((d.step, d.entry.given.double()) for d in self.details):
            if step.index is None:
                raise CannotTell("no images of the data set at a trained layer")
            index, image = step.index[: len(given)], given[:, step.start :][:, :784]
            onehot = F.one_hot(self.watch.labels[index], 10).double()
            gray = self.watch.gray[index].double()
            found.append(Note(image=image, gray=gray, onehot=onehot))
        return found

    @cached_property
    def reconstructions(self):
        pairs = zip(self.details, self.entries)
        return [find_reconstruction(d, each.image, each.gray) for d, each in pairs]

    @property
    def regularizer(self):
        """The first that is a KL: its weight may grow from nothing."""
        kls = [found for found in self.regularizers if found.name in KLS]
        return [*kls, *self.regularizers][0]

    @cached_property
    def repeated(self):
        known = [step for step in self.steps if step.index is not None]
        return any(len({*step.index.tolist()}) < step.rows for step in known)

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
            batch, whole = {*step.index.tolist()}, total // self.watch.size
            if whole > len(found) if self.repeated else seen & batch:
                found.append((t - 1, len(seen)))
                seen = set()
            seen, total = seen | batch, total + step.rows
        return [*found, (t, len(seen))]

    def epochs_done(self):
        *before, (_, size) = self.epochs
        whole = before[-1][1] if before else self.watch.size
        return len(before) + (1 if self.repeated else min(1, size / whole))

    def check_sizes(self):
        """Where sizes of the real data are written in, numbers of steps say little."""
        code = re.sub("#.*", "", "\n".join(self.end.sources))
        if re.search(r"\b(60_?000|50_?000|93[78])\b", code):
            raise CannotTell("sizes of the real data are written in; these differ")

    def S1_1(self):
        term, kl, weights = self.reconstructions[0], self.regularizer, []
        if kl.name not in KLS:
            raise CannotTell("the regularizer is not the KL (see S5.2)")
        for one, two in zip(self.reconstructions, self.regularizers):
            weights += [two.factor / one.factor] * (two.name in (kl.name, "nothing"))
        equal = all(abs(weight - 1) < 0.02 for weight in weights)
        if not equal and term.name != CROSS_ENTROPY:
            raise CannotTell(f"{term.name} and KL have no common scale (see S5.1)")
        words = f"cross-entropy {reduction(term.factor, term.rows, 784, 'pixels')}; KL "
        words += reduction(kl.factor, term.rows, self.latents[0].size, "dimensions")
        yield equal or f"the KL weighs {spread(weights)} times, expected once: {words}"
        yield "swapped" not in kl.name or "the KL's arguments are swapped: KL(p ‖ q)"

    def S1_2(self):
        sizes = [size for _, size in self.epochs]
        sizes, size = {*(sizes[:-1] or sizes)}, self.watch.size  # the last: see S5.3
        if self.stop and len(self.epochs) == 1:
            raise CannotTell("not one epoch was finished")
        if sizes != {size}:
            self.check_sizes()
        tested = any((step.index >= size).any() for step in self.steps)
        yield not tested or "images of the test set are trained on"
        yield not self.repeated or "a batch holds an image more than once"
        said = f"an epoch has {' or '.join(map(str, sizes))} of the {size} images"
        yield self.repeated or tested or sizes == {size} or f"{said}, expected all"

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
        others = sorted(names - ALLOWED - sys.stdlib_module_names - own)
        yield not others or f"depends on {', '.join(others)}, besides {PACKAGES}"
        yield "torch" in names or f"does not import PyTorch; expected are {PACKAGES}"

    def S2_2(self):
        error, counts = self.end.error, [c for c in self.end.counts if c is not None]
        yield self.end.path.suffix != ".py" or "a script, expected one notebook"
        said = f"{type(error).__name__}: {error}"
        if outer(error):
            raise CannotTell(f"{outer(error)} ({said})")
        if isinstance(error, IndexError | ValueError | RuntimeError):
            self.check_sizes()
        yield not error or f"stops in {self.stop}: {said}"
        ordered = all(b == a + 1 for a, b in itertools.pairwise(counts))
        yield ordered or f"not run from top to bottom: the saved counts are {counts}"

    def S3_1(self):
        kinds = {kind.__name__ for kind in self.watch.datasets}
        if not kinds:
            raise CannotTell("torchvision.datasets.MNIST is not loaded")
        yield "MNIST" in kinds or f"{', '.join(kinds)} is loaded, expected MNIST"

    def S3_2(self):
        image, expected = self.entries[0].image, (self.entries[0].gray / 255).round()
        values, wrong = image.unique(), (image != expected).double().mean()
        said = f"images, {wrong:.1%} of whose pixels are not the rounded ones"
        if {*values.tolist()} - {0, 1}:
            said = f"{len(values)} values, {values[0]:.3g} to {values[-1]:.3g}"
        yield not wrong or f"the first layer is given {said}; expected 0 and 1, rounded"

    def S4_0(self):
        size = self.latents[0].size
        yield size == 40 or f"z has {size} dimensions, expected 40"

    def block(self, calls, after, expected, what, start, size):
        """Two layers: their sizes, ReLU between, what is joined by the class."""
        shapes = "-".join(f"({c.shape[0]}, {c.shape[1]})" for c in calls)
        given, onehot = calls[0].given.double(), self.entries[0].onehot
        rest = torch.cat([given[:, :start], given[:, start + size :]], dim=1)
        two = [call.shape for call in calls[:2]]
        if len(two) == 2 and two[0][1] == two[1][1] and two[1][0] == 10:
            raise CannotTell(f"{what} and class enter by layers of their own: {shapes}")
        yield shapes == expected or f"layers {shapes}, expected {expected}"
        hidden = activation(calls[0], after)
        yield hidden == "ReLU" or f"{hidden} after the hidden layer, expected ReLU"
        joined = rest.shape == onehot.shape and rest.equal(onehot)
        found = f"{rest.shape[1]} values that are" if rest.numel() else "nothing:"
        yield joined or f"{what} is joined by {found} not the one-hot class"
        yield not start or f"the class stands before {what}, expected after it"

    def S4_1(self):
        at, calls, entry = self.latents[0], self.details[0].calls, self.details[0].entry
        end = min(calls.index(at.mean[0]), calls.index(at.std[0]))
        before = calls[calls.index(entry) : end] or calls[:1]
        start, after = self.details[0].step.start, at.mean[0].given
        yield from self.block(before, after, "(794, 256)", "the image", start, 784)
        g = at.g or self.regularizers[0].g or "sigmoid"
        yield at.f == "sigmoid" or f"the mean has {at.f}, expected a sigmoid"
        yield g == "sigmoid" or f"the standard deviation has {g}, expected a sigmoid"

    def S4_2(self):
        at, calls = self.latents[0], self.details[0].calls
        after = calls[calls.index(at.first) :]
        ends = [n for n, call in enumerate(after, start=1) if call.shape[1] == 784]
        after = after[: ends[0]] if ends else after
        second, expected = after[:2][-1].given, f"({at.size + 10}, 256)-(256, 784)"
        yield from self.block(after, second, expected, "z", at.start, at.size)
        found = self.reconstructions[0].name
        bare = "without" in found or "tanh" in found
        yield not bare or f"the outputs have no sigmoid: {found}"
        bare = any(picture.bare for picture in self.shown)
        yield not bare or "the outputs have no sigmoid: samples are shown without it"

    def S4_3(self):
        at, noises = self.latents[0], [each.noise for each in self.latents]
        noise, found = torch.cat(noises), self.regularizers[0]
        if not noise.any():
            yield "z is the mean itself, expected mean + deviation · noise"
            return
        through = at.first.given_grad is not None
        through = through and (found.path == "both" or found.off > 0.02)
        trick = "which the reparameterization trick lets pass"
        yield through or f"z does not pass the gradient on to both heads, {trick}"
        same = any(len(n) > 1 and (n == n[0]).all() for n in noises)
        yield not same or "all images of a batch have the same noise"
        odd = not same and unlike_normal(noise)
        yield not odd or f"the noise is not standard normal: {odd}"

    def S5_1(self):
        found = self.reconstructions[0]
        yield found.name == CROSS_ENTROPY or f"{found.name}, expected {CROSS_ENTROPY}"
        whose = f"compared with the {found.whose} images, expected the input images"
        yield found.whose == "input" or whose

    def S5_2(self):
        found = self.regularizer.name
        said = f"what is added to the cross-entropy is {found}, expected the KL"
        yield found in KLS or f"{said} divergence to the standard normal"

    def S5_3(self):
        settings = [each for step in self.steps for each in step.optimizers]
        kinds, rates, decays = (sorted({*each}) for each in zip(*settings))
        yield kinds == ["Adam"] or f"{' and '.join(kinds)}, expected Adam"
        yield rates == [0.001] or f"learning rate {spread(rates)}, expected 0.001"
        yield decays == [0] or f"weight decay {spread(decays)}, expected none"
        largest = max(step.rows for step in self.steps)
        yield largest == 64 or f"batches of {largest}, expected 64"
        first, last = self.details[0], self.details[-1]
        left = [c for c in last.calls if c.key not in last.step.owned]
        left = [c.shape for c in left if c.weight.requires_grad and is_leaf(c.weight)]
        yield not left or f"the optimizer leaves out layers {left}"
        stale = last.stale > 0.01 > first.stale
        yield not stale or "gradients of earlier batches are added: no zero_grad"
        n = self.epochs_done()
        if n != 11:
            self.check_sizes()
            if self.stop and self.steps[-1].cell == self.end.ran + 1:
                raise CannotTell(f"the run stopped in training, after {n:.3g} epochs")
        yield n == 11 or f"{n:.3g} epochs, expected 11"

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
            raise CannotTell(f"a line of {sizes[-1]} points is unknown, {expected}")
        self.check_sizes()
        drawn = f"lines of {spread(sizes)} points are" if sizes else "no line is"
        yield f"{drawn} drawn, {expected}"

    @cached_property
    def shown(self):
        """For each picture: the samples found in it, as step, digit and z."""
        at, steps = self.latents[0], {s.mark: t for t, s in enumerate(self.steps)}
        known, values = [], [torch.empty(0, 784)]
        for each in self.watch.decoded:
            wanted = len(each.call.value), at.first.shape[0]
            given = [g for g in each.inputs if g.shape == wanted]
            if each.mark in steps and given:
                z = given[-1][:, at.start : at.start + at.size]
                rest = given[-1][:, : at.start], given[-1][:, at.start + at.size :]
                rest = torch.cat(rest, dim=1)
                onehot = rest.shape[1] == 10 and (rest.amax(1) == rest.sum(1)).all()
                digits = rest.argmax(1).tolist() if onehot else [None] * len(z)
                known += [(steps[each.mark], *own) for own in zip(digits, z.tolist())]
                values.append(each.call.value)
        values, pictures = torch.cat(values), []
        for picture in self.watch.pictures:
            for images in values.sigmoid(), values.sigmoid().round(), values:
                found = find_shown(picture.sheets, images)
                if any(found):
                    break
            samples, bare = itertools.compress(known, found), images is values
            note = Note(samples=[*samples], bare=bare and any(found), cell=picture.cell)
            pictures.append(note)
        return pictures

    def S6_2(self):
        ends = {epoch: t for epoch, (t, _) in enumerate(self.epochs, start=1)}
        names, groups = {t: f"epoch {epoch}" for epoch, t in ends.items()}, {}
        for picture in self.shown:
            for t in {t for t, *_ in picture.samples}:
                own = {(d, tuple(z)) for step, d, z in picture.samples if step == t}
                groups.setdefault(t, []).append(own)
        cells = sorted({p.cell for p in self.watch.pictures if p.sheets})
        if not groups and (cells or self.stop):
            raise CannotTell(f"the decoder's images were looked for in cells {cells}")
        if None in {digit for each in self.shown for _, digit, _ in each.samples}:
            raise CannotTell("which digits the samples are: no one-hot class beside z")
        at = ", ".join(names.get(t, f"step {t + 1}") for t in sorted(groups)) or "none"
        for epoch in 1, 6, 11:
            if epoch not in ends and not self.stop:
                raise CannotTell(f"there is no epoch {epoch} (see S5.3)")
            own = groups.get(ends.get(epoch), [])
            number, digit = fewest(own)
            odd = [unlike_normal(torch.tensor([*{z for _, z in each}])) for each in own]
            normal = [each for each, said in zip(own, odd) if not said]
            if not own:
                fault = f"no samples after epoch {epoch} (shown: {at})"
            elif number < 10:
                fault = f"{number} different samples of {digit} after epoch {epoch}"
            elif fewest(normal)[0] < 10:
                fault = f"z after epoch {epoch} is not standard normal: {max(odd)}"
            else:
                continue
            if self.stop:
                raise CannotTell(fault)
            self.check_sizes()
            yield f"{fault}, expected 10 of each digit"

    def S6_3(self):
        cells = sorted({picture.cell for picture in self.shown if picture.samples})
        by = f"the samples that cells {cells} show" if cells else "no samples found"
        raise CannotTell(f"a claim for the reader to judge, by {by}")

    S6_4 = S6_3


def fewest(groups):
    """The digit of which the fewest samples are there, and their number before it."""
    counts = Counter(digit for digit, _ in set().union(*groups))
    return min((counts[digit], digit) for digit in range(10))


def outer(error):
    """In words, what an error says of the place of the run, not of the submission."""
    wanted = "cuda|nvidia|can't allocate memory|raw_input"
    wanted = re.search(wanted, str(error), re.IGNORECASE)
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed here"
    if isinstance(error, OSError):
        return "a file, a network or a program of the submission's own is not here"
    if isinstance(error, OutOfTime | MemoryError):
        return "the run was too long or too large"
    if isinstance(error, SystemExit):
        return "arguments are wanted, or the code exits"
    return f"{wanted[0]} is not here" if wanted else ""


def happened(judge, runs):
    """What became of the run, and what it trained."""
    end, steps = judge.end, judge.steps
    said = [f"Ran {end.ran} of {len(end.sources)} cells"]
    if end.error:
        said += [f"stopped in {judge.stop}: {type(end.error).__name__}: {end.error}"]
    if not judge.details:
        return "; ".join([*said, "no training with an optimizer of PyTorch was seen."])
    sizes = ", ".join(f"{c.shape[0]}-{c.shape[1]}" for c in judge.details[0].calls)
    (kind, rate, _), rows = steps[0].optimizers[0], max(step.rows for step in steps)
    said += [f"trained layers {sizes} with {kind}, rate {rate:g}, batches of {rows}"]
    said += [f"{len(steps)} steps"]
    with contextlib.suppress(Exception):
        said += [f"{judge.epochs_done():.3g} epochs"]
    if runs > 1:
        said += [f"of {runs} models trained this is nearest to the specification"]
    return f"{'; '.join(said)}."


def grade_here(path, folder, timeout):
    """Grade in this process, which is good for nothing else then."""
    warnings.simplefilter("ignore")  # whatever the grader itself was started with
    faulthandler.dump_traceback_later(timeout + 60, exit=True)
    with contextlib.suppress(OSError, ValueError):  # not every system has it
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    watch, end = run(path, folder, timeout)
    judges = [Judge(watch, end, each) for each in [*watch.runs.values()] or [None]]
    slow = "S4.2", "S6.2", "S6.3", "S6.4"  # they look for samples in pictures
    quick = [line for line in LINES if line not in slow]
    met = [sum(judge.verdict(line) == "met" for line in quick) for judge in judges]
    best = judges[met.index(max(met))]  # the first of equals
    return happened(best, len(judges)), {line: best.verdict(line) for line in LINES}


def grade(path, timeout=300):
    """Grade a submission: what happened, and for each line a sentence."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "IPython", "matplotlib.pyplot"])
    with tempfile.TemporaryDirectory() as folder:
        places = Path(path).resolve(), Path(folder).resolve()
        with ProcessPoolExecutor(1, context) as pool:
            try:
                return pool.submit(grade_here, *places, timeout).result()
            except BrokenProcessPool:
                said = "its process ended: by itself, or for want of time or memory"
            except (Exception, OutOfTime) as error:  # noqa: BLE001, it has to be told
                said = f"it could not be run: {error!r}"
    return f"Not graded: {said}.", dict.fromkeys(LINES, f"cannot tell: {said}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="path")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each")
    options, rows = parser.parse_args(), []
    files = [[p, *p.rglob("*.ipynb"), *p.rglob("*.py")] for p in options.paths]
    files = {path for each in files for path in each if path.is_file()}
    for path in sorted(p for p in files if ".ipynb_checkpoints" not in p.parts):
        what, sheet = grade(path, options.timeout)
        lines = [f"{line}  {said}" for line, said in sheet.items()]
        print(path, what, *lines, "", sep="\n", flush=True)
        marks = {"m": "+", "N": "-", "c": "?"}  # by the verdict's first letter
        rows.append([*(f"{marks[said[0]]:4}" for said in sheet.values()), path])
    if len(rows) > 1:
        print(*LINES, "(+ met, - NOT MET, ? cannot tell)")
        for row in rows:
            print(*row)


if __name__ == "__main__":
    main()
