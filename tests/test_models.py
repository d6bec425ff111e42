"""Layer builders and nets: their parts, shapes, and messages for wrong arguments."""

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn import models
from fastrbn.models import (
    GeneralRelu,
    Lambda,
    Residual,
    conv_bn,
    conv_gn,
    conv_layer,
    conv_rbn,
    flatten,
    get_cnn_layers,
    get_cnn_model,
    init_cnn,
    make_norm,
    resnet9,
)
from fastrbn.norm import RunningBatchNorm

DATA = SimpleNamespace(c=10)
NORM_TYPES = {"batch": nn.BatchNorm2d, "running": RunningBatchNorm, "group": nn.GroupNorm}


# the small modules


def test_flatten_keeps_the_batch_and_joins_the_rest():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert torch.equal(flatten(x), torch.arange(24.0).reshape(2, 12))
    assert flatten(torch.zeros(0, 3, 2, 2)).shape == (0, 12)
    assert flatten(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)).shape == (2, 48)


def test_lambda_applies_its_function_and_names_it():
    module = Lambda(flatten)
    assert module(torch.zeros(2, 3, 4)).shape == (2, 12)
    assert repr(module) == "Lambda(flatten)"


def test_lambda_of_a_named_function_survives_pickle():
    assert pickle.loads(pickle.dumps(Lambda(flatten))).func is flatten


def test_lambda_of_a_lambda_deep_copies_but_says_why_it_cannot_be_pickled():
    module = Lambda(lambda x: x + 1)
    twin = copy.deepcopy(nn.Sequential(module))
    assert torch.equal(twin(torch.zeros(1)), torch.ones(1))
    with pytest.raises(pickle.PicklingError, match="def at the top level.*state_dict"):
        pickle.dumps(module)


def test_lambda_copies_keep_hooks_and_mode():
    module = Lambda(flatten).eval()
    module.register_forward_hook(copy_of_output)
    twin = copy.deepcopy(module)
    assert not twin.training and len(twin._forward_hooks) == 1
    assert twin._forward_hooks is not module._forward_hooks


def copy_of_output(module, args, out):
    return out.clone()


def test_lambda_refuses_what_is_not_callable():
    with pytest.raises(TypeError, match="got 3 of type int"):
        Lambda(3)


@pytest.mark.parametrize(
    "knobs, expected",
    [
        ({}, [0, 0, 0, 1, 8]),
        ({"leak": 0.1}, [-0.8, -0.1, 0, 1, 8]),
        ({"sub": 0.5}, [-0.5, -0.5, -0.5, 0.5, 7.5]),
        ({"maxv": 6.0}, [0, 0, 0, 1, 6]),
        ({"leak": 0.1, "sub": 0.5, "maxv": 6.0}, [-1.3, -0.6, -0.5, 0.5, 6]),
        ({"leak": 0.0, "sub": 0.0, "maxv": 0.0}, [0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_general_relu_leaks_then_subtracts_then_caps(knobs, expected):
    x = torch.tensor([-8.0, -1, 0, 1, 8])
    kept = x.clone()
    torch.testing.assert_close(GeneralRelu(**knobs)(x), torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(x, kept), "the input was overwritten"


@pytest.mark.parametrize("knobs", [{"sub": 0.4}, {"leak": 0.1, "sub": 0.4, "maxv": 6.0}], ids=str)
def test_general_relu_has_the_right_gradient(knobs):
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0, 9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GeneralRelu(**knobs), x)


def test_general_relu_shows_the_knobs_that_are_set():
    assert repr(GeneralRelu(leak=0.1, maxv=6)) == "GeneralRelu(leak=0.1, maxv=6)"


# one layer


@pytest.mark.parametrize("norm", NORM_TYPES)
def test_a_layer_is_convolution_without_bias_then_relu_then_norm(norm):
    conv, relu, made = conv_layer(3, 16, ks=5, stride=1, norm=norm, leak=0.1)
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride) == (3, 16, (5, 5), (1, 1))
    assert conv.padding == (2, 2) and conv.bias is None
    assert type(relu) is GeneralRelu and relu.leak == 0.1
    assert type(made) is NORM_TYPES[norm]


@pytest.mark.parametrize("build", [conv_layer, conv_rbn, conv_bn, conv_gn])
def test_bn_false_leaves_the_norm_out_and_gives_the_convolution_a_bias(build):
    conv, relu = build(3, 16, bn=False, sub=0.4)
    assert conv.bias is not None and relu.sub == 0.4


def test_norm_none_by_name_is_the_same_as_bn_false():
    assert len(conv_layer(3, 16, norm="none")) == 2


def test_bn_false_with_a_norm_is_refused():
    with pytest.raises(ValueError, match="bn=False.*norm='running'"):
        conv_layer(3, 16, bn=False, norm="running")


@pytest.mark.parametrize(
    "build, kind", [(conv_layer, nn.BatchNorm2d), (conv_bn, nn.BatchNorm2d), (conv_gn, nn.GroupNorm)]
)
def test_each_builder_has_the_norm_of_its_name(build, kind):
    assert type(build(3, 16)[2]) is kind


def test_conv_rbn_passes_recipe_and_momentum_to_the_norm():
    course = conv_rbn(3, 16, recipe="course", mom=0.2)[2]
    assert type(course) is RunningBatchNorm
    assert repr(course) == repr(RunningBatchNorm(16, mom=0.2, recipe="course"))
    assert repr(course) != repr(RunningBatchNorm(16)), "the representation must show the recipe for this test to work"
    assert repr(partial(conv_rbn, recipe="course", mom=0.2)(3, 16)[2]) == repr(course)


@pytest.mark.parametrize(
    "nf, groups", [(1, 1), (4, 4), (8, 8), (64, 8), (12, 6), (10, 5), (7, 7), (11, 1), (9, 3)], ids=str
)
def test_group_norm_takes_eight_groups_or_the_largest_divisor_below(nf, groups):
    assert make_norm("group", nf).num_groups == groups


def test_group_norm_takes_another_number_of_groups_and_refuses_zero():
    assert conv_gn(3, 16, groups=4)[2].num_groups == 4
    with pytest.raises(ValueError, match="groups must be a whole number, 1 or more; got 0"):
        conv_gn(3, 16, groups=0)


def test_norm_takes_a_callable():
    made = conv_layer(3, 16, norm=lambda nf: nn.InstanceNorm2d(nf, affine=True))[2]
    assert type(made) is nn.InstanceNorm2d and made.num_features == 16
    assert type(conv_layer(3, 16, norm=nn.BatchNorm2d, momentum=0.3)[2]) is nn.BatchNorm2d
    assert conv_layer(3, 16, norm=lambda nf: None)[0].bias is not None


def test_a_misspelt_norm_is_refused_with_the_closest_name():
    with pytest.raises(ValueError, match="batch, running, group, none.*got 'runing'. Did you mean 'running'?"):
        conv_layer(3, 16, norm="runing")


def test_a_norm_instance_is_refused():
    with pytest.raises(TypeError, match="a BatchNorm2d instance, which cannot serve several layers"):
        conv_layer(3, 16, norm=nn.BatchNorm2d(16))


def test_a_callable_that_makes_no_module_is_refused():
    with pytest.raises(TypeError, match="for nf=16 it returned 3"):
        conv_layer(3, 16, norm=lambda nf: 3)


@pytest.mark.parametrize(
    "build, kwargs, words",
    [
        (conv_rbn, {"recepie": "course"}, "got 'recepie'. Did you mean 'recipe'?"),
        (conv_bn, {"lek": 0.1}, "GeneralRelu leak, sub, maxv.*got 'lek'. Did you mean 'leak'?"),
        (conv_bn, {"recipe": "course"}, "norm 'batch' takes eps.*got 'recipe'"),
        (partial(conv_layer, norm="none"), {"eps": 1.0}, "norm 'none' takes no arguments.*got 'eps'"),
    ],
    ids=["running", "relu", "batch", "none"],
)
def test_an_unknown_keyword_is_refused_with_the_known_ones(build, kwargs, words):
    with pytest.raises(TypeError, match=words):
        build(3, 16, **kwargs)


# the course's net


def test_the_cnn_has_a_first_kernel_of_five_then_threes_and_ends_in_classes():
    layers = get_cnn_layers(DATA, [8, 16, 32], conv_bn)
    assert isinstance(layers, list)
    convs = [layer[0] for layer in layers[:3]]
    assert [c.kernel_size[0] for c in convs] == [5, 3, 3]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(1, 8), (8, 16), (16, 32)]
    assert all(c.stride == (2, 2) for c in convs)
    assert [type(m) for m in layers[3:]] == [nn.AdaptiveAvgPool2d, Lambda, nn.Linear]
    assert (layers[-1].in_features, layers[-1].out_features) == (32, 10)


@pytest.mark.parametrize("norm", [*NORM_TYPES, "none"])
def test_the_cnn_maps_images_to_classes_and_every_parameter_gets_a_gradient(norm):
    model = get_cnn_model(DATA, [8, 16, 32, 64, 64], conv_layer, norm=norm)
    init_cnn(model)
    out = model(torch.randn(4, 1, 28, 28))
    assert out.shape == (4, 10)
    F.cross_entropy(out, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(bool(p.grad.any()) for p in model.parameters()) == len(list(model.parameters()))


def test_the_cnn_does_not_change_the_callers_sizes_and_takes_any_sequence():
    nfs = [8, 16]
    get_cnn_layers(DATA, nfs, conv_bn)
    assert nfs == [8, 16]
    assert len(get_cnn_layers(DATA, (8, np.int64(16)), conv_bn)) == 5


def test_the_cnn_takes_its_input_channels_from_the_data():
    data = SimpleNamespace(c=torch.tensor(7), c_in=3)
    model = get_cnn_model(data, [8], conv_rbn)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    assert get_cnn_layers(SimpleNamespace(c=7, c_in=None), [8], conv_rbn)[0][0].in_channels == 1


def test_keywords_reach_each_layer_of_the_cnn():
    layers = get_cnn_layers(DATA, [8, 16], conv_rbn, leak=0.1, recipe="detached")
    assert [layer[1].leak for layer in layers[:2]] == [0.1, 0.1]
    assert [repr(layer[2]) for layer in layers[:2]] == [repr(RunningBatchNorm(n, recipe="detached")) for n in (8, 16)]


@pytest.mark.parametrize("norm", [*NORM_TYPES, "none"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_trained_cnn_copies_and_pickles(norm, again):
    model = get_cnn_model(DATA, [8, 16], conv_layer, norm=norm)
    F.cross_entropy(model(torch.randn(4, 1, 12, 12)), torch.arange(4)).backward()
    twin, x = again(model).eval(), torch.randn(3, 1, 12, 12)
    assert torch.equal(twin(x), model.eval()(x))


@pytest.mark.parametrize(
    "nfs, error, words",
    [
        ("8,16", TypeError, "such as .*got '8,16'"),
        (8, TypeError, "got 8"),
        ([], ValueError, "at least one; got none"),
        ([8, 0], ValueError, "1 or more; got 0"),
        ([8, 16.0], ValueError, "whole number, 1 or more; got 16.0"),
        ([True], ValueError, "got True"),
    ],
    ids=["text", "number", "empty", "zero", "float", "bool"],
)
def test_invalid_channel_counts_are_refused(nfs, error, words):
    with pytest.raises(error, match=words):
        get_cnn_model(DATA, nfs, conv_rbn)


@pytest.mark.parametrize("layer", ["conv_rbn", None, conv_rbn(1, 8)], ids=["name", "none", "made"])
def test_a_layer_that_is_not_a_function_is_refused(layer):
    with pytest.raises(TypeError, match="layer must be a function .*unquoted and not called"):
        get_cnn_model(DATA, [8], layer)


@pytest.mark.parametrize("c", [None, 0, 2.5, "10"], ids=str)
def test_data_without_a_number_of_classes_is_refused(c):
    with pytest.raises(ValueError, match="data.c, the number of classes, .*DataBunch.*must be a whole number"):
        get_cnn_model(SimpleNamespace(c=c), [8], conv_rbn)
    with pytest.raises(ValueError, match="data.c_in"):
        get_cnn_model(SimpleNamespace(c=10, c_in=0), [8], conv_rbn)


# initialisation


@pytest.mark.parametrize("uniform", [False, True], ids=["normal", "uniform"])
def test_init_cnn_reaches_nested_convolutions_of_any_rank_and_clears_biases(uniform):
    inner = nn.Sequential(nn.Conv1d(64, 64, 5), nn.Sequential(nn.Conv3d(16, 16, 3), nn.ConvTranspose2d(32, 32, 5)))
    linear = nn.Linear(4, 4)
    kept = linear.weight.clone(), linear.bias.clone()
    init_cnn(nn.Sequential(nn.Conv2d(32, 64, 5), inner, linear), uniform=uniform)
    convs = [inner[0], inner[1][0], inner[1][1]]
    for conv in convs:
        fan_in = conv.weight[0].numel()
        std = (2 / (1 + 0.1**2) / fan_in) ** 0.5  # Kaiming: He et al. 2015, eq. 15
        assert conv.weight.std().item() == pytest.approx(std, rel=0.05)
        largest = conv.weight.abs().max().item() / std
        assert largest <= 3**0.5 + 1e-6 if uniform else largest > 3, "a uniform draw ends at √3 standard deviations"
        assert not conv.bias.any()
    assert torch.equal(linear.weight, kept[0]) and torch.equal(linear.bias, kept[1])


# the CIFAR net


def test_residual_adds_its_input():
    x = torch.randn(2, 3)
    assert torch.equal(Residual(nn.Identity(), Lambda(torch.neg))(x), torch.zeros(2, 3))


@pytest.mark.parametrize("norm", [*NORM_TYPES, "none"])
@pytest.mark.parametrize("size", [8, 32])
def test_resnet9_maps_images_to_classes_with_every_norm(norm, size):
    model = resnet9(width=8, norm=norm)
    out = model(torch.randn(2, 3, size, size))
    assert out.shape == (2, 10)
    F.cross_entropy(out, torch.arange(2)).backward()
    assert all(p.grad is not None for p in model.parameters())
    kinds = [type(m) for m in model.modules() if type(m) in NORM_TYPES.values()]
    assert kinds == ([] if norm == "none" else [NORM_TYPES[norm]] * 8)


def test_resnet9_has_the_usual_size():
    model = resnet9(norm="batch")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(6.57e6, rel=0.002)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) + 1 == 9, "eight convolutions and a linear layer"


def test_resnet9_orders_convolution_norm_relu_and_adds_around_two_of_them():
    first, residual = resnet9(width=8).layer1
    assert [type(m) for m in first] == [nn.Conv2d, RunningBatchNorm, nn.ReLU, nn.MaxPool2d]
    x = torch.randn(2, 16, 8, 8)
    residual.eval()
    torch.testing.assert_close(residual(x) - x, residual[1](residual[0](x)))


def test_resnet9_passes_keywords_to_its_norms_and_copies():
    model = resnet9(c_in=1, c_out=4, width=8, recipe="course")
    assert repr(model.prep[1]) == repr(RunningBatchNorm(8, recipe="course"))
    twin, x = pickle.loads(pickle.dumps(copy.deepcopy(model))).eval(), torch.randn(2, 1, 28, 28)
    assert twin(x).shape == (2, 4) and torch.equal(twin(x), model.eval()(x))


def test_resnet9_refuses_an_invalid_width_and_a_misspelt_norm():
    with pytest.raises(ValueError, match="width must be a whole number, 1 or more; got 0"):
        resnet9(width=0)
    with pytest.raises(ValueError, match="Did you mean 'group'?"):
        resnet9(norm="grup")


def test_every_public_name_of_models_has_a_docstring():
    assert [n for n in models.__all__ if not (getattr(models, n).__doc__ or "").strip()] == []
