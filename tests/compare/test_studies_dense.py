"""Dense prediction of `fastrbn.compare`: what canvases and inpainted images are made of, and how they are scored."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.compare import get_norm, get_task, task_data, task_nets, tasks
from fastrbn.data.image_data import ImageData
from fastrbn.data.sets import Dataset


@pytest.fixture(autouse=True)
def images(monkeypatch):
    """Squares of ink in place of digits, two pixels larger with each class, and noise in place of photographs."""
    y, axis = torch.arange(40) % 10, (torch.arange(28) - 13.5).abs()
    side = axis < 4 + y[:, None]
    squares = Dataset((side[:, None, :, None] & side[:, None, None]).to(torch.uint8) * 255, y)
    noise = torch.randint(256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sets = {"mnist": squares, "cifar10": Dataset(noise, y)}
    classes = tuple("0123456789")
    monkeypatch.setattr(task_data, "_images", lambda name, root=None: ImageData(name, sets[name], sets[name], classes))


def test_canvases_are_the_same_every_time_and_differ_between_training_and_validation():
    first, again = (task_data.canvases(n=8, n_valid=8, cells=3, cell=8) for _ in range(2))
    assert all(map(torch.equal, first, again))
    x, y, valid_x, valid_y = first
    assert x.shape == (8, 1, 24, 24) and y.shape == (8, 24, 24) and y.dtype == torch.int64
    assert x.mean().abs() < 1e-5 and x.std().sub(1).abs() < 1e-5
    assert not torch.equal(y, valid_y) and not torch.equal(x, valid_x)


def test_labelled_pixels_are_ink_of_a_digit_of_that_class():
    x, y, *_ = task_data.canvases(n=60, n_valid=4)
    assert y.min() == 0 and set(y.unique().tolist()) == set(range(11))
    assert x[:, 0][y > 0].mean() > x[:, 0][y == 0].mean() + 1
    pixels = [(y == c).sum((1, 2)).float() for c in (1, 10)]
    small, large = (p[p > 0].mean() for p in pixels)
    assert 2 * small < large, "a larger square has more pixels"
    quarters = [(y[:, a : a + 14, b : b + 14] > 0).flatten(1).any(1).float().mean() for a in (0, 14) for b in (0, 14)]
    assert all(0.6 < q < 1 for q in quarters), "8 in 10 places have a digit"


def test_the_middle_of_an_image_is_erased_and_becomes_the_target():
    whole, _, whole_valid, _ = task_data.cifar(n=8, n_valid=6)
    x, y, valid_x, valid_y = task_data.inpainting(n=8, n_valid=6)
    for image, erased, middle in ((whole, x, y), (whole_valid, valid_x, valid_y)):
        assert torch.equal(middle, image[:, :, 10:22, 10:22]) and not erased[:, :, 10:22, 10:22].any()
        put_back = erased.clone()
        put_back[:, :, 10:22, 10:22] = middle
        assert torch.equal(put_back, image)


def test_a_perfect_labelling_scores_100_and_a_blind_one_is_at_the_bounds():
    y = torch.zeros(2, 10, 10, dtype=torch.int64)
    y[:, 0] = torch.arange(10) + 1
    goal = tasks.LABEL_PIXELS
    perfect, blind = F.one_hot(y, 11).movedim(-1, 1).float(), F.one_hot(y * 0, 11).movedim(-1, 1).float()
    assert goal.score(perfect, y) == 100
    assert goal.score(blind, y).item() == pytest.approx(90 / 11), "only the background overlaps"
    one_wrong = perfect.clone()
    one_wrong[0, :, 0, 0] = blind[0, :, 0, 0]  # class 1 loses one of its two pixels to the background
    assert goal.score(one_wrong, y).item() == pytest.approx((180 / 181 + 1 / 2 + 9) * 100 / 11)
    # the loss of the best constant prediction, with a fifth of the weight for the background
    shares = torch.tensor([0.2 * 90, *[1.0] * 10]) / 28
    constant = shares.log().view(1, 11, 1, 1).expand(2, 11, 10, 10)
    score, loss = goal.blind(y)
    assert score == pytest.approx(2 * 90 / 11) and loss == pytest.approx(0.9 * goal.loss(constant, y).item())
    assert math.isfinite(goal.score(perfect * torch.nan, y))


@pytest.mark.parametrize("levels", [2, 4])
def test_a_u_net_keeps_the_size_and_has_levels_widths_and_a_norm_after_each_convolution(levels):
    net = task_nets.EncoderDecoder(get_norm("batchnorm"), 4, levels, ni=2, outputs=3)
    assert net(torch.randn(2, 2, 16, 24)).shape == (2, 3, 16, 24)
    assert [down[0][0].out_channels for down in net.down] == [4, 8, 12, 16][:levels]
    kinds = [type(m) for m in net.modules()]
    assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.Conv2d) - 1 == 3 * levels - 1
    assert task_nets.EncoderDecoder(get_norm("batchnorm"), 4, levels)(torch.randn(2, 1, 8, 8)).shape == (2, 8, 8)


def test_a_u_nets_finest_features_reach_the_output_past_the_coarser_levels():
    net = task_nets.EncoderDecoder(get_norm("none"), 4, 3, outputs=2)
    before = net(x := torch.randn(1, 1, 16, 16))
    with torch.no_grad():
        for down in net.down[1:]:
            down[0][0].weight.zero_()
    assert not torch.equal(net(x), before) and net(x).std() > 0
    assert task_nets.Middle(2)(torch.arange(36).view(1, 1, 6, 6)).flatten().tolist() == [14, 15, 20, 21]


@pytest.mark.parametrize("name", ["canvases", "inpainting"])
def test_the_full_length_has_the_same_goal_and_rule_with_more_of_everything(name):
    short, full = get_task(name), get_task(f"{name}-full")
    assert full.goal is short.goal and str(full) == str(short) and full.lr(2) == short.lr(2)
    assert all(full.n_steps(bs) > 10 * short.n_steps(bs) for bs in (1, 2, 8))
    size = [sum(p.numel() for p in task.net(get_norm("batchnorm")).parameters()) for task in (short, full)]
    assert size[1] > 3 * size[0]
