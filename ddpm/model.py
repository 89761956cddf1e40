"""A DDPM from seeds to images."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ddpm.checkpoint import load_unet
from ddpm.config import Config
from run.families import Condition
from run.folder import to_uint8
from run.image_model import ImageModel
from run.weights import check_md5, sha256
from unet_caching.nest import Network
from unet_caching.policy import Policy
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.samplers import noise_predictor
from unet_caching.speed.accelerate import place


class DDPM(ImageModel[Config, Condition]):
    """An unconditional model in pixels: its latents are the images."""

    def load(self) -> None:
        path = self.run.checkpoint
        if self.config.md5 and self.run.spec.network.checkpoint is None:
            check_md5(path, self.config.md5)        # first: a download that was cut short should be called that
        unet = load_unet(self.config, path)
        self.settings["checkpoint_sha256"] = sha256(path)
        self.unet = place(unet, self.device, self.dtype)

    def latents(self, seeds: Sequence[int], policy: Policy | None = None, network: Network | None = None,
                report: Callable[[float], None] | None = None) -> Tensor:
        unet, noise = self.config.unet, SeededNoise(seeds, self.device)
        predict = noise_predictor(network or self.unet, self.config.diffusion, self.dtype, policy)
        return self.sampler.run(predict, noise((unet.in_channels, unet.resolution, unet.resolution)), noise, report)

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_uint8(latents)


MODEL = DDPM
