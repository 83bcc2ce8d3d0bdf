"""CIFAR-10 from a zip of JPEGs, decoded once.

The zip holds `train/CLASS/NAME.jpg` and `test/CLASS/NAME.jpg`, each 32 x 32 RGB; the classes get
the original's labels. The decoded pixels are kept in a folder outside the repository, under the
hash of the zip, so that another zip is decoded anew.
"""

import hashlib
import io
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit.common.files import new_file
from edgekit.errors import EdgekitError

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SIZE = 32
# Of the pixels of the original training set, by channel, of 255.
MEAN, DEVIATION = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
CALIBRATION_BATCHES, CALIBRATION_SIZE = 100, 25
DEFAULT_CACHE = Path(tempfile.gettempdir()) / "edgekit-cifar"


@dataclass(frozen=True)
class Split:
    """Pictures as uint8 [n, 3, 32, 32] and their labels as int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised pictures and labels, in order."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield normalise(self.images[part]), self.labels[part]


@dataclass(frozen=True)
class Cifar:
    train: Split
    test: Split

    def calibration(self) -> list[Tensor]:
        """Return about a hundred mini-batches of training pictures, drawn by a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.train), generator=generator)
        chosen = order[: CALIBRATION_BATCHES * CALIBRATION_SIZE]
        return [normalise(self.train.images[part]) for part in chosen.split(CALIBRATION_SIZE)]


def normalise(images: Tensor) -> Tensor:
    """Return uint8 pictures [n, 3, 32, 32] as float32 of mean 0 and deviation 1 by channel."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return ((images.float() - mean) / deviation).contiguous()


def load(archive: Path, cache: Path = DEFAULT_CACHE) -> Cifar:
    """Read the zip, or what an earlier call left of it in the folder `cache`.

    Raises EdgekitError for what is no such zip.
    """
    try:
        key = hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise EdgekitError(f"{archive}: cannot be read: {error.strerror}") from error
    return Cifar(
        *(_split(archive, part, cache / f"{key}-{part}.npy") for part in ("train", "test"))
    )


def _split(archive: Path, part: str, cached: Path) -> Split:
    """Return one half; its file holds a label and the 3 x 32 x 32 pixels of each picture."""
    if not cached.exists():
        rows = _decode(archive, part)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with new_file(cached) as path, path.open("wb") as file:
            np.save(file, rows)
    rows = np.load(cached)
    images = torch.from_numpy(rows[:, 1:].reshape(-1, 3, SIZE, SIZE).copy())
    return Split(images, torch.from_numpy(rows[:, 0].astype(np.int64)))


def _decode(archive: Path, part: str) -> NDArray[np.uint8]:
    try:
        with zipfile.ZipFile(archive) as file:
            names = sorted(name for name in file.namelist() if name.startswith(f"{part}/"))
            if not names:
                raise EdgekitError(f"{archive}: holds no {part}/CLASS/NAME.jpg")
            return np.stack([_row(archive, name, file.read(name)) for name in names])
    except (OSError, zipfile.BadZipFile) as error:
        raise EdgekitError(f"{archive}: is no readable zip: {error}") from error


def _row(archive: Path, name: str, data: bytes) -> NDArray[np.uint8]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise EdgekitError("decoding JPEGs needs Pillow: pip install pillow") from error
    label = name.split("/")[1]
    if label not in CLASSES:
        raise EdgekitError(f"{archive}: {name}: {label!r:.40} is none of CIFAR-10's classes")
    try:
        picture = Image.open(io.BytesIO(data), formats=["JPEG"])
        if picture.size != (SIZE, SIZE):
            raise EdgekitError(f"{archive}: {name}: is {picture.size}, not {SIZE} x {SIZE}")
        pixels = np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise EdgekitError(f"{archive}: {name}: is no readable JPEG") from error
    return np.concatenate([[np.uint8(CLASSES.index(label))], pixels.transpose(2, 0, 1).ravel()])
