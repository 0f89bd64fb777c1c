"""The towers: images and text to Embeddings."""
