"""Every pipeline class of diffusers that takes a `unet`: as results/pipelines.md says (every_pipeline.py)."""

import re
from functools import cache

import pytest
from every_pipeline import PAGE, classes, outcome, row, short

# One of each kind: text to image, several conditions, parts of a schedule, two calls of a step, pixels, sound, video,
# loops inside others, and what is refused.
SHORT = ["StableDiffusionPipeline", "StableDiffusionXLControlNetInpaintPipeline", "KandinskyV22Img2ImgPipeline",
         "ScoreSdeVePipeline", "IFSuperResolutionPipeline", "AudioLDM2Pipeline", "StableVideoDiffusionPipeline",
         "AnimateDiffPipeline", "KandinskyCombinedPipeline", "StableDiffusionSAGPipeline", "DanceDiffusionPipeline"]


@cache
def told() -> dict[str, str]:
    """What the table says of each class, by its short name."""
    rows = re.findall(r"^\| ((?:works|refused): .*) \| (.+) \|$", PAGE.read_text(), re.M)
    return {name: what for what, names in rows for name in names.split(", ")}


def check(name: str) -> None:
    found = outcome(name)
    assert not found.fault, found
    assert told()[short(name)] == row(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHORT)
def test_interval_1_is_the_plain_pipeline_and_3_is_cheaper_or_it_is_refused(name):
    check(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_class():
    names = list(classes())
    assert {short(name) for name in names} == set(told())
    for name in names:
        check(name)
