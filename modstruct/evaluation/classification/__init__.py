"""Classification by frozen embeddings: zero-shot, linear probes, few shots."""
