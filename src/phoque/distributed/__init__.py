"""Several processes that do one command together, each with a GPU of its own."""
