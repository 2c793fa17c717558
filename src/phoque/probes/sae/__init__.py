"""Sparse autoencoders: which features did the fine-tune move, beyond what chance and any fine-tune would."""
