"""Seeds as people write them, and which of several processes this is."""

import os
import re
from collections.abc import Iterable, Sequence

from unet_caching.errors import UserError

MOST = 10_000_000       # images per command


def parse_seeds(text: str, what: str = "seeds", most: int = MOST) -> list[int]:
    """Read seeds: '0-3,7' -> [0, 1, 2, 3, 7]. what: what the numbers are, for messages. most: how many are allowed.

    Raises UserError for anything but numbers below 2^63 and ascending ranges, for repeats, and for too many numbers.
    """
    shown = text if len(text) <= 100 else f"{text[:97]}..."
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,30})\s*(?:-\s*(\d{1,30})\s*)?", part, re.ASCII)
        if not match:
            raise UserError(f"{what} {shown!r} cannot be read at {part[:40]!r}: write numbers and ranges, like 0-49999 "
                            "or 0-9,20")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{what} {shown!r}: the range {part.strip()} runs backwards")
        if last >= 2 ** 63:
            raise UserError(f"{what} {shown!r}: {last} is too large: the largest is 2^63 - 1")
        ranges.append(range(first, last + 1))
    count = sum(map(len, ranges))
    if count > most:
        raise UserError(f"{what} {shown!r} are {count:,}: more than {most:,} at a time is too many")
    seeds = [seed for one in ranges for seed in one]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{what} {shown!r} contain a number twice")
    return seeds


def format_seeds(seeds: Iterable[int]) -> str:
    """Sort seeds and write them as `parse_seeds` reads them: [0, 1, 2, 3, 7] -> '0-3,7'."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def in_batches(seeds: Sequence[int], size: int) -> list[list[int]]:
    """Cut seeds, in their order, into batches."""
    return [list(seeds[first:first + size]) for first in range(0, len(seeds), size)]


def rank_and_world() -> tuple[int, int]:
    """torchrun's RANK and WORLD_SIZE, or (0, 1) without it. Raises UserError for values that are not valid."""
    rank, world = (environment_number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not 0 <= rank < world:
        raise UserError(f"the environment has RANK={rank}, WORLD_SIZE={world}: RANK must be from 0 to WORLD_SIZE - 1")
    return rank, world


def environment_number(name: str, default: int) -> int:
    """A whole number from the environment, or the default if it is not set. Raises UserError for anything else."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise UserError(f"the environment variable {name} is {text[:40]!r}: set it to a whole number, or unset it")
    return int(text)


def format_some(seeds: Iterable[int]) -> str:
    """The seeds, cut short for a message."""
    text = format_seeds(seeds)
    return text if len(text) <= 60 else text[:60].rsplit(",", 1)[0] + ",..."
