"""Caching in diffusers' own U-Nets and pipelines: their modules in the nest, and what tells one run from the next."""

from importlib.metadata import version

OLDEST = "0.30"         # of diffusers: older ones were not tried


def check_diffusers(found: str) -> None:
    """Refuse a version of diffusers that the nest was not compared with. Raises ImportError."""
    if tuple(map(int, found.split(".")[:2])) < tuple(map(int, OLDEST.split("."))):
        raise ImportError(f"caching in pipelines needs diffusers {OLDEST} or newer, and {found} is installed: "
                          "pip install --upgrade diffusers")


check_diffusers(version("diffusers"))
