"""Caching in diffusers' U-Nets and pipelines: their modules in the nest, and the start and end of each run."""

from importlib.metadata import version

OLDEST = "0.30"         # version of diffusers; older ones were not tried


def check_diffusers(found: str) -> None:
    """Raise an ImportError for a version of diffusers that the nest was not compared with."""
    if tuple(map(int, found.split(".")[:2])) < tuple(map(int, OLDEST.split("."))):
        raise ImportError(f"caching in pipelines needs diffusers {OLDEST} or newer, but {found} is installed: "
                          "pip install --upgrade diffusers")


check_diffusers(version("diffusers"))
