"""One file a subcommand: flags -> settings -> service -> rendering."""
