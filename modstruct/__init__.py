"""modstruct: vision-language pretraining whose embeddings keep their structure."""

import os

# Before torch is imported, whose libgomp reads it then. On a busy machine threads that wait actively take the cores
# from those that work: at a load of 17 on two cores a step took 30 s instead of 2. Loader processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
