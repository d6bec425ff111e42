"""`GraphMonitor`: counts the autograd graph of each step, and names what holds on to graphs of earlier steps."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import weakref

from fastrbn.graph import held, walk
from fastrbn.learn.callback import RUN_STATE, Callback
from fastrbn.util import whole

_FIRST = 4  # first steps, after each of which all attributes are searched
_LIMIT = 100_000  # most nodes in one count
_REMEMBERED = 1024  # step starts
_fits = itertools.count()


@dataclasses.dataclass
class GraphHolder:
    """Something that keeps a graph alive.

    Parameters
    ----------
    name : str
        Its qualified name, such as `2.sums` or `MyCallback.losses`.
    kind : str
        "buffer", "attribute", "gradient", "state" or "global".
    step : int
        The first step whose nodes it keeps; −1: from before the fit.
    last_step : int
        The last such step.
    """

    name: str
    kind: str
    step: int
    last_step: int

    def __str__(self):
        if self.step == self.last_step:
            return f"{self.name} holds the graph of {_named(self.step)}"
        return f"{self.name} holds the graphs from {_named(self.step)} to {_named(self.last_step)}"


@dataclasses.dataclass
class GraphReport:
    """The first thing that `GraphMonitor` found. `print(report)` reads well.

    Parameters
    ----------
    step : int
        `run.n_iter` of the batch in which it showed.
    epoch : int or None
        The batch's epoch, None in a loop that does not tell it.
    batch : int
        The batch's number in its epoch.
    nodes : int
        Nodes in the graph of this step's loss.
    first_nodes : int
        Nodes in that of the fit's first step.
    made_in : int or None
        The earliest step whose nodes this step's loss reaches (−1: before the fit); None if it reaches none.
    holders : list of GraphHolder
        What holds them; empty if nothing was found.
    changed : list
        After a backward pass that failed for it: what was changed in place after it had been saved, each with `name`
        (such as `1.sums`), `kind` and `nodes`.
    """

    step: int
    epoch: int | None
    batch: int
    nodes: int
    first_nodes: int
    made_in: int | None
    holders: list[GraphHolder]
    changed: list[held.Changed] = dataclasses.field(default_factory=list)

    @property
    def sentence(self) -> str:
        """The finding in a sentence."""
        if self.made_in is not None:
            what = f"the loss's graph reaches nodes made in {_named(self.made_in)}"
        elif self.holders:
            what = "graphs of earlier steps are kept"
        elif self.changed:
            what = "the backward pass needs what was changed in place since"
        else:
            what = "the loss's graph grows"
        place = "" if self.epoch is None else f", epoch {self.epoch}, batch {self.batch}"
        return f"{what} (step {self.step}{place})"

    def __str__(self):
        lines = [self.sentence, f"  nodes in the loss's graph: {self.nodes}; in the first step: {self.first_nodes}"]
        for h in self.holders:
            lines += [f"  {h}", f"    {_ADVICE[h.kind]}"]
        for c in self.changed:
            lines += [f"  {c}", f"    {_ADVICE_CHANGED[c.kind == 'parameter']}"]
        if not self.holders and self.made_in is not None:
            lines.append("  no attribute of model, loss, callbacks, run, learner or optimiser holds them")
        if not self.holders and self.made_in is None and not self.changed:
            lines.append("  nothing of earlier steps is reached: the model does more now (allow that with max_growth)")
        return "\n".join(lines)


class GraphMonitor(Callback):
    """Count the nodes of each training step's graph, and find what holds on to graphs of earlier steps.

    The first finding of a fit is printed through `run.logger` and stays in `.report` (None if all was well). `.steps`
    and `.counts` are lists of int: the number of nodes of each step.

    Parameters
    ----------
    max_growth : int, default 0
        Nodes by which the loss's graph may exceed that of the fit's first step.
    every : int, default 50
        Search all attributes after every `every`-th training step, besides the first four. Buffers and the last losses
        are checked after each.

    Raises
    ------
    ValueError
        For a negative `max_growth` or an `every` below 1.

    Notes
    -----
    Reported are: a loss whose graph grows or reaches nodes made in an earlier step; a buffer or attribute whose own
    graph spans several steps; a list or dictionary with graphs of three or more steps, such as a callback's
    `self.losses.append(self.loss)`; losses or predictions that are kept elsewhere. A tensor of the last step alone, as
    in `run.loss`, is normal. When the backward pass fails because a saved tensor was changed in place, the report names
    the buffer, attribute or parameter.

    Attributes of modules, callbacks, loss function, run, learner and optimiser are found by name, also inside
    containers and objects, and so are global variables; local variables of functions are not.

    It costs about 1 µs a node and 0.02 ms in each step: 0.06 ms for the course's net (38 nodes, one CPU thread), 3 % of
    its step at batch 8; and 0.4 ms for each search of all attributes (`benchmarks/graph.py`). It never waits for the
    device. Attach it to find a leak, not always.

    Examples
    --------
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[GraphMonitor])
    >>> run.fit(1, learn)
    >>> run.graph_monitor.report is None, len(set(run.graph_monitor.counts))
    (True, 1)
    """

    _eager = "reads the autograd graph of each loss"

    def __init__(self, max_growth: int = 0, every: int = 50):
        self.max_growth, self.every = whole("max_growth", max_growth, 0), whole("every", every)
        self._clear()

    def _clear(self):
        self.report, self.steps, self.counts = None, [], []
        # keys of what this fit writes on nodes: the step that saw them first, and the attribute that holds them
        self._made = f"fastrbn.step.{next(_fits)}"
        self._holder = f"{self._made}.holder"
        self._start, self._begun, self._step = walk.clock(), [], -1
        self._recent, self._buffers, self._grown = collections.deque(maxlen=2 * _FIRST), [], None

    def begin_fit(self):
        self._clear()
        self._judge(self._all_held())

    def begin_epoch(self):
        self._buffers = [m._buffers for m in self.run.model.modules() if m._buffers]

    def begin_batch(self):
        run = self.run
        if run.in_train:
            self._step = run.n_iter
            self._begun.append((walk.clock(), run.n_iter))
            del self._begun[:-_REMEMBERED]

    def after_loss(self):
        run = self.run
        if not (run.in_train and held.has_graph(run.loss)):
            return
        made, step = self._made, self._step
        oldest = step

        def visit(node):
            nonlocal oldest
            seen_in = node.metadata.setdefault(made, step)
            if seen_in < oldest:
                oldest = seen_in

        nodes = walk.count_nodes(run.loss.grad_fn, visit, _LIMIT)
        self.steps.append(step)
        self.counts.append(nodes)
        self._recent.extend((weakref.ref(t), step) for t in (run.loss, run.pred) if held.has_graph(t))
        if self.report is not None:
            return
        if oldest < step:
            self._report(oldest, self._blame(run.loss.grad_fn))
        elif self._grown is not None:
            self._say(self._grown)
        elif nodes > self.counts[0] + self.max_growth:
            self._grown = self._made_report(None, [])  # wait a step: its loss may show who holds this graph

    def after_batch(self):
        if not self.run.in_train or self.report is not None:
            return
        kept = {s for ref, s in self._recent if s < self._step and held.has_graph(ref())}
        if len(kept) > 1 or self._step < _FIRST or self._step % self.every == 0:
            self._judge(self._all_held())
            if len(kept) > 1 and self.report is None:
                self._blame_for_kept(kept)
        elif any(b is not None and b.grad_fn is not None for table in self._buffers for b in table.values()):
            self._judge(held.of_model(self.run.model, buffers_only=True))

    def after_fit(self):
        if walk.CHANGED in (self.run.stop_reason or "") and held.has_graph(self.run.loss):
            changed = held.changed_in_place(self.run.loss, self.run.model)
            self._say(dataclasses.replace(self.report or self._made_report(None, []), changed=changed))
        elif self.report is None and self._grown is not None:
            self._say(self._grown)
        self._recent.clear()
        self._buffers = []

    def _step_of(self, node) -> int:
        """The step that made a node: the one that saw it first, or else by its number."""
        seen_in = node.metadata.get(self._made)
        if seen_in is not None:
            return seen_in
        number = walk.made_at(node)
        if number < self._start or not self._begun:
            return -1
        at = bisect.bisect_right(self._begun, (number, float("inf"))) - 1
        return self._begun[at][1] if at >= 0 else self._begun[0][1] - 1

    def _judge(self, found) -> None:
        """Report entries that keep too much; name what the others keep, in case a later loss reaches it."""
        blamed = []
        for h in found:
            each = [held.steps_of(t, self._step_of, _LIMIT) for t in h.tensors]
            steps = set().union(*each)
            if max(map(len, each)) > 1 or len(steps) > 2:
                blamed.append(GraphHolder(h.name, h.kind, min(steps), max(steps)))
            for t in h.tensors:
                t.grad_fn.metadata.setdefault(self._made, self._step_of(t.grad_fn))
                t.grad_fn.metadata[self._holder] = h.name, h.kind
        if blamed and self.report is None:
            self._report(None, blamed)

    def _blame(self, root) -> list[GraphHolder]:
        """The holders of the earlier steps' nodes that this graph reaches."""
        made, step = self._made, self._step
        frontier = {}
        for node in walk.reach([root]):
            if node.metadata.get(made) == step:
                for child, _ in node.next_functions:
                    if child is not None and child.metadata.get(made, step) < step:
                        frontier[child] = child.metadata.get(self._holder)
        if not any(frontier.values()):
            for h in self._all_held():  # stored since the last search
                for node in set(walk.reach([t.grad_fn for t in h.tensors])) & set(frontier):
                    frontier[node] = h.name, h.kind
        blamed: dict[tuple[str, str], set[int]] = {}
        for node, holder in frontier.items():
            if holder:
                steps = {s for n in walk.reach([node]) if (s := n.metadata.get(made, step)) < step}
                blamed.setdefault(holder, set()).update(steps)
        return [GraphHolder(name, kind, min(steps), max(steps)) for (name, kind), steps in blamed.items()]

    def _blame_for_kept(self, kept) -> None:
        """Report losses or predictions that are kept, but not by an attribute."""
        tensor = next(t for ref, s in self._recent if s in kept and held.has_graph(t := ref()))
        name = held.found_by_collector(tensor) or "something that is neither attribute nor global variable"
        self._report(None, [GraphHolder(name, "global", min(kept), max(kept))])

    def _all_held(self) -> list[held.Held]:
        run = self.run
        seen = {id(m) for m in run.model.modules()} | {id(o) for o in (run, run.learn, run.opt, run.data, *run.cbs)}
        found = held.of_model(run.model)
        ours: list[held.Held] = []
        for cb in run.cbs:
            if cb is not self:
                place = ours if type(cb).__module__.startswith("fastrbn.") else found
                place += held.of_attributes(cb, f"{type(cb).__name__}.", {"run"}, seen)
        own = RUN_STATE.keys() | {name for name in vars(run) if name.startswith("_")}
        found += held.of_attributes(run, "run.", own, seen)
        found += held.of_attributes(run.learn, "learn.", RUN_STATE, seen)
        found += held.of_optimiser(run.opt, {p: name for name, p in run.model.named_parameters()})
        found += held.of_object(run.loss_func, "loss_func.", seen)
        users = {t.grad_fn for h in found for t in h.tensors}
        for h in ours:  # a callback of this package may refer to what is the user's; it is not a second holder
            if others := [t for t in h.tensors if t.grad_fn not in users]:
                found.append(h._replace(tensors=others))
        return found

    def _made_report(self, made_in, holders) -> GraphReport:
        nodes, first = (self.counts[-1], self.counts[0]) if self.counts else (0, 0)
        return GraphReport(self._step, self.run.epoch, self.run.iter, nodes, first, made_in, holders)

    def _report(self, made_in, holders) -> None:
        self._say(self._made_report(made_in, holders))

    def _say(self, report) -> None:
        self.report = report
        self.run.logger(str(report))

    def __getstate__(self):
        return {**super().__getstate__(), "_recent": collections.deque(maxlen=2 * _FIRST), "_buffers": []}

    def __repr__(self):
        return f"GraphMonitor(max_growth={self.max_growth}, every={self.every})"


def _named(step: int) -> str:
    return f"step {step}" if step >= 0 else "the time before the fit"


_ADVICE = {
    "buffer": "detach what is written to it: buffer.lerp_(new.detach(), …)",
    "attribute": "keep it detached: value.detach()",
    "gradient": "clear it in each step, and leave no gradients made with create_graph behind",
    "state": "an optimiser keeps values: update them under torch.no_grad",
    "global": "keep it detached: loss.detach(), and numbers once an epoch",
}
_ADVICE_CHANGED = {
    False: "assign a new tensor, as in self.sums = self.sums.lerp(…), or use a copy in the forward pass: .clone()",
    True: "the optimiser has stepped since: keep no graph beyond its step",
}
