"""What `evaluate.py` does, one file a command."""
