"""Reading a set of images, in batches and always in the same order: a sample folder, a plain folder, or an npz."""

import hashlib
import itertools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from run.files import stamp
from run.folder import read_run
from run.images import read_png
from run.seeds import format_seeds, format_some, parse_seeds
from unet_caching.errors import UserError, one_line

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_NUMBER = re.compile("[0-9]+")
_OTHER_SUFFIXES = {".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif", ".heic"}
_READERS = min(8, os.cpu_count() or 1)      # threads that decode; Pillow releases the GIL


# (n, ranges) -> the images of each range of positions in turn, in batches of at most n; none crosses a range's end
Reader = Callable[[int, Sequence[range]], Iterator[np.ndarray]]


@dataclass
class ImageSet:
    """Images that are read on demand; memory does not grow with their number."""
    description: str                                        # where they are
    names: list[str]                                        # one per image, in order
    seeds: list[int] | None                                 # the names as numbers, if all are numbers
    size: tuple[int, int]                                   # (height, width)
    root: Path | None                                       # the folder or file; None for arrays
    read: Reader
    fingerprint: str                                        # changes when the files do
    reopen: Callable[[], "ImageSet"] | None = None          # opens the same path again

    def __len__(self) -> int:
        return len(self.names)

    def numbers(self, why: str) -> list[int]:
        """The seeds. why: the consequence of a missing one. Raises UserError that names a file without a seed."""
        if self.seeds is None:
            name = next((name for name in self.names if not _NUMBER.fullmatch(Path(name).stem)), self.names[0])
            raise UserError(f"{self.description}: the file name {name!r} is not a number, so {why}")
        return self.seeds

    def batches(self, n: int, ranges: Sequence[range] | None = None) -> Iterator[np.ndarray]:
        """uint8 [at most n, height, width, 3], in order. Raises UserError that names a file that cannot be used.

        ranges: ascending ranges of positions (default: all images); no batch crosses the end of one.
        """
        yield from self.read(n, [range(len(self))] if ranges is None else ranges)

    def run(self) -> dict | None:
        """The run.json of a sample folder; None without one."""
        return read_run(self.root) if self.root is not None and (self.root / "run.json").is_file() else None


def open_images(path: Path | str, seeds: Sequence[int] | None = None) -> ImageSet:
    """The images of a sample folder (000/000123.png), a plain folder (PNG, JPEG), or an npz (`arr_0`, uint8 NHWC).

    Order: by seed if the names are numbers, else by name; an npz in its own order, with positions as seeds.
    seeds: exactly these, which must all exist; other files are ignored.
    Raises UserError for no images, missing seeds, and files that are not 8-bit RGB images.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, seeds)
    if path.is_file():
        return _npz(path, seeds)
    raise UserError(f"no images at {path}: give a folder of PNGs or an npz")


def check_finished(images: ImageSet, allow_fewer: bool = False) -> list[str]:
    """Refuse a sample folder that lacks images of its own runs: a score of it would depend on when it was computed.

    Returns no lines, or with allow_fewer one that says what is missing. Raises UserError.
    """
    log = images.root / "sessions.jsonl" if images.root else None
    if log is None or not log.is_file():
        return []
    missing: set[int] = set()
    for line in log.read_text().splitlines():
        try:
            missing.update(parse_seeds(json.loads(line)["seeds"]))
        except (ValueError, KeyError, TypeError, RecursionError, UserError):
            continue        # a line that is still being written
    missing -= set(images.seeds or ())
    if not missing:
        return []
    line = (f"{images.description} lacks {len(missing)} images of its own runs, seeds {format_some(missing)}: it is "
            "still being written, or was interrupted")
    if not allow_fewer:
        raise UserError(f"{line}; run the same sample command to the end first")
    return [line]


def check_unchanged(images: ImageSet) -> None:
    """Raises UserError if images were added, removed or rewritten since the set was opened."""
    if images.root and images.reopen is not None and images.reopen().fingerprint != images.fingerprint:
        raise UserError(f"{images.description} changed while it was read: wait until it is written, then run the same "
                        "command again")


def check_paired(samples: ImageSet, against: ImageSet) -> list[int]:
    """The seeds of both sets. Raises UserError if the sets have different seeds or sizes."""
    seeds, others = (images.numbers("images cannot be paired by seed") for images in (samples, against))
    for one, other, (own, theirs) in ((samples, against, (seeds, others)), (against, samples, (others, seeds))):
        if alone := set(own) - set(theirs):
            raise UserError(f"{len(alone)} of the {len(one)} images in {one.description} have no partner in "
                            f"{other.description}: seeds {format_some(alone)}")
    if samples.size != against.size:
        raise UserError(f"{samples.description} has images of {samples.size[1]}x{samples.size[0]} pixels, "
                        f"{against.description} of {against.size[1]}x{against.size[0]}")
    return seeds


def batched(ranges: Sequence[range], n: int) -> Iterator[range]:
    """The ranges cut into pieces of at most n."""
    for positions in ranges:
        for first in range(positions.start, positions.stop, n):
            yield range(first, min(first + n, positions.stop))


def one_by_one(load: Callable[[int], np.ndarray]) -> Reader:
    """A reader that loads each image by its position, several at a time."""
    def read(n: int, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(_READERS) as pool:
            for some in batched(ranges, n):
                yield np.stack(list(pool.map(load, some)))
    return read


def from_array(pixels: np.ndarray, description: str, names: Sequence[str], root: Path | None = None,
               seeds: list[int] | None = None) -> ImageSet:
    """Images in memory: uint8 [n, height, width, 3] and n names. root: where they were read from."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) != len(names):
        raise ValueError(f"expected uint8 [{len(names)}, height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
    return ImageSet(description, list(names), seeds, pixels.shape[1:3], root,
                    lambda n, ranges: (pixels[some.start:some.stop] for some in batched(ranges, n)),
                    hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest())


def _folder(path: Path, wanted: Sequence[int] | None = None) -> ImageSet:
    """wanted: exactly these seeds; other files are ignored."""
    # A plain folder may hold other sub-folders, and a sample folder a picture of all samples.
    dealt, sampled = _dealt(path, wanted is None), (path / "run.json").exists()
    files = dealt if dealt or sampled else plain_files(path)
    if dealt and not sampled and plain_files(path):
        raise UserError(f"{path} holds images itself and in {dealt[0].parent.name}/, and no run.json says that it is "
                        "a sample folder: name the sub-folder, or move the other images elsewhere")
    if not files:
        raise UserError(f"no PNG images in {path}")
    if wanted is not None:
        files = [file for file in files if _NUMBER.fullmatch(file.stem)]
    seeds = None
    if all(_NUMBER.fullmatch(file.stem) for file in files):
        files.sort(key=lambda file: int(file.stem))
        seeds = [int(file.stem) for file in files]
        if twice := [a for a, b in itertools.pairwise(seeds) if a == b]:
            raise UserError(f"{path} has two images of seed {twice[0]}")
    if wanted is not None and seeds is not None:
        files = [files[i] for i in _positions(path, seeds, wanted)]
        seeds = [int(file.stem) for file in files]
    if other := [file for file in files if not file.is_file()]:
        raise UserError(f"{other[0]} is not a regular file: move it elsewhere")
    names, first = [str(file.relative_to(path)) for file in files], read_png(files[0])
    return ImageSet(str(path), names, seeds, first.shape[:2], path,
                    one_by_one(lambda i: read_png(files[i], first.shape, files[0])),
                    fingerprint_of(files, names), lambda: _folder(path, wanted))


def _positions(path: Path, there: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The positions of the wanted seeds, ascending, among the existing ones. Raises UserError for missing seeds."""
    at = {seed: place for place, seed in enumerate(there)}
    missing = [seed for seed in wanted if seed not in at]
    if missing or not len(wanted):
        raise UserError(f"{path} has {len(wanted) - len(missing)} of {len(wanted)} images; missing seeds "
                        f"{format_some(missing)}: sample them first")
    return sorted(at[seed] for seed in wanted)


def _dealt(path: Path, alone: bool) -> list[Path]:
    """The images of a sample folder, 000/000123.png. alone: raise UserError for other images among them."""
    inside = [file for folder in path.iterdir() if re.fullmatch("[0-9]{3,}", folder.name) and folder.is_dir()
             for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    files = [file for file in inside if file.suffix == ".png" and _NUMBER.fullmatch(file.stem)]
    other = sorted({file for file in inside if file.suffix.lower() in _SUFFIXES | _OTHER_SUFFIXES} - set(files))
    if files and other and alone:
        raise UserError(f"{other[0]} and {len(other) - 1} more lie among the images of seeds, like {files[0].name}, "
                        "and leaving them out would judge another set: move them elsewhere, or name the --seeds")
    return files


def plain_files(path: Path) -> list[Path]:
    """The images in a folder, by name; text and the like are ignored."""
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    if other := [file for file in files if file.suffix.lower() in _OTHER_SUFFIXES]:
        raise UserError(f"{other[0]} and {len(other) - 1} more are in an image format that is not read here, and "
                        "leaving them out would judge another set: convert them to PNG")
    return [file for file in files if file.suffix.lower() in _SUFFIXES]


def _npz(path: Path, wanted: Sequence[int] | None = None) -> ImageSet:
    """wanted: exactly these positions."""
    with _array(path) as (_, (count, *shape)):
        places = list(range(count)) if wanted is None else _positions(path, range(count), wanted)

    def take(file: IO[bytes], place: int) -> np.ndarray:
        size = int(np.prod(shape))
        try:
            data = file.read(size)
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged: {one_line(error)}") from None
        if len(data) < size:
            raise UserError(f"{path} is truncated: arr_0 ends before image {place + 1} of {count}")
        return np.frombuffer(data, np.uint8).reshape(shape)

    def read(n: int, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        # The archive is decompressed while it is read: numpy.load would hold all 10 GB of 50,000 images. Positions that
        # are not wanted are read, too, so that the checksum at the end covers everything.
        with _array(path) as (file, _):
            at = 0
            for some in batched(ranges, n):
                batch = []
                for place in places[some.start:some.stop]:
                    while at <= place:
                        image = take(file, at)
                        at += 1
                    batch.append(image)
                yield np.stack(batch)

    return ImageSet(str(path), [str(i) for i in places], places, (shape[0], shape[1]), path, read,
                    fingerprint_of([path], [f"{path.name} {format_seeds(places)}"]), lambda: _npz(path, wanted))


@contextmanager
def _array(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The array arr_0 of an npz: (a file positioned at the first pixel, shape)."""
    try:
        archive = zipfile.ZipFile(path)
        file = archive.open("arr_0.npy")
        header = (np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(file) == (1, 0)
                  else np.lib.format.read_array_header_2_0)
        shape, fortran, dtype = header(file)
    except KeyError:
        raise UserError(f"{path} has no arr_0: expected uint8 [n, height, width, 3]") from None
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not an npz: {one_line(error)}") from None
    with archive:
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise UserError(f"{path}: arr_0 is {dtype} {list(shape)}{' in Fortran order' if fortran else ''}: "
                            "expected uint8 [n, height, width, 3]")
        if not shape[0]:
            raise UserError(f"no images in {path}")
        yield file, shape


def fingerprint_of(files: Iterable[Path], names: Iterable[str]) -> str:
    """A digest of names, sizes and times of files: reading 50,000 images to see that nothing changed takes too long."""
    digest = hashlib.sha256()
    for file, name in zip(files, names, strict=True):
        digest.update("\0".join([name, *map(str, stamp(file))]).encode() + b"\n")
    return digest.hexdigest()
