"""Synthetic digits for the tests: small, quick to learn, of all gray levels."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch


def write_digits(root, train=600, t10k=300):
    """Write synthetic digits as the extracted IDX files of MNIST, where it puts them.

    train, t10k: how many images. Returns root, raw (the folder of the files) and, as
    train and t10k, pairs of gray images (N, 784), bytes, and labels (N,).
    """
    digits = SimpleNamespace(root=Path(root), raw=Path(root, "MNIST", "raw"))
    digits.raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in ("train", train), ("t10k", t10k):
        labels = rng.permutation(np.arange(count) % 10)
        images = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images, labels):
            image[2 * label : 2 * label + 3] = 255  # a bar that tells the class,
            top, left = rng.integers(0, 19, 2)  # a gray patch that does not
            patch = rng.integers(0, 256, (10, 10))
            patch[0, :2] = 127, 128  # the two levels next to one half, in every image
            image[top : top + 10, left : left + 10] = patch
        for kind, array in ("images", images), ("labels", labels):
            sizes = np.array([2048 + array.ndim, *array.shape], ">i4").tobytes()
            path = digits.raw / f"{name}-{kind}-idx{array.ndim}-ubyte"
            path.write_bytes(sizes + array.astype(np.uint8).tobytes())
        gray = torch.from_numpy(images.reshape(count, 784))
        setattr(digits, name, (gray, torch.from_numpy(labels)))
    return digits
