"""Shards: their index, the order of samples, reading, loading, and what is done about bad samples."""
