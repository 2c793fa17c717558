"""Sparse autoencoders: find the features that a fine-tune shifted beyond chance and beyond a control fine-tune."""
