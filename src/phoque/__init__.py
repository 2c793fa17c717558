"""phoque: fine-tune a small chat model into a persona, prove what changed, ship it to a browser."""

__version__ = "0.1.0"
