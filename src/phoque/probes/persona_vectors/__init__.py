"""Persona vectors: extract a direction, test it against controls, and measure if a fine-tune moved along it."""
