"""The mathematics of a run: the noise of each seed, timesteps, samplers, predictions, guidance."""
