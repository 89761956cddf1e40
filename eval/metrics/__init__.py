"""Features of images, and the distances and scores made of them."""
