"""Noise that depends only on the image's seed: not on batch size, rank, job split, restart or device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """One generator per image, on the CPU, so that runs on a GPU get the same numbers.

    Each generator has the image's seed. It draws x_T first, then the noise of each stochastic step.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device, self.dtype = device, dtype

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Standard normal noise: `shape` of one image -> [images, *shape]. Drawn in float32, then cast."""
        drawn = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self.generators])
        return drawn.to(self.device, self.dtype)
