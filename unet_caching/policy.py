"""A caching policy decides, for each network call of a run, which values are computed and which are reused."""

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

from torch import Tensor


class Policy(Protocol):
    """The protocol, and its base class, which computes everything and keeps nothing.

    `unet(x, t, cache=policy.at(step))` runs network call `step`; `reset()` comes after the last call of a batch.
    Your own policy overrides `__call__`, and as much of the rest as it needs:

    - `at` chooses what the next call does. It sets plain attributes, outside any compiled region.
    - `owns` says which keys the policy may keep.
    - `kept` are the tensors that it holds between calls. CUDA graphs read and write them in fixed buffers, so an
      assignment must replace the tensors.
    - `pattern` is equal for calls that compute, keep and reuse the same keys, so that one recording serves all of them.
      None (the default) means that this is not known; such calls are never recorded.
    """

    def at(self, step: int) -> "Policy":
        """The cache of network call `step`."""
        return self

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The value of `key`, computed or reused."""
        return compute()

    def reset(self) -> None:
        """Drop all values."""
        return None

    def owns(self, key: Hashable) -> bool:
        """Whether this policy may keep the value of `key`."""
        return True

    @property
    def pattern(self) -> Hashable | None:
        """What the next call does, as far as a recording depends on it; None if that is not known."""
        return None

    @property
    def kept(self) -> Mapping[Hashable, Tensor]:
        """The tensors that are held between calls, by any names."""
        return {}

    @kept.setter
    def kept(self, values: Mapping[Hashable, Tensor]) -> None:
        return None

