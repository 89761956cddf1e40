"""Reading a set of images: a sample folder, a plain folder, or an npz; always in the same order, in batches."""

import hashlib
import itertools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from run.files import stamp
from run.folder import read_run
from run.images import read_png
from run.seeds import format_seeds, format_some, parse_seeds
from unet_caching.errors import UserError, one_line

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_NUMBER = re.compile("[0-9]+")
_OTHER_SUFFIXES = {".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif", ".heic"}
_READERS = min(8, os.cpu_count() or 1)      # threads that decode; Pillow lets others run meanwhile


class Stamp(NamedTuple):
    """What was seen of files without reading them. text: changes whenever a file does. changed: when the last of them
    did, in seconds since 1970: clocks of file systems are coarse, and a file may change twice within a tick. 0: the
    text is of the content itself."""
    text: str
    changed: float = 0


@dataclass
class ImageSet:
    """Images that are read when asked for; memory does not grow with their number.

    description: where they are. names: one per image, in order. seeds: the same as numbers, where the names are.
    size: (height, width). fingerprint: changes when the files do. root: the folder or file; None for arrays.
    read: (n, ranges) -> the images of each range of positions in turn, in batches of at most n that end with a range.
    stamp: (range) -> of the files of these images. reopen: the same path as it is now.
    """
    description: str
    names: list[str]
    seeds: list[int] | None
    size: tuple[int, int]
    fingerprint: str
    root: Path | None
    read: Callable[[int, Sequence[range]], Iterator[np.ndarray]]
    stamp: Callable[[range], Stamp]
    reopen: Callable[[], "ImageSet"] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def numbers(self, why: str) -> list[int]:
        """The seeds. why: what they are needed for. Raises UserError that names a file without one."""
        if self.seeds is None:
            name = next((name for name in self.names if not _NUMBER.fullmatch(Path(name).stem)), self.names[0])
            raise UserError(f"{self.description}: the file name {name!r} is not a number, so {why}")
        return self.seeds

    def batches(self, n: int, ranges: Sequence[range] | None = None) -> Iterator[np.ndarray]:
        """uint8 [at most n, height, width, 3], in order. Raises UserError that names a file it cannot use.

        ranges: ascending ranges of positions (default: all images); no batch crosses the end of one.
        """
        yield from self.read(n, [range(len(self))] if ranges is None else ranges)

    def run(self) -> dict | None:
        """run.json of a sample folder, None where there is none."""
        path = self.root / "run.json" if self.root else None
        if path is None or not path.is_file():
            return None
        return read_run(path.parent)


def open_images(path: Path | str, seeds: Sequence[int] | None = None, expected: int | None = None) -> ImageSet:
    """The images of a sample folder (000/000123.png), a plain folder (PNG, JPEG), or an npz (`arr_0`, uint8 NHWC).

    Order: by seed where the names are numbers, else by name; an npz as it lies, its positions counting as seeds.
    seeds: exactly these, which must all be there; whatever else lies there is left alone. expected: at least so many.
    Raises UserError for no images, too few, missing seeds, and files that are no 8-bit RGB images.
    """
    path = Path(path)
    if path.is_dir():
        images = _folder(path, seeds)
    elif path.is_file():
        images = _npz(path, seeds)
    else:
        raise UserError(f"no images at {path}: give a folder of PNGs or an npz")
    if expected is not None and len(images) < expected:
        raise UserError(f"{path} has {len(images)} of the {expected} images expected: sample the rest first")
    return images


def open_to_judge(path: Path | str, seeds: Sequence[int] | None = None, expected: int | None = None,
                  allow_fewer: bool = False) -> tuple[ImageSet, list[str]]:
    """As `open_images`, and what must be said about the images.

    Raises UserError for an unfinished sample folder, unless allow_fewer or `seeds` say that those there are meant.
    """
    images = open_images(path, seeds, None if allow_fewer else expected)
    note = check_finished(images, allow_fewer) if seeds is None else None
    return images, [note] if note else []


def check_finished(images: ImageSet, allow_fewer: bool = False) -> str | None:
    """Refuse a sample folder that lacks images which its own runs were asked for: it grows, or was interrupted.

    Returns None, or with allow_fewer a line that says what is missing. Raises UserError. For judging: a number that
    depends on when it was computed is none.
    """
    log = images.root / "sessions.jsonl" if images.root else None
    if log is None or not log.is_file():
        return None
    asked: set[int] = set()
    for line in log.read_text().splitlines():
        try:
            asked.update(parse_seeds(json.loads(line)["seeds"]))
        except (ValueError, KeyError, TypeError, RecursionError, UserError):
            continue        # a line that was being written; the images are what counts
    missing = asked - set(images.seeds or ())
    if not missing:
        return None
    line = (f"{images.description} lacks {len(missing)} images that its runs were asked for, seeds "
            f"{format_some(missing)}: it is still being written, or was interrupted")
    if not allow_fewer:
        raise UserError(f"{line}; run the same sample command to the end first")
    return line


def check_unchanged(images: ImageSet) -> None:
    """Raises UserError where images were added, removed or rewritten since they were opened."""
    if images.root and images.reopen is not None and images.reopen().fingerprint != images.fingerprint:
        raise UserError(f"{images.description} changed while it was read: it is still being written; wait for that")


def batched(ranges: Sequence[range], n: int) -> Iterator[range]:
    """The ranges cut into pieces of at most n."""
    for positions in ranges:
        for first in range(positions.start, positions.stop, n):
            yield range(first, min(first + n, positions.stop))


def from_array(pixels: np.ndarray, description: str, names: Sequence[str]) -> ImageSet:
    """Images in memory: uint8 [n, height, width, 3] and n names."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) != len(names):
        raise ValueError(f"expected uint8 [{len(names)}, height, width, 3], got {pixels.dtype} {list(pixels.shape)}")

    def read(n: int, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        for some in batched(ranges, n):
            yield pixels[some.start:some.stop]

    def stamp(some: range) -> Stamp:
        return Stamp(hashlib.sha256(np.ascontiguousarray(pixels[some.start:some.stop]).data).hexdigest())

    return ImageSet(description, list(names), None, pixels.shape[1:3], stamp(range(len(pixels))).text, None, read,
                    stamp)


def check_paired(samples: ImageSet, against: ImageSet) -> list[int]:
    """The seeds, which are those of the other set too. Raises UserError where they, or the sizes, differ."""
    seeds, others = (images.numbers("images cannot be paired by seed") for images in (samples, against))
    for one, other, (mine, theirs) in ((samples, against, (seeds, others)), (against, samples, (others, seeds))):
        if alone := set(mine) - set(theirs):
            raise UserError(f"{len(alone)} of the {len(one)} images in {one.description} have no partner in "
                            f"{other.description}: seeds {format_some(alone)}")
    if samples.size != against.size:
        raise UserError(f"{samples.description} has images of {samples.size[1]}x{samples.size[0]} pixels, "
                        f"{against.description} of {against.size[1]}x{against.size[0]}")
    return seeds


def _folder(path: Path, wanted: Sequence[int] | None = None) -> ImageSet:
    """wanted: the seeds that are meant, among whatever else lies there."""
    # A plain folder may hold sub-folders of something else, and a sample folder a picture of all samples.
    dealt, sampled = _dealt(path, wanted is None), (path / "run.json").exists()
    files = dealt if dealt or sampled else _plain(path)
    if dealt and not sampled and _plain(path):
        raise UserError(f"{path} holds images itself and in {dealt[0].parent.name}/, and no run.json says that it is "
                        "a sample folder: name the sub-folder, or move what is not meant elsewhere")
    if not files:
        raise UserError(f"no PNG images in {path}")
    if wanted is not None:
        files = [file for file in files if _NUMBER.fullmatch(file.stem)]
    seeds = None
    if all(_NUMBER.fullmatch(file.stem) for file in files):
        files.sort(key=lambda file: int(file.stem))
        seeds = [int(file.stem) for file in files]
        if len(set(seeds)) < len(seeds):
            twice = next(a for a, b in itertools.pairwise(seeds) if a == b)
            raise UserError(f"{path} has two images of seed {twice}")
    if wanted is not None and seeds is not None:
        files = [files[i] for i in _positions(path, seeds, wanted)]
        seeds = [int(file.stem) for file in files]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is no regular file: move it elsewhere")
    names = [str(file.relative_to(path)) for file in files]
    first = read_png(files[0])

    def read(n: int, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(_READERS) as pool:
            for some in batched(ranges, n):
                yield np.stack(list(pool.map(lambda i: read_png(files[i], first.shape, files[0]), some)))

    def stamp(some: range) -> Stamp:
        return stamp_of(files[some.start:some.stop], names[some.start:some.stop])

    return ImageSet(str(path), names, seeds, first.shape[:2], stamp(range(len(files))).text, path, read, stamp,
                    lambda: _folder(path, wanted))


def _positions(path: Path, there: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Where the wanted seeds, ascending, are among those that are there. Raises UserError for missing ones."""
    at = {seed: place for place, seed in enumerate(there)}
    missing = [seed for seed in wanted if seed not in at]
    if missing or not len(wanted):
        raise UserError(f"{path} has {len(wanted) - len(missing)} of the {len(wanted)} images asked for; "
                        f"missing seeds {format_some(missing)}: sample them first")
    return sorted(at[seed] for seed in wanted)


def _dealt(path: Path, alone: bool) -> list[Path]:
    """The images of a sample folder, 000/000123.png. alone: raise UserError for others among them."""
    found = [file for folder in path.iterdir() if re.fullmatch("[0-9]{3,}", folder.name) and folder.is_dir()
             for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    files = [file for file in found if file.suffix == ".png" and _NUMBER.fullmatch(file.stem)]
    other = sorted({file for file in found if file.suffix.lower() in _SUFFIXES | _OTHER_SUFFIXES} - set(files))
    if files and other and alone:
        raise UserError(f"{other[0]} and {len(other) - 1} more lie among the images of seeds, like {files[0].name}, "
                        "and leaving them out would judge another set: move them elsewhere, or say --seeds")
    return files


def _plain(path: Path) -> list[Path]:
    """The images that lie in a folder, by name; text and the like beside them are left alone."""
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    other = [file for file in files if file.suffix.lower() in _OTHER_SUFFIXES]
    if other:
        raise UserError(f"{other[0]} and {len(other) - 1} more are images of a kind that is not read here, and leaving "
                        "them out would judge another set: convert them to PNG")
    return [file for file in files if file.suffix.lower() in _SUFFIXES]


def _npz(path: Path, wanted: Sequence[int] | None = None) -> ImageSet:
    """wanted: positions that are meant."""
    with _open_array(path) as (_, shape):
        pass
    places = list(range(shape[0])) if wanted is None else _positions(path, range(shape[0]), wanted)

    def take(file: IO[bytes], some: range) -> bytes:
        size = len(some) * int(np.prod(shape[1:]))
        try:
            data = file.read(size)
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged: {one_line(error)}") from None
        if len(data) < size:
            raise UserError(f"{path} is truncated: arr_0 ends before image {some.stop} of {shape[0]}")
        return data

    def read(n: int, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        # The archive is decompressed as it is read: numpy.load would hold all 10 GB of 50,000 images. What lies before
        # a range is read too, so that the checksum at the end is of everything.
        at = 0
        with _open_array(path) as (file, _):
            for some in batched(ranges, n):
                batch = []
                for piece in _runs(places[some.start:some.stop]):
                    for skipped in batched([range(at, piece.start)], n):
                        take(file, skipped)
                    batch.append(np.frombuffer(take(file, piece), np.uint8).reshape(len(piece), *shape[1:]))
                    at = piece.stop
                yield batch[0] if len(batch) == 1 else np.concatenate(batch)

    def stamp(some: range) -> Stamp:
        chosen = format_seeds(places[some.start:some.stop]) if wanted is not None else f"{some.start}-{some.stop}"
        return stamp_of([path], [f"{path.name} {chosen}"])

    return ImageSet(str(path), [str(i) for i in places], places, (shape[1], shape[2]), stamp(range(len(places))).text,
                    path, read, stamp, lambda: _npz(path, wanted))


def _runs(places: Sequence[int]) -> Iterator[range]:
    """Ascending positions as ranges of neighbours."""
    first = last = places[0]
    for place in places[1:]:
        if place != last + 1:
            yield range(first, last + 1)
            first = place
        last = place
    yield range(first, last + 1)


class _open_array:
    """Context of arr_0 in an npz: (a file positioned at the first pixel, shape)."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> tuple[IO[bytes], tuple[int, ...]]:
        try:
            self.archive = zipfile.ZipFile(self.path)
            self.file = self.archive.open("arr_0.npy")
            version = np.lib.format.read_magic(self.file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(self.file)
        except KeyError:
            raise UserError(f"{self.path} has no arr_0: expected uint8 [n, height, width, 3]") from None
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise UserError(f"{self.path} is truncated or not an npz: {one_line(error)}") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise UserError(f"{self.path}: arr_0 is {dtype} {list(shape)}{' in Fortran order' if fortran else ''}: "
                            "expected uint8 [n, height, width, 3]")
        if not shape[0]:
            raise UserError(f"no images in {self.path}")
        return self.file, shape

    def __exit__(self, *_: object) -> None:
        self.archive.close()


def stamp_of(files: Iterable[Path], names: Iterable[str]) -> Stamp:
    """Of files under these names: reading 50,000 images to learn that they are the same takes too long."""
    digest, last = hashlib.sha256(), 0
    for file, name in zip(files, names, strict=True):
        seen = stamp(file)
        digest.update("\0".join([name, *map(str, seen)]).encode() + b"\n")
        last = max(last, seen[2])
    return Stamp(digest.hexdigest(), last / 1e9)
