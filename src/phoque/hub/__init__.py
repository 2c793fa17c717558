"""What leaves this machine, and what is said about it."""
