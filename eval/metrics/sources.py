"""Real images as data sets come: CIFAR-10's python batches and LSUN's lmdb folders, as sets of images to read.

LSUN at 256 pixels as ermongroup/ddim prepares it: the shorter side to 256 (Pillow's bilinear), then the centre. For
pictures whose shorter side is 256 already, as in the published lmdb files, that is a crop. Photographs in a folder,
such as COCO's, are brought to a size in the same way, grey ones among them as RGB.
"""

import hashlib
import importlib
import io
import pickle
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from eval.metrics.images import ImageSet, Stamp, batched, from_array, open_images, stamp_of
from run.images import UNREADABLE
from run.training import emoji
from unet_caching.errors import UserError, one_line

_CIFAR10 = [f"data_batch_{i}" for i in range(1, 6)]


def open_source(path: Path, size: int | None = None, count: int | None = None) -> ImageSet:
    """The images at a path: an LSUN lmdb folder, CIFAR-10's folder, a folder of images, or an npz.

    size: pixels that they are brought to; None: 256 of LSUN, all others as they are. count: the first so many only
    (default: all).
    Raises UserError for what is none of these, or has fewer.
    """
    path = Path(path)
    if (path / "data.mdb").is_file():
        return lsun(path, size or 256, count)
    if (path / _CIFAR10[0]).is_file():
        images = cifar10(path)
    elif (path / "cifar-10-batches-py" / _CIFAR10[0]).is_file():
        images = cifar10(path / "cifar-10-batches-py")
    elif path.is_dir() and size is not None:
        images = photographs(path, size)
    else:
        images = open_images(path)
    if size is not None and images.size != (size, size):
        raise UserError(f"{images.description} has images of {images.size[1]}x{images.size[0]} pixels, which --size "
                        "does not change: leave it out")
    _check_count(images.description, len(images), count)
    return images if count in (None, len(images)) else _first(images, count)


def _check_count(what: str, there: int, count: int | None) -> None:
    if count is not None and not 2 <= count <= there:
        raise UserError(f"{what} has {there} images, so --count must be from 2 to {there}, got {count}")


def _first(images: ImageSet, count: int) -> ImageSet:
    return ImageSet(f"{images.description} (the first {count})", images.names[:count],
                    images.seeds and images.seeds[:count], images.size, images.fingerprint, images.root,
                    lambda n, ranges: images.read(n, ranges), images.stamp, images.reopen)


class _ArraysOnly(pickle.Unpickler):
    """Opens nothing but arrays in lists and dicts: a pickle that wants more could run code."""
    _allowed = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
                          ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")})

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which is no array")
        return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)


def cifar10(path: Path) -> ImageSet:
    """The 50,000 training images, from data_batch_1 to data_batch_5: uint8 [n, 32, 32, 3].

    Raises UserError for a batch that is missing, damaged, or a pickle of anything but arrays.
    """
    files = [path / name for name in _CIFAR10]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)} of CIFAR-10's python version")
    pixels = []
    for file in files:
        try:
            with open(file, "rb") as opened, warnings.catch_warnings(action="ignore"):  # of numpy's older pickles
                content = _ArraysOnly(opened, encoding="latin1").load()
            data = content.get("data") if isinstance(content, dict) else None
        except Exception as error:      # a damaged pickle may raise anything
            raise UserError(f"{file} is damaged, or not CIFAR-10's: {one_line(error)[:200]}") from None
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise UserError(f"{file} is not CIFAR-10's: no uint8 data of 3072 columns")
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    names = [f"{file.name}/{i}" for file, some in zip(files, pixels, strict=True) for i in range(len(some))]
    everything = np.concatenate(pixels)

    def read(n: int, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        for some in batched(ranges, n):
            yield everything[some.start:some.stop]

    def stamp(some: range) -> Stamp:
        return Stamp(hashlib.sha256(everything[some.start:some.stop].tobytes()).hexdigest())

    return ImageSet(f"{path} (CIFAR-10, training)", names, None, (32, 32), stamp(range(len(names))).text, path, read,
                    stamp)


def prepared(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the shorter side brought to `size`, then the centre."""
    from torchvision.transforms.functional import center_crop, resize  # takes seconds
    return np.asarray(center_crop(resize(image.convert("RGB"), size), [size, size]))


def photographs(path: Path, size: int) -> ImageSet:
    """The images that lie in a folder, of any size, in the order of their names. Raises UserError where one is none."""
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in (".png", ".jpg", ".jpeg")
             and not file.name.startswith(".")]
    if not files:
        raise UserError(f"no images in {path}")
    names = [file.name for file in files]

    def read_one(i: int) -> np.ndarray:
        if not files[i].is_file():
            raise UserError(f"{files[i]} is no regular file: move it elsewhere")
        try:
            with Image.open(files[i]) as image:
                return prepared(image, size)
        except UNREADABLE as error:
            raise UserError(f"{files[i]} is damaged or not an image ({one_line(error)})") from None

    def read(n: int, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for some in batched(ranges, n):
                yield np.stack(list(pool.map(read_one, some)))

    def stamp(some: range) -> Stamp:
        return stamp_of(files[some.start:some.stop], [f"{size} {name}" for name in names[some.start:some.stop]])

    return ImageSet(f"{path} (at {size})", names, None, (size, size), stamp(range(len(files))).text, path, read, stamp,
                    lambda: photographs(path, size))


def lsun(path: Path, size: int = 256, count: int | None = None) -> ImageSet:
    """The pictures of an LSUN lmdb folder, in the order of their keys: shorter side to `size`, centre crop.

    Raises UserError where the package lmdb is missing or broken, and for an lmdb that cannot be read.
    """
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"{path} is an lmdb, and the package lmdb is not installed ({one_line(error)}): "
                        "pip install lmdb, or export the pictures to a folder") from None
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=1)
        with env.begin() as transaction:
            there = transaction.stat()["entries"]
            _check_count(str(path), there, count)
            count = count or there
            keys = [key for key, _ in zip(transaction.cursor().iternext(values=False), range(count), strict=False)]
    except lmdb.Error as error:
        raise UserError(f"{path} cannot be read as an lmdb: {one_line(error)}") from None
    if not keys:
        raise UserError(f"no images in {path}")

    def prepare(item: tuple[bytes, bytes]) -> np.ndarray:
        key, data = item
        try:
            with Image.open(io.BytesIO(data)) as image:
                return prepared(image, size)
        except UNREADABLE as error:
            raise UserError(f"{path}: the picture {key.decode(errors='replace')} is damaged or of a format that is not "
                            f"read here ({one_line(error)})") from None

    def read(n: int, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool, env.begin() as transaction:
            for some in batched(ranges, n):
                items = [(keys[i], transaction.get(keys[i])) for i in some]
                yield np.stack(list(pool.map(prepare, items)))

    def stamp(some: range) -> Stamp:
        return stamp_of([path / "data.mdb"], [f"{size} {some.start}-{some.stop}"])

    return ImageSet(f"{path} (LSUN at {size}, {len(keys)} of {there})", [key.decode(errors="replace") for key in keys],
                    None, (size, size), stamp(range(len(keys))).text, path, read, stamp,
                    lambda: lsun(path, size, count))


def open_reference(text: str, size: tuple[int, int]) -> tuple[ImageSet, ImageSet | None]:
    """(reference, held-out or None) of 'emoji:GROUP' (training images), a folder or an npz.

    GROUP: one group of the emoji, several with commas between, or 'all'.
    size: (height, width) of the samples; a reference of another size is a UserError, since sharpness would differ.
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
