"""The autograd graph as plain nodes and edges: what a backward pass runs through, what it saved, and who holds it.

`read.py` reads a graph, `modules.py` finds the module each node came from, `views.py` has what users see, `layout.py`
places it for a picture, `held.py` finds tensors that keep a graph alive, `leaves.py` is the table of parameters and
buffers. PyTorch's internals are read in `walk.py` only.
"""

from .leaves import LeafTable, leaf_table
from .modules import record_modules
from .nodes import GraphNode
from .read import autograd_graph
from .views import AutogradGraph

__all__ = ["AutogradGraph", "GraphNode", "LeafTable", "autograd_graph", "leaf_table", "record_modules"]
