"""The plain and the augmented view of each image and text."""
