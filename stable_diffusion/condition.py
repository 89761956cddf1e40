"""What an image of Stable Diffusion shows: the options that only this family has."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from run import arguments
from run.families import Guided
from run.prompts import prompts_sha256, read_prompts
from stable_diffusion.config import Config
from unet_caching.errors import UserError
from unet_caching.options import option

SIZED = ("original_size", "crop", "target_size")


@dataclass(frozen=True)
class Prompts:
    """The prompt of each seed. Seed s has prompt s // per; if `per` is None, all seeds have the only prompt."""
    prompts: list[str]
    per: int | None

    @property
    def images(self) -> int:
        """The default number of images: `per` of each prompt, or one."""
        return len(self.prompts) * (self.per or 1)

    def place(self, seed: int) -> int:
        """The index of a seed's prompt."""
        return 0 if self.per is None else seed // self.per

    def of(self, seed: int) -> str:
        """The prompt of a seed."""
        return self.prompts[self.place(seed)]

    def check(self, seeds: Sequence[int]) -> None:
        """Raise a UserError for a seed that has no prompt."""
        if self.per is not None and max(seeds) >= self.images:
            raise UserError(f"seed {max(seeds)} has no prompt: {len(self.prompts)} prompts with {self.per} image(s) "
                            f"each are for seeds 0-{self.images - 1}")


@dataclass(frozen=True)
class TextCondition(Guided):
    """Which prompt each image shows, its size, and the guidance scale."""
    prompts: Path | None = option(None, "a file of prompts, one for each seed")
    prompt: str | None = option(None, "one prompt, for every seed")
    images_per_prompt: int = option(1, "seed s has prompt s // this (default: 1)", least=1)
    negative_prompt: str = option("", "guidance leads away from it (default: empty)", metavar="TEXT")
    height: int | None = option(None, "of the images, in pixels (default: the config's)")
    width: int | None = option(None, "likewise")
    original_size: str | None = option(None, "SDXL: size before cropping (default: the image's)", metavar="H,W")
    crop: str | None = option(None, "SDXL: corner of the crop (default: 0,0)", metavar="TOP,LEFT")
    target_size: str | None = option(None, "SDXL: size after cropping (default: the image's)", metavar="H,W")
    released_noise: bool = option(False, "the released evaluation's noise: seed 42 for "
                                  "each batch, so that --batch-size changes images")
    unet: Path | None = option(None, "weights of the U-Net, instead of the model's")
    vae: Path | None = option(None, "weights of the autoencoder, likewise")
    diffusers_unet: bool = option(False, "diffusers' U-Net of a folder, uncached (BK-SDM)")

    def __post_init__(self) -> None:
        arguments.check(self)
        if self.prompts is not None and self.prompt is not None:
            raise UserError("give --prompts, a file, or --prompt, a text: not both")
        if self.prompt is not None and self.images_per_prompt != 1:
            raise UserError("--images-per-prompt is for --prompts: with --prompt every seed of --seeds has that prompt")
        for text in (self.prompt or "", self.negative_prompt):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"a prompt is not UTF-8 text: {text!r:.60}") from None
        for name in SIZED:
            _pair(name, getattr(self, name))

    def name(self) -> tuple[list[str], list[str]]:
        each = f"_x{self.images_per_prompt}" if self.images_per_prompt != 1 else ""
        first = [self.prompts.stem.removeprefix("captions_") + each] if self.prompts else []
        return first, super().name()[1]

    def check(self, config: Config) -> None:
        self.latent_size(config)
        if config.xl is None and any(getattr(self, name) is not None for name in SIZED):
            raise UserError(f"--original-size, --crop and --target-size are for SDXL: {config.name} does not take them")

    def settings(self, config: Config) -> dict[str, Any]:
        height, width = (pixels * config.downsampling for pixels in self.latent_size(config))
        xl = {} if config.xl is None else {"xl": asdict(config.xl), "sizes": self.sizes(config)}
        rule = {"prompts_rule": "one for all seeds"} if self.prompts is None else {
            "prompts_rule": "seed // images_per_prompt", "images_per_prompt": self.images_per_prompt}
        known = self.prompt is not None or (self.prompts is not None and self.prompts.exists())
        return {"unet": asdict(config.unet), "height": height, "width": width, **xl, **rule,
                **({"prompts_sha256": prompts_sha256(self.read_prompts().prompts)} if known else {}),
                "negative_prompt": self.negative_prompt, **({} if self.released_noise else {"noise": "per seed"}),
                "first_stage_dtype": "fp32", "text_encoder_dtype": "fp32"}

    def read_prompts(self) -> Prompts:
        """The prompts of the options. Raises UserError for an unreadable file, and if there is neither."""
        if self.prompts is not None:
            return Prompts(read_prompts(self.prompts), self.images_per_prompt)
        if self.prompt is None:
            raise UserError("what should the images show? Give --prompts, a file, or --prompt, a text")
        return Prompts([self.prompt], None)

    def latent_size(self, config: Config) -> tuple[int, int]:
        """The height and width of the latents. Raises UserError."""
        sides = [config.resolution if pixels is None else pixels for pixels in (self.height, self.width)]
        for side, pixels in zip(("height", "width"), sides, strict=True):
            if pixels < 1 or pixels % config.downsampling:
                raise UserError(f"--{side} must be a multiple of {config.downsampling} pixels, the autoencoder's "
                                f"downsampling, got {pixels}")
        return sides[0] // config.downsampling, sides[1] // config.downsampling

    def sizes(self, config: Config) -> list[int]:
        """SDXL's micro-conditioning, the sizes of the image in pixels, as `unet.XLUNet` takes them."""
        size = [pixels * config.downsampling for pixels in self.latent_size(config)]
        defaults = {"original_size": size, "crop": [0, 0], "target_size": size}
        return [number for name in SIZED for number in _pair(name, getattr(self, name)) or defaults[name]]


def _pair(name: str, text: str | None) -> list[int] | None:
    """Read '1024,768' -> [1024, 768]. Raises UserError."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--{name.replace('_', '-')} must be two numbers of pixels like 1024,1024, got {text!r}")
    return [int(part) for part in parts]
