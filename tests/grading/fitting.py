"""What the tensors of one step of training show: z, the terms of the loss, layers."""

import itertools
from types import SimpleNamespace

import torch
from torch.nn import functional as F

torch.set_num_threads(1)  # sheets are made side by side


class Note(SimpleNamespace):
    """Values by name."""


class CannotTell(Exception):
    """Says why."""


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
    "GELU": F.gelu,
    "SiLU": F.silu,
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


def ratio(a, b):
    """The factor r of the nearest r * a to b, and how far off that is, as a share."""
    a, b = (torch.as_tensor(each).double().flatten() for each in (a, b))
    r = (a @ b / (a @ a + 1e-30)).item()
    return r, ((b - r * a).norm() / (b.norm() + 1e-30)).item()


def gradient(value, *inputs):
    grads = {"allow_unused": True, "materialize_grads": True}  # zeros for the unused
    return torch.autograd.grad(value.sum(), inputs, **grads)


def close(a, b):
    return a.shape == b.shape and a.allclose(b, rtol=1e-4, atol=1e-5)


def activation(before, after):
    """The name of the function that makes one of the other, or None."""
    return next((n for n, f in ACTIVATIONS.items() if close(f(before), after)), None)


def slope(name, a):
    """The derivative of an activation."""
    a = a.double().requires_grad_()
    return gradient(ACTIVATIONS[name](a), a)[0]


class Detail:
    """The layers of one step, what they were given and the gradients at them."""

    def __init__(self, note):
        self.step, self.index, self.start = note.step, note.index, note.start
        self.calls = [Note(**call) for call in note.calls]
        self.entry, self.noise, self.seen = (
            self.calls[note.entry],
            note.noise,
            note.latent,
        )
        if any(call.value is None for call in self.calls):
            self.seen = None
        last = [call for call in self.calls if call.shape[1] == 784]
        self.last = last[-1] if last else None

    def latent(self):
        """z, its mean, deviation and noise; the layers and derivatives behind them."""
        at = self.from_seen() if self.seen else self.by_formula()
        keys = [call.key for call in self.calls]
        at.draws = keys.count(at.first.key)
        at.draws = at.draws / max(
            1, keys.count(at.mean_head.key) if at.mean_head else 1
        )
        return at

    def from_seen(self):
        at, found = Note(**self.seen), Note(f=None, g=None)
        found.first, found.start, found.size = self.calls[at.first], at.start, at.size
        found.mean, found.std = at.mean.double(), at.std.double()
        found.noise = at.noise.double().expand(*at.noise.shape[:-2], *at.std.shape)
        for name, f in ("mean", "f"), ("std", "g"):
            head, by = getattr(at, f"{name}_head"), getattr(at, f"{name}_slope")
            head = None if head is None else self.calls[head]
            value, parts = getattr(found, name), [slice(None)]
            if head and head.shape[1] == 2 * at.size:
                parts = [slice(0, at.size), slice(at.size, None)]
                parts = parts if by[:, parts[0]].any() else parts[::-1]
            usable = head and head.value[:, parts[0]].shape == value.shape
            if usable:
                part = head.value[:, parts[0]]
                setattr(found, f, activation(part, value.to(part)))
                by, grad = by[:, parts[0]].double(), head.grad
                grad = None if grad is None else grad[:, parts[0]].double()
            else:
                by = grad = None
            setattr(found, f"{name}_head", head)
            setattr(found, f"{name}_slope", by)
            setattr(found, f"{name}_grad", grad)
        return found

    def by_formula(self):
        """The layer that is fed z = f(mean) + g(deviation) * noise, and all of these."""
        names = [*ACTIVATIONS]
        for j, *heads in heads_of([c for c in self.calls if c.value is not None]):
            later, size = self.calls[j + 1 :], heads[0][1].shape[1]
            for first, start, turn in itertools.product(later, (0, 10), (1, -1)):
                (mean, a, a_grad), (std, b, b_grad) = heads[::turn]
                if first.given is None or first.given.shape[1] - start < size:
                    continue
                z = first.given[:, start : start + size]
                if z.shape != a.shape:
                    continue
                noises = [e for e in self.noise if e.shape == z.shape]
                if mean is not std and mean.given.equal(std.given):
                    noises.append(torch.zeros_like(z))  # z may be the mean itself
                for noise in noises:
                    m = torch.stack([f(a) for f in ACTIVATIONS.values()])
                    s = torch.stack([f(b) for f in ACTIVATIONS.values()])
                    off = (m[:, None] + s * noise - z).abs().amax((2, 3))
                    off = off.nan_to_num(1e9)
                    if off.min() < 1e-4 * (1 + z.abs().max()):
                        f, g = divmod(off.argmin().item(), len(names))
                        g = names[g] if noise.any() else None
                        found = {"f": names[f], "g": g, "noise": noise.double()}
                        found |= {"mean": m[f].double(), "b": b, "std": None}
                        if g:
                            found["std"] = ACTIVATIONS[g](b.double())
                            found["std_slope"] = slope(g, b)
                        found |= {"first": first, "start": start, "size": size}
                        found |= {"mean_head": mean, "mean_grad": a_grad.double()}
                        found |= {"std_head": std, "std_grad": b_grad.double()}
                        return Note(mean_slope=slope(names[f], a), **found)
        raise CannotTell("how z comes from a mean, a deviation and noise was not found")

    def reconstruction(self, x, gray, like=None):
        """Kind of the reconstruction term, its factor, and whose pixels it is of.

        like: what it was before, which is tried first.
        """
        if self.last is None or self.last.value is None:
            raise CannotTell(
                "no trained layer has an output for each of the 784 pixels"
            )
        a, fits = self.last.value.double().requires_grad_(), []
        draws = len(a) // len(x)
        if draws * len(x) != len(a):
            raise CannotTell("the decoder draws more or fewer images than it is given")
        targets = {"input": x, "gray": gray / 255, "rounded": (gray / 255).round()}
        kinds = [*itertools.product(RECONSTRUCTIONS, targets)]
        for name, whose in [(like.name, like.whose), *kinds] if like else kinds:
            target = targets[whose].repeat(draws, 1)
            loss = RECONSTRUCTIONS[name](a, target, reduction="none")
            factor, off = ratio(gradient(loss, a)[0], self.last.grad)
            fits.append((off, len(fits), factor * draws, name, whose))
            if like and off < 0.01:
                break
        off, _, factor, name, whose = min(fits)
        if off > 0.01:
            raise CannotTell("the gradient at the decoder's outputs fits no known loss")
        return Note(name=name, factor=factor, whose=whose, rows=len(x))

    def regularizer(self, at, factor):
        """What is added to the reconstruction: kind, factor, what z passes gradients to.

        factor: the reconstruction's; a KL that weighs little beside it may be lost.
        """
        if at.draws > 1:
            raise CannotTell("the decoder is used more than once for each image")
        if at.mean_slope is None or at.std_head is None or at.std_grad is None:
            raise CannotTell("the layers of mean and deviation were not found")
        whole, through = torch.cat([at.mean_grad, at.std_grad]), at.first.given_grad
        if through is None:
            through = torch.zeros(1, 1, dtype=torch.double)
        else:
            through = through[:, at.start : at.start + at.size].double()
        stds = [(at.g, at.std, getattr(at, "std_slope", None))]
        if at.std is None:  # z is the mean itself
            b = at.b.double()
            stds = [(g, f(b), slope(g, b)) for g, f in ACTIVATIONS.items()]
        fits, rows = [], len(at.mean)
        for (g, std, by), path in itertools.product(stds, ("both", "mean", "none")):
            m, s = (v.clone().requires_grad_() for v in (at.mean, std))
            noise, dz = (
                at.noise.reshape(-1, *m.shape),
                through.expand(max(rows, len(through)), at.size),
            )
            dz = dz.reshape(-1, *m.shape) if len(dz) % rows == 0 else dz[None]
            to_mean = (dz * (path != "none")).sum(0) * at.mean_slope
            to_std = (dz * noise * (path == "both")).sum(0) * by
            rest = whole - torch.cat([to_mean, to_std])
            for name, formula in REGULARIZERS.items():
                of_m, of_s = gradient(formula(m, s, noise[0]), m, s)
                expected = torch.cat([of_m * at.mean_slope, of_s * by])
                if name == "the KL":
                    lost = abs(factor) * expected.norm() < 1e-3 * whole.norm()
                r, off = ratio(expected, rest)
                fits.append((off, len(fits), r, name, path, g))
            if rest.norm() < max(1e-4 * whole.norm(), 1e-12):
                name = "lost" if lost or whole.norm() < 1e-9 else "nothing"
                return Note(name=name, factor=0, off=0, path=path, g=g)
        off, _, r, name, path, g = min(fits)
        name = name if off < 0.02 else f"not the KL ({off:.0%} off)"
        return Note(name=name, factor=r, off=off, path=path, g=g)


def heads_of(calls):
    """Pairs of outputs that may be the heads': two layers', or the halves of one's."""
    for (_, a), (j, b) in itertools.combinations(enumerate(calls), 2):
        if a.value.shape == b.value.shape:
            yield j, (a, a.value, a.grad), (b, b.value, b.grad)
    for j, b in enumerate(calls):
        yield j, *zip((b, b), b.value.chunk(2, dim=1), b.grad.chunk(2, dim=1))


def unlike_normal(values):
    """How independent values differ from standard normal ones, in words, if they do."""
    v = values.double().flatten()
    n, mean, square, fourth = len(v), v.mean(), (v**2).mean(), (v**4).mean()
    wide = abs(mean) > 6 / n**0.5 or abs(square - 1) > 6 * (2 / n) ** 0.5
    if wide or abs(fourth - 3) > 6 * (96 / n) ** 0.5:
        return f"mean {mean:.2f}, deviation {v.std():.2f}, largest {v.abs().max():.2f}"
    return ""


def reduction(factor, rows, size, items):
    """How a term is summed or averaged, by its factor."""
    known = {1: "summed", 1 / rows: f"summed over the {items}, averaged over the batch"}
    known |= {1 / size: f"averaged over the {items}, summed over the batch"}
    known |= {1 / rows / size: f"averaged over {items} and batch"}
    near = [words for value, words in known.items() if abs(factor / value - 1) < 0.02]
    return near[0] if near else f"times {factor:.3g}"


def follows(losses, bounds, line):
    """Whether a line shows a loss over the iterations: "all", "some" of them (every
    tenth, means of neighbours, a smoothed line), "firsts" of epochs, or "" for neither.

    losses (T,) at each iteration; bounds: (first, last + 1) of each epoch.
    """

    def fits(points, exact=2e-3):
        return len(points) == len(line) and ratio(points, line)[1] < exact

    if fits(losses):
        return "all"
    epochs = [losses[a:b] for a, b in bounds]
    if fits(torch.stack([each[0] for each in epochs])):
        return "firsts"
    longest = max(len(each) for each in epochs)
    for k in range(2, min(len(losses), 1001)):
        # One value for each epoch says nothing of its iterations.
        if k == longest or abs(len(line) - len(losses) / k) > 1 + len(epochs):
            continue
        for start in {0, k - 1, 1, len(losses) % k}:
            whole = losses[: len(losses) // k * k].view(-1, k).mean(1)
            if fits(losses[start::k]) or fits(whole):
                return "some"
            inside = [e[start::k] for e in epochs]
            means = [e[: len(e) // k * k].view(-1, k).mean(1) for e in epochs]
            if k < longest and (fits(torch.cat(inside)) or fits(torch.cat(means))):
                return "some"
    if len(line) >= max(len(losses) // 2, 2 * len(epochs) + 2):  # smoothed?
        at = torch.linspace(0, len(losses) - 1, len(line)).round().long()
        both = torch.stack([losses[at].double(), line.double()])
        if both.isfinite().all() and torch.corrcoef(both)[0, 1] > 0.8:
            return "some"
    return ""
