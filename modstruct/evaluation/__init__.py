"""What a trained model is worth: retrieval, zero-shot classification and the structure of its embeddings."""
