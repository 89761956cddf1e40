"""What an image of Stable Diffusion shows: the options of a run beside those that all models share."""

from dataclasses import dataclass
from pathlib import Path

from run.families import Condition
from unet_caching.errors import UserError
from unet_caching.options import option

SIZED = ("original_size", "crop", "target_size")


@dataclass(frozen=True)
class TextCondition(Condition):
    """Which prompt each image shows, its size, and how strongly it is led there."""
    prompts: Path | None = option(None, "a file of prompts, one for each seed")
    prompt: str | None = option(None, "one prompt, for every seed")
    images_per_prompt: int = option(1, "seed s has prompt s // this (default: 1)")
    negative_prompt: str = option("", "what guidance leads away from (default: the empty one)")
    height: int | None = option(None, "of the images, in pixels (default: the config's resolution)")
    width: int | None = option(None, "likewise")
    original_size: str | None = option(None, "SDXL: the size that a training image would have had before it was cut, "
                                             "in pixels (default: that of the images)", metavar="HEIGHT,WIDTH")
    crop: str | None = option(None, "SDXL: where that would have been cut; 0,0 = nothing of what is shown is cut off "
                                    "(default)", metavar="TOP,LEFT")
    target_size: str | None = option(None, "SDXL: the size after that (default: that of the images)",
                                     metavar="HEIGHT,WIDTH")
    guidance: float | None = option(None, "classifier-free guidance; 1 = none, anything else doubles the batch")
    released_noise: bool = option(False, "the released evaluation's noise, the same in every batch: seed 42 is set "
                                  "again for each; an image depends on its place in the batch then, and on "
                                  "--batch-size, --dtype and the kind of --device")
    diffusers_unet: bool = option(False, "run the folder's U-Net through diffusers, without caching: for pruned ones "
                                         "(BK-SDM)")

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise UserError(f"--images-per-prompt must be 1 or more, got {self.images_per_prompt}")
        if self.prompts is not None and self.prompt is not None:
            raise UserError("give --prompts, a file, or --prompt, a text: not both")
        if self.prompt is not None and self.images_per_prompt != 1:
            raise UserError("--images-per-prompt is for --prompts; with --prompt every seed of --seeds has the same")

        for text in (self.prompt or "", self.negative_prompt):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"a prompt is no UTF-8 text: {text!r:.60}") from None
        for name in SIZED:
            _pair(name, getattr(self, name))

    def sizes(self, height: int, width: int) -> list[int]:
        """What SDXL is told of the sizes of images, its micro-conditioning: pixels, as `unet.XLUNet` takes them."""
        defaults = {"original_size": [height, width], "crop": [0, 0], "target_size": [height, width]}
        return [number for name in SIZED for number in _pair(name, getattr(self, name)) or defaults[name]]

    def name(self) -> tuple[list[str], list[str]]:
        each = f"_x{self.images_per_prompt}" if self.images_per_prompt != 1 else ""
        return ([self.prompts.stem.removeprefix("captions_") + each] if self.prompts else [],
                [] if self.guidance is None else [f"guidance{self.guidance:g}"])


def _pair(name: str, text: str | None) -> list[int] | None:
    """'1024,768' -> [1024, 768]. Raises UserError."""
    if text is None:
        return None
    found = text.split(",")
    if len(found) != 2 or not all(part.strip().isdecimal() for part in found):
        raise UserError(f"--{name.replace('_', '-')} must be two numbers of pixels like 1024,1024, got {text!r}")
    return [int(part) for part in found]
