"""Pictures: what they show, that no text is on another or too small, and that no window or backend is touched."""

import doctest
import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

from fastrbn import conv_layer, get_learn_run, glyphs, image_databunch, plots
from fastrbn.callbacks import ActivationStats, LR_Find, ParamMagnitudes, Recorder


def png(fig):
    out = io.BytesIO()
    fig.savefig(out, format="png")
    data = out.getvalue()
    assert data.startswith(b"\x89PNG")
    return data


def texts(fig):
    """All texts that are drawn in `fig`, with their extents; `fig` must have been saved."""
    found = [t for legend in fig.legends for t in (legend.get_title(), *legend.get_texts())]
    for ax in fig.axes:
        where = ax.get_window_extent()
        ticks = [t for t in ax.get_xticklabels() if where.x0 - 2 < _mid(t)[0] < where.x1 + 2]
        ticks += [t for t in ax.get_yticklabels() if where.y0 - 2 < _mid(t)[1] < where.y1 + 2]
        names = [ax.xaxis.label, ax.yaxis.label, ax.title, ax._left_title, ax._right_title] if ax.axison else []
        found += [*(ticks if ax.axison else []), *names, *ax.texts]
    found += [fig._suptitle] if fig._suptitle else []
    return [(t, Text.get_window_extent(t)) for t in found if t.get_visible() and t.get_text()]  # without its line


def _mid(text):
    box = text.get_window_extent()
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


def labels(ax):
    return [t.get_text() for t in ax.texts]


def line(ax, i=0):
    return ax.lines[i].get_ydata().tolist()


def history(n=3, valid=True):
    def row(i):
        v = i + 0.5 if valid else None
        return {"epoch": i, "train_loss": 1 / (i + 1), "train_accuracy": i / 10, "valid_loss": v, "valid_accuracy": v}

    return [{**row(i), "lr": 0.1, "time": 1.0} for i in range(n)]


def test_loss_is_drawn_step_by_step_with_its_mean_when_there_are_many():
    (ax,) = plots.plot_loss([3.0, 2.0, 1.0]).axes
    assert line(ax) == [3, 2, 1]
    assert (ax.get_xlabel(), ax.get_ylabel(), len(ax.lines)) == ("step", "loss", 1)
    values = [float(i % 2) + 1 for i in range(600)]
    (ax,) = plots.plot_loss(values).axes
    assert line(ax, 0) == values
    assert all(abs(v - 1.5) < 0.1 for v in line(ax, 1)[20:-20])


@pytest.mark.parametrize(
    ("losses", "scale"), [([100.0, 1.0], "log"), ([2.0, 1.0], "linear"), ([100.0, -1.0], "linear")]
)
def test_the_loss_axis_is_logarithmic_where_losses_span_decades(losses, scale):
    assert plots.plot_loss(losses).axes[0].get_yscale() == scale


def test_the_search_for_a_rate_has_a_logarithmic_axis_and_a_label_for_each_suggestion():
    lrs, losses = [10.0**i for i in range(-6, 1)], [2.0, 2.0, 1.9, 1.5, 1.0, 5.0, 1e9]
    (ax,) = plots.plot_lr_find(lrs, losses, suggestion=1e-3).axes
    assert ax.get_xscale() == "log"
    assert labels(ax) == ["suggestion: 0.001"]
    assert ax.lines[1].get_xdata()[0] == 1e-3
    assert ax.get_ylim()[1] < 20, "the explosion hides the curve"
    (ax,) = plots.plot_lr_find(lrs, losses, {"steepest": 1e-2, "minimum": 1e-3, "valley": None}).axes
    assert labels(ax) == ["minimum: 0.001", "steepest: 0.01"]


def test_the_search_for_a_rate_is_smoothed_up_to_the_explosion():
    lrs, losses = torch.logspace(-6, 0, 90), torch.ones(90) + torch.rand(90) / 10
    losses[80:] = torch.logspace(1, 9, 10)
    (ax,) = plots.plot_lr_find(lrs, losses).axes
    assert line(ax, 0) == pytest.approx(losses.tolist())
    mean = torch.tensor(line(ax, 1))
    assert len(mean) == 80, "what is off the axis has no mean"
    assert mean.std() < losses[:80].std() / 1.5


@pytest.mark.parametrize("values", [[], [1.0], [math.nan] * 3, [1.0, math.inf, math.nan], [0.0, 0.0], torch.rand(80)])
def test_odd_values_are_drawn_all_the_same(values):
    for fig in (plots.plot_loss(values), plots.plot_lr(values), plots.plot_lr_find(values, values)):
        png(fig)
    png(plots.plot_run(values, values, []))


def test_history_has_a_panel_for_each_measure():
    fig = plots.plot_history(history())
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss", "accuracy"]
    assert line(fig.axes[0], 0) == [1, 1 / 2, 1 / 3]
    assert line(fig.axes[0], 1) == [0.5, 1.5, 2.5]
    assert fig.axes[0].lines[0].get_xdata().tolist() == [0, 1, 2], "epochs have the numbers that the history has"
    assert [len(ax.lines) for ax in plots.plot_history(history(valid=False)).axes] == [1, 1]
    png(plots.plot_history([]))


def test_a_run_at_a_glance_has_steps_above_and_epochs_below():
    fig = plots.plot_run([2.0, 1.0], [0.1, 0.2], history())
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss", "learning rate", "loss", "accuracy"]
    assert labels(fig.axes[2]) == ["train 0.3333", "valid 2.5"]


@pytest.mark.parametrize(("valid", "parts"), [(True, ["train", "valid"]), (False, ["train"])])
def test_a_single_epoch_has_bars_with_their_values_and_no_lone_dots(valid, parts):
    _, _, loss, accuracy = plots.plot_run([2.0, 1.0], [0.1, 0.2], history(1, valid)).axes
    assert [len(ax.lines) for ax in (loss, accuracy)] == [0, 0]
    assert [bar.get_width() for bar in loss.patches] == [1.0, 0.5][: len(parts)]
    assert [t.get_text() for t in loss.get_yticklabels()] == parts
    assert labels(loss) == ["1", "0.5"][: len(parts)]
    assert loss.get_title("left") == "Loss of epoch 0"


def test_a_loss_that_breaks_says_from_which_step_on():
    (ax,) = plots.plot_loss([1.0, 2.0, 3.0, math.nan, math.nan]).axes
    assert labels(ax) == ["NaN or infinite\nfrom step 3 on"]
    (cross,) = [line for line in ax.lines if line.get_marker() == "X"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (2, 3)


def test_magnitudes_have_a_row_for_each_parameter_and_a_logarithmic_colour():
    names = [f"layers.{i}.weight" for i in range(25)]
    values = torch.rand(40, 25) + 0.1
    values[3, 4], values[5, 6], values[7, 8] = 0.0, math.nan, math.inf
    fig = plots.plot_magnitudes(values, names, list(range(0, 80, 2)), title="largest |value|")
    ax, bar = fig.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    assert bar.get_ylabel() == "largest |value|"
    assert type(ax.images[0].norm).__name__ == "LogNorm"
    shown = ax.images[0].get_array()
    assert shown.shape == (25, 40)
    assert [bool(shown.mask[c, r]) for r, c in ((3, 4), (5, 6), (7, 8), (0, 0))] == [True, True, True, False]
    assert ax.images[0].get_extent()[:2] == [-1.0, 79.0]
    png(fig)
    fig.canvas.draw()
    heights = [t.get_window_extent().height for t in ax.get_yticklabels()]
    assert max(heights) <= ax.get_window_extent().height / 25 + 1, "the names overlap"


NOTHING_MUCH = [torch.empty(0, 2), torch.zeros(3, 2), torch.full((1, 2), math.nan), torch.ones(1, 2)]


@pytest.mark.parametrize("values", NOTHING_MUCH)
def test_magnitudes_of_nothing_much_are_drawn_all_the_same(values):
    png(plots.plot_magnitudes(values, ["a", "b"], list(range(len(values)))))


def test_what_broke_is_orange_in_the_map_and_what_was_never_there_is_not():
    values = torch.ones(6, 3)
    values[4:, 0], values[:3, 1], values[5, 2] = math.nan, math.nan, 0.0
    fig = plots.plot_magnitudes(values, ["a", "b", "c"], list(range(6)))
    ax, _ = fig.axes
    orange = ax.images[1].get_array()[..., 3]
    assert orange.tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6, [0] * 6]
    assert ax.get_title(loc="right") == "grey: 0 or not there; orange: NaN or infinite"
    assert len(plots.plot_magnitudes(torch.ones(6, 3), ["a", "b", "c"], list(range(6))).axes[0].images) == 1


def test_a_peak_of_one_step_among_thousands_is_seen():
    values = torch.ones(5000, 1)
    values[1234] = 100.0
    shown = plots.plot_magnitudes(values, ["a"], list(range(5000))).axes[0].images[0].get_array()
    assert shown.shape[1] < 1000
    assert shown.max() == 100


def test_lines_are_named_where_they_grow_most_and_crossed_where_they_break():
    names = [f"p{i}" for i in range(14)]
    values = torch.ones(20, 14)
    values[:, 7] = torch.logspace(0, 5, 20)
    values[12:, 3] = math.inf
    fig = plots.plot_magnitude_lines(values, names, list(range(20)), "rms")
    (ax,) = fig.axes
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "rms (logarithmic)")
    assert len(labels(ax)) == 8
    assert {"p3", "p7"} <= set(labels(ax))
    colors = [line.get_color() for line in ax.lines if line.get_marker() != "X"]
    assert sorted(colors.count(c) for c in set(colors)) == [1] * 8 + [6], "a colour each, and grey"
    (cross,) = [line for line in ax.lines if line.get_marker() == "X"]
    assert cross.get_xdata()[0] == 11
    assert "NaN" in ax.get_title("right")


@pytest.mark.parametrize("values", NOTHING_MUCH)
def test_lines_of_nothing_much_are_drawn_all_the_same(values):
    png(plots.plot_magnitude_lines(values, ["a", "b"], list(range(len(values)))))
    png(plots.plot_activations(values, values, values, ["a", "b"], list(range(len(values))), values))


@pytest.mark.parametrize(("largest", "scales"), [(10.0, ["linear", "linear"]), (1e9, ["symlog", "log"])])
def test_activations_that_explode_have_logarithmic_axes(largest, scales):
    values = torch.ones(50, 2)
    values[-1] = largest
    fig = plots.plot_activations(values, values, torch.zeros(50, 2), ["a", "b"], list(range(50)), torch.zeros(50, 2))
    assert [ax.get_yscale() for ax in fig.axes[:2]] == scales
    assert [ax.get_ylabel() for ax in fig.axes[2:]] == ["share near zero", "share of dead channels"]
    png(fig)


def test_activations_have_three_panels_and_histograms_one_for_each_module():
    names, steps = ["0", "1.conv", "2"], list(range(10))
    fig = plots.plot_activations(torch.randn(10, 3), torch.rand(10, 3), torch.rand(10, 3), names, steps)
    assert [ax.get_ylabel() for ax in fig.axes] == ["mean", "standard deviation", "share near zero"]
    assert [len(ax.lines) for ax in fig.axes] == [3, 3, 3]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == names
    png(fig)
    counts = torch.rand(10, 3, 40) * 100
    fig = plots.plot_histograms(counts, names, steps, (-5.0, 5.0))
    *images, bar = fig.axes
    assert [ax.get_title("left") for ax in images] == names
    assert images[0].images[0].get_extent() == [-0.5, 9.5, -5.0, 5.0]
    assert images[0].images[0].get_array().sum(0).tolist() == pytest.approx([100] * 10, rel=1e-3), "percent of a step"
    assert len({image.images[0].get_clim() for image in images}) == 1, "one scale for all"
    assert bar.get_ylabel().startswith("% of the step's values")


def test_what_training_leaves_is_drawn_with_the_type_of_each_module_and_every_suggestion():
    data = image_databunch(glyphs(256, 64), 8)
    learn, run = get_learn_run([4, 8], data, 0.1, conv_layer, cbs=[ActivationStats])
    run.fit(1, learn)
    titles = [ax.get_title("left") for ax in run.activation_stats.plot_hist().axes[:-1]]
    assert titles == [f"{name} {type(module).__name__}" for name, module in learn.model.named_children()]
    assert [t.get_text() for t in run.activation_stats.plot().legends[0].get_texts()] == titles
    learn, run = get_learn_run([4, 8], data, 0.1, conv_layer, cbs=[LR_Find])
    run.fit(5, learn)
    rules = [text.split(":")[0] for text in labels(run.lr_find.plot().axes[0])]
    assert {"steepest", "minimum / 10"} <= set(rules)


def test_nothing_recorded_is_drawn_as_nothing():
    for fig in (
        Recorder().plot_loss(),
        LR_Find().plot(),
        ParamMagnitudes().plot(),
        ParamMagnitudes().plot(kind="lines"),
        ActivationStats().plot(),
        ActivationStats().plot_hist(),
    ):
        png(fig)


def test_outside_notebooks_no_backend_is_chosen():
    code = (
        "import sys, io; from fastrbn import plots; assert not any(m.startswith('matplotlib') for m in sys.modules);"
        "plots.plot_run([1.0], [1.0], []).savefig(io.BytesIO()); print('matplotlib.pyplot' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    env["PYTHONPATH"] = str(Path(plots.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_in_a_notebook_a_figure_shows_itself_once(monkeypatch):
    import IPython.display
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plots.figure, "in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    fig = plots.plot_loss([1.0, 2.0])
    assert plt.get_fignums() != [], "the end of the cell would not show it"
    fig._ipython_display_()  # as the cell's value
    assert plt.get_fignums() == [], "the end of the cell would show it again"
    assert [type(s).__name__ for s in shown] == ["Image"]
    fig._ipython_display_()  # and it can be shown again
    assert len(shown) == 2


def history_of_activations(steps, modules):
    return [torch.rand(steps, modules) for _ in range(3)]


POINT = {"x": 8, "mean": 98.2, "std": None, "total": 1, "at chance": 0, "diverged": 0, "refused": 0}


def comparison(columns, norms):
    def point(x, i):
        counts = {"at chance": i % 3 == 1, "diverged": 2 * (i % 4 == 1), "refused": 3 * (i == 6 and x < 4)}
        mean = None if sum(counts.values()) == 3 else 98 - 9 * (i == 5) - i / 10
        return {"x": x, "mean": mean, "std": 0.2, "total": 3, **counts}

    lines = {f"norm-{i}": [point(x, i) for x in (1, 2, 4, 8, 32, 512)] for i in range(norms)}
    return [(f"mnist, cnn, 50000 images, 3 to 6 seeds, batch size {i}, lr×0.333", lines) for i in range(columns)]


def up_to_32(lines):
    return {label: [p for p in points if p["x"] <= 32] for label, points in lines.items()}


def test_a_confusion_matrix_has_the_shares_of_each_row_and_counts_in_the_cells():
    ax, *_ = plots.plot_confusion(torch.tensor([[6, 2, 0], [0, 0, 0], [1, 0, 3]])).axes
    (image,) = ax.images
    shares = image.get_array().filled(-1.0).tolist()
    assert shares == [[0.75, 0.25, 0.0], [-1.0] * 3, [0.25, 0.0, 0.75]], "the row without samples has no colour"
    assert {(t.get_position(), t.get_text()) for t in ax.texts} == {
        ((0, 0), "6"),
        ((1, 0), "2"),
        ((0, 2), "1"),
        ((2, 2), "3"),
    }
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("target", "predicted")
    assert ax.get_title("left").endswith("75.0 % of 12 samples right")


def test_a_matrix_of_many_classes_lists_what_is_confused_most():
    counts = 50 * torch.eye(30, dtype=torch.int64)
    counts[3, 7], counts[7, 3], counts[1, 2] = 9, 20, 1
    fig = plots.plot_confusion(counts)
    assert not fig.axes[0].texts
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["7 → 3: 20", "3 → 7: 9", "1 → 2: 1"]
    assert len(plots.plot_confusion(torch.eye(300)).axes[0].get_xticks()) == 100, "names stay 0.15 inches apart"


def test_what_is_no_confusion_matrix_is_refused():
    for matrix, classes, message in [
        (torch.ones(2, 3), None, r"got shape \(2, 3\)"),
        (torch.ones(2, 2), ["a"], "each of the 2 classes; got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            plots.plot_confusion(matrix, classes)


def test_the_worst_predictions_come_first_and_are_told_from_the_right_ones():
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 2, 2) / 4
    losses, probs = [0.5, math.nan, 3.0, 1.0], torch.eye(4)[[0, 1, 2, 3]] * 0.5
    fig = plots.plot_worst(images, [0, 1, 2, 3], torch.tensor([0, 0, 2, 1]), losses, probs, classes="abcd", n=3)
    assert [float(ax.images[0].get_array()[0, 0]) for ax in fig.axes] == [0.25, 0.5, 0.75]
    assert [ax.get_title("left").splitlines() for ax in fig.axes] == [
        ["target b", "predicted a", "loss nan, probability 0.00"],
        ["target c", "predicted c", "loss 3, probability 0.50"],
        ["target d", "predicted b", "loss 1, probability 0.00"],
    ]
    wrong, right, _ = (ax._left_title.get_color() for ax in fig.axes)
    assert wrong != right


def test_images_are_drawn_as_they_were_before_they_were_normalised():
    pixels = torch.tensor([[[0.1, 0.6]], [[0.2, 0.7]], [[0.3, 0.8]]])
    mean, std = [0.4, 0.5, 0.6], torch.tensor([0.1, 0.2, 0.3])
    normalised = (pixels - torch.tensor(mean).reshape(3, 1, 1)) / std.reshape(3, 1, 1)

    def drawn(image, **undo):
        return torch.as_tensor(plots.plot_worst([image], [0], [0], [1.0], **undo).axes[0].images[0].get_array())

    assert torch.allclose(drawn(normalised, mean=mean, std=std).float(), pixels.permute(1, 2, 0), atol=1e-6)
    assert drawn(torch.tensor([[0, 51, 255]], dtype=torch.uint8)).tolist()[0] == pytest.approx([0, 0.2, 1])
    assert drawn(torch.tensor([[-1.0, 0.0, 3.0]])).tolist()[0] == [0, 0.25, 1], "from the smallest to the largest value"
    with pytest.raises(ValueError, match=r"got \(5, 2, 2\): pass channels first"):
        drawn(torch.ones(5, 2, 2))
    with pytest.raises(ValueError, match="got 1 losses, 2 images"):
        plots.plot_worst([pixels, pixels], [0], [0], [1.0])


def test_images_stand_in_rows_with_coloured_texts():
    fig = plots.plot_images(torch.rand(5, 1, 4, 4), [f"image {i}" for i in range(5)], [True, False, None, True, False])
    assert [ax.get_title("left") for ax in fig.axes] == [f"image {i}" for i in range(5)]
    assert [ax.get_subplotspec().rowspan.start for ax in fig.axes] == [0, 0, 0, 1, 1]
    right, wrong, neither = (ax._left_title.get_color() for ax in fig.axes[:3])
    assert len({right, wrong, neither}) == 3
    assert plots.plot_images(torch.rand(2, 3, 4, 4)).axes[1].get_title("left") == ""


WALK = torch.randn(200, 20).div(9).cumsum(0).exp()
NAMES = [f"layers.{i}.weight" for i in range(20)]
BOXES = [
    {"x": 1.5, "y": y, "width": w, "height": h, "title": title, "detail": "16×64, 3 KiB saved", "kind": kind}
    for y, title, kind in ((3.0, "0 Conv2d", "module"), (2.0, "AddBackward0", "op"), (1.0, "MeanBackward0", "root"))
    for w, h in [plots.box_size(title, "16×64, 3 KiB saved")]
]
CURVES = {f"norm-{i}": (list(range(50)), [20 + i * s for s in range(50)]) for i in range(6)}
PICTURES = {
    "one epoch": lambda: plots.plot_run(torch.rand(500) + 1, torch.rand(500), history(1)),
    "one epoch, two steps": lambda: plots.plot_run([2.0, 1.0], [0.1, 0.1], history(1, valid=False)),
    "two epochs": lambda: plots.plot_run([2.0, 1.0], [0.1, 0.1], history(2)),
    "twenty epochs": lambda: plots.plot_run(torch.rand(7000) * 1e-3, torch.ones(7000), history(20)),
    "broken": lambda: plots.plot_run([2.0, 1e9, math.inf], [0.1] * 3, history(1)),
    "equal ends": lambda: plots.plot_history([{"epoch": i, "train_a": 1.0, "valid_a": 1.0} for i in range(3)]),
    "rates": lambda: plots.plot_lr_find(
        torch.logspace(-6, 1, 100), torch.rand(100) + 1, {"steepest": 0.1, "minimum": 0.09, "valley": 0.08}
    ),
    "map": lambda: plots.plot_magnitudes(WALK, NAMES, list(range(200)), "root mean square"),
    "lines": lambda: plots.plot_magnitude_lines(WALK, NAMES, list(range(200)), "root mean square"),
    "equal lines": lambda: plots.plot_magnitude_lines(torch.ones(9, 20), NAMES, list(range(9)), "rms"),
    "activations": lambda: plots.plot_activations(*history_of_activations(200, 9), NAMES[:9], list(range(200))),
    "explosion": lambda: plots.plot_activations(*[WALK[:, :8] ** 20] * 3, NAMES[:8], range(200)),
    "forty modules": lambda: plots.plot_activations(*history_of_activations(9, 40), 2 * NAMES, list(range(9))),
    "histograms": lambda: plots.plot_histograms(torch.rand(50, 6, 40), NAMES[:6], list(range(50)), (-5.0, 5.0)),
    "two histograms": lambda: plots.plot_histograms(torch.rand(50, 2, 40), NAMES[:2], list(range(50)), (-5.0, 5.0)),
    "comparison": lambda: plots.plot_comparison(comparison(1, 10), dashed=["norm-1", "norm-5"]),
    "three comparisons": lambda: plots.plot_comparison(comparison(3, 4)),
    "study": lambda: plots.plot_study(
        "Which norm is the best of these seven, and does it matter which one I take, if batches are small? " * 2,
        [(f"task {i}", "accuracy, %", up_to_32(lines)) for i, (_, lines) in enumerate(comparison(2, 7))],
        ours=["norm-2", "norm-3"],
        level=["norm-4"],
    ),
    "study of one size": lambda: plots.plot_study("Why?", [("t", "a, %", {"a": [POINT], "b": [POINT]})], ours=["b"]),
    "study of nothing": lambda: plots.plot_study("Which norm is the best?", [("task", "accuracy, %", {})]),
    "weights": lambda: plots.plot_weight_norms([(f"mnist, cnn, 50000 images, batch size {i}", CURVES) for i in (2, 8)]),
    "two classes": lambda: plots.plot_confusion([[9, 1], [0, 0]], ["a class with a long name", "dog"]),
    "21 classes": lambda: plots.plot_confusion(torch.randint(9, (21, 21)), [f"class {i}" for i in range(21)]),
    "worst": lambda: plots.plot_worst(
        torch.rand(5, 1, 8, 8),
        [0, 1, 0, 1, 1],
        [0] * 5,
        torch.rand(5),
        torch.rand(5),
        ["dog", "a long name of a class of mine"],
    ),
    "images": lambda: plots.plot_images(torch.rand(3, 3, 8, 8), ["M, " * 20 + "\nsecond line"] * 3),
    "graph": lambda: plots.plot_graph(BOXES, [[(1.5, 2.8), (1.5, 2.2)], [(1.5, 1.8), (1.5, 1.2)]]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_texts_are_large_enough_inside_the_picture_and_not_on_one_another_nor_on_data(name):
    fig = PICTURES[name]()
    png(fig)
    found = texts(fig)
    assert len(found) > 2
    for text, box in found:
        assert text.get_fontsize() >= 8, text
        assert fig.bbox.x0 - 1 <= box.x0 and box.x1 <= fig.bbox.x1 + 1, text
        assert fig.bbox.y0 - 1 <= box.y0 and box.y1 <= fig.bbox.y1 + 1, text
    for (a, box), (b, other) in itertools.combinations(found, 2):
        assert not box.padded(-1).overlaps(other.padded(-1)), (a, b)
    for legend in fig.legends if name != "graph" else []:
        assert not any(legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in fig.axes)
    assert not any(ax.get_legend() for ax in fig.axes)


@pytest.mark.parametrize("module", ["figure", "training", "diagnose", "compare", "study", "graph", "predictions"])
def test_the_examples_of_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch}
    found = doctest.testmod(getattr(plots, module), extraglobs=names)
    assert found.failed == 0 and found.attempted > 0


def test_a_plain_interpreter_is_no_notebook():
    assert plots.in_notebook() is False
