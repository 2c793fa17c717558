"""Finding, reading and loading of base models and adapters."""
