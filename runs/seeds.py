"""Seeds as people write them, and the part of them that a process is given."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from runs.errors import UserError

T = TypeVar("T")


def parse_seeds(text: str, what: str = "seeds") -> list[int]:
    """Read seeds: '0-3,7' -> [0, 1, 2, 3, 7]. `what` the numbers are, for messages.

    Raises UserError for anything else than numbers and ascending ranges, and for repeats.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise UserError(f"{what} {text!r} do not parse at {part!r}: write numbers and ranges, like 0-49999 or "
                            "0-9,20")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{what} {text!r}: the range {part.strip()} runs backwards")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{what} {text!r} name some number twice")
    return seeds


def format_seeds(seeds: Iterable[int]) -> str:
    """Write seeds, sorted, as `parse_seeds` reads them: [0, 1, 2, 3, 7] -> '0-3,7'."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is: torchrun's RANK and WORLD_SIZE, else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def format_some(seeds: Iterable[int]) -> str:
    """The seeds, cut short for a message."""
    text = format_seeds(seeds)
    return text if len(text) <= 60 else text[:60].rsplit(",", 1)[0] + ",..."


def deal(seeds: Sequence[T]) -> Sequence[T]:
    """The seeds of this process: a contiguous slice of them, as long as those of the other ranks up to one."""
    rank, world = rank_and_world()
    bounds = [len(seeds) * i // world for i in (rank, rank + 1)]
    return seeds[bounds[0]:bounds[1]]
