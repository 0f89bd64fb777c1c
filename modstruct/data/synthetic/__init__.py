"""The built-in data: images of generated scenes with captions, and downstream tasks about them."""
