"""Training: one step, the run around it, and what is kept of it."""
