"""show_batch, show_results, show_worst: what stands above which image."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastrbn import show_batch, show_results, show_worst
from fastrbn.callbacks import BatchTransformXCallback
from fastrbn.data import DataBunch, Dataset, ImageData, get_dls, image_databunch
from fastrbn.learn import Learner, Runner

NAMES = ("dark", "grey", "light")
LEVELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 2])


def images(levels=LEVELS):
    return (levels * 100).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 6, 6).contiguous()


class Level(nn.Module):
    """Classes by brightness; of a normalised batch if it is given mean and standard deviation."""

    def __init__(self, mean=0.0, std=1.0):
        super().__init__()
        self.w, self.mean, self.std = nn.Parameter(torch.ones(())), mean, std

    def forward(self, x):
        level = (x.flatten(1).mean(1) * self.std + self.mean) * 2.55
        return -5 * self.w * (level[:, None] - torch.arange(3.0)).abs()


def make_learn(model, data, loss_func=F.cross_entropy):
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_func, data)


@pytest.fixture
def learn():
    wrong = LEVELS.clone()
    wrong[2] = 0
    data = image_databunch(ImageData("levels", Dataset(images(), LEVELS), Dataset(images(), wrong), NAMES), 4)
    return make_learn(Level(data.valid_dl.normalize[0][0], data.valid_dl.normalize[1][0]), data)


def titles(fig):
    return [ax.get_title("left") for ax in fig.axes]


def colors(fig):
    return [ax._left_title.get_color() for ax in fig.axes]


def brightness(fig):
    return [round(float(ax.images[0].get_array().mean()) * 255) for ax in fig.axes]


def test_show_batch_draws_the_first_batch_without_normalisation_and_leaves_the_loader_alone(learn):
    state = torch.get_rng_state()
    for given in (learn.data, learn):
        fig = show_batch(given, n=3)
        assert [NAMES[round(b / 100)] for b in brightness(fig)] == titles(fig)
    xb, yb = next(iter(learn.data.train_dl))  # still the first batch
    assert titles(fig) == [NAMES[i] for i in yb[:3]]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(show_batch(learn).axes) == 4


def test_show_results_spreads_over_the_validation_set_and_marks_errors(learn):
    fig = show_results(Runner(), n=4, learn=learn)
    assert titles(fig) == [
        f"target {t}\npredicted {p}" for t, p in [("dark", "dark"), ("dark", "light"), *[("grey",) * 2, ("dark",) * 2]]
    ]
    assert brightness(fig) == [0, 200, 100, 0]
    right, wrong = colors(fig)[:2]
    assert right != wrong and colors(fig) == [right, wrong, right, right]


def test_show_results_of_given_data_draws_the_first_also_without_targets(learn):
    fig = show_results(Runner(), n=2, data=images(torch.tensor([2, 1, 0])), learn=learn)
    assert titles(fig) == ["predicted light", "predicted grey"]
    loader = DataLoader(TensorDataset(next(iter(learn.data.valid_dl))[0], LEVELS), 3)
    assert titles(show_results(Runner(), 5, loader, learn))[4] == "target grey\npredicted grey"


def test_show_worst_finds_the_highest_loss_over_all_batches(learn):
    fig = show_worst(Runner(), n=2, learn=learn)
    assert titles(fig)[0] == "target dark\npredicted light\nloss 10, probability 0.99"
    assert brightness(fig)[0] == 200 and len(fig.axes) == 2


def test_images_are_drawn_as_callbacks_reshape_them(learn):
    flat = images().flatten(1).float() / 255
    data = DataBunch(*get_dls(Dataset(flat, LEVELS), Dataset(flat, LEVELS), 4))
    run, learn = Runner([BatchTransformXCallback(lambda xb: xb.view(-1, 1, 4, 9))]), make_learn(Level(), data)
    assert show_results(run, 1, learn=learn).axes[0].images[0].get_array().shape == (4, 9)
    assert show_batch(data).axes[0].images[0].get_array().shape == (6, 6)  # flat and square
    data.train_dl = [(torch.randn(2, 7), LEVELS[:2])]
    with pytest.raises(ValueError, match=r"images with 1 or 3 channels, .*got shape \(2, 7\)"):
        show_batch(data)


@pytest.mark.parametrize(
    ("outputs", "targets", "texts"),
    [
        ([[0.3], [-2.0]], [[1.0], [1.0]], ["target grey\npredicted grey", "target grey\npredicted dark"]),
        ([0.25, 2.0], [0.5, 2.0], ["target 0.5\npredicted 0.25", "target 2\npredicted 2"]),
        (
            [[3.0, -3, 3], [-1, -1, -1]],
            [[1.0, 0, 1], [0, 1, 0]],
            ["target dark, light\npredicted dark, light", "target grey\npredicted none"],
        ),
        (
            [[0.5, 2.0], [1, 1]],
            [[0.5, 2.5], [1, 1]],
            ["target 0.5, 2.5\npredicted 0.5, 2", "target 1, 1\npredicted 1, 1"],
        ),
    ],
    ids=["two classes", "regression", "several labels", "vectors"],
)
def test_targets_and_predictions_of_other_kinds(outputs, targets, texts):
    class Fixed(nn.Linear):
        def forward(self, x):
            return torch.tensor(outputs)[: len(x)]

    data = DataBunch(None, [(torch.rand(2, 3, 5, 5), torch.tensor(targets))], c_in=3, classes=NAMES)
    learn = make_learn(Fixed(1, 1), data, F.mse_loss)
    fig, worst = show_results(Runner(), learn=learn), show_worst(Runner(), learn=learn)
    assert titles(fig) == texts
    assert {text.partition("\nloss")[0] for text in titles(worst)} == set(texts)
    assert set(colors(fig)) == set(colors(worst))


def test_a_model_that_returns_its_loss_beside_its_scores_is_shown_over_all_batches():
    class Own(Level):
        def forward(self, image):
            return {"loss": self.w.sum(), "scores": super().forward(image)}

    x = images().float() / 255
    data = DataBunch(None, [{"image": part} for part in x.split(3)])
    assert len(titles(show_results(Runner(), learn=make_learn(Own(), data, None)))) == len(x)


def test_masks_have_the_share_of_pixels_that_are_right_and_no_colour():
    class Fixed(nn.Linear):
        def forward(self, x):
            return torch.stack([torch.zeros(2, 4, 4), x.mean(1) - 0.5], 1)

    x, masks = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    masks[1, 0] = 1
    learn = make_learn(Fixed(1, 1), DataBunch(None, [(x, masks)], c_in=3))
    fig, worst = show_results(Runner(), learn=learn), show_worst(Runner(), learn=learn)
    assert titles(fig) == ["100 % of pixels right", "75 % of pixels right"]
    assert titles(worst)[0] == "75 % of pixels right\nloss 0.599"
    assert colors(fig) == colors(worst) == ["black", "black"]


def test_what_cannot_be_shown_is_refused(learn):
    batches = iter([(torch.rand(2, 1, 4, 4), LEVELS[:2])])
    with pytest.raises(ValueError, match="is an iterator"):
        show_batch(SimpleNamespace(train_dl=batches))
    with pytest.raises(ValueError, match="the training loader gives none"):
        show_batch(SimpleNamespace(train_dl=[]))
    with pytest.raises(ValueError, match="n must be a whole number, 1 or more; got 0"):
        show_results(Runner(), 0, learn=learn)
    with pytest.raises(TypeError, match=r"need the run .* got Learner: write show_results\(run\)"):
        show_worst(learn)
    with pytest.raises(TypeError, match="has not trained yet"):
        show_worst(Runner())
    with pytest.raises(ValueError, match="losses need targets"):
        show_worst(Runner(), data=images(), learn=learn)
