"""What lab/train.py is made of: the emoji images, and a loop that can be stopped and resumed at any moment."""
