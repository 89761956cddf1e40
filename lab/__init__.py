"""The laboratory: what fits, searches and compares."""
