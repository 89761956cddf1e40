"""What is fitted to a model before it runs."""
