"""Metrics of classification that are exact over a pass and over processes: they count, and counts add up."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastrbn.util import one_of, whole

from .metrics import is_one_logit, predicted_classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Counts:
    """Counts in one tensor, whose last element counts invalid targets, so that nobody waits for the device before
    `compute`."""

    scalar = True  # False for metrics of several numbers, which have no column in the table

    def __init__(self, name: str, ignore_index: int):
        self.__name__, self.ignore_index = name, operator.index(ignore_index)
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._counts: torch.Tensor | None = None

    def merge(self, gather: Callable[[Any], list]) -> None:
        """Add the counts of all processes; `gather(value)` returns the value of each."""
        every = [t for t in gather(None if self._counts is None else self._counts.cpu()) if t is not None]
        if len({len(t) for t in every}) > 1:
            raise ValueError(f"{self!r}: the processes' models have different numbers of classes")
        if every:
            device = None if self._counts is None else self._counts.device
            self._counts = torch.stack(every).sum(0).to(device)

    def _table(self, size: int, device: torch.device) -> torch.Tensor:
        """The counts, to be changed in place."""
        if self._counts is None:
            self._counts = torch.zeros(size, dtype=torch.int64, device=device)
        if len(self._counts) != size:
            raise ValueError(f"{self!r} needs the same number of classes in all batches of a pass")
        self._counts = self._counts.to(device)
        return self._counts

    def _checked(self) -> torch.Tensor:
        """The counts on the CPU, without that of invalid targets."""
        if self._counts is None:
            raise RuntimeError(f"{self!r} has seen no batch: call update(pred, yb) first")
        counts = self._counts.cpu()
        if counts[-1]:
            raise ValueError(
                f"{self!r}: {int(counts[-1])} targets are {self._invalid}; mark those to leave out by "
                f"{self.ignore_index} (ignore_index)"
            )
        return counts[:-1]

    _invalid = "no class index from 0 to the number of classes less one"

    def _valid(self, target: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(targets as int64 with 0 for what does not count, which count, how many are invalid)."""
        whole_target = target.long()  # a byte of 156 equals -100
        is_whole = whole_target == target
        ignored = is_whole & (whole_target == self.ignore_index)
        valid = is_whole & ~ignored & (whole_target >= 0) & (whole_target < classes)
        return torch.where(valid, whole_target, 0), valid, (~(valid | ignored)).sum()

    def __repr__(self):
        return f"{type(self).__name__}()"


class TopK(_Counts):
    """Measure the share of samples whose class is among the `k` with the highest scores.

    Parameters
    ----------
    k : int, default 5
        The usual number for ImageNet. 1 gives `accuracy`, without the targets that are ignored.
    ignore_index : int, default -100
        Targets of this value do not count, as in `F.cross_entropy`.

    Raises
    ------
    ValueError
        If `k` is not a whole number of at least 1; in a fit, if the model has fewer than `k` classes or a target is no
        class.

    Examples
    --------
    >>> top2 = TopK(2)
    >>> top2.update(tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), tensor([1, 0]))
    >>> top2.compute()
    tensor(0.5000)
    """

    def __init__(self, k: int = 5, ignore_index: int = -100):
        self.k = whole("TopK: k", k)
        super().__init__(f"top{k}_accuracy", ignore_index)

    def update(self, pred: torch.Tensor, yb: torch.Tensor) -> None:
        """Count a batch: scores (N, classes, *) and class indices (N, *)."""
        pred, yb = _tensors(pred, yb, self)
        if is_one_logit(pred) or pred.shape[1] < self.k:
            raise ValueError(
                f"{self!r} needs scores of at least {self.k} classes, (N, classes, *); got shape {tuple(pred.shape)}: "
                f"use a smaller k, or accuracy"
            )
        _, target = predicted_classes(pred, yb, repr(self))
        target, valid, invalid = self._valid(target, pred.shape[1])
        hit = (pred.topk(self.k, dim=1).indices == target[:, None]).any(1) & valid
        self._table(3, pred.device).add_(torch.stack([hit.sum(), valid.sum(), invalid]))

    def compute(self) -> torch.Tensor:
        """The share, from 0 to 1; NaN if no target counts."""
        hits, total = self._checked().double()
        return (hits / total).float()

    def __repr__(self):
        return f"TopK({self.k})"


class _PerClass(_Counts):
    """For each class: hits, predictions and targets."""

    def __init__(self, name: str, average: str | None, ignore_index: int):
        average = one_of(f"{type(self).__name__}: average", "none" if average is None else average, _AVERAGES)
        self.average, self.scalar = average, average != "none"
        super().__init__(_AVERAGES[average] + name, ignore_index)

    _labels = True  # a target of the scores' shape has labels that are independent of one another
    _invalid = f"{_Counts._invalid} (for labels of the scores' shape: not 0 or 1)"

    def update(self, pred: torch.Tensor, yb: torch.Tensor) -> None:
        """Count a batch."""
        pred, yb = _tensors(pred, yb, self)
        if self._labels and (pred.shape == yb.shape or is_one_logit(pred)):
            self._add_labels(pred, yb)
            return
        predicted, target = predicted_classes(pred, yb, repr(self))
        classes = 2 if is_one_logit(pred) else pred.shape[1]
        target, valid, invalid = self._valid(target, classes)
        predicted = predicted.long()
        spare = 3 * classes  # where to count what does not count
        places = (
            torch.where(valid & (predicted == target), target, spare),
            torch.where(valid, predicted + classes, spare),
            torch.where(valid, target + 2 * classes, spare),
        )
        table = self._table(spare + 2, pred.device)
        _count(table, torch.stack(places))
        table[-1] += invalid

    def _add_labels(self, pred: torch.Tensor, yb: torch.Tensor) -> None:
        if is_one_logit(pred):
            predicted, yb = predicted_classes(pred, yb, repr(self))
            pred, yb = predicted[:, None].bool(), yb[:, None]
        else:
            pred = pred > 0
        target, valid, invalid = self._valid(yb, 2)
        there, said = target.bool() & valid, pred & valid
        labels = pred.shape[1]
        over = [d for d in range(pred.dim()) if d != 1]
        table = self._table(3 * labels + 2, pred.device)
        table[:-2] += torch.cat([(there & said).sum(over), said.sum(over), there.sum(over)])
        table[-1] += invalid

    def compute(self) -> torch.Tensor:
        """The average, or for `average="none"` a float32 tensor (classes,), with NaN for classes that do not occur."""
        hits, predicted, there = self._checked()[:-1].double().reshape(3, -1)
        if self.average == "micro":
            hits, predicted, there = hits.sum(), predicted.sum(), there.sum()
        values = self._ratio(hits, predicted, there).float()
        return values.nanmean() if self.average == "macro" else values

    def _ratio(self, hits: torch.Tensor, predicted: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def __repr__(self):
        return f"{type(self).__name__}({self.average!r})"


_AVERAGES = {"macro": "", "micro": "micro_", "none": "per_class_"}  # and what the names of their columns begin with


class F1(_PerClass):
    """Compute the F1 score, 2 · precision · recall / (precision + recall), of each class or averaged over classes.

    It is not the mean of the scores of batches, so a plain function of a batch would give a wrong value. Its column is
    `f1`, or `micro_f1` with `average="micro"`; with `average=None` it has several numbers and no column (see
    `AvgStatsCallback`).

    Parameters
    ----------
    average : {"macro", "micro", "none"} or None, default "macro"
        "macro": the mean of the classes' scores, each class alike; classes that occur neither in targets nor in
        predictions are left out. "micro": the score of the summed counts; of class indices it is the accuracy. None or
        "none": the score of each class, NaN for those that do not occur.
    ignore_index : int, default -100
        Targets of this value do not count, as in `F.cross_entropy`.

    Raises
    ------
    ValueError
        If `average` is another word; in a fit, if shapes do not match or a target is invalid.

    Notes
    -----
    `update` takes scores (N, classes, *) with class indices (N, *). Targets with the shape of the scores are labels, 0
    or 1, each by itself (multi-label), and so are those of one logit, (N,) or (N, 1, *): a logit above 0 predicts the
    label. One logit gives the F1 score of class 1.

    Examples
    --------
    >>> f1 = F1(average=None)
    >>> f1.update(tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), tensor([0, 1, 1]))
    >>> f1.compute()
    tensor([0.6667, 0.6667])
    >>> labels = F1()
    >>> labels.update(tensor([[2.0, -1.0], [-3.0, -0.5]]), tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> labels.compute()   # 1 for the first label, 0 for the second
    tensor(0.5000)
    """

    def __init__(self, average: str | None = "macro", ignore_index: int = -100):
        super().__init__("f1", average, ignore_index)

    def _ratio(self, hits, predicted, there):
        return 2 * hits / (predicted + there)


class IoU(_PerClass):
    """Compute intersection over union (the Jaccard index), the usual score of segmentation, by class or averaged.

    For each class: pixels that are this class in both prediction and target, over those that are in at least one.

    Parameters
    ----------
    average : {"macro", "micro", "none"} or None, default "macro"
        As for `F1`: "macro" is the mean over classes, mIoU; None gives each class. Columns are `iou` and `micro_iou`.
    ignore_index : int, default -100
        Targets of this value do not count, as in `F.cross_entropy`; data sets of segmentation often use 255.

    Raises
    ------
    ValueError
        As for `F1`, which takes the same predictions and targets.

    Examples
    --------
    >>> iou = IoU(ignore_index=255)
    >>> scores = torch.zeros(1, 2, 2, 2)
    >>> scores[:, 1, 0] = 1.0   # the upper row is class 1
    >>> iou.update(scores, tensor([[[1, 1], [1, 255]]]))
    >>> iou.compute()   # class 0: 0 of 1; class 1: 2 of 3
    tensor(0.3333)
    """

    def __init__(self, average: str | None = "macro", ignore_index: int = -100):
        super().__init__("iou", average, ignore_index)

    def _ratio(self, hits, predicted, there):
        return hits / (predicted + there - hits)


class PerClassAccuracy(_PerClass):
    """Measure the accuracy within each class: the share of its samples that are predicted right (its recall).

    It has several numbers and no column; see `AvgStatsCallback` for how to read them.

    Parameters
    ----------
    ignore_index : int, default -100
        Targets of this value do not count, as in `F.cross_entropy`.

    Raises
    ------
    ValueError
        In a fit, if shapes do not match or a target is no class.

    Examples
    --------
    >>> per_class = PerClassAccuracy()
    >>> per_class.update(tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0]]), tensor([0, 1, 1]))
    >>> per_class.compute()   # class 2 does not occur
    tensor([1.0000, 0.5000,    nan])
    """

    _labels = False

    def __init__(self, ignore_index: int = -100):
        super().__init__("accuracy", None, ignore_index)

    def _ratio(self, hits, predicted, there):
        return hits / there

    def __repr__(self):
        return "PerClassAccuracy()"


class ConfusionMatrix(_Counts):
    """Count how often each class is predicted as each other: a row for each target, a column for each prediction.

    It has no column in the table. Keep the object: after a fit it has the counts of the last validation. Those of
    training are in `run.avg_stats.train_stats.objects["confusion_matrix"]`.

    Parameters
    ----------
    ignore_index : int, default -100
        Targets of this value do not count, as in `F.cross_entropy`.

    Raises
    ------
    ValueError
        In a fit, if shapes do not match or a target is no class.

    Examples
    --------
    >>> matrix = ConfusionMatrix()
    >>> learn, run = get_learn_run([8, 16], data, 0.1, conv_rbn, cbs=[partial(AvgStatsCallback, [accuracy, matrix])])
    >>> run.logger = lambda line: None
    >>> run.fit(1, learn)
    >>> matrix.compute().shape
    torch.Size([10, 10])
    >>> fig = matrix.plot()
    """

    scalar = False

    def __init__(self, ignore_index: int = -100):
        super().__init__("confusion_matrix", ignore_index)

    def update(self, pred: torch.Tensor, yb: torch.Tensor) -> None:
        """Count a batch: scores (N, classes, *), or one logit, and class indices (N, *)."""
        pred, yb = _tensors(pred, yb, self)
        predicted, target = predicted_classes(pred, yb, repr(self))
        classes = 2 if is_one_logit(pred) else pred.shape[1]
        target, valid, invalid = self._valid(target, classes)
        table = self._table(classes**2 + 2, pred.device)
        _count(table, torch.where(valid, target * classes + predicted, classes**2))
        table[-1] += invalid

    def compute(self) -> torch.Tensor:
        """The counts, int64 (classes, classes): `[i, j]` samples of class i were predicted as j."""
        counts = self._checked()[:-1]
        classes = round(len(counts) ** 0.5)
        return counts.reshape(classes, classes).clone()

    def most_confused(self, n: int = 10, classes: Sequence[Any] | None = None) -> list[tuple[Any, Any, int]]:
        """Return the `n` most frequent errors as (target, prediction, count), named by `classes`, by default numbers.

        Parameters
        ----------
        n : int, default 10
            Largest number of errors; ten are quickly read.
        classes : sequence, optional
            Names of the classes.

        Returns
        -------
        list of tuple
            The most frequent first. Pairs that never occurred are left out.

        Examples
        --------
        >>> matrix = ConfusionMatrix()
        >>> matrix.update(torch.eye(3)[[0, 1, 1, 2]], tensor([0, 0, 0, 1]))
        >>> matrix.most_confused(classes=["cat", "dog", "bird"])
        [('cat', 'dog', 2), ('dog', 'bird', 1)]
        """
        errors = self.compute().fill_diagonal_(0)
        names = range(len(errors)) if classes is None else classes
        order = errors.flatten().argsort(descending=True, stable=True)[: min(n, int(errors.count_nonzero()))]
        pairs = (divmod(k, len(errors)) for k in order.tolist())
        return [(names[i], names[j], int(errors[i, j])) for i, j in pairs]

    def plot(self, classes: Sequence[str] | None = None) -> Figure:
        """Draw the matrix; see `plots.plot_confusion`.

        Parameters
        ----------
        classes : sequence of str, optional
            Names of the classes. Default: their numbers.

        Returns
        -------
        matplotlib.figure.Figure
            Coloured by the share of each row.

        Examples
        --------
        >>> matrix = ConfusionMatrix()
        >>> matrix.update(torch.eye(2)[[0, 1, 1]], tensor([0, 0, 1]))
        >>> fig = matrix.plot(["cat", "dog"])
        """
        from fastrbn import plots

        return plots.plot_confusion(self.compute(), classes)


def _count(table: torch.Tensor, places: torch.Tensor) -> None:
    """Add 1 to `table` at each of `places`. Unlike bincount it does not wait for the device."""
    table.scatter_add_(0, places.flatten(), torch.ones_like(places).flatten())


def _tensors(pred: Any, yb: Any, metric: Any) -> tuple[torch.Tensor, torch.Tensor]:
    for what, value in (("predictions", pred), ("targets", yb)):
        if not isinstance(value, torch.Tensor):
            got = type(value).__name__ + (f" with {', '.join(map(str, value))}" if isinstance(value, dict) else "")
            raise TypeError(
                f"{metric!r} takes the {what} of a batch as one tensor; got {got}: pick the tensor in a subclass whose "
                f"update(pred, yb) calls super().update"
            )
    return pred, yb
