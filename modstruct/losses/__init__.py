"""The training objective's terms, one file each, and their weighted sum."""
