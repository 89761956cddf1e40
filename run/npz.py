"""Pack a sample folder into one npz, in the layout that ADM's evaluation takes (github openai/guided-diffusion).

    python -m run.npz --samples samples/cin256_n10 --seeds 0-49999 --out samples/cin256_n10.npz

arr_0: uint8 [images, height, width, 3], in the order of the seeds; arr_1: int64 [images], the labels, if the model has
classes. The file is not compressed, is written image by image, and appears whole or not at all.
"""

import shutil
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from run.cli import command
from run.files import remove_leftovers, write_atomically
from run.folder import image_path, missing_seeds, read_run
from run.images import read_png
from run.labels import Labels
from run.seeds import format_some, parse_seeds
from unet_caching.errors import UserError
from unet_caching.options import required

_OVERHEAD = 4096        # bytes that the headers and the zip directory take at most


def pack(samples: Path, seeds: Sequence[int], out: Path) -> None:
    """Write the images of `seeds`, in ascending order, and their labels to the npz `out`.

    Raises UserError for images that are missing, damaged or of mixed sizes, and if the disk is too full.
    """
    seeds = sorted(seeds)
    labels = Labels.from_settings(read_run(samples)["settings"])
    missing = missing_seeds(samples, seeds)
    if missing:
        raise UserError(f"{samples} has {len(seeds) - len(missing)} of the {len(seeds)} images asked for; missing "
                        f"seeds {format_some(missing)}: sample them first")
    if not out.parent.is_dir():
        raise UserError(f"no folder {out.parent} for {out.name}")
    first = image_path(samples, seeds[0])
    shape = read_png(first).shape
    needed = len(seeds) * (int(np.prod(shape)) + (8 if labels else 0)) + _OVERHEAD
    remove_leftovers(out.parent.glob(f".{out.name}.*.tmp"))
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(f"{out} needs {needed:,} bytes and its disk has {free:,} free: free some space, or take a "
                        "folder on another disk")

    def images() -> Iterable[np.ndarray]:
        for seed in tqdm(seeds, unit="img", desc=out.name):
            yield read_png(image_path(samples, seed), shape, first)

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            _write_array(archive, "arr_0", np.dtype(np.uint8), (len(seeds), *shape), images())
            if labels:
                of_all = np.array([labels.of(seed) for seed in seeds], np.int64)
                _write_array(archive, "arr_1", of_all.dtype, of_all.shape, [of_all])

    write_atomically(out, write)


def _write_array(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...],
                 parts: Iterable[np.ndarray]) -> None:
    """Add one array to an npz, part by part. The time stamp is fixed, so equal images give equal files."""
    member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    with archive.open(member, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
        for part in parts:
            file.write(np.ascontiguousarray(part).data)


@dataclass(frozen=True)
class Options:
    samples: Path = required("sample folder, with run.json")
    seeds: str = required("which images: 0-49999 or 0-9,20; all of them must exist")
    out: Path = required("the npz; an existing one is replaced")


@command
def main(options: Options) -> None:
    seeds = parse_seeds(options.seeds)
    pack(options.samples, seeds, options.out)
    print(f"{options.out}: {len(seeds)} images")


if __name__ == "__main__":
    main()
