"""Trainer callbacks: metrics, samples, stopping and W&B artifacts, one file each."""
