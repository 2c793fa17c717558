"""What a fine-tune changed inside a model: measured on held-out prompts, and beside controls that could say no."""
