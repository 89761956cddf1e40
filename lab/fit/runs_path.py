"""What stands in for the U-Net while a run with DeepCache samples: the network itself tells, at every cached step and
from the run's own input, what the feature should have been.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lab.fit.scale_shift import relative_distance
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import Network


class OnRunsPath:
    """Stands in for the U-Net while a run samples with a `DeepCache`: `network(x, t, *context, cache=cache.at(step))`,
    as `unet_caching.samplers.samplers.noise_predictor` calls it.
    """

    def __init__(self, unet: Network):
        self.unet = unet

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, *context: Tensor, cache: DeepCache) -> Tensor:
        if not cache.full:
            wanted: list[Tensor] = []

            def teacher(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
                value = compute()
                if key == cache.branch:
                    wanted.append(value)
                return value

            self.unet(x, t, *context, cache=teacher)
            self.meet(cache, wanted[0])
        return self.unet(x, t, *context, cache=cache)

    def meet(self, cache: DeepCache, wanted: Tensor) -> None:
        """Look at what the cached step is about to forecast, or change it. wanted: what the feature should be."""
        raise NotImplementedError


class ForecastErrors(OnRunsPath):
    """How far what cached steps see is from what the network would compute there.

    `errors`: for every cached step |forecast - computed|_2 / |computed|_2, float32 [batch].
    """

    def __init__(self, unet: Network):
        super().__init__(unet)
        self.errors: list[Tensor] = []

    def meet(self, cache: DeepCache, wanted: Tensor) -> None:
        self.errors.append(relative_distance(cache.reuse(), wanted))
