"""Compare norms: a grid of norm × batch size × learning rate × seed × data set × net, trained in parallel processes.

    cells = cells_of(["default", "groupnorm"], bs=[1, 2, 8], seeds=[0, 1, 2])
    result = run_grid(cells, "compare/cells.csv")

    cells = cells_of(["default", "batchnorm"], bs=[2, 8], data=[ZOO], net=["dense", "mlp-adam"])    # tasks of `TASKS`

`fastrbn compare` is the command for it. This package uses all other parts and is imported by none of them.
"""

from .cell import LR_RULES, NETS, Cell, load_images, load_task, run_cell
from .grid import GridResult, cells_of, run_grid
from .norms import PEERS, describe, get_norm, prepare_model, split_norms
from .report import markdown, standing_table, write_report
from .results import standings
from .studies import STUDIES, Best, Study, best_points, run_study
from .study_report import study_figure, study_table, write_page
from .table import read_rows
from .tasks import STUDY_TASKS, TASKS, ZOO, get_task

__all__ = [
    "LR_RULES",
    "NETS",
    "PEERS",
    "STUDIES",
    "STUDY_TASKS",
    "TASKS",
    "ZOO",
    "Best",
    "Cell",
    "GridResult",
    "Study",
    "best_points",
    "cells_of",
    "describe",
    "get_norm",
    "get_task",
    "load_images",
    "load_task",
    "markdown",
    "prepare_model",
    "read_rows",
    "run_cell",
    "run_grid",
    "run_study",
    "split_norms",
    "standing_table",
    "standings",
    "study_figure",
    "study_table",
    "write_page",
    "write_report",
]
