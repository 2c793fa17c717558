"""The version of phoque, here and nowhere else."""

__version__ = "0.1.0"
