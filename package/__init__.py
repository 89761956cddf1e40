"""Feature caching in diffusion U-Nets: DeepCache and Block Caching.

    from unet_caching import disable_deepcache, enable_deepcache
    enable_deepcache(pipe, interval=5)      # a Stable Diffusion pipeline of diffusers; one full step in five
    disable_deepcache(pipe)                 # as it was

This is what `pip install .` makes of a clone (setup.py): the clone's rooms are subpackages here, so that
`python -m ddpm.sample` there is `python -m unet_caching.ddpm.sample` here.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_diffusion.pipeline import disable_deepcache, enable_deepcache

__all__ = ["__version__", "disable_deepcache", "enable_deepcache"]
__version__ = version("unet-caching")


def __getattr__(name: str) -> Any:
    """The pipelines' functions at their first use: diffusers, which they import, takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stable_diffusion import pipeline
    return getattr(pipeline, name)


def __dir__() -> list[str]:
    return __all__
