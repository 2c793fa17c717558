"""Persona vectors: extract a direction, test it against controls, and ask whether a fine-tune moved along it."""
