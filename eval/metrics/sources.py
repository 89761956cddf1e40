"""Data sets of real images as they are published: CIFAR-10's python batches, LSUN's lmdb folders, photographs.

LSUN at 256 pixels is prepared as in ermongroup/ddim: the shorter side is resized to 256 (Pillow's bilinear), then the
centre is cropped. The pictures of the published lmdb files have a shorter side of 256 already. Photographs in a folder,
such as COCO's, are resized and cropped in the same way; grey ones become RGB.
"""

import importlib
import io
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from eval.metrics.images import ImageSet, fingerprint_of, from_array, one_by_one, open_images, plain_files
from eval.metrics.libraries import needed
from run.images import UNREADABLE
from run.training import emoji
from unet_caching.errors import UserError, one_line

_CIFAR10 = [f"data_batch_{i}" for i in range(1, 6)]


def open_source(path: Path, size: int | None = None, count: int | None = None) -> ImageSet:
    """The images at a path: an LSUN lmdb folder, CIFAR-10's folder, a folder of images, or an npz.

    size: pixels a side to resize to (default: 256 for LSUN, else unchanged). count: only the first so many images.
    Raises UserError for anything else, and for fewer images than count.
    """
    if (path / "data.mdb").is_file():
        return lsun(path, size or 256, count)
    if (path / "cifar-10-batches-py" / _CIFAR10[0]).is_file():
        path /= "cifar-10-batches-py"
    if (path / _CIFAR10[0]).is_file():
        images = cifar10(path)
    elif path.is_dir() and size is not None:
        images = photographs(path, size)
    else:
        images = open_images(path)
    if size is not None and images.size != (size, size):
        raise UserError(f"{images.description} has images of {images.size[1]}x{images.size[0]} pixels, which --size "
                        "cannot change: leave --size out")
    count = _checked(images.description, len(images), count)
    return images if count == len(images) else replace(
        images, description=f"{images.description} (the first {count})", names=images.names[:count],
        seeds=images.seeds and images.seeds[:count])


def _checked(what: str, there: int, count: int | None) -> int:
    """The number of images to take. Raises UserError if count is more than there are."""
    if count is not None and not 2 <= count <= there:
        raise UserError(f"{what} has {there} images, so --count must be from 2 to {there}, got {count}")
    return count or there


class _ArraysOnly(pickle.Unpickler):
    """Opens only arrays in lists and dicts: a pickle of anything else could run code."""
    _allowed = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
                          ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")})

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which is not an array")
        return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)


def cifar10(path: Path) -> ImageSet:
    """The 50,000 training images, from data_batch_1 to data_batch_5: uint8 [n, 32, 32, 3].

    Raises UserError for a batch that is missing, damaged, or a pickle of anything but arrays.
    """
    files = [path / name for name in _CIFAR10]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{path} lacks {', '.join(missing)} of CIFAR-10's python version")
    pixels = []
    for file in files:
        try:
            with open(file, "rb") as opened, warnings.catch_warnings(action="ignore"):  # about numpy's older pickles
                content = _ArraysOnly(opened, encoding="latin1").load()
            data = content.get("data") if isinstance(content, dict) else None
        except Exception as error:      # a damaged pickle may raise anything
            raise UserError(f"{file} is damaged, or not CIFAR-10's: {one_line(error)[:200]}") from None
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise UserError(f"{file} is not CIFAR-10's: no uint8 data of 3072 columns")
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    names = [f"{file.name}/{i}" for file, some in zip(files, pixels, strict=True) for i in range(len(some))]
    return from_array(np.concatenate(pixels), f"{path} (CIFAR-10, training)", names, path)


def prepared(file: Path | IO[bytes], size: int, what: str) -> np.ndarray:
    """uint8 [size, size, 3]: a picture with its shorter side resized to `size`, then cropped to the centre.

    what: the picture's name in a message. Raises UserError if it cannot be read.
    """
    from torchvision.transforms.functional import center_crop, resize  # takes seconds
    try:
        with Image.open(file) as image:
            return np.asarray(center_crop(resize(image.convert("RGB"), size), [size, size]))
    except UNREADABLE as error:
        raise UserError(f"{what} is damaged, or in a format that is not read here ({one_line(error)})") from None


def photographs(path: Path, size: int) -> ImageSet:
    """The images in a folder, of any size, in the order of their names. Raises UserError if one cannot be read."""
    files = plain_files(path)
    if not files:
        raise UserError(f"no images in {path}")
    if other := [file for file in files if not file.is_file()]:
        raise UserError(f"{other[0]} is not a regular file: move it elsewhere")
    names = [file.name for file in files]
    return ImageSet(f"{path} (at {size})", names, None, (size, size), path,
                    one_by_one(lambda i: prepared(files[i], size, str(files[i]))),
                    fingerprint_of(files, [f"{size} {name}" for name in names]), lambda: photographs(path, size))


def lsun(path: Path, size: int = 256, count: int | None = None) -> ImageSet:
    """The pictures of an LSUN lmdb folder, in the order of their keys: shorter side to `size`, centre crop.

    Raises UserError if the package lmdb is missing or broken, or the folder cannot be read.
    """
    with needed("lmdb"):
        import lmdb
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=64)
        with env.begin() as transaction:
            there = transaction.stat()["entries"]
            taken = range(_checked(str(path), there, count))
            keys = [key for key, _ in zip(transaction.cursor().iternext(values=False), taken, strict=False)]
    except lmdb.Error as error:
        raise UserError(f"{path} cannot be read as an lmdb: {one_line(error)}") from None
    if not keys:
        raise UserError(f"no images in {path}")
    names = [key.decode(errors="replace") for key in keys]

    def load(i: int) -> np.ndarray:
        with env.begin() as transaction:
            return prepared(io.BytesIO(transaction.get(keys[i]) or b""), size, f"{path}: the picture {names[i]}")

    return ImageSet(f"{path} (LSUN at {size}, {len(keys)} of {there})", names, None, (size, size), path,
                    one_by_one(load), fingerprint_of([path / "data.mdb"], [f"{size} {len(keys)}"]),
                    lambda: lsun(path, size, count))


def open_reference(text: str, size: tuple[int, int]) -> tuple[ImageSet, ImageSet | None]:
    """The images of a reference and the held-out ones, if there are any.

    text: a folder, an npz, or 'emoji:GROUP' with a group of the emoji, several with commas between, or 'all'.
    size: (height, width) of the samples. Raises UserError for a reference of another size: sharpness would differ.
    """
    if not text.startswith("emoji:"):
        reference = open_images(text)
        if reference.size != size:
            raise UserError(f"the samples are {size[1]}x{size[0]} pixels and {text} is "
                            f"{reference.size[1]}x{reference.size[0]}: take a reference of the same size")
        return reference, None
    groups = None if text == "emoji:all" else text.removeprefix("emoji:").split(",")

    def load(split: str) -> ImageSet:
        pixels, rows = emoji.load(size[0], split, groups)
        return from_array(pixels, f"{text} ({split}, {size[0]} px)", [f"{row.style}/{row.name}" for row in rows])

    if size[0] != size[1]:
        raise UserError(f"the samples are {size[1]}x{size[0]} pixels: the emoji are square")
    try:
        return load("train"), load("held-out")
    except ValueError as error:
        raise UserError(f"--reference {text}: {error}") from None
