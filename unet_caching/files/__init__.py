"""Fitted files, which belong to the runs of one model, and the schemas of files."""
