"""`load_run`: the model of a finished `fastrbn train`, with its classes and transform, ready for inference."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from fastrbn.callbacks import AvgStatsCallback, ConfusionMatrix, CudaCallback, MixedPrecision
from fastrbn.data import BadDataError, BatchLoader, DataBunch, DataError, DataNotFoundError, Dataset, load_dataset
from fastrbn.data.folder import files_in, listing
from fastrbn.data.image_file import UNREADABLE, ImageTransform
from fastrbn.learn import Learner, Runner, checkpoint_file
from fastrbn.learn.checkpoint_file import CheckpointError
from fastrbn.learn.snapshot import load_plain_state_dict
from fastrbn.trainer.build import build_data, build_model
from fastrbn.trainer.settings import Settings, find_device, of_config, read_config
from fastrbn.util import one_of, suggestion, whole

__all__ = ["Evaluation", "ImagePrediction", "RunError", "SavedRun", "load_run"]

Images = str | Path | Image.Image


class RunError(ValueError):
    """Raised if the folder of a run cannot be loaded; the message says what is missing."""


class ImagePrediction(NamedTuple):
    """The class that a model predicts for an image.

    Parameters
    ----------
    path : str or None
        The image's file, None for an image that was not read from one.
    label : str
        Name of the most probable class.
    probability : float
        Its probability, 0 to 1.
    probabilities : Tensor
        Of all classes, in the order of the run's `classes`.
    """

    path: str | None
    label: str
    probability: float
    probabilities: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy of a model on labelled images.

    Parameters
    ----------
    loss : float
        Mean over the images.
    accuracy : float
        Share of images whose most probable class is right.
    per_class : dict of str to float
        The accuracy of each class that has images.
    confusion : Tensor
        Numbers of images, int64 (classes, classes): a row for each true class, a column for each predicted one.
    """

    loss: float
    accuracy: float
    per_class: dict[str, float]
    confusion: Tensor


def load_run(folder: str | Path, weights: str = "best", device: torch.device | str = "cpu") -> SavedRun:
    """Load the model of a run of `fastrbn train`, in evaluation mode, with its classes and transform.

    A run that has not ended can be loaded as soon as it has written weights.

    Parameters
    ----------
    folder : str or Path
        The run's folder, `--out` of `fastrbn train`.
    weights : {"best", "last"}, default "best"
        "best" are those that `SaveBest` kept (`fastrbn train --cb SaveBest`), or the last ones if the run had no
        `SaveBest`. "last" are those at the end of training; of a run that was killed, those of the newest checkpoint.
    device : torch.device or str, default "cpu"
        Where the model goes; the default works on every machine. "auto" takes the accelerator if there is one.

    Returns
    -------
    SavedRun

    Raises
    ------
    RunError
        If the folder holds no run, a damaged one, or one without weights yet; if the model cannot be made here.

    Examples
    --------
    >>> run = load_run("runs/pets")            # doctest: +SKIP
    >>> run.predict("photo.jpg").label         # doctest: +SKIP
    'cat'
    >>> x = run.transform("photo.jpg")         # doctest: +SKIP
    >>> run.model(x[None]).shape               # doctest: +SKIP
    torch.Size([1, 2])
    """
    folder = Path(folder)
    one_of("weights", weights, ("best", "last"))
    config = _config(folder)
    settings = _settings(folder / "config.json", config, device)
    classes, transform = _about(folder / "config.json", config)
    file, state, which = _weights(folder, config, weights)
    try:
        with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, and overwritten
            model = build_model(settings, len(transform.mean), len(classes))
    except ValueError as e:
        raise RunError(f"{folder}: the run's model cannot be made here: {e}") from e
    try:
        load_plain_state_dict(model, state)
    except (RuntimeError, AttributeError, TypeError) as e:
        why = " ".join(str(e).split())
        raise RunError(
            f"{file} does not fit the model that {folder / 'config.json'} describes ("
            f"{settings.title}): {why[:300]}{'…' if len(why) > 300 else ''} Are both files of the same run?"
        ) from e
    history = _history(folder / "history.csv")
    model = model.to(settings.device).eval()
    trained = _trained(history, config, which)
    return SavedRun(folder, model, classes, transform, settings, file, history, trained, config)


@dataclass(repr=False, eq=False)
class SavedRun:
    """A run that was loaded with `load_run`.

    Parameters
    ----------
    folder : Path
        The run's folder.
    model : nn.Module
        In evaluation mode. Takes float32 (N, C, H, W) and returns scores (N, classes) before softmax.
    classes : tuple of str
        Class names, in the order of the scores.
    transform : callable
        Makes the tensor (C, H, W) that the model takes from a path or a Pillow image: scaled to cover the training
        images' size and cropped at the centre, in their colours, and normalised with their mean and standard deviation,
        which are its `size`, `mean` and `std`.
    settings : object
        The options that the run was trained with, as attributes: `settings.bs`, `settings.lr`.
    weights : Path
        The file that the weights came from.
    history : list of dict
        A row for each epoch, as in history.csv.
    trained : dict or None
        The row of `history` that these weights were validated in; None if there is none.
    config : dict
        What config.json holds.

    Examples
    --------
    >>> run = load_run("runs/mnist")                         # doctest: +SKIP
    >>> [p.label for p in run.predict(["a.png", "b.png"])]   # doctest: +SKIP
    ['7 - seven', '2 - two']
    >>> run.evaluate().accuracy                              # doctest: +SKIP
    0.9812
    >>> run.export("digits.onnx")                            # doctest: +SKIP
    """

    folder: Path
    model: nn.Module
    classes: tuple[str, ...]
    transform: ImageTransform
    settings: Settings
    weights: Path
    history: list[dict[str, Any]]
    trained: dict[str, Any] | None
    config: dict[str, Any]

    @property
    def results(self) -> dict[str, Any]:
        """How the run ended: `status`, `reason`, `seconds`, `steps`, and `best` if it had a `SaveBest`.

        Empty if it has not ended, or was killed.
        """
        return self.config.get("result", {})

    @property
    def _device(self) -> torch.device:
        """Where the model is now."""
        return next((p.device for p in self.model.parameters()), torch.device(self.settings.device))

    def predict(self, images: Images | Iterable[Images], bs: int = 64) -> Any:
        """Predict the classes of images.

        Parameters
        ----------
        images : path, Pillow image, or list of them
            A folder stands for all images in it, at any depth.
        bs : int, default 64
            Images per batch. It does not change the predictions, only speed and memory.

        Returns
        -------
        ImagePrediction, or list of them
            One for one image; a list for a list or a folder.

        Raises
        ------
        ValueError
            If an image cannot be read; the message names it.
        """
        single = isinstance(images, Image.Image) or isinstance(images, (str, Path)) and not Path(images).is_dir()
        made = []
        for source, found in predictions(self, images, bs):
            if isinstance(found, Exception):
                raise ValueError(f"{source}: no image can be read: {found}") from found
            made.append(found)
        return made[0] if single else made

    def evaluate(self, data: Any = None, split: str = "valid") -> Evaluation:
        """Measure loss and accuracy as the training did, on the run's validation images or on others.

        Parameters
        ----------
        data : path, loader or batch, optional
            A folder with a folder of images for each class (some classes may be missing), or batches `(xb, yb)` that
            are normalised: a loader, another iterable of them, a DataBunch, or one. By default the data of the run.
        split : {"valid", "test"}, default "valid"
            Which of the run's data: the validation images as the run had them, or all test images.

        Returns
        -------
        Evaluation

        Raises
        ------
        RunError
            If the data have other classes than the run.
        DataError
            If the data cannot be found or read.
        """
        one_of("split", split, ("valid", "test"))
        if data is not None and split == "test":
            raise ValueError("split is for the run's own data: leave it out, or data")
        if isinstance(data, (str, Path)):
            loader: Any = self._folder(Path(data))
        elif data is not None:
            loader = data
        else:
            loader = self.data().valid_dl if split == "valid" else self._loader(self._images(valid="test").valid)
        return self._measure(loader)

    def _measure(self, loader: Any) -> Evaluation:
        matrix, amp, opt = ConfusionMatrix(), self.settings.amp, torch.optim.SGD(self.model.parameters())
        cbs = [AvgStatsCallback(matrix), CudaCallback(self._device), *([MixedPrecision(amp)] if amp else [])]
        loss_func = nn.CrossEntropyLoss(label_smoothing=self.settings.label_smoothing)
        learn = Learner(self.model, opt, loss_func, DataBunch([], []))
        loss = Runner(cbs).validate(loader, learn)["loss"]
        confusion = matrix.compute()
        counts, right = confusion.sum(1).tolist(), confusion.diagonal()
        per_class = {name: int(hits) / count for name, hits, count in zip(self.classes, right, counts) if count}
        return Evaluation(loss, int(right.sum()) / sum(counts), per_class, confusion)

    def data(self) -> DataBunch:
        """Make the loaders that the run was trained with, normalised with the run's statistics.

        Returns
        -------
        DataBunch

        Raises
        ------
        DataError
            If the data cannot be found or read.
        RunError
            If they have other classes now, or the loaders cannot be made here.
        """
        images = self._images()
        try:
            data = build_data(self.settings, images)
        except ValueError as e:
            raise RunError(f"{self.folder}: the run's loaders cannot be made here: {e}") from e
        for dl in (data.train_dl, data.valid_dl):  # the images may have changed since
            dl.normalize = [*self.transform.mean], [*self.transform.std]
            dl.to(dl.device)
        kept = self.config["data"]
        now, then = (len(data.train_ds), len(data.valid_ds)), (kept.get("train"), kept.get("valid"))
        if now != then:
            warnings.warn(
                f"the data of {self.folder} have changed since: there were {then[0]} training and {then[1]} validation "
                f"images, now there are {now[0]} and {now[1]}",
                stacklevel=2,
            )
        return data

    def export(self, path: str | Path, to: str | None = None) -> float:
        """Write the model, in evaluation mode and for batches of any size, for use without fastrbn.

        The file is loaded again and compared with the model; it is written only if both agree. Classes and transform
        are in it as JSON: under "fastrbn" in the metadata of ONNX, as the extra file "fastrbn.json" in a .pt2.

        Parameters
        ----------
        path : str or Path
            The file.
        to : {"onnx", "torch"}, optional
            By default taken from the name's end, .onnx or .pt2.

        Returns
        -------
        float
            The largest difference between the file's scores and the model's.

        Raises
        ------
        ImportError
            If the packages for ONNX are missing.
        RuntimeError
            If the model cannot be exported, or what was exported gives other scores.
        """
        from fastrbn.export import export_model

        t = self.transform
        about = {
            "classes": list(self.classes),
            "input": {"channels": len(t.mean), "height": t.size[0], "width": t.size[1]},
            "transform": "scale to cover height x width, crop the centre, divide by 255, subtract mean, divide by std",
            "mean": list(t.mean),
            "std": list(t.std),
            "output": "scores before softmax",
        }
        return export_model(self.model, (len(t.mean), *t.size), path, to, about)

    def _images(self, **split: Any) -> Any:
        settings = self.settings
        size: dict[str, Any] = {} if settings.size is None else {"size": settings.size}
        images = load_dataset(settings.data or "", settings.data_dir, **size, **split)
        if images.classes != self.classes:
            raise RunError(
                f"{settings.data} has other classes than {self.folder} was trained with: "
                f"{', '.join(sorted({*images.classes} ^ {*self.classes})[:5]) or 'in another order'}"
            )
        return images

    def _loader(self, images: Any) -> BatchLoader:
        t = self.transform
        return BatchLoader(
            images.x, images.y, 2 * self.settings.bs, device=self.settings.device, normalize=(t.mean, t.std)
        )

    def _folder(self, folder: Path) -> BatchLoader:
        """The images in `folder`, which has a folder for each class."""
        if not folder.is_dir():
            raise DataNotFoundError(f"there is no folder {folder}: give one with a folder of images for each class")
        files, y, names = listing(folder, {})
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            inner = next((folder / n for n in ("valid", "val", "test", "train") if n in unknown), None)
            hint = suggestion(unknown[0], self.classes) if inner is None else f" Do you mean {inner}?"
            raise RunError(
                f"{folder} must have folders named after the run's classes ({', '.join(self.classes[:5])}"
                f"{', …' if len(self.classes) > 5 else ''}); got {', '.join(unknown[:5])}.{hint}"
            )
        with ThreadPoolExecutor() as pool:
            read = list(pool.map(lambda file: _try(self.transform.bytes, file), files))
        bad = [f"{file} ({e})" for file, e in zip(files, read) if isinstance(e, Exception)]
        if bad:
            raise BadDataError(
                f"every image must be readable; {len(bad)} of {len(files)} are not: {'; '.join(bad[:3])}"
                f"{' …' if len(bad) > 3 else ''}"
            )
        labels = torch.tensor([self.classes.index(name) for name in names])
        return self._loader(Dataset(torch.stack([x for x in read if isinstance(x, Tensor)]), labels[y]))

    def __repr__(self) -> str:
        t = self.transform
        weights = self.weights.relative_to(self.folder) if self.weights.is_relative_to(self.folder) else self.weights
        return (
            f"SavedRun({str(self.folder)!r}, {self.settings.title}, weights of {weights}, "
            f"{len(self.classes)} classes of images of {(len(t.mean), *t.size)})"
        )


def predictions(
    run: SavedRun, images: Images | Iterable[Images], bs: int = 64
) -> Iterator[tuple[Any, ImagePrediction | Exception]]:
    """Each image, or its path, with its prediction, or with the error of one that cannot be read."""
    whole("bs", bs)
    device, sources = run._device, _sources(images)
    run.model.eval()
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(sources, bs)):
            read = list(pool.map(lambda item: item[1] or _try(run.transform.bytes, item[0]), chunk))
            x = [t for t in read if isinstance(t, Tensor)]
            rows: Iterator[Tensor] = iter(())
            if x:
                with torch.inference_mode():
                    batch = run.transform.normalize(torch.stack(x)).to(device)
                    rows = iter(run.model(batch).float().softmax(1).cpu())
            for (source, _), made in zip(chunk, read):
                if isinstance(made, Exception):
                    yield source, made
                    continue
                row = next(rows)
                best = int(row.argmax())
                path = None if isinstance(source, Image.Image) else str(source)
                yield source, ImagePrediction(path, run.classes[best], float(row[best]), row)


def _sources(images: Any) -> Iterator[tuple[Images, Exception | None]]:
    """The images one by one, those in folders too; with an error, a folder that has none."""
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        try:
            found = files_in(str(images), {})
        except DataError as e:
            yield images, e
            return
        yield from ((file, None) for file in found)
        if not found:
            yield images, ValueError("there are no images in this folder")
    elif isinstance(images, (str, Path, Image.Image)):
        yield images, None
    else:
        for image in images:
            yield from _sources(image) if isinstance(image, (str, Path)) else ((image, None),)


def _try(function: Any, *args: Any) -> Any:
    """The result, or the error of an image that cannot be read."""
    try:
        return function(*args)
    except UNREADABLE as e:
        return e


# the folder


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no folder"
        raise RunError(f"load_run needs the folder of a run of `fastrbn train`; {folder} is {what}")
    try:
        return read_config(folder / "config.json")
    except FileNotFoundError as e:
        raise RunError(
            f"{folder} is not the folder of a run: it has no config.json, which `fastrbn train` writes. Give the "
            f"folder that it named"
        ) from e
    except OSError as e:
        raise RunError(f"{folder / 'config.json'} cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise RunError(f"{e}; restore the file from a copy") from e


def _settings(path: Path, config: dict[str, Any], device: torch.device | str) -> Settings:
    kept = config.get("arguments")
    try:
        here = (
            "auto"
            if str(device) == "auto"
            else find_device(str(device), "auto, cpu, or an accelerator of this machine")
        )
    except ValueError as e:
        raise ValueError(str(e).removeprefix("--")) from e
    if kept is None:
        raise RunError(f"{path} lacks `arguments`, the run's settings, because an old version wrote it: train again")
    try:
        # not the device of the training, which this machine need not have
        return of_config({**kept, "device": here} if isinstance(kept, dict) else kept)
    except ValueError as e:
        raise RunError(f"{path}: {e}; a newer fastrbn may have written it, or restore the file from a copy") from e


def _about(path: Path, config: dict[str, Any]) -> tuple[tuple[str, ...], ImageTransform]:
    """Classes and transform of the run's images."""
    data = config.get("data")
    data = data if isinstance(data, dict) else {}
    kinds: dict[str, Any] = {"classes": str, "shape": int, "mean": (int, float), "std": (int, float)}
    for name, kind in kinds.items():
        value = data.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(v, kind) for v in value):
            raise RunError(
                f"{path} lacks data.{name}, without which images cannot be prepared as in the training: restore the "
                f"file from a copy, or train again"
            )
    c, *size = data["shape"]
    if len(size) != 2 or not len(data["mean"]) == len(data["std"]) == c:
        raise RunError(f"{path}: data.shape must be channels, height, width, with a mean and std for each channel")
    return tuple(data["classes"]), ImageTransform((size[0], size[1]), tuple(data["mean"]), tuple(data["std"]))


def _weights(folder: Path, config: dict[str, Any], which: str) -> tuple[Path, dict[str, Any], str]:
    """File and state_dict of the best or the last weights, and which they are: "best", "last", or "checkpoint"."""
    result = config.get("result", {})
    best = _best(config)
    kept = folder / str(best.get("file", "best.pt"))
    if which == "best" and (best or kept.is_file()):
        return kept, _state(kept), "best"
    model, saved = folder / "model.pt", checkpoint_file.files(folder / "checkpoints")
    steps = result.get("steps", -1) if model.exists() else -1
    if saved and checkpoint_file.steps_in(saved[-1][1]) > steps:
        try:
            file, state = checkpoint_file.find(folder / "checkpoints")
        except CheckpointError as e:
            raise RunError(str(e)) from e
        return file, state["model"], "checkpoint"
    if not model.exists():
        other = "; weights='best' are there" if kept.is_file() else ""
        raise RunError(
            f"{folder} has no weights: the run is still training, or was killed before it wrote any{other}. Wait for "
            f"its end, or train with --checkpoint-every"
        )
    return model, _state(model), "last"


def _best(config: dict[str, Any]) -> dict[str, Any]:
    """What the configuration says of the weights that SaveBest wrote; empty if it wrote none."""
    best = config.get("result", {}).get("best", {})
    return best if isinstance(best, dict) else {}


def _state(file: Path) -> dict[str, Any]:
    try:
        if file.exists() and not file.is_file():
            raise OSError(None, "it is not a file")
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise RunError(f"{file}, the run's best weights, is gone: put it back, or take weights='last'") from e
    except OSError as e:
        raise RunError(f"{file} cannot be read: {e.strerror or e}") from e
    except Exception as e:  # on damaged bytes the zip and pickle readers raise all kinds of exceptions
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        raise RunError(f"{file} is damaged, or no file of weights ({why[:200]}): restore it from a copy") from e


def _history(file: Path) -> list[dict[str, Any]]:
    """The rows of history.csv; an empty field is None."""
    try:
        with open(file, newline="", encoding="utf-8") as f:
            rows = [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(f)]
        return [{**row, "epoch": int(row["epoch"] or 0)} for row in rows]
    except (OSError, ValueError, KeyError, TypeError):  # it is not needed for inference
        return []


def _trained(history: list[dict[str, Any]], config: dict[str, Any], which: str) -> dict[str, Any] | None:
    """The row of the epoch in which the best, or the last, weights were validated."""
    result = config.get("result", {})
    if which == "best":
        best = _best(config)
        rows = [row for row in history if row["epoch"] == best.get("epoch")]
        # an epoch that max_steps had cut, and that went on later, has two: the one with the best value comes first
        rows.sort(key=lambda row: [*best.values()][-1] in [*row.values()][1:], reverse=True)
    else:
        ema = [cb for cb in map(str, config.get("callbacks", ())) if cb.startswith("EMA(")]
        kept = not ema or result.get("status") == 0 and "keep=True" in ema[0]  # else the averages were validated
        rows = history[-1:] if which == "last" and kept else []
    return rows[0] if rows and rows[0].get("valid_loss") is not None else None
