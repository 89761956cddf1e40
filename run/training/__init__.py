"""The parts of lab/train.py: the emoji images, and a loop that can be stopped and resumed at any moment."""
