"""What a command is asked to do: one frozen model a command, and where each value came from."""
