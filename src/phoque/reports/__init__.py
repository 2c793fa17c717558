"""HTML reports and their charts: one look for every command."""
