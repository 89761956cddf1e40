"""What the three models' train.py share: the emoji images, and a loop that can be stopped and resumed at any moment."""
