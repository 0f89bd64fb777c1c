"""The towers: pictures and text to Embeddings."""
