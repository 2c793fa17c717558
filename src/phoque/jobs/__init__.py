"""HF Jobs: what a command becomes as a Job, what it costs, and the Jobs that were submitted."""
