"""Pictures: what they show, that they work on what training really leaves, and that no window or backend is touched."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrbn import plots
from fastrbn.callbacks import ActivationStats, LR_Find, ParamMagnitudes, Recorder


def png(fig):
    out = io.BytesIO()
    fig.savefig(out, format="png")
    data = out.getvalue()
    assert data.startswith(b"\x89PNG")
    return data


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


@pytest.mark.parametrize(("losses", "scale"), [([100.0, 1.0], "log"), ([2.0, 1.0], "linear"), ([100.0, -1.0], "linear")])
def test_the_loss_axis_is_logarithmic_where_losses_span_decades(losses, scale):
    assert plots.plot_loss(losses).axes[0].get_yscale() == scale


def test_the_search_for_a_rate_has_a_logarithmic_axis_and_its_mark():
    lrs, losses = [10.0**i for i in range(-6, 1)], [2.0, 2.0, 1.9, 1.5, 1.0, 5.0, 1e9]
    (ax,) = plots.plot_lr_find(lrs, losses, suggestion=1e-3).axes
    assert ax.get_xscale() == "log"
    assert ax.lines[1].get_xdata()[0] == 1e-3
    assert ax.get_ylim()[1] < 20, "the explosion hides the curve"
    assert ax.get_xlabel() == "learning rate"


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
    png(fig)
    png(plots.plot_run([], [], history(1)))


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


def test_what_broke_is_red_in_the_map_and_what_was_never_there_is_not():
    values = torch.ones(6, 3)
    values[4:, 0], values[:3, 1], values[5, 2] = math.nan, math.nan, 0.0
    fig = plots.plot_magnitudes(values, ["a", "b", "c"], list(range(6)))
    ax, _ = fig.axes
    red = ax.images[1].get_array()[..., 3]
    assert red.tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6, [0] * 6]
    assert "NaN" in ax.get_title(loc="right")
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
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "rms")
    (legend,) = fig.legends
    texts = [t.get_text() for t in legend.get_texts()]
    assert len(texts) == 10
    assert {"p3", "p7"} <= set(texts)
    assert "4 more" in legend.get_title().get_text()
    (cross,) = [line for line in ax.lines if line.get_marker() == "X"]
    assert cross.get_xdata()[0] == 11
    png(fig)


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
    fig = plots.plot_histograms(torch.rand(10, 3, 40) * 100, names, steps, (-5.0, 5.0))
    assert [ax.get_title() for ax in fig.axes] == names
    assert fig.axes[0].images[0].get_extent() == [-0.5, 9.5, -5.0, 5.0]
    assert fig.axes[0].images[0].get_array().shape == (40, 10)
    png(fig)


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
    monkeypatch.setattr(plots, "in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    fig = plots.plot_loss([1.0, 2.0])
    assert plt.get_fignums() != [], "the end of the cell would not show it"
    fig._ipython_display_()  # as the cell's value
    assert plt.get_fignums() == [], "the end of the cell would show it again"
    assert [type(s).__name__ for s in shown] == ["Image"]
    fig._ipython_display_()  # and it can be shown again
    assert len(shown) == 2


def test_a_plain_interpreter_is_no_notebook():
    assert plots.in_notebook() is False
