"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

from unet_caching.speed.memory import keep_freed_memory

FAULTS = """
import resource, sys, torch
from unet_caching.speed.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def layer():
    return torch.ones(10 * 2**20)       # 40 MB
for _ in range(20):                     # glibc finds a place that fits after a few
    layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_no_new_pages_for_what_was_freed():
    faults = {how: int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True).stdout)
              for how in ("keep", "default")}
    assert faults["default"] >= 20 * 10_000 and faults["keep"] < 0.2 * faults["default"], faults


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
