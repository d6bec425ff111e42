"""Callbacks that look inside a fit: magnitudes, activations, the autograd graph, NaN and Inf, the time of a step."""
