"""ALBEF's model (Li et al. 2021): an image encoder, a text encoder, and a fusion encoder that looks from one to the
other.

backbone.py puts the three together from vision.py and bert.py; pretraining.py adds heads, hard negatives (negatives.py)
and the momentum encoders with their queues (momentum.py).
"""
