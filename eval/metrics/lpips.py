"""LPIPS (Zhang et al., arXiv 1801.03924), version 0.1 with AlexNet.

The network and its small linear heads are torchmetrics'. The backbone, which torchmetrics would download, is read from
a file.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from eval.metrics.measure import PairMeasure, PixelMeasure
from run.weights import load_strict, read_tensors, sha256
from unet_caching.errors import UserError

BACKBONE = "alexnet-owt-7be5be79.pth"       # torchvision's, named by the start of its sha256
_SMALLEST = 31      # pixels: below, nothing is left after the second pooling
LPIPS = PairMeasure("LPIPS", key="lpips", label="LPIPS")
OTHER_BACKBONE = PairMeasure("not LPIPS (backbone)", key="lpips_other_backbone", label="not LPIPS (backbone)")


class Lpips:
    """uint8 [n, height, width, 3] twice -> float64 [n]: 0 for equal images, larger for less alike ones.

    backbone: the file of torchvision's AlexNet (BACKBONE). Raises UserError if it is missing or another network.
    """

    def __init__(self, backbone: Path, device: torch.device | str = "cpu"):
        if not Path(backbone).is_file():
            raise UserError(f"no file {backbone}: LPIPS needs {BACKBONE}, torchvision's AlexNet")
        self.backbone, self.device = Path(backbone), torch.device(device)
        tensors = read_tensors(backbone)
        if not isinstance(tensors, dict) or not any(str(name).startswith("features.") for name in tensors):
            raise UserError(f"{backbone} is not torchvision's AlexNet: LPIPS needs {BACKBONE}")
        from torchmetrics.functional.image.lpips import _NoTrainLpips
        self.net = _NoTrainLpips(net="alex", pnet_rand=True)
        # slice1.0.weight is torchvision's features.0.weight.
        load_strict(self.net.net, {k: v for k, v in tensors.items() if not k.startswith("classifier.")},
                    lambda name: f"features.{name.split('.', 1)[1]}")
        self.net.to(self.device)

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the backbone's file, hex."""
        return sha256(self.backbone)

    @property
    def measure(self) -> PixelMeasure:
        """The measure for eval.fidelity. With any other than the published backbone it is not called LPIPS."""
        published = self.sha256.startswith(BACKBONE.removesuffix(".pth").rsplit("-", 1)[1])
        return PixelMeasure(**vars(LPIPS if published else OTHER_BACKBONE), of=self, smallest=_SMALLEST)

    @torch.no_grad()
    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        a, b = (torch.tensor(one, device=self.device).permute(0, 3, 1, 2) / 127.5 - 1 for one in (x, y))
        return self.net(a, b).reshape(-1).double().cpu().numpy()
