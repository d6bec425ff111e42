"""Callbacks that take part in a training step: schedules, gradients, precision, and the batch before the model."""
