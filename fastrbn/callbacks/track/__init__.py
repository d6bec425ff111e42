"""Callbacks that record a fit: losses, averages, progress, logs, checkpoints and early stopping."""
