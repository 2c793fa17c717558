"""Persona vectors: is there a direction, does it cause the behaviour, did the fine-tune move along it?"""
