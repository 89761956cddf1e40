"""A pytest plugin for scripts/diffusers_own_tests.py: runs each test twice, as it is and with caching at interval 1
switched on in every pipeline that it makes.

Environment: UNET_CACHING_RECORD, a file that a JSON line is added to for each run of a test; UNET_CACHING_STAND_INS,
"1" for tokenizers of letters in the places of those that tests would download.
"""

import functools
import hashlib
import json
import os
import random
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.runner import runtestprotocol
from diffusers import DiffusionPipeline
from PIL.Image import Image
from transformers import CLIPTokenizer

import unet_caching.pipelines.install
from unet_caching.errors import UserError
from unet_caching.pipelines.enable import enable_deepcache

RECORD = Path(os.environ["UNET_CACHING_RECORD"])
STAND_INS = os.environ.get("UNET_CACHING_STAND_INS") == "1"
Report = Generator[None, pytest.TestReport, pytest.TestReport]
LETTERS = [chr(code) for code in range(33, 127)]


class Seen:
    """What is seen of one run of a test. nest: whether caching is switched on. calls: network calls by the nest.
    outputs: digests of what its pipelines returned.
    """

    def __init__(self, nest: bool = False):
        self.nest = nest
        self.outcome, self.reason, self.calls = "passed", "", 0
        self.refused: list[str] = []
        self.outputs: list[str] = []


seen = Seen()


def digest(value: Any) -> str:
    """A digest of the numbers in what a pipeline returned."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if torch.is_tensor(value):
            value = value.detach().cpu().float().numpy()
        if isinstance(value, np.ndarray | Image):
            array = np.ascontiguousarray(value)
            found.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
        elif isinstance(value, Mapping):
            add(list(value.values()))
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)
    add(value)
    return found.hexdigest()[:16]


def watch(cls: type) -> None:
    """Digest what pipelines of a class return from now on."""
    owner = next(one for one in cls.__mro__ if "__call__" in vars(one))
    call = vars(owner)["__call__"]
    if not hasattr(call, "watched"):
        @functools.wraps(call)
        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = call(self, *args, **kwargs)
            seen.outputs.append(digest(found))
            return found
        watched.watched = True  # type: ignore[attr-defined]
        owner.__call__ = watched  # type: ignore[method-assign]


def pytest_configure(config: pytest.Config) -> None:
    own, forward = DiffusionPipeline.register_modules, unet_caching.pipelines.install.cached_forward

    def register_modules(self: Any, **modules: Any) -> None:
        own(self, **modules)
        watch(type(self))
        if seen.nest and modules.get("unet") is not None:
            try:
                enable_deepcache(self, interval=1)
            except UserError as error:
                seen.refused.append(str(error))

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.calls += 1
        return forward(*args, **kwargs)

    DiffusionPipeline.register_modules = register_modules
    unet_caching.pipelines.install.cached_forward = counted
    if STAND_INS:
        CLIPTokenizer.from_pretrained = classmethod(stand_in(CLIPTokenizer.from_pretrained.__func__))


def stand_in(own: Any) -> Any:
    """`from_pretrained` of a tokenizer, with one of letters for tiny models that are not at hand."""
    def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(name).startswith("hf-internal-testing/"):
            return own(cls, name, *args, **kwargs)
        tokens = ["<|startoftext|>", "<pad>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
        return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    return from_pretrained


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    global seen
    for nest in (False, True):
        seen = Seen(nest)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        if hasattr(item, "_initrequest"):
            item._initrequest()             # fixtures afresh, as where a test is run again
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        runtestprotocol(item, nextitem=None)        # what is shared by a class is made anew for each, too
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        with RECORD.open("a") as file:
            file.write(json.dumps({"test": item.nodeid, **vars(seen)}) + "\n")
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Report:
    report = yield
    if report.failed:
        seen.outcome = "failed"
        error = call.excinfo
        said = re.sub(r"\b0x[0-9a-f]{6,}", "", " ".join(str(error.value).split())) if error else ""     # no addresses
        seen.reason = f"{error.typename}: {said[:300]}" if error else ""
        if error and error.errisinstance(UserError):
            seen.refused.append(str(error.value))
    elif report.skipped:
        seen.outcome = "skipped"
    return report
