"""The command line: one file per command, from flags to settings to a service to its rendered result."""
