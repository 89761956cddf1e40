"""Feature caching in diffusion U-Nets: DeepCache and Block Caching.

    from unet_caching import disable_deepcache, enable_deepcache
    enable_deepcache(pipe, interval=3)      # a diffusers pipeline with a U-Net; one full step in three
    disable_deepcache(pipe)                 # as it was
    with enable_deepcache(pipe, interval=3, forecast=1):
        pipe(...)                           # on in here alone
    pipe.scheduler = plan_scheduler("plan.json", pipe.scheduler)
    enable_deepcache(pipe, plan="plan.json")                    # a plan, with the timesteps that it was found for

This is what `pip install .` makes of a clone (setup.py): the clone's rooms are subpackages here, so that
`python -m ddpm.sample` there is `python -m unet_caching.ddpm.sample` here.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.enable import disable_deepcache, enable_deepcache
    from pipelines.scheduler import plan_scheduler

__all__ = ["__version__", "disable_deepcache", "enable_deepcache", "plan_scheduler"]
__version__ = version("unet-caching")


def __getattr__(name: str) -> Any:
    """The pipelines' functions at their first use: diffusers, which they import, takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipelines import enable, scheduler
    return getattr(scheduler if name == "plan_scheduler" else enable, name)


def __dir__() -> list[str]:
    return __all__
