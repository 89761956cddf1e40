"""tests/diffusers_own.py on a checkout of a few tests, one of each kind."""

import pytest
from conftest import run_command
from diffusers_own import main
from forked import Forked

TESTS = '''
import unittest
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
        return [torch.tensor(float("progress_bar" in vars(self)))]

def run(cls=UNet2DModel, pipeline=DDIMPipeline):
    pipe = pipeline(cls(**SIZES), DDIMScheduler())
    images = pipe(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
    return pipe, images

class TestShared:
    @pytest.fixture(scope="class")
    def images(self):
        return run()[1].images

    def test_same(self, images):
        assert images.shape == (1, 8, 8, 3)

    def test_fails_alike(self, images):
        assert images.shape == (2, 2), f"{object()} is elsewhere each time"

class FastTests(unittest.TestCase):
    def test_untouched(self):
        CLIPTokenizer.from_pretrained("hf-internal-testing/tiny-random-clip")

    def test_refused(self):
        run(Own)

    def test_differs(self):
        run(pipeline=Changing)

    def test_broken(self):
        assert "progress_bar" not in vars(run()[0])

    def test_skipped(self):
        self.skipTest("slow")
'''


def test_each_kind_of_test_is_named(tmp_path):
    folder = tmp_path / "checkout" / "tests" / "pipelines" / "ddim"
    folder.mkdir(parents=True)
    (folder / "test_ddim.py").write_text(TESTS)
    run = Forked(main, tmp_path / "checkout", "--stand-ins", log=tmp_path / "log")
    assert run.wait() == 1
    counts = {words[0]: words[1:] for words in map(str.split, run.output.splitlines()) if len(words) > 1}
    assert counts["same"][:4] == ["2", "1", "passed,", "2"] and counts["same"][5] == "4"
    assert all(counts[name][0] == "1" for name in ("untouched", "skipped"))
    lines = [line for line in run.output.splitlines() if line.startswith(("refused: ", "differs: ", "broken: "))]
    assert [line.split("::test_")[1].split(":")[0] for line in lines] == ["refused", "differs", "broken"]
    assert "Own, which has a forward of its own" in lines[0] and "AssertionError" in lines[2]


@pytest.mark.parametrize(("folder", "word"), [("else", "no checkout of diffusers"), ("tests/pipelines", "name the")])
def test_what_is_no_checkout_is_refused(tmp_path, capsys, folder, word):
    (tmp_path / folder).mkdir(parents=True)
    assert run_command(main, tmp_path) == 2 and word in capsys.readouterr().err
