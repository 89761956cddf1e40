"""The same results in less time: packed CPU weights, memory, torch.compile, CUDA graphs."""
