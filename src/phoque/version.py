"""The version of phoque, here and nowhere else."""

__version__ = "1.0.0"
