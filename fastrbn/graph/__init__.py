"""The autograd graph as plain nodes and edges: what a loss runs backward through, what that saved, and who holds it.

`nodes.py` reads a graph, `modules.py` tells which module a node came from, `views.py` is what users see, `layout.py`
places it for a picture, `held.py` finds tensors that keep a graph alive, `leaves.py` is the table of parameters and
buffers. `walk.py` is where PyTorch's internals are read.
"""

from .leaves import LeafTable, leaf_table
from .modules import record_modules
from .nodes import GraphNode, autograd_graph
from .views import AutogradGraph

__all__ = ["AutogradGraph", "GraphNode", "LeafTable", "autograd_graph", "leaf_table", "record_modules"]
