"""modstruct: vision-language pretraining whose embeddings keep their structure."""

__version__ = "0.1.0"
