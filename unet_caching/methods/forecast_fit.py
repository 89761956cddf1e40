"""The damping of a forecast, fitted on the path of the run itself, and how good a forecast is there.

At every cached step the network computes the feature that the run does without, from the run's own input: what the
forecast should have been. Nothing is trained: each step has a closed form (`unet_caching.forecast.DampingFit`).
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from unet_caching.forecast import DampingFit, newton_terms
from unet_caching.methods.deepcache import DeepCache
from unet_caching.methods.scale_shift import relative_distance
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


class ForecastFit(OnRunsPath):
    """Fits the damping of every cached step, in closed form as the run comes to it.

    Runs of several batches add up: each takes the path of what is known by then. All of them must take `policy`.
    calls: network calls of a run. ridge: weight of 1, the polynomial itself, against the data, in squares of each term.
    `damping`: [calls][order], as `DeepCache` takes it; 1 where nothing was fitted.
    """

    def __init__(self, unet: Network, branch: int, full_steps: Sequence[int], order: int, calls: int,
                 ridge: float = 1e-2):
        super().__init__(unet)
        self.branch, self.full_steps, self.ridge = branch, list(full_steps), ridge
        self.damping = [[1.0] * order for _ in range(calls)]
        self.fits: dict[int, DampingFit] = {}

    def policy(self) -> DeepCache:
        """A fresh one for a batch, which forecasts with the damping as it is by then."""
        return DeepCache(self.branch, self.full_steps, len(self.damping[0]), self.damping)

    def meet(self, cache: DeepCache, wanted: Tensor) -> None:
        factors = newton_terms(cache.step, cache.history.steps)
        if not factors or cache.feature is None:
            return                              # the start of a run: the one value so far is reused
        latest = cache.feature.float()
        apart = torch.stack([value.float() - latest for value in cache.history.older[:len(factors)]])
        terms = torch.tensordot(apart.new_tensor(factors), apart, dims=1)           # [terms, *feature]
        fit = self.fits.setdefault(cache.step, DampingFit(len(terms)))
        fit.add(terms, wanted.float() - latest - terms.sum(0))
        self.damping[cache.step][:len(terms)] = fit.solve(self.ridge)
        cache.at(cache.step)


class ForecastErrors(OnRunsPath):
    """How far what cached steps see is from what the network would compute there.

    `errors`: for every cached step |forecast - computed|_2 / |computed|_2, float32 [batch].
    """

    def __init__(self, unet: Network):
        super().__init__(unet)
        self.errors: list[Tensor] = []

    def meet(self, cache: DeepCache, wanted: Tensor) -> None:
        self.errors.append(relative_distance(cache.reuse(), wanted))
