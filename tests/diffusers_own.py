"""diffusers' own fast pipeline tests with our forward in their U-Nets: what they say, and what pipelines then return.

    git clone --depth 1 https://github.com/huggingface/diffusers ../diffusers
    python tests/diffusers_own.py ../diffusers [tests/pipelines/stable_diffusion_xl --stand-ins]

Each test of the checkout runs twice on the diffusers that is installed here: as it is, and with caching at interval 1
switched on in every pipeline as it is made. Nothing of theirs is copied. A test is

    same        ends as it does without us, and its pipelines return the same bits; by the nest, for some call at least
    untouched   likewise, but no pipeline of it calls a U-Net that caching is on in
    refused     caching was refused in it, at construction or at the call, with a reason
    differs     ends as before, and a pipeline returns something else
    broken      passes without us, and not with us
    skipped

Tests that fail without us too (they want downloads, an accelerator or other versions) are `same` where they fail with
us in the same way. Needs parameterized and requests_mock beside what is required here (`pip install --target FOLDER`
and PYTHONPATH=FOLDER). Ends with 1 where a test differs or is broken.
"""

import argparse
import functools
import hashlib
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from _pytest.runner import runtestprotocol
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_leaves
from transformers import CLIPTokenizer

from run.cli import command
from unet_caching.errors import UserError
from unet_caching.pipelines import install
from unet_caching.pipelines.enable import enable_deepcache

FOLDERS = ("controlnet", "ddim", "ddpm", "latent_consistency_models", "latent_diffusion", "pag", "stable_diffusion",
           "stable_diffusion_2", "stable_diffusion_adapter", "stable_diffusion_image_variation", "stable_diffusion_xl")
KINDS = ("same", "untouched", "refused", "differs", "broken", "skipped")
Report = Generator[None, pytest.TestReport, pytest.TestReport]


@dataclass
class Seen:
    """What is seen of one run of a test."""
    nest: bool = False              # whether caching is switched on
    outcome: str = "passed"
    reason: str = ""
    calls: int = 0                  # network calls by the nest
    refused: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)        # digests of what its pipelines returned


def kind(plain: Seen, ours: Seen) -> str:
    """Which of KINDS a test is, by what was seen of it without us and with us."""
    if ours.refused:
        return "refused"
    if plain.outcome == ours.outcome == "skipped":
        return "skipped"
    if plain.outcome != ours.outcome:
        return "broken" if plain.outcome == "passed" else "differs"
    if plain.outputs != ours.outputs or plain.reason != ours.reason:
        return "differs"
    return "same" if ours.calls else "untouched"


def digest(value: Any) -> str:
    """A digest of the numbers in what a pipeline returned."""
    found = hashlib.sha256()
    for one in tree_leaves(value):
        array = one.detach().cpu().float().numpy() if torch.is_tensor(one) else np.asarray(one)
        found.update(f"{array.shape} {array.dtype}".encode() + (b"" if array.dtype == object else array.tobytes()))
    return found.hexdigest()[:16]


class Twice:
    """A pytest plugin that runs each test twice. pairs: what was seen without us and with us, by test."""

    def __init__(self) -> None:
        self.seen = Seen()
        self.pairs: dict[str, tuple[Seen, Seen]] = {}
        own, forward = DiffusionPipeline.register_modules, install.cached_forward

        def register_modules(pipe: Any, **modules: Any) -> None:
            own(pipe, **modules)
            self.watch(type(pipe))
            if self.seen.nest and modules.get("unet") is not None:
                try:
                    enable_deepcache(pipe, interval=1)
                except UserError as error:
                    self.seen.refused.append(str(error))

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.seen.calls += 1
            return forward(*args, **kwargs)

        DiffusionPipeline.register_modules, install.cached_forward = register_modules, counted

    def watch(self, cls: type) -> None:
        """Digest what pipelines of a class return from now on."""
        owner = next(one for one in cls.__mro__ if "__call__" in vars(one))
        call = vars(owner)["__call__"]
        if not hasattr(call, "watched"):
            @functools.wraps(call)
            def watched(pipe: Any, *args: Any, **kwargs: Any) -> Any:
                found = call(pipe, *args, **kwargs)
                self.seen.outputs.append(digest(found))
                return found
            watched.watched = True
            owner.__call__ = watched

    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        runs = Seen(), Seen(nest=True)
        for self.seen in runs:
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(0)
            if hasattr(item, "_initrequest"):
                item._initrequest()             # fixtures afresh, as where a test is run again
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            runtestprotocol(item, nextitem=None)        # what is shared by a class is made anew for each, too
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        self.pairs[item.nodeid] = runs
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Report:
        report = yield
        if report.failed or report.skipped:
            self.seen.outcome = report.outcome
        if report.failed and (error := call.excinfo):
            message = re.sub(r"\b0x[0-9a-f]{6,}", "", " ".join(str(error.value).split()))       # no addresses
            self.seen.reason = f"{error.typename}: {message[:300]}"
            self.seen.refused += [str(error.value)] if error.errisinstance(UserError) else []
        return report


def stand_in(own: Any) -> Any:
    """`from_pretrained` of a tokenizer, with one of letters for tiny models that are not at hand."""
    def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(name).startswith("hf-internal-testing/"):
            return own(cls, name, *args, **kwargs)
        letters = [chr(code) for code in range(33, 127)]
        tokens = ["<|startoftext|>", "<pad>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
        return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    return from_pretrained


def report(pairs: Mapping[str, tuple[Seen, Seen]]) -> str:
    """How many tests of each kind, as text; of the kinds that matter, which and why."""
    kinds, lines = {test: kind(*pair) for test, pair in pairs.items()}, []
    for name in KINDS:
        ours = [pair[1] for test, pair in pairs.items() if kinds[test] == name]
        outcomes, outputs = Counter(one.outcome for one in ours), sum(len(one.outputs) for one in ours)
        lines.append(f"{name:10}{len(ours):5}   {outcomes['passed']} passed, {outputs} outputs, "
                     f"{sum(one.calls for one in ours)} network calls by the nest")
    return "\n".join([*lines, *(
        f"{name}: {test}: {'; '.join(dict.fromkeys(ours.refused)) or ours.reason}"
        for name in ("refused", "differs", "broken") for test, (_, ours) in pairs.items() if kinds[test] == name)])


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a working tree of diffusers")
    parser.add_argument("tests", nargs="*", help="files or folders there (default: the pipelines with U-Nets that can "
                                                 "be cached)")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="which of their tests, as pytest's -k")
    parser.add_argument("--stand-ins", action="store_true", help="a tokenizer of letters for those that tests "
                        "download; numbers that tests expect are not met then, outputs are compared all the same")
    args = parser.parse_intermixed_args()
    folder = args.checkout / "tests" / "pipelines"
    if not folder.is_dir():
        raise UserError(f"{args.checkout} is no checkout of diffusers: no {folder}")
    words = args.tests or [f"tests/pipelines/{name}" for name in FOLDERS if (folder / name).is_dir()]
    if not words:
        raise UserError(f"none of {', '.join(FOLDERS)} in {folder}: name the tests to run")
    os.chdir(args.checkout)
    sys.path.insert(0, os.getcwd())
    if args.stand_ins:
        CLIPTokenizer.from_pretrained = classmethod(stand_in(CLIPTokenizer.from_pretrained.__func__))
    twice = Twice()
    code = pytest.main(["-q", "--no-header", "-W", "ignore", "--tb=short", "-p", "no:cacheprovider",
                        "-p", "no:faulthandler", "-k", args.k, *words], [twice])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not twice.pairs:
        raise UserError(f"pytest ended with {int(code)} in {args.checkout}: what it says is above")
    print(report(twice.pairs))
    sys.exit(any(kind(*pair) in ("differs", "broken") for pair in twice.pairs.values()))


if __name__ == "__main__":
    main()
