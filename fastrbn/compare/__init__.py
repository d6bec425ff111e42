"""Norms compared: a grid of norm × batch size × learning rate × seed × data set × net, trained over processes.

    cells = cells_of(["default", "groupnorm"], bs=[1, 2, 8], seeds=[0, 1, 2])
    result = run_grid(cells, "compare/cells.csv")

`fastrbn compare` is this as a command. It puts the parts of the package together and is imported by none of them.
"""

from .cell import LR_RULES, NETS, Cell, load_images, run_cell
from .grid import GridResult, cells_of, run_grid
from .norms import PEERS, describe, get_norm, prepare_model, split_norms
from .report import markdown, write_report
from .table import read_rows

__all__ = [
    "LR_RULES",
    "NETS",
    "PEERS",
    "Cell",
    "GridResult",
    "cells_of",
    "describe",
    "get_norm",
    "load_images",
    "markdown",
    "prepare_model",
    "read_rows",
    "run_cell",
    "run_grid",
    "split_norms",
    "write_report",
]
