"""Sets of images with class labels: published ones as their files are published, and the user's own."""
