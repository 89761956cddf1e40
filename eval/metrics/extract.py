"""Features of a set of images, computed once and kept beside the images in parts.

    SAMPLES/.features/KEY/part-00000.npz        for a folder; KEY stands for the extractor
    X.npz.features/KEY/part-00000.npz           for an npz

A part holds the features of 1000 images and the sha256 of their pixels. It is used again if the pixels are unchanged:
reading 50,000 images takes a minute, the network minutes to hours. So a run that was stopped computes only the parts
that are missing, a set that has grown only its new parts, and a copied folder none.
"""

import hashlib
import os
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
from unet_caching.errors import UserError
from unet_caching.files.schema import fault, read_json

PART = 1000             # images; another number would change the batches, and with them the last bits
T = TypeVar("T")


class Extractor(Protocol):
    """A network that turns images into features."""

    @property
    def id(self) -> str:
        """What decides the features: network, weights, preprocessing."""

    @property
    def layers(self) -> Mapping[str, int]:
        """The dimensions of each layer."""

    def features(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [n, height, width, 3] -> float32 [n, dims] by layer."""


class Features:
    """The features of a set of images, read from disk in parts on demand.

    count: images. layers: dimensions by layer. images_sha256: of the names and the pixels, in order.
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
                        raise UserError(f"{part} was replaced by features of other images: another command evaluates a "
                                        "changed set at the same time; run the same command again")
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


def _sha256_of_all(names: Sequence[str], digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join([*names, *digests]).encode()).hexdigest()


def _parts(images: ImageSet) -> list[range]:
    return [range(first, min(first + PART, len(images))) for first in range(0, len(images), PART)]


def extract(images: ImageSet, extractor: Extractor, batch_size: int = 32) -> Features:
    """The features of all images. Those that are kept beside the images, and still right, are not computed again.

    Those of images in memory stay in memory. Raises UserError for images that cannot be used or change meanwhile.
    """
    parts, folder = _parts(images), _folder(images, extractor)
    files = {} if folder is None else {part: folder / f"part-{i:05d}.npz" for i, part in enumerate(parts)}
    kept = {part: digest for part, file in files.items() if (digest := _kept(file, len(part), extractor))}
    digests = {part: digest for part, digest in _digests(images, list(kept), batch_size) if digest == kept[part]}
    features: dict[range, Mapping[str, np.ndarray] | Path] = dict(files)
    for part, values, digest in _computed(images, extractor, [part for part in parts if part not in digests],
                                          batch_size):
        digests[part] = digest
        if folder is None:
            features[part] = values
        else:
            _keep(files[part], values, extractor, digest)
    check_unchanged(images)
    return Features([features[part] for part in parts], [digests[part] for part in parts], images.names,
                    extractor.layers)


def _folder(images: ImageSet, extractor: Extractor) -> Path | None:
    """The folder that keeps these features, created and writable; None: in memory."""
    if images.root is None:
        return None
    of_set = (images.root / ".features" if images.root.is_dir()
              else images.root.with_name(f"{images.root.name}.features"))
    folder = of_set / hashlib.sha256(extractor.id.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            remove_leftovers(folder.glob(".*.tmp"))
            return folder
        reason = "no permission"
    except OSError as error:
        reason = str(error.strerror)
    tqdm.write(f"note: {folder} cannot be written ({reason}): the features stay in memory and are computed again next "
               "time")
    return None


def pixels_sha256(images: ImageSet) -> str:
    """`Features.images_sha256` of a set of images, without features. Raises UserError for images that cannot be used.

    A folder keeps a note of it until a file changes, since tables look at many folders.
    """
    note, known = None, dict[str, str]()        # fingerprint -> digest
    if images.root and images.root.is_dir():
        note = images.root / ".features" / "pixels.json"
        with suppress(ValueError):              # a note that does not exist, or is damaged
            content = read_json(note)
            known = content if fault(content, dict[str, str]) is None else {}
    if images.fingerprint in known:
        return known[images.fingerprint]
    digest = _sha256_of_all(images.names, [digest for _, digest in _digests(images, _parts(images), 32)])
    check_unchanged(images)
    if note is not None:
        with suppress(OSError):         # a folder that cannot be written: the images are read again next time
            note.parent.mkdir(exist_ok=True)
            write_json(note, dict(list(known.items())[-9:]) | {images.fingerprint: digest})
    return digest


def _kept(file: Path, count: int, extractor: Extractor) -> str | None:
    """The digest of a part's pixels, from its file; None without a usable file."""
    shapes = {name: (count, dims) for name, dims in extractor.layers.items()}
    # A part that is missing or damaged is computed again: it is only kept to save work.
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), \
            np.load(file, allow_pickle=False) as kept:
        if str(kept["extractor"]) == extractor.id and shapes == {name: kept[name].shape for name in shapes}:
            return str(kept["pixels_sha256"])
    return None


def _keep(file: Path, values: Mapping[str, np.ndarray], extractor: Extractor, digest: str) -> None:
    content: dict[str, Any] = {"extractor": extractor.id, "pixels_sha256": digest, **values}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as opened:
            np.savez(opened, **content)
    write_atomically(file, write)


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
    """(part, its batches, the sha256 of the batches so far), in one pass through the images, with a progress bar."""
    if not parts:
        return
    following = _ahead(images.batches(batch_size, parts))
    with tqdm(total=sum(map(len, parts)), unit="img", leave=False, disable=None,
              desc=f"{title} of {images.description}") as bar:
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
    """The same items; the next one is computed while one is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
