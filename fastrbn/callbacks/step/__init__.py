"""Callbacks that take part in a training step: schedules, gradients, precision, the batch on its way to the model."""
