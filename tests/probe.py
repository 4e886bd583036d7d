"""Run as the first cell of a notebook: note what the reproduction really computes.

`seen` holds what the hooks below saw: every step of the first optimizer that takes
one, what went through the model before it, what was decoded without gradients, what
each saved figure shows, and how many steps each optimizer took.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

seen = {"steps": [], "decoded": [], "figures": {}, "counts": []}
latest, optimizers = {}, []


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).numpy().copy()


def note_forward(module, args, output):
    name = type(module).__name__
    arrays = [a.detach().numpy().copy() for a in args if isinstance(a, torch.Tensor)]
    if not torch.is_grad_enabled():
        if name == "Decoder" and len(arrays[0]) == 100:
            seen["decoded"].append((*arrays, output.numpy().copy()))
    elif name == "Decoder":
        latest["z"] = arrays[0]
    elif name == "CVAE":
        image, q = output
        latest.update(x=arrays[0], y=arrays[1], image=image.detach().numpy().copy())
        latest.update(mean=q.mean.detach().numpy(), std=q.stddev.detach().numpy())


def note_step(optimizer, args, kwargs):
    if optimizer not in optimizers:
        optimizers.append(optimizer)
        seen["counts"].append(0)
    seen["counts"][optimizers.index(optimizer)] += 1
    if optimizer is optimizers[0]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        step = {"optimizer": type(optimizer).__name__, "settings": settings, **latest}
        step["before"] = flat(parameters)
        step["grad"] = flat(p.grad for p in parameters)
        seen["steps"].append(step)


def note_stepped(optimizer, args, kwargs):
    if optimizer is optimizers[0]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen["steps"][-1]["after"] = flat(parameters)


def note_figure(figure, path, *args, plain=Figure.savefig, **kwargs):
    name = Path(path).name.removeprefix(".").removesuffix(".part")
    seen["figures"][name] = [
        {
            "title": axes.get_title(loc="left"),
            "xlabel": axes.get_xlabel(),
            "ylabel": axes.get_ylabel(),
            "images": [np.asarray(image.get_array()) for image in axes.images],
            "lines": [np.asarray(line.get_ydata()) for line in axes.lines],
            "rows": [
                (tick, label.get_text())
                for tick, label in zip(axes.get_yticks(), axes.get_yticklabels())
            ],
        }
        for axes in figure.axes
    ]
    return plain(figure, path, *args, **kwargs)


torch_module.register_module_forward_hook(note_forward)
torch_optimizer.register_optimizer_step_pre_hook(note_step)
torch_optimizer.register_optimizer_step_post_hook(note_stepped)
Figure.savefig = note_figure
