"""Every pipeline class of the installed diffusers that takes a `unet`, built tiny (tiny_pipelines.py), with caching.

    python tests/every_pipeline.py              all: minutes; writes the table of results/pipelines.md
    python tests/every_pipeline.py NAME ...     some, and what each ends in
"""

import inspect
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import unet_caching  # noqa: F401  isort: skip  first: it lets torchvision be imported
import diffusers
import torch
from tiny_pipelines import built, call
from torch import nn

from unet_caching import enable_deepcache
from unet_caching.errors import UserError, one_line

INTERVAL = 3
PAGE, HEAD = Path(__file__).parents[1] / "results" / "pipelines.md", "| | pipelines |"
NOT_BUILT = ("BlipDiffusionPipeline", "BlipDiffusionControlNetPipeline")        # which do not run beside transformers 5
EXPORTED = re.compile(r"\b(?!Onnx|Flax)\w*Pipeline\w*\b")
# Network calls of one step, and full ones of runs in several loops, by what a pipeline's name matches.
TOGETHER = {"GLIGENTextImage|ScoreSde": 2}
FULL = {"TextToVideoZero": 4, "LEdits": 6, "Paradigms": 5, "KarrasVe": 7}       # KarrasVe: two calls at two sigmas


class Outcome(NamedTuple):
    """What caching in a pipeline comes to."""
    name: str
    unet: str
    refused: str = ""
    fault: str = ""         # what must not be


class Count:
    """How often a U-Net is called, and how often all of it runs."""

    def __init__(self, unet: nn.Module):
        self.calls = self.full = 0
        unet.register_forward_pre_hook(lambda *_: setattr(self, "calls", self.calls + 1))
        unet.mid_block.register_forward_pre_hook(lambda *_: setattr(self, "full", self.full + 1))

    def take(self) -> tuple[int, int]:
        found, self.calls, self.full = (self.calls, self.full), 0, 0
        return found


def outcome(name: str) -> Outcome:
    """With interval 3 one step in three is full, as the log says, and interval 1 is the plain pipeline, bit for bit,
    whatever is logged; or it is refused."""
    pipe = built(getattr(diffusers, name))
    unet, log = type(pipe.unet).__name__, logging.getLogger("unet_caching")
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())      # type: ignore[method-assign]
    log.addHandler(handler)
    before = log.level
    try:
        log.setLevel(logging.INFO)
        with enable_deepcache(pipe, interval=INTERVAL):
            count = Count(pipe.unet)
            call(pipe)
        calls, full = count.take()
        lines = said[:]
        with enable_deepcache(pipe, interval=1):
            same = call(pipe)
    except UserError as error:
        return Outcome(name, unet, refused=str(error))
    finally:
        log.setLevel(before)
        log.removeHandler(handler)
    together = _matching(TOGETHER, name, 1)
    planned = _matching(FULL, name, together * -(-calls // together // INTERVAL))
    # GLIGEN's layers act for a part of the run only: its later full calls cost less than the first.
    told = [sum(map(int, found)) for found in zip(*re.findall(
        r"caching in (\d+) network calls, (\d+) of them full", "\n".join(lines)), strict=True)]
    wrong = [line for line in said if not line.startswith("caching in") and "next to nothing" not in line]
    fault = (f"{full} full of {calls} calls, not {planned}" if full != planned else f"the log says {told}, not {calls}"
             if told != [calls, full] and "GLIGEN" not in name else wrong[0] if wrong else "")
    plain = call(pipe)
    return Outcome(name, unet, fault=fault or ("" if torch.equal(same, plain) else "differs at interval 1"))


def _matching(values: dict[str, int], name: str, default: int) -> int:
    return next((value for pattern, value in values.items() if re.search(pattern, name)), default)


def classes() -> Iterator[str]:
    """The names of all pipelines of the installed diffusers that take a `unet`, but for those that cannot be built."""
    exported = EXPORTED.findall((Path(diffusers.__file__).parent / "__init__.py").read_text())
    for name in sorted(set(exported)):
        cls = getattr(diffusers, name, None)
        if isinstance(cls, type) and "unet" in inspect.signature(cls.__init__).parameters and name not in NOT_BUILT:
            yield name


def short(name: str) -> str:
    return name.replace("Pipeline", "").replace("StableDiffusion", "SD")


def row(one: Outcome) -> str:
    """Where the table has a class: with those of its U-Net, or of the same reason."""
    refused = re.sub(r"^\w+ store (.*): .*", r"attention processors store \1", one.refused)
    refused = re.sub(r"has a \w+,", "has a block", re.sub(r"loop of a \w+", "loop", refused))
    return f"refused: {refused}" if refused else f"works: {one.unet}"


def table(outcomes: list[Outcome]) -> str:
    """The classes of each kind of U-Net that work, and of each reason those that are refused."""
    rows: dict[str, list[str]] = {}
    for one in sorted(outcomes, key=lambda one: bool(one.refused)):
        rows.setdefault(row(one), []).append(short(one.name))
    return "\n".join([HEAD, "|---|---|", *(f"| {what} | {', '.join(names)} |" for what, names in rows.items())]) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("unet_caching").setLevel(logging.ERROR)
    diffusers.utils.logging.set_verbosity_error()
    found = []
    for name in sys.argv[1:] or classes():
        try:
            found.append(outcome(name))
            print(*found[-1], sep="; ", flush=True)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{name}: {type(error).__name__}: {one_line(error)[:150]}, {where.filename}:{where.lineno}")
    if not sys.argv[1:]:
        page = PAGE.read_text()
        PAGE.write_text(re.sub(re.escape(HEAD) + r"\n(\|.*\n)+", lambda _: table(found), page))
