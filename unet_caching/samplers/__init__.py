"""The mathematics of a run: noise of each seed, timesteps, samplers, what a network predicts, guidance."""
