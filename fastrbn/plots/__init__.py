"""Pictures; nothing else in the package draws. Every painter takes plain data and returns a matplotlib Figure.

Save a figure with `fig.savefig("loss.png")`; a notebook shows it once. matplotlib is imported when the first picture is
made.
"""

from .compare import plot_comparison, plot_weight_norms
from .diagnose import plot_activations, plot_histograms, plot_magnitude_lines, plot_magnitudes
from .figure import in_notebook, new_figure, png
from .graph import box_size, plot_graph
from .predictions import plot_confusion, plot_images, plot_worst
from .study import plot_study
from .training import plot_history, plot_loss, plot_lr, plot_lr_find, plot_run

__all__ = [
    "box_size",
    "in_notebook",
    "new_figure",
    "plot_activations",
    "plot_comparison",
    "plot_confusion",
    "plot_graph",
    "plot_histograms",
    "plot_history",
    "plot_images",
    "plot_loss",
    "plot_lr",
    "plot_lr_find",
    "plot_magnitude_lines",
    "plot_magnitudes",
    "plot_run",
    "plot_study",
    "plot_weight_norms",
    "plot_worst",
    "png",
]
