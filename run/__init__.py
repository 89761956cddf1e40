"""A run as a folder and as a command: seeds, claims, stopping, resume, atomic files, errors, weights on disk."""
