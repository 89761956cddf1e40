"""Commands over the whole project: the demo, the emoji images, one script per table."""
