"""What one run says of each line of the specification: a method for each line.

A line's method yields, for each thing that has to hold, True or what is wrong, or
raises CannotTell. It reads the notes of the run only, never the submission's objects.
"""

import ast
import contextlib
import re
import sys
from collections import Counter
from functools import cached_property

import torch
from fitting import (
    CROSS_ENTROPY,
    KLS,
    CannotTell,
    Detail,
    Note,
    activation,
    follows,
    reduction,
    unlike_normal,
)
from running import imports, trees
from torch.nn import functional as F

COUNTS = {"S1": "12", "S2": "12", "S3": "12", "S4": "0123", "S5": "123", "S6": "1234"}
LINES = [f"{part}.{number}" for part in COUNTS for number in COUNTS[part]]
PACKAGES = "PyTorch, Torchvision, Matplotlib and NumPy"
ALLOWED = {"torch", "torchvision", "matplotlib", "mpl_toolkits", "numpy"}
ALLOWED |= {"IPython", "ipywidgets", "PIL", "google", "tqdm"}  # add nothing to a result
REAL = {60_000, 59_999, 55_000, 54_000, 50_000, 48_000, 937, 938}
FILES = "FileNotFoundError OSError IsADirectoryError NotADirectoryError PermissionError"
FILES += (
    " URLError HTTPError ConnectionError gaierror CalledProcessError TimeoutExpired"
)
UNSURE = "the images are changed, and which ones the batches hold is not sure"
LONG = "OutOfTime", "MemoryError", "OutOfMemoryError"


def outer(error):
    """In words, what an error says of the place of the run, not of the submission."""
    wanted = re.search(
        "cuda|nvidia|mps device|can't allocate", error.text, re.IGNORECASE
    )
    if error.name in ("ModuleNotFoundError", "ImportError"):
        name = re.search("'([^']+)'", error.text)
        return f"the package {name[1] if name else ''} is not installed here"
    if "<StandIn name='" in error.text:
        name = error.text.split("<StandIn name='")[1].split("'")[0].split(".")[0]
        return f"the package {name} is not installed here"
    if error.name in FILES.split():
        return "a file, a network or a program of the submission's own is not here"
    if error.name == "DeadKernel":
        return "the run's process ended, by itself or for want of memory"
    if error.name in LONG:
        return "the run was too long or too large for the grader's bounds"
    if error.name == "SystemExit":
        return "the code exits, or wants arguments"
    if error.name == "StdinNotImplementedError":
        return "the code asks for input"
    return f"there is no {wanted[0]} here" if wanted else ""


def plainly(text):
    """On one line, without what a terminal would take for a command, and short."""
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return text if len(text) <= 500 else f"{text[:497]}..."


def spread(values):
    ends = f"{min(values):.3g}", f"{max(values):.3g}"
    return " to ".join(dict.fromkeys(ends))


def named(calls):
    return ", ".join(call.name for call in calls)


class Trained:
    """The steps of one model, and the details of some of them."""

    def __init__(self, key, notes):
        own = [n for n in notes if getattr(n, "run", None) == key]
        self.steps = [n for n in own if n.what == "step"]
        self.details = [Detail(n) for n in own if n.what == "detail"]
        self.decoded = [n for n in notes if n.what == "decoded"]

    def rank(self):
        """A model with a class, whose images are shown, that is trained longest."""
        wide = self.details and self.details[0].last is not None
        classed = wide and any(c.shape[0] in (794, 50) for c in self.details[0].calls)
        classed = classed or (wide and self.details[0].entry.shape[0] > 784)
        marks = {tuple(step.mark) for step in self.steps}
        shown = any(tuple(each.mark) in marks for each in self.decoded)
        return bool(wide), bool(classed), shown, len(self.steps)


class Judge:
    """The verdicts on one run, a sentence for each line."""

    def __init__(self, run, path):
        self.run, self.path = run, path
        self.pictures = [n for n in run.notes if n.what == "picture"]
        keys = dict.fromkeys(n.run for n in run.notes if n.what == "step")
        models = [Trained(key, run.notes) for key in keys]
        self.models = len(models)
        model = max(models, key=Trained.rank) if models else None  # the first of equals
        self.steps = model.steps if model else []
        self.details = model.details if model else []
        self.decoded = model.decoded if model else []
        if not model:  # a forward pass before an error shows something
            passes = [n for n in run.notes if n.what == "detail" and n.step < 0]
            self.details = [Detail(each) for each in passes[:1]]
        gray, labels = zip(run.digits.train, run.digits.t10k)
        self.gray, self.labels = torch.cat(gray), torch.cat(labels)
        self.size, self.few = len(gray[0]), len(gray[0]) < 60_000
        self.error = run.errors[0] if run.errors else None
        self.stop = ""
        if self.error:
            line = f", line {self.error.line}" if self.error.line else ""
            self.stop = f"cell {self.error.cell}{line}"
        used = {n.name for n in run.notes if n.what == "stand-in"}
        self.missing = sorted(used - ALLOWED - {"torchinfo", "torchsummary"})

    def sheet(self):
        return {line: self.verdict(line) for line in LINES}

    def verdict(self, line):
        """met, NOT MET or cannot tell; the last too where the grader itself fails."""
        said = []
        try:
            forward = ("S3.2", "S4.0", "S4.1", "S4.2") if not self.steps else LINES
            known = "S2.1", "S2.2", "S3.1", *(forward if self.details else ())
            if line not in known:
                raise CannotTell(self.untrained())
            for each in getattr(self, line.replace(".", "_"))():
                said += [each] * (each is not True)
        except CannotTell as why:
            if not said:
                return f"cannot tell: {why}"
        except Exception as error:  # noqa: BLE001, says nothing of the line
            where = error.__traceback__
            while where.tb_next:
                where = where.tb_next
            where = f"{type(error).__name__}, {where.tb_frame.f_code.co_name}"
            return f"cannot tell: the grader itself fails here ({where}: {error})"
        trouble = [n.error for n in self.run.notes if n.what == "trouble"]
        if said and trouble and line not in ("S2.1", "S2.2"):
            return f"cannot tell: the grader itself failed in the run ({trouble[0]})"
        return f"NOT MET: {'; '.join(said)}" if said else "met"

    def untrained(self):
        """Why there is nothing to judge."""
        if self.error:
            said = outer(self.error) or f"{self.error.name}: {self.error.text}"
            return f"nothing was trained before the run stopped in {self.stop} ({said})"
        if self.missing:
            return f"training needs {', '.join(self.missing)}, which is not here"
        if self.steps:
            return "no step of training could be looked at"
        return "no training with an optimizer of PyTorch was seen"

    latents = cached_property(lambda self: [self.latent(d) for d in self.details])

    def latent(self, detail):
        try:
            return detail.latent()
        except CannotTell:
            if detail is self.details[0]:
                raise
            return None

    @cached_property
    def entries(self):
        """Of each step looked at: the images given, as they are in MNIST, their class."""
        found = []
        for detail in self.details:
            if detail.index is None or detail.entry.given is None:
                raise CannotTell("the images of the data set were not recognized")
            given = detail.entry.given.double()
            index, image = detail.index[: len(given)], given[:, detail.start :][:, :784]
            onehot = F.one_hot(self.labels[index], 10).double()
            found.append(
                Note(image=image, gray=self.gray[index].double(), onehot=onehot)
            )
        return found

    @cached_property
    def terms(self):
        """Reconstruction and regularizer of each step looked at, where both are known;
        of the first in any case."""
        found = []
        for detail, entry, at in zip(self.details, self.entries, self.latents):
            like = found[0][0] if found else None
            try:
                one = detail.reconstruction(entry.image, entry.gray, like)
                found.append((one, detail.regularizer(at, one.factor), detail))
            except (CannotTell, AttributeError):
                if not found:
                    raise
        return found

    @cached_property
    def reconstruction(self):
        entry = self.entries[0]
        return self.details[0].reconstruction(entry.image, entry.gray)

    @cached_property
    def regularizer(self):
        """The first that is a KL: its weight may grow from nothing."""
        kls = [two for _, two, _ in self.terms if two.name in KLS]
        return [*kls, self.terms[0][1]][0]

    def sign(self):
        """-1 if the optimizer climbs."""
        return -1 if self.steps[0].optimizers[0].get("maximize") else 1

    @cached_property
    def repeated(self):
        known = [s.index[s.sure].tolist() for s in self.steps if s.index is not None]
        return any(len({*batch}) < len(batch) for batch in known)

    @cached_property
    def epochs(self):
        """First step, last step and number of images of each epoch.

        An epoch ends where an image would be seen again; where batches are drawn with
        replacement, with the number of images.
        """
        found, seen, total, begun, first = [], set(), 0, 0, 0
        for t, step in enumerate(self.steps):
            if step.index is None:
                self.check_sizes()
                raise CannotTell("which images the batches hold is not known")
            batch, whole = {*step.index[step.sure].tolist()}, total // self.size
            if len(batch) < step.rows / 4 and not self.repeated:
                raise CannotTell(UNSURE)
            if whole > len(found) if self.repeated else seen & batch:
                found.append((first, t - 1, total - begun))
                seen, begun, first = set(), total, t
            seen, total = seen | batch, total + step.rows
        odd = self.repeated or {size for *_, size in found} - {self.size}
        if odd and not all(step.exact for step in self.steps):
            raise CannotTell(UNSURE)
        return [*found, (first, t, total - begun)]

    def epochs_done(self):
        *before, (_, _, size) = self.epochs
        whole = before[-1][2] if before else self.size
        return len(before) + (1 if self.repeated else min(1, size / whole))

    @cached_property
    def sized(self):
        """Whether sizes of the real data are written in, or numbers that need them.

        What stands after the training does not matter to it.
        """
        last = self.steps[-1].cell if self.steps else None
        return self.few and sizes_in(self.run.sources[:last])

    def check_sizes(self):
        if self.sized:
            raise CannotTell("sizes of the real data are written in; these differ")

    def check_stop(self):
        """What comes after the place where the run stopped is not known."""
        if self.stop:
            raise CannotTell(f"the run stopped in {self.stop} ({self.error.name})")

    def check_missing(self):
        if self.missing:
            names = ", ".join(self.missing)
            raise CannotTell(f"it may be done by what is not installed here: {names}")

    def happened(self):
        """What became of the run, and what it trained."""
        number = f"{self.size:,} synthetic training images"
        said = [f"Ran {self.run.ran} of {len(self.run.sources)} cells on {number}"]
        if self.error:
            said += [f"error in {self.stop}: {self.error.name}: {self.error.text}"]
        if not self.steps or not self.details:
            return plainly("; ".join([*said, f"{self.untrained()}."]))
        each, rows = self.steps[0].optimizers[0], max(s.rows for s in self.steps)
        said += [f"trained {named(self.details[0].calls)} with {each['kind']}"]
        said += [
            f"rate {each['lr']:g}",
            f"batches of {rows}",
            f"{len(self.steps)} steps",
        ]
        with contextlib.suppress(CannotTell):
            said += [f"{self.epochs_done():.3g} epochs"]
        if self.models > 1:
            said += [f"the longest trained with a class, of {self.models} models"]
        return plainly(f"{'; '.join(said)}.")

    # The lines

    def S1_1(self):
        """Cross-entropy and KL weigh the same, at every step; the KL is KL(q || p)."""
        term, kl = self.terms[0][0], self.regularizer
        if kl.name not in KLS:
            raise CannotTell("what is added to the reconstruction is no KL (see S5.2)")
        weights = [
            two.factor / one.factor
            for one, two, detail in self.terms
            if two.name in (kl.name, "nothing") and (two.off < 2e-3 or not detail.step)
        ]
        equal = all(abs(weight - 1) < 0.02 for weight in weights)
        if not equal and term.name != CROSS_ENTROPY:
            raise CannotTell(f"{term.name} and KL have no common scale (see S5.1)")
        words = f"cross-entropy {reduction(term.factor, term.rows, 784, 'pixels')}; KL "
        words += reduction(kl.factor, term.rows, self.latents[0].size, "dimensions")
        yield equal or f"the KL weighs {spread(weights)} times, expected once: {words}"
        yield "swapped" not in kl.name or "the KL's arguments are swapped: KL(p ‖ q)"
        up = term.factor * self.sign() < 0
        yield not up or "training makes the bound smaller: its sign is turned"

    def S1_2(self):
        """An epoch has all training images, each once."""
        sizes = [size for *_, size in self.epochs]
        sizes = {*(sizes[:-1] or sizes)}  # the last: see S5.3
        if self.stop and len(self.epochs) == 1:
            raise CannotTell(f"not one epoch was finished: stopped in {self.stop}")
        self.check_sizes()
        tested = [s for s in self.steps if (s.index[s.sure] >= self.size).any()]
        if tested and not all(step.exact for step in tested):
            raise CannotTell(UNSURE)
        yield not tested or "images of the test set are trained on"
        yield not self.repeated or "a batch holds an image more than once"
        said = f"an epoch has {' or '.join(map(str, sorted(sizes)))} of the {self.size}"
        whole = self.repeated or bool(tested) or sizes == {self.size}
        yield whole or f"{said} images, expected all"

    def S2_1(self):
        """Imports nothing but the four packages, the standard library, own modules."""
        names, _ = imports(self.run.sources)
        own = {each.stem for each in self.path.parent.iterdir()}
        others = sorted(names - ALLOWED - sys.stdlib_module_names - own)
        yield not others or f"depends on {', '.join(others)}, besides {PACKAGES}"
        yield "torch" in names or f"does not import PyTorch; expected are {PACKAGES}"

    def S2_2(self):
        """A notebook whose cells run in order, from the first to the last."""
        yield self.path.suffix.lower() != ".py" or "a script, expected one notebook"
        yield bool(self.run.sources) or "it has no code"
        error = self.error
        if error:
            said = f"{error.name}: {error.text}"
            if outer(error):
                raise CannotTell(f"{outer(error)} ({self.stop}: {said})")
            if self.missing:
                names = ", ".join(self.missing)
                raise CannotTell(f"not installed here: {names} ({self.stop}: {said})")
            self.check_sizes()
            yield f"stops in {self.stop}: {said}"

    def S3_1(self):
        """torchvision's MNIST is loaded."""
        kinds = {n.name for n in self.run.notes if n.what == "dataset"}
        if not kinds:
            raise CannotTell("torchvision.datasets.MNIST is not loaded")
        yield "MNIST" in kinds or f"{', '.join(kinds)} is loaded, expected MNIST"

    def S3_2(self):
        """The first layer is given zeros and ones, as rounding makes them."""
        image, expected = self.entries[0].image, (self.entries[0].gray / 255).round()
        values, wrong = image.unique(), (image != expected).double().mean()
        said = f"images, {wrong:.1%} of whose pixels are not the rounded ones"
        if {*values.tolist()} - {0, 1}:
            said = f"{len(values)} values, {values[0]:.3g} to {values[-1]:.3g}"
        yield not wrong or f"the first layer is given {said}; expected 0 and 1, rounded"
        known = [step.wrong > 0 for step in self.steps if step.index is not None]
        said = f"in {sum(known)} of {len(known)} steps pixels are not the rounded ones"
        yield bool(wrong) or not any(known) or said

    def S4_0(self):
        """z has 40 dimensions."""
        size = self.latents[0].size
        yield size == 40 or f"z has {size} dimensions, expected 40"

    def block(self, calls, expected, what, start, size):
        """Layers: their sizes, ReLU after the first, what is joined by the class."""
        two = [call.shape for call in calls[:2]]
        if len(two) == 2 and two[0][1] == two[1][1] and two[1][0] == 10:
            said = named(calls[:2])
            raise CannotTell(f"{what} and class enter by layers of their own: {said}")
        yield named(calls) == expected or f"layers {named(calls)}, expected {expected}"
        bare = [call for call in calls if not call.bias]
        yield not bare or f"{named(bare)} without biases"
        given = calls[0].given
        if given is None:
            raise CannotTell("the first layer's input is too large to be looked at")
        hidden = self.after(calls[0])
        if hidden is None and named(calls) == expected:
            raise CannotTell("the function after the hidden layer is not known")
        yield (
            hidden in ("ReLU", None)
            or f"{hidden} after the hidden layer, expected ReLU"
        )
        onehot, given = self.entries[0].onehot, given.double()
        rest = torch.cat([given[:, :start], given[:, start + size :]], dim=1)
        joined = rest.shape == onehot.shape and rest.equal(onehot)
        found = f"{rest.shape[1]} values that are" if rest.numel() else "nothing:"
        yield joined or f"{what} is joined by {found} not the one-hot class"
        yield not start or f"the class stands before {what}, expected after it"

    def after(self, call):
        """What stands between a layer and the next one."""
        calls = self.details[0].calls
        for later in calls[calls.index(call) + 1 :]:
            if later.given is not None and later.given.shape[1] >= call.shape[1]:
                found = activation(call.value, later.given[:, : call.shape[1]])
                if found:
                    return found
        names = {"relu": "ReLU", "batch_norm": "batch normalization", "gelu": "GELU"}
        names |= {"silu": "SiLU", "leaky_relu": "leaky ReLU", "elu": "ELU"}
        then = [names.get(n.rstrip("_"), n.rstrip("_")) for n in call.then]
        known = {*names.values(), "dropout", "layer_norm", "tanh", "selu", "relu6"}
        then = [name for name in then if name in known]
        return " and ".join(then) if then and then != ["ReLU"] else None

    def S4_1(self):
        """Encoder: Linear(794, 256), ReLU, two layers with a sigmoid each."""
        at, detail = self.latents[0], self.details[0]
        calls, heads = detail.calls, (at.mean_head, at.std_head)
        if None in heads:
            raise CannotTell("the layers of mean and deviation were not found")
        end = min(map(calls.index, heads))
        before = calls[calls.index(detail.entry) : end] or calls[:1]
        yield from self.block(
            before, "Linear(794, 256)", "the image", detail.start, 784
        )
        bare = [call for call in calls if call in heads and not call.bias]
        yield not bare or f"{named(bare)} without biases"
        g = at.g
        if at.std is None:
            g = self.terms[0][1].g or "sigmoid"
        for what, found in ("mean", at.f), ("standard deviation", g):
            odd = "a function that is no plain sigmoid" if found is None else found
            yield found == "sigmoid" or f"the {what} has {odd}, expected a sigmoid"

    def S4_2(self):
        """Decoder: Linear(50, 256), ReLU, Linear(256, 784), sigmoid."""
        at, calls = self.latents[0], self.details[0].calls
        after = calls[calls.index(at.first) :]
        ends = [n for n, call in enumerate(after, start=1) if call.shape[1] == 784]
        after = after[: ends[0]] if ends else after
        expected = f"Linear({at.size + 10}, 256), Linear(256, 784)"
        yield from self.block(after, expected, "z", at.start, at.size)
        found = self.reconstruction.name if self.steps else ""
        bare = "without" in found or "tanh" in found
        yield not bare or f"the outputs have no sigmoid: {found}"
        if "sigmoid" not in after[-1].then:
            shown = [p for p in self.pictures if p.images and p.low < -0.01]
            cells = sorted({p.cell for p in shown})
            yield not shown or f"cells {cells} show images without a sigmoid"

    def S4_3(self):
        """z = mean + deviation * noise: standard normal, new, gradients pass."""
        at, latents = self.latents[0], [each for each in self.latents if each]
        noise = torch.cat([e.noise.reshape(-1, e.size) for e in latents])
        if not noise.any():
            yield "z is the mean itself, expected mean + deviation · noise"
            return
        through = at.first.given_grad is not None
        if through and at.mean_slope is not None:
            found = self.terms[0][1]
            through = found.path == "both" or found.off > 0.02
        trick = "which the reparameterization trick lets pass"
        yield through or f"z does not pass the gradient on to both heads, {trick}"
        same = any(len(e.noise.reshape(-1, e.size).unique(dim=0)) == 1 for e in latents)
        yield not same or "all images of a batch have the same noise"
        first = [e.noise.flatten()[: e.size] for e in latents]
        again = len(first) > 2 and all(each.equal(first[0]) for each in first)
        yield not again or "the noise is the same at every step, expected new noise"
        odd = not same and unlike_normal(latents[0].noise if again else noise)
        yield not odd or f"the noise is not standard normal: {odd}"

    def S5_1(self):
        """The reconstruction is the cross-entropy of output and input images."""
        found = self.reconstruction
        yield found.name == CROSS_ENTROPY or f"{found.name}, expected {CROSS_ENTROPY}"
        whose = f"compared with the {found.whose} images, expected the input images"
        yield found.whose == "input" or whose
        up = found.factor * self.sign() < 0
        yield not up or "the cross-entropy is made larger, expected smaller"

    def S5_2(self):
        """The regularizer is the KL to the standard normal."""
        found = self.regularizer
        if found.name == "lost":
            raise CannotTell("beside the cross-entropy a KL would be too small to see")
        said = f"what is added to the cross-entropy is {found.name}, expected the KL"
        yield found.name in KLS or f"{said} divergence to the standard normal"
        down = found.name in KLS and found.factor * self.terms[0][0].factor < 0
        yield not down or "the KL is subtracted from the cross-entropy, expected added"

    def S5_3(self):
        """11 epochs of batches of 64, all layers, one Adam with its defaults."""
        settings = [each for step in self.steps for each in step.optimizers]
        kinds = sorted({each["kind"] for each in settings})
        yield kinds == ["Adam"] or f"{' and '.join(kinds)}, expected Adam"
        rates = {each["lr"] for each in settings}
        close = all(abs(rate - 0.001) < 1e-9 for rate in rates)
        yield close or f"learning rate {spread(rates)}, expected 0.001"
        decays = {each.get("weight_decay", 0) for each in settings}
        yield decays == {0} or f"weight decay {spread(decays)}, expected none"
        betas = {tuple(each["betas"]) for each in settings} - {(0.9, 0.999), ()}
        yield kinds != ["Adam"] or not betas or f"betas {min(betas)} in Adam"
        amsgrad = any(each.get("amsgrad") for each in settings)
        yield not amsgrad or "AMSGrad, expected Adam"
        serials = {tuple(e["serial"] for e in step.optimizers) for step in self.steps}
        said = f"{len(serials)} optimizers one after the other, expected one"
        yield len(serials) == 1 or said
        yield from self.batches()
        yield from self.untouched()
        n = self.epochs_done()
        if n != 11:
            self.check_sizes()
            if self.error and self.steps[-1].cell == self.error.cell:
                said = f"the run stopped in training, after {n:.3g} epochs"
                raise CannotTell(f"{said} ({self.error.name})")
        yield n == 11 or f"{n:.3g} epochs, expected 11"

    def batches(self):
        """64 images at each step; fewer only where the data ends."""
        rows = [step.rows for step in self.steps]
        lasts = {last for _, last, _ in self.epochs}
        odd = [n for t, n in enumerate(rows) if n != 64 and (n > 64 or t not in lasts)]
        yield not odd or f"batches of {spread([*odd, max(rows)])}, expected 64"

    def untouched(self):
        """Every layer changes at every step, by this step's gradient alone."""
        layers = [(layer, step) for step in self.steps for layer in step.layers]
        left = sorted({each["name"] for each, _ in layers if not each["owned"]})
        yield not left or f"the optimizer leaves out {', '.join(left)}"
        idle = Counter(e["name"] for e, _ in layers if e["idle"] or e["frozen"])
        few = len(self.steps) - 1 if self.error else len(self.steps) / 20
        idle = sorted(name for name, steps in idle.items() if steps > few)
        yield not idle or f"without a gradient at the step: {', '.join(idle)}"
        stale = [all(c.stale for c in d.calls) for d in self.details if d.step]
        added = not idle and sum(stale) > len(stale) / 2
        said = "gradients of earlier batches are added: no zero_grad before most steps"
        yield not added or said

    def S6_1(self):
        """A line of the loss over the iterations: of each, or of some of each epoch."""
        rows = torch.tensor([step.rows for step in self.steps]).double()
        count = min(len(step.scalars) for step in self.steps)
        ends = slice(count), slice(-count or None, None)
        terms = [torch.stack([s.scalars[end] for s in self.steps]).T for end in ends]
        terms = torch.cat(terms)
        terms = torch.cat([terms, terms / rows, terms * rows]).unique(dim=0)
        lines = [line for p in self.pictures for line in p.lines if len(line) > 1]
        bounds = [(first, last + 1) for first, last, _ in self.epochs]
        lines = {tuple(line.tolist()): line for line in lines}.values()
        found = {follows(term, bounds, line) for line in lines for term in terms}
        if found & {"all", "some"}:
            return
        expected = "expected the loss over the training iterations"
        if "firsts" in found:
            raise CannotTell(
                "with so few images it is not clear which losses are drawn"
            )
        self.check_missing()
        if self.stop:
            raise CannotTell(f"no graph of the losses before it stopped in {self.stop}")
        sizes = sorted({len(line) for line in lines})
        if sizes and sizes[-1] >= 2 * len(bounds):
            said = f"lines of {spread(sizes)} points fit no loss of these iterations"
            raise CannotTell(said)
        self.check_sizes()
        drawn = f"lines of {spread(sizes)} points are" if sizes else "no line is"
        yield f"{drawn} drawn in {len(bounds)} epochs of training, {expected}"

    @cached_property
    def samples(self):
        """What the decoder was fed apart from training, where a picture followed: step,
        digits (None: not known), z (None: not kept), whether without the encoder."""
        at, marks, found = self.latents[0], {}, []
        for t, step in enumerate(self.steps):
            marks[tuple(step.mark)] = t
        last = max((p.number for p in self.pictures if p.images), default=0)
        for each in (each for each in self.decoded if each.number < last):
            given = [g for g in each.given if g.shape[1] == at.first.shape[0]]
            before = [t for t, s in enumerate(self.steps) if s.number < each.number]
            t = marks.get(tuple(each.mark))
            if before and self.steps[before[-1]].mark == each.mark:
                t = before[-1]
            if t is not None and not each.given:
                found.append(Note(step=t, digits=None, z=None, plain=each.plain))
            elif t is not None and given:
                z = given[-1][:, at.start : at.start + at.size]
                rest = given[-1][:, : at.start], given[-1][:, at.start + at.size :]
                rest = torch.cat(rest, dim=1)
                known = rest.shape[1] == 10 and (rest.amax(1) == rest.sum(1)).all()
                digits = rest.argmax(1).tolist() if known else None
                found.append(Note(step=t, digits=digits, z=z, plain=each.plain))
        return found

    def S6_2(self):
        """After epochs 1, 6 and 11 the decoder is fed ten standard normal z for each
        digit, and a picture follows."""
        ends = {n: last for n, (_, last, _) in enumerate(self.epochs, start=1)}
        names = {t: f"epoch {n}" for n, t in ends.items()}
        drawn = any(p.images for p in self.pictures)
        # Where images are encoded, what is decoded shows these, if there are others.
        told = any(each.plain for each in self.samples)
        judged = [each for each in self.samples if each.plain or not told]
        if not judged:
            self.check_missing()
            self.check_stop()
            if drawn and self.decoded:
                raise CannotTell("what the pictures show does not come from this model")
        at = sorted({each.step for each in judged})
        at = ", ".join(names.get(t, f"step {t + 1}") for t in at) or "none"
        for epoch in 1, 6, 11:
            if epoch not in ends:
                self.check_stop()
                raise CannotTell(f"there is no epoch {epoch} (see S5.3)")
            every = [each for each in self.samples if each.step == ends[epoch]]
            own = [each for each in every if each.plain or not told]
            fault = "" if enough(every) else f"no samples (they are after: {at})"
            if fault and any(each.z is None for each in own or every):
                raise CannotTell("the decoder is used too often to look at all it does")
            if fault and any(each.digits is None for each in own):
                raise CannotTell("which digits the samples are: no one-hot class by z")
            if fault and own:
                fault = wanting(own)
            if fault:
                self.check_stop()
                self.check_missing()
                self.check_sizes()
            yield not fault or f"after epoch {epoch} {fault}, expected 10 of each digit"

    def S6_3(self):
        """For the reader."""
        cells = sorted({p.cell for p in self.pictures if p.images})
        where = f" of cells {', '.join(map(str, cells))}" if cells else ""
        raise CannotTell(f"a claim for the reader to judge, by the pictures{where}")
        yield

    S6_4 = S6_3


def enough(own):
    """Whether some of what the decoder is fed, in a row or of one size, are ten
    different standard normal z for each digit: the rest may show something else."""
    known = [each for each in own if each.digits]
    rows = [known, [each for each in known if each.plain]]
    sizes = {len(each.z) for each in known}
    rows += [[each for each in known if len(each.z) == size] for size in sizes]
    for row in rows:
        for start in range(len(row)):
            fewest, pairs = counted(row[start:])
            if fewest[0] < 10:
                break  # a later start has no more
            if not unlike_normal(torch.tensor([*{v for _, v in pairs}])):
                return True
    return False


def counted(own):
    """The digit drawn least often, and digits and z, until there are ten of each."""
    pairs, counts = set(), Counter()
    for each in own:
        new = {*zip(each.digits, map(tuple, each.z.tolist()))} - pairs
        pairs |= new
        counts.update(digit for digit, _ in new)
        if min(counts[digit] for digit in range(10)) >= 10:
            break
    return min((counts[digit], digit) for digit in range(10)), pairs


def wanting(own):
    """What samples lack that are not ten different standard normal z for each digit."""
    fewest, _ = counted(own)
    if fewest[0] < 10:
        return f"the decoder draws {fewest[0]} different samples of {fewest[1]}"
    odds = [unlike_normal(each.z) for each in own]
    if any(odds) and not all(odds):
        raise CannotTell("which of what the decoder is fed are samples is not clear")
    odd = unlike_normal(torch.cat([each.z for each in own]))
    return f"z is not standard normal ({odd})" if odd else ""


def needs_real_sizes(judge, sheet):
    """Whether few digits may be what made a run fail, or what a line says."""
    if judge.sized:
        return True
    if judge.error and not outer(judge.error) and not judge.missing:
        name = re.match("name '(.*)' is not defined", judge.error.text)
        known = {node.id for tree in trees(judge.run.sources) for node in stored(tree)}
        syntax = judge.error.name in ("SyntaxError", "IndentationError", "TabError")
        if not syntax and not (name and name[1] not in known):
            return True
    seldom = [  # what is done at every 100th step, say
        node.right.value
        for tree in trees(judge.run.sources)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod)
        if isinstance(node.right, ast.Constant) and isinstance(node.right.value, int)
    ]
    return sheet["S6.1"] != "met" and max(seldom, default=0) > 16 and judge.details


def stored(tree):
    """Names that are given a value."""
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return (node for node in names if isinstance(node.ctx, ast.Store))


def sizes_in(sources):
    """Whether numbers are written in that fit the real data only."""
    for tree in trees(sources):
        for code in codes(compile(tree, "cell", "exec")):
            if REAL & {c for c in code.co_consts if isinstance(c, int)}:
                return True
        for node in ast.walk(tree):
            parts = [node.lower, node.upper] if isinstance(node, ast.Slice) else []
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "range":
                parts = node.args
            for each in (each for part in parts if part for each in ast.walk(part)):
                value = each.value if isinstance(each, ast.Constant) else 0
                if isinstance(value, int) and value >= 1000:
                    return True
    return False


def codes(code):
    """A code object and those inside."""
    yield code
    for each in code.co_consts:
        if hasattr(each, "co_consts"):
            yield from codes(each)
