"""The mathematics of a run: noise of each seed, timesteps, samplers, what a network predicts, guidance."""

from unet_caching.samplers.libraries import let_torchvision_import

let_torchvision_import()
