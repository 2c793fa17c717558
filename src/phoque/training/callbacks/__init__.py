"""What a run measures and shows while it trains: one file a concern."""
