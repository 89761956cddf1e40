"""Whatever is fitted to a model before it runs: change curves, block schedules, scale and shift, forecasts."""
