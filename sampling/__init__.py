"""The mathematics of a run: noise of each seed, timesteps, samplers, what a network predicts, guidance."""

from sampling.libraries import let_torchvision_import

let_torchvision_import()
