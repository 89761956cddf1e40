"""What a run costs: multiply-accumulates and wall-clock time."""
