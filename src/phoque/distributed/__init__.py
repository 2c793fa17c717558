"""Several processes that run one command together, each with a GPU of its own."""
