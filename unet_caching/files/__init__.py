"""Files of what was fitted to the runs of one model; those of another are refused."""
