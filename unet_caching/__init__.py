"""Feature caching in diffusion U-Nets: DeepCache and Block Caching.

    from unet_caching import disable_deepcache, enable_deepcache
    enable_deepcache(pipe, interval=3)      # a diffusers pipeline with a U-Net; one full step in three
    disable_deepcache(pipe)                 # back to the original pipeline
    with enable_deepcache(pipe, interval=3, forecast=1):
        pipe(...)                           # caching is on only in here
    pipe.scheduler = plan_scheduler("plan.json", pipe.scheduler)
    enable_deepcache(pipe, plan="plan.json")                    # a plan, with its own timesteps

In your own network: `unet(x, t, cache=DeepCache(branch, uniform(steps, interval)).at(step))`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unet_caching.libraries import let_torchvision_import

if TYPE_CHECKING:
    from unet_caching.methods.deepcache import DeepCache
    from unet_caching.methods.plan import Plan
    from unet_caching.pipelines.enable import disable_deepcache, enable_deepcache
    from unet_caching.pipelines.learn import learn_plan
    from unet_caching.pipelines.run import refresh_deepcache
    from unet_caching.pipelines.scheduler import plan_scheduler
    from unet_caching.schedules import centered, released_ldm, uniform

let_torchvision_import()
__version__ = "0.1.0"
__all__ = ["DeepCache", "Plan", "__version__", "centered", "disable_deepcache", "enable_deepcache", "learn_plan",
           "plan_scheduler", "refresh_deepcache", "released_ldm", "uniform"]
_PLACES = {"enable_deepcache": "pipelines.enable", "disable_deepcache": "pipelines.enable",
           "refresh_deepcache": "pipelines.run", "learn_plan": "pipelines.learn",
           "plan_scheduler": "pipelines.scheduler", "DeepCache": "methods.deepcache", "Plan": "methods.plan",
           "uniform": "schedules", "centered": "schedules", "released_ldm": "schedules"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: PyTorch and diffusers take seconds to import."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
