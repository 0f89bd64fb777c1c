"""Readers of the downstream tasks' published files, exactly as a user downloads them, and batches of their entries."""
