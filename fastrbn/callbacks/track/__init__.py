"""Callbacks that record a fit: losses, metrics, progress, logs, checkpoints, stopping."""
