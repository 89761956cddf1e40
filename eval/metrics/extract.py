"""Features of a set of images, computed once: kept beside the images in parts, and shared out among processes.

    SAMPLES/.features/KEY/part-00000.npz        of a folder; KEY stands for the extractor
    X.npz.features/KEY/part-00000.npz           of an npz

A part holds the features of 1000 images, what was seen of their files, and the sha256 of their pixels. It is taken as
it is while the files are untouched (name, size, inode, times of modification and of change); where they are not, or had
been written just before they were seen, their pixels decide. So a run that was stopped goes on with the parts it lacks,
a set that has grown needs its new parts only, and a copied folder none.
Under torchrun every process computes its share of the parts, and rank 0 gets them all. Which process computes a part
changes nothing in it: statistics of four processes are those of one.
"""

import hashlib
import os
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from eval.metrics.images import ImageSet, check_unchanged
from run.files import remove_leftovers, write_atomically, write_json
from run.seeds import deal, rank_and_world
from unet_caching.errors import UserError
from unet_caching.files.schema import fault, read_json

PART = 1000             # images; a change of it would change the batches, and with them the last bits
_DOUBT = 2              # seconds after a change within which another might go unseen: file systems' coarsest clock
_PATIENCE = 1800        # seconds without a new part after which rank 0 no longer waits for the others
T = TypeVar("T")


class Extractor(Protocol):
    """A network that turns images into features."""

    @property
    def id(self) -> str:
        """What decides the features: network, weights, preprocessing."""

    @property
    def layers(self) -> Mapping[str, int]:
        """Dimensions by name."""

    def features(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [n, height, width, 3] -> float32 [n, dims] of every layer."""


class Features:
    """The features of a set of images, read from disk part by part when they are asked for.

    count: images. layers: dimensions by name. images_sha256: of the names and the pixels, in order.
    """

    def __init__(self, parts: Sequence[Mapping[str, np.ndarray] | Path], digests: Sequence[str], names: Sequence[str],
                 layers: Mapping[str, int]):
        self._parts, self._digests, self.count, self.layers = parts, digests, len(names), dict(layers)
        self.images_sha256 = _sha256_of_all(names, digests)

    def parts(self, layer: str | None = None) -> Iterator[np.ndarray]:
        """float32 [at most 1000, dims] of a layer (default: the first), in the order of the images."""
        layer = layer or next(iter(self.layers))
        for part, digest in zip(self._parts, self._digests, strict=True):
            if isinstance(part, Path):
                with np.load(part, allow_pickle=False) as kept:
                    if str(kept["pixels_sha256"]) != digest:
                        raise UserError(f"{part} has become that of other images: something else evaluates a changed "
                                        "set at the same time; run the same command again")
                    yield kept[layer]
            else:
                yield part[layer]

    def all(self, layer: str | None = None) -> np.ndarray:
        """float32 [n, dims]: the whole layer in memory, 410 MB for 50,000 images and 2048 dimensions."""
        layer = layer or next(iter(self.layers))
        out, first = np.empty((self.count, self.layers[layer]), np.float32), 0
        for part in self.parts(layer):
            out[first:first + len(part)] = part
            first += len(part)
        return out

    @property
    def values(self) -> np.ndarray:
        """The first layer, whole."""
        return self.all()


def _sha256_of_all(names: Sequence[str], digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join([*names, *digests]).encode()).hexdigest()


def _parts(images: ImageSet) -> list[range]:
    return [range(first, min(first + PART, len(images))) for first in range(0, len(images), PART)]


def extract(images: ImageSet, extractor: Extractor, batch_size: int = 32, store: Path | None = None,
            share: bool = False) -> Features | None:
    """The features of all images; those that are kept and still right are not computed again.

    store: where to make the folder for them (default: beside the images; images in memory keep theirs in memory).
    share: with torchrun's other processes, which get None when their parts are there; rank 0 waits for all of them.
    Raises UserError for images that cannot be used, that change meanwhile, and for a folder that cannot be written.
    """
    (rank, world), parts = rank_and_world() if share else (0, 1), _parts(images)
    folder = _folder(images, extractor, store, world)
    if folder is None:
        computed = [(values, digest) for _, values, digest in _computed(images, extractor, parts, batch_size)]
        check_unchanged(images)
        return Features([values for values, _ in computed], [digest for _, digest in computed], images.names,
                        extractor.layers)
    kept = {part: _Kept(folder / f"part-{i:05d}.npz", images, part, extractor) for i, part in enumerate(parts)}
    own = list(deal(parts)) if share else parts
    for part, digest in _digests(images, [part for part in own if kept[part].digest and not kept[part].valid],
                                 batch_size):
        kept[part].confirm(digest)
    for part, values, digest in _computed(images, extractor, [part for part in own if not kept[part].valid],
                                          batch_size):
        kept[part].write(values, digest)
    if rank:
        return None
    _wait({part: one for part, one in kept.items() if not one.valid}, images, batch_size)
    check_unchanged(images)
    return Features([one.path for one in kept.values()], [one.digest or "" for one in kept.values()], images.names,
                    extractor.layers)


def _folder(images: ImageSet, extractor: Extractor, store: Path | None, world: int) -> Path | None:
    """Where these features are kept, made and ready to be written to; None: in memory."""
    if images.root is None:
        return None
    of_set = (images.root / ".features" if images.root.is_dir()
              else images.root.with_name(f"{images.root.name}.features"))
    if store is not None:
        root = images.root.resolve()        # many files are called samples.npz
        of_set = store / f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    folder = of_set / hashlib.sha256(extractor.id.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            remove_leftovers(folder.glob(".*.tmp"))
            return folder
        reason = "no permission"
    except OSError as error:
        reason = str(error.strerror)
    if store is not None or world > 1:
        raise UserError(f"the features are kept in {folder}, which cannot be written ({reason}): name another folder "
                        "with --features")
    tqdm.write(f"note: {folder} cannot be written ({reason}): the features stay in memory, and are computed again next "
               "time")
    return None


def pixels_sha256(images: ImageSet) -> str:
    """`Features.images_sha256` of a set of images, without features. Raises UserError for images that cannot be used.

    Those of a folder are noted in it, for files that are not touched: reading 50,000 images takes minutes.
    """
    note, known = None, dict[str, str]()        # fingerprint -> digest
    if images.root and images.root.is_dir():
        note = images.root / ".features" / "pixels.json"
        with suppress(ValueError):              # a note that is not there, or damaged
            content = read_json(note)
            known = content if fault(content, dict[str, str]) is None else {}
    if images.fingerprint in known:
        return known[images.fingerprint]
    seen = images.stamp(range(len(images)))
    digest = _sha256_of_all(images.names, [digest for _, digest in _digests(images, _parts(images), 32)])
    check_unchanged(images)
    if note is not None and time.time() - seen.changed > _DOUBT:
        with suppress(OSError):         # a folder that cannot be written to: they are read again the next time
            note.parent.mkdir(exist_ok=True)
            write_json(note, dict(list(known.items())[-9:]) | {images.fingerprint: digest})
    return digest


class _Kept:
    """One part on disk."""

    def __init__(self, path: Path, images: ImageSet, part: range, extractor: Extractor):
        self.path, self.extractor = path, extractor
        self.shapes = {name: (len(part), dims) for name, dims in extractor.layers.items()}
        seen = images.stamp(part)
        self.stamp = seen.text if time.time() - seen.changed > _DOUBT else ""
        self.read()

    def read(self) -> None:
        self.digest: str | None = None          # of its images' pixels; None without a usable file
        self.valid = False                      # the images are the same, as far as their files tell
        self.in_doubt = False                   # they tell nothing, since they had just been written
        # What is not there or damaged is computed again: it is only kept to save work.
        with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), \
                np.load(self.path, allow_pickle=False) as kept:
            if str(kept["extractor"]) == self.extractor.id and self.shapes == {
                    name: kept[name].shape for name in self.shapes}:
                digest, stamp = str(kept["pixels_sha256"]), str(kept["stamp"])
                self.digest, self.in_doubt = digest, "" in (stamp, self.stamp)
                self.valid = stamp == self.stamp and not self.in_doubt

    def confirm(self, digest: str) -> None:
        """The files were touched: with the same pixels in them, only what was seen of them is written anew."""
        if digest == self.digest:
            with np.load(self.path, allow_pickle=False) as kept:
                self.write({name: kept[name] for name in self.shapes}, digest)

    def write(self, values: Mapping[str, np.ndarray], digest: str) -> None:
        content: dict[str, Any] = {"extractor": self.extractor.id, "stamp": self.stamp, "pixels_sha256": digest,
                                   **values}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, **content)
        write_atomically(self.path, write)
        self.digest, self.valid = digest, True


def _computed(images: ImageSet, extractor: Extractor, parts: Sequence[range], batch_size: int
              ) -> Iterator[tuple[range, dict[str, np.ndarray], str]]:
    """(part, features by layer, sha256 of the pixels) of each part."""
    for part, batches, digest in _by_part(images, parts, batch_size, "features"):
        features = []
        for pixels in batches:
            features.append(extractor.features(pixels))
            for name, values in features[-1].items():
                if not np.isfinite(values).all():
                    raise UserError(f"the {name} features of an image in {images.description} are not finite: the "
                                    "weights of the extractor are damaged")
        yield part, {name: np.concatenate([f[name] for f in features]) for name in extractor.layers}, digest.hexdigest()


def _digests(images: ImageSet, parts: Sequence[range], batch_size: int) -> Iterator[tuple[range, str]]:
    """(part, sha256 of the pixels) of each part."""
    for part, batches, digest in _by_part(images, parts, batch_size, "checking"):
        for _ in batches:
            pass
        yield part, digest.hexdigest()


def _by_part(images: ImageSet, parts: Sequence[range], batch_size: int, title: str
             ) -> Iterator[tuple[range, Iterator[np.ndarray], Any]]:
    """(part, its batches, the sha256 of those that were used up), all in one pass through the images, with progress."""
    if not parts:
        return
    rank, world = rank_and_world()
    following = _ahead(images.batches(batch_size, parts))
    with tqdm(total=sum(map(len, parts)), unit="img", leave=False, disable=True if rank else None,
              desc=f"{title} of {images.description}" + (f", 1 of {world} processes" if world > 1 else "")) as bar:
        for part in parts:
            digest = hashlib.sha256()

            def batches(left: int = len(part), digest: Any = digest) -> Iterator[np.ndarray]:
                while left:
                    pixels = next(following)
                    left -= len(pixels)
                    digest.update(np.ascontiguousarray(pixels).data)
                    yield pixels
                    bar.update(len(pixels))

            yield part, batches(), digest


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one being made while one is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


def _wait(missing: dict[range, _Kept], images: ImageSet, batch_size: int) -> None:
    """Until other processes have written these parts."""
    since, pixels = time.monotonic(), dict[range, str]()
    with tqdm(total=len(missing), unit="part", leave=False, disable=None if missing else True,
              desc="waiting for the other processes") as bar:
        while missing:
            for part, kept in missing.items():
                kept.read()
                if kept.in_doubt:
                    if part not in pixels:
                        pixels |= _digests(images, [part], batch_size)
                    kept.valid = kept.digest == pixels[part]
            left = {part: kept for part, kept in missing.items() if not kept.valid}
            if len(left) < len(missing):
                since = time.monotonic()
                bar.update(len(missing) - len(left))
            elif time.monotonic() - since > _PATIENCE:
                raise UserError(f"{len(left)} parts are still missing in {next(iter(left.values())).path.parent}, and "
                                f"no process has added one for {_PATIENCE // 60} minutes: run the same command again")
            missing = left
            if missing:
                time.sleep(1)
