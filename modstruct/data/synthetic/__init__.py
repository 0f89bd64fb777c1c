"""The built-in data: images of scenes with captions, written once as ordinary shards.

A scene's factors are drawn in factors.py, split in splits.py, worded in captions.py with the words of words.py,
drawn in drawing.py, written in shards.py; folder.py keeps what was written. tasks/ makes questions,
statements and hypotheses about such scenes, for the downstream tasks.
"""
