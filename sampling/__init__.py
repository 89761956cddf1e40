"""From a network and a list of seeds to a folder of images: noise, samplers, and runs that survive a kill."""

from sampling.libraries import let_torchvision_import

let_torchvision_import()
