"""scripts/diffusers_own_tests.py on a checkout of a few tests, one of each kind."""

import json

import pytest
from conftest import run_command

from scripts.diffusers_own_tests import kind, main, report

TESTS = '''
import os
import unittest
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from transformers import CLIPTokenizer

SIZES = dict(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=8,
             down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))

class Own(UNet2DModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)

class Changing(DDIMPipeline):
    def __call__(self, *args, **kwargs):
        return [np.array([float("progress_bar" in vars(self))])]

class FastTests(unittest.TestCase):
    def run_one(self, cls=UNet2DModel, pipeline=DDIMPipeline):
        pipe = pipeline(cls(**SIZES), DDIMScheduler())
        images = pipe(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
        return pipe, images

    def test_same(self):
        self.run_one()

    def test_fails_alike(self):
        assert self.run_one()[1].images.shape == (2, 2), f"{object()} is elsewhere each time"

    def test_untouched(self):
        CLIPTokenizer.from_pretrained("hf-internal-testing/tiny-random-clip")

    def test_refused(self):
        self.run_one(Own)

    def test_differs(self):
        self.run_one(pipeline=Changing)

    def test_broken(self):
        assert "progress_bar" not in vars(self.run_one()[0])

    @unittest.skip("slow")
    def test_skipped(self):
        pass

class TestShared:
    @pytest.fixture(scope="class")
    def images(self):
        return FastTests().run_one()[1].images

    def test_shared(self, images):
        assert images.shape == (1, 8, 8, 3)

    def test_shared_again(self, images):
        assert images.shape == (1, 8, 8, 3)
'''


def test_each_kind_of_test_is_told(tmp_path, capsys):
    folder = tmp_path / "checkout" / "tests" / "pipelines" / "ddim"
    folder.mkdir(parents=True)
    (folder / "test_ddim.py").write_text(TESTS)
    out = tmp_path / "report.json"
    assert run_command(main, tmp_path / "checkout", "--stand-ins", "--out", out) == 1
    found = json.loads(out.read_text())["tests"]
    names = {name: sorted(test.split("::test_")[1] for test in tests) for name, tests in found.items()}
    assert names == {"same": ["fails_alike", "same", "shared", "shared_again"], "untouched": ["untouched"],
                     "refused": ["refused"], "differs": ["differs"], "broken": ["broken"], "skipped": ["skipped"]}
    for name in ("same", "shared", "shared_again"):
        (same,) = (seen for test, seen in found["same"].items() if test.endswith(f"test_{name}"))
        assert same == {"outcome": "passed", "without us": "passed", "why": "", "calls": 2, "outputs": 1}
    printed = capsys.readouterr().out
    assert "Own, which has a forward of its own" in printed and "AssertionError" in printed


@pytest.mark.parametrize(("plain", "ours", "expected"), [
    ({}, {}, "same"), ({}, {"calls": 0}, "untouched"), ({}, {"outputs": ["b"]}, "differs"),
    ({}, {"outcome": "failed"}, "broken"), ({"outcome": "failed"}, {}, "differs"),
    ({"outcome": "failed", "reason": "a"}, {"outcome": "failed", "reason": "b"}, "differs"),
    ({}, {"outcome": "failed", "refused": ["why"]}, "refused"), ({}, {"outcome": "skipped"}, "broken")])
def test_kinds(plain, ours, expected):
    seen = {"outcome": "passed", "reason": "", "calls": 3, "refused": [], "outputs": ["a"]}
    assert kind(seen | plain, seen | ours) == expected
    assert list(report({"t": seen | plain}, {"t": seen | ours})[expected]) == ["t"]


@pytest.mark.parametrize(("make", "word"), [
    (lambda folder: None, "no checkout of diffusers"), (lambda folder: folder.mkdir(parents=True), "name the tests")])
def test_what_is_no_checkout_is_refused(tmp_path, capsys, make, word):
    make(tmp_path / "tests" / "pipelines")
    assert run_command(main, tmp_path) == 2 and word in capsys.readouterr().err


@pytest.mark.slow
def test_a_package_that_tests_import_and_is_missing_is_named(tmp_path, capsys):
    (folder := tmp_path / "tests" / "pipelines" / "ddim").mkdir(parents=True)
    (folder / "test_ddim.py").write_text("import nothing")
    assert run_command(main, tmp_path) == 2 and "No module named 'nothing'" in capsys.readouterr().err
