"""From a network and a list of seeds to a folder of images: noise, samplers, and runs that survive a kill."""
