"""Tokenizers: sentencepiece, CLIP's BPE, BERT's WordPiece."""

from modstruct.data.tokenizers.tokenizer import *  # noqa: F403
