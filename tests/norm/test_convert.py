"""Model surgery on torchvision's nets: to running batch norm and back, and folded into what comes before."""

import copy
import gc
import inspect
import warnings

import pytest
import torch
import torchvision
from checks import relative_error
from norm.steps import layer_of, step
from torch import nn
from torch.nn.utils import parametrize, prune

from fastrbn.norm import (
    RunningBatchNorm,
    RunningBatchNorm1d,
    RunningBatchNorm2d,
    RunningBatchNorm3d,
    convert_batchnorm,
    fuse_conv_rbn,
    to_batchnorm,
)

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# name: (builder, input shape, number of norms, how many of them directly follow a convolution)
NETS = {
    "resnet18": (torchvision.models.resnet18, (2, 3, 40, 40), 20, 20),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, (2, 3, 40, 40), 34, 34),
    "densenet121": (torchvision.models.densenet121, (2, 3, 40, 40), 121, 59),  # norm, ReLU, convolution: half remain
    "efficientnet_b0": (torchvision.models.efficientnet_b0, (2, 3, 40, 40), 49, 49),
    "r3d_18": (torchvision.models.video.r3d_18, (2, 3, 4, 24, 24), 20, 20),
}


def norms(model, kinds=RunningBatchNorm):
    return [m for m in model.modules() if isinstance(m, kinds)]


def randomize(model):
    """Weights and statistics such as training leaves them, with activations of size 1 or so."""
    g = torch.Generator().manual_seed(0)
    for m in norms(model, BATCHNORMS):
        m.running_mean.normal_(0, 0.3, generator=g)
        m.running_var.uniform_(0.5, 2, generator=g)
        m.num_batches_tracked.fill_(9)
        m.weight.data.uniform_(0.5, 1.5, generator=g)
        m.bias.data.normal_(0, 0.3, generator=g)
    return model.eval()


@pytest.fixture(scope="module", params=NETS)
def net(request):
    torch.manual_seed(0)
    build, shape, count, foldable = NETS[request.param]
    with torch.no_grad():
        model = randomize(build(weights=None))
        x = torch.randn(shape)
        return model, x, model(x), count, foldable


def test_evaluation_is_bit_for_bit_the_same_there_and_back(net):
    model, x, want, count, _ = net
    ours = convert_batchnorm(copy.deepcopy(model))
    assert len(norms(ours)) == count and not norms(ours, BATCHNORMS)
    with torch.no_grad():
        assert torch.equal(ours(x), want)
        back = to_batchnorm(ours)
        assert len(norms(back, BATCHNORMS)) == count and not norms(back)
        assert torch.equal(back(x), want)
    assert {type(m) for m in norms(back, BATCHNORMS)} == {type(m) for m in norms(model, BATCHNORMS)}
    assert back.state_dict().keys() == model.state_dict().keys()


def test_a_converted_net_trains_on_one_image(net):
    model, x, *_ = net
    ours = convert_batchnorm(copy.deepcopy(model)).train()
    opt = torch.optim.SGD(ours.parameters(), 1e-3)
    for i in range(2):
        opt.zero_grad()
        ours(x[i : i + 1]).backward(torch.randn(1, 1000 if x.dim() == 4 else 400))
        assert all(p.grad.isfinite().all() for p in ours.parameters())
        opt.step()
    assert all(m.num_batches_tracked == 11 and m.running_grad.any() for m in norms(ours))


def test_folding_keeps_the_outputs_and_removes_what_follows_a_convolution(net):
    model, x, want, count, foldable = net
    ours = convert_batchnorm(copy.deepcopy(model))
    before = copy.deepcopy(ours.state_dict())
    fused = fuse_conv_rbn(ours)
    assert len(norms(fused)) == count - foldable and len(norms(ours)) == count
    with torch.no_grad():
        assert relative_error(fused(x), want) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_an_existing_optimiser_keeps_its_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    model.requires_grad_()[1].bias.requires_grad_(False)
    params = list(model.parameters())
    convert_batchnorm(model)
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    before = model[1].weight.clone()
    model(torch.randn(5, 3)).backward(torch.randn(5, 1))
    opt.step()
    assert not torch.equal(model[1].weight, before) and model[1].bias.grad is None


def test_eps_momentum_mode_and_device_are_kept():
    old = nn.BatchNorm3d(3, eps=0.1, momentum=0.3, dtype=torch.float64).eval()
    new = convert_batchnorm(nn.Sequential(old), recipe="course")[0]
    assert isinstance(new, RunningBatchNorm3d) and (new.eps, new.mom, new.training) == (0.1, 0.3, False)
    assert new.recipe.name == "course" and new.running_mean.dtype == torch.float64
    assert convert_batchnorm(nn.BatchNorm1d(3, momentum=None)).mom == 0.1
    back = to_batchnorm(new)
    assert (back.eps, back.momentum, back.training) == (0.1, 0.3, False) and type(back) is nn.BatchNorm3d
    plain = convert_batchnorm(nn.BatchNorm2d(3, affine=False))
    assert plain.weight is None and to_batchnorm(plain).weight is None
    with torch.device("meta"):
        assert convert_batchnorm(nn.BatchNorm2d(3, affine=False, track_running_stats=True)).running_mean.is_meta


def test_a_layer_in_several_places_is_converted_once():
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": nn.Sequential(norm, nn.ReLU()), "b": nn.Sequential(norm), "c": norm})
    convert_batchnorm(model)
    assert model["a"][0] is model["b"][0] is model["c"] and type(model["c"]) is RunningBatchNorm2d
    to_batchnorm(model)
    assert model["a"][0] is model["b"][0] is model["c"] and type(model["c"]) is nn.BatchNorm2d


def test_a_model_that_is_itself_a_norm_is_replaced():
    assert type(convert_batchnorm(nn.BatchNorm1d(3))) is RunningBatchNorm1d
    assert type(to_batchnorm(RunningBatchNorm1d(3))) is nn.BatchNorm1d
    assert type(to_batchnorm(RunningBatchNorm(3), dims=3)) is nn.BatchNorm3d
    assert type(to_batchnorm(RunningBatchNorm(3))) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="1, 2 or 3; got 4"):
        to_batchnorm(RunningBatchNorm(3), dims=4)


@pytest.mark.parametrize("function", [convert_batchnorm, to_batchnorm, fuse_conv_rbn])
def test_a_model_without_a_norm_is_unchanged_with_a_warning(function):
    model = nn.Sequential(nn.Linear(3, 3), nn.InstanceNorm1d(3)).eval()
    before = repr(model)
    with pytest.warns(UserWarning, match=f"{function.__name__} found no .* in Sequential; nothing was changed") as seen:
        assert repr(function(model)) == before
    assert seen[0].filename == __file__  # the warning points at the caller


def test_syncbatchnorm_without_processes_becomes_a_layer_for_any_rank():
    sync = nn.SyncBatchNorm(3)
    sync.running_mean.fill_(2.0)
    new = convert_batchnorm(nn.Sequential(sync))[0]
    assert type(new) is RunningBatchNorm and new.process_group is None and new.running_count == -1
    assert new(torch.randn(2, 3, 4)).shape == (2, 3, 4) and new(torch.randn(1, 3, 4, 4)).isfinite().all()


def test_layers_without_statistics_are_converted_with_one_warning():
    model = nn.Sequential(*(nn.BatchNorm2d(3, track_running_stats=False) for _ in range(3)))
    with pytest.warns(UserWarning, match="'0', '1' and 1 more layers had no running stat.*must be trained") as seen:
        new = convert_batchnorm(model)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert all(m.running_count == 0 and m.num_samples_tracked == 0 for m in new)


def test_lazy_layers_and_momentum_0_are_refused_and_the_model_is_unchanged():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="number of channels.*LazyBatchNorm2d at '1'.*send one through"):
        convert_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    model(torch.randn(2, 3, 4, 4))
    assert len(norms(convert_batchnorm(model))) == 2
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.0))
    with pytest.raises(ValueError, match="must be above 0; got 0 in BatchNorm2d at '1'"):
        convert_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Renamed(nn.BatchNorm2d):
    pass


def test_a_subclass_that_does_more_stays_and_one_that_does_not_is_converted():
    with pytest.warns(UserWarning, match="left '1' unchanged: NormAndReLU has its own forward pass") as seen:
        model = convert_batchnorm(nn.Sequential(Renamed(3), NormAndReLU(3)))
    assert type(model[0]) is RunningBatchNorm2d and type(model[1]) is NormAndReLU
    assert seen[0].filename == __file__


class Split(nn.BatchNorm2d):
    """timm's SplitBatchNorm2d: each part of a batch has its own norm."""

    def __init__(self, nf):
        super().__init__(nf)
        self.aux_bn = nn.ModuleList([nn.BatchNorm2d(nf)])

    def forward(self, x):
        return torch.cat([super().forward(x[:1]), self.aux_bn[0](x[1:])])


def test_subclasses_are_left_whole_with_one_warning_for_all():
    for model in (nn.Sequential(*(Split(3) for _ in range(30))), Split(3)):
        with pytest.warns(UserWarning, match="Split has its own forward pass") as seen:
            convert_batchnorm(model)
        assert len(seen) == 1 and not norms(model)
        assert "'0', '1' and 28 more layers" in str(seen[0].message) or type(model) is Split


class NormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d: dropout and activation are inside, and the forward pass does not call BatchNorm2d's."""

    def __init__(self, nf, act=nn.ReLU, drop=nn.Identity):
        super().__init__(nf)
        self.drop, self.act = drop(), act()

    def forward(self, x):
        training, mean, var = self.training, self.running_mean, self.running_var
        return self.act(self.drop(nn.functional.batch_norm(x, mean, var, self.weight, self.bias, training)))


def test_a_norm_with_dropout_and_activation_inside_keeps_both_there_and_back():
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, nn.SiLU, nn.Dropout), nn.Conv2d(4, 4, 1), NormAct(4))
    )
    x, keys, act = torch.randn(2, 3, 6, 6), list(model.state_dict()), model[1].act
    want = model(x)
    ours = convert_batchnorm(model)
    assert len(norms(ours)) == 2 and ours[1].act is act and torch.equal(ours(x), want)
    assert set(keys) <= set(ours.state_dict())
    fused = fuse_conv_rbn(ours)
    assert not norms(fused) and relative_error(fused(x), want) < 1e-6
    y = ours.train()[1](torch.randn(50, 4, 9, 9))
    assert (y == 0).float().mean() == pytest.approx(0.5, abs=0.05)  # dropped
    copy.deepcopy(ours)
    before = ours.eval()(x)
    back = to_batchnorm(ours)
    assert not norms(back) and list(back.state_dict()) == keys and torch.equal(back(x), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still what older PyTorch deploys with
        assert torch.equal(torch.jit.script(back)(x), before)
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(back[3].state_dict())
    for momentum in (0.1, None):
        plain.momentum = back[3].momentum = momentum
        batch = torch.randn(5, 4, 3, 3)
        assert torch.equal(back[3].train()(batch), plain(batch).relu())
        assert torch.equal(back[3].running_var, plain.running_var)


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_100", "regnetx_002", "densenet121"])
def test_timms_nets_are_converted_throughout(name):
    timm = pytest.importorskip("timm")
    model, x = randomize(timm.create_model(name)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        ours = convert_batchnorm(model)
        assert not norms(ours, BATCHNORMS) and norms(ours)
        assert torch.equal(ours(x), want) and torch.equal(to_batchnorm(ours)(x), want)


@pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="this torch has no bias=")
def test_a_norm_without_bias_has_none_there_and_back():
    model = nn.Sequential(nn.BatchNorm2d(4, bias=False), nn.BatchNorm2d(4))
    nn.init.normal_(model[0].running_mean)
    x, want = torch.randn(2, 4, 3, 3), copy.deepcopy(model).eval()
    ours = convert_batchnorm(model)
    assert ours[0].bias is None and ours[1].bias is not None
    assert torch.equal(copy.deepcopy(ours).eval()(x), want(x))
    folded = nn.Sequential(nn.Conv2d(4, 4, 1), ours[0]).eval()
    assert relative_error(fuse_conv_rbn(folded)(x), folded(x)) < 1e-6
    ours.train()
    back = to_batchnorm(ours)
    assert back[0].bias is None and list(back.state_dict()) == list(want.state_dict())
    assert torch.equal(back.eval()(x), want(x))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, RunningBatchNorm1d, NormAct])
@pytest.mark.parametrize("how", ["pruned", "parametrised"])
def test_pruned_and_parametrised_norms_are_refused_and_the_model_is_unchanged(kind, how):
    model = nn.Sequential(nn.BatchNorm1d(3), RunningBatchNorm1d(3), kind(3))
    if how == "pruned":
        prune.l1_unstructured(model[2], "weight", amount=1)
    else:
        parametrize.register_parametrization(model[2], "weight", nn.Softplus())
    function = to_batchnorm if kind is RunningBatchNorm1d else convert_batchnorm
    more = "weight_orig, weight_mask" if how == "pruned" else "a parametrised weight"
    with pytest.raises(ValueError, match=rf"{function.__name__} takes batch norms.*with {more} at '2': make it perm"):
        function(model)
    assert [type(m) for m in model][:2] == [nn.BatchNorm1d, RunningBatchNorm1d]
    if how == "pruned":
        prune.remove(model[2], "weight")
    else:
        parametrize.remove_parametrizations(model[2], "weight")
    assert isinstance(function(model)[2], RunningBatchNorm) == (function is convert_batchnorm)


@pytest.mark.parametrize("there", [True, False], ids=["to ours", "back"])
def test_hooks_are_kept_and_their_handles_remove_them(there):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if there else RunningBatchNorm1d(4))
    norm, calls = model[1], []

    def say(what, value=None):
        return lambda m, *args: (calls.append((what, m)), value)[1]

    handles = [
        norm.register_forward_pre_hook(lambda m, args: (calls.append(("pre", m)), (args[0] * 2,))[1]),
        norm.register_forward_hook(
            lambda m, args, kwargs, y: (calls.append(("forward", m)), y + 1)[1], with_kwargs=True
        ),
        norm.register_full_backward_pre_hook(say("backward pre")),
        norm.register_full_backward_hook(say("backward")),
        norm.register_state_dict_pre_hook(say("state_dict pre")),
        norm.register_state_dict_post_hook(say("state_dict")),
        norm.register_load_state_dict_pre_hook(say("load pre")),
        norm.register_load_state_dict_post_hook(say("load")),
    ]
    x = torch.randn(5, 3)
    want = copy.deepcopy(model).eval()(x)
    calls.clear()
    (convert_batchnorm if there else to_batchnorm)(model)
    new = model[1]
    assert type(new) is not type(norm) and calls == []
    del norm
    gc.collect()
    assert relative_error(model.eval()(x), want) < 1e-6  # with what the hooks make of it
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert {what for what, _ in calls} == {
        "pre", "forward", "backward pre", "backward", "state_dict pre", "state_dict", "load pre", "load"
    }  # fmt: skip
    assert all(m is new for _, m in calls)
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert calls == []


def trained(nf, dtype=torch.float64, **settings):
    layer = layer_of(nf, dtype=dtype, **settings)
    for i in range(3):
        step(layer, torch.randn(4, nf, 5, dtype=dtype) * 2 + i, torch.randn(4, nf, 5, dtype=dtype))
    return layer


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6), (3, 4)),
        (nn.Conv1d(4, 6, 3, groups=2), (3, 4, 7)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
        (nn.Conv3d(4, 6, 1, dilation=2), (2, 4, 3, 3, 3)),
        (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(4, 6, 2, groups=1, padding=1), (2, 4, 3, 3, 3)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_a_norm_folds_into_every_kind_of_convolution_and_linear(layer, shape, bias, affine):
    layer = copy.deepcopy(layer).double()
    if not bias:
        layer.bias = None
    model = nn.Sequential(layer, trained(6, affine=affine), nn.ReLU()).eval()
    x = torch.randn(shape, dtype=torch.float64)
    fused = fuse_conv_rbn(model)
    assert not norms(fused) and isinstance(fused[1], nn.Identity)
    assert relative_error(fused(x), model(x)) < 1e-12
    assert fused[0].weight.requires_grad and fused[0].bias.dtype == torch.float64


def test_a_frozen_layer_is_folded_in_training_mode_and_a_moving_one_is_refused():
    model = nn.Sequential(nn.Conv1d(3, 3, 1).double(), trained(3))
    with pytest.raises(ValueError, match="only layers in evaluation mode.*'1' is in training mode.*model.eval"):
        fuse_conv_rbn(model)
    model[1].freeze()
    assert not norms(fuse_conv_rbn(model))


class Doubled(nn.Conv1d):
    def forward(self, x):
        return super().forward(x) * 2


class Branching(nn.Module):
    """A convolution that is read twice, a norm used twice, and one where the two only fit each other."""

    def __init__(self):
        super().__init__()
        self.read_twice, self.a = nn.Conv1d(3, 3, 1), layer_of(3)
        self.used_twice, self.b = nn.Conv1d(3, 3, 1), layer_of(3)
        self.fits, self.c = nn.Conv1d(3, 3, 1), layer_of(3)

    def forward(self, x):
        h = self.read_twice(x)
        h = self.a(h) + h
        h = self.b(self.used_twice(h)) + self.b(h)
        return self.c(self.fits(h))


def test_only_a_norm_that_is_the_sole_reader_of_its_convolution_is_folded():
    model, x = Branching().eval(), torch.randn(2, 3, 5)
    fused = fuse_conv_rbn(model)
    assert [name for name, m in fused.named_modules() if isinstance(m, RunningBatchNorm)] == ["a", "b"]
    assert relative_error(fused(x), model(x)) < 1e-6


@pytest.mark.parametrize("what", ["subclass", "hook", "hook on the norm", "weight norm"])
def test_a_convolution_that_does_more_than_convolve_is_left_alone(what):
    conv = (Doubled if what == "subclass" else nn.Conv1d)(3, 3, 1)
    model = nn.Sequential(conv, layer_of(3), nn.Conv1d(3, 3, 1), layer_of(3)).eval()
    if what == "weight norm":
        nn.utils.parametrizations.weight_norm(conv)
    elif what != "subclass":
        model[what.endswith("norm")].register_forward_hook(lambda m, args, y: y * 2)
    x = torch.randn(2, 3, 5)
    fused = fuse_conv_rbn(model)
    assert isinstance(fused[1], RunningBatchNorm) and isinstance(fused[3], nn.Identity)
    assert relative_error(fused(x), model(x)) < 1e-6


class Deciding(nn.Module):
    """Python that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        norm = layer_of(3)
        self.body = nn.Sequential(nn.Conv1d(3, 3, 1), layer_of(3), nn.ReLU(), norm)
        self.tail = nn.Sequential(nn.Conv1d(3, 3, 1), norm)  # shared: stays

    def forward(self, x):
        return self.tail(self.body(x)) if x.sum() > -1e9 else x


def test_a_model_that_cannot_be_traced_is_folded_within_its_sequentials_with_a_warning():
    model, x = Deciding().eval(), torch.randn(2, 3, 5)
    with pytest.warns(
        UserWarning, match=r"could not trace Deciding \(TraceError.*neighbours within each nn.Sequential"
    ) as seen:
        fused = fuse_conv_rbn(model)
    assert seen[0].filename == __file__
    assert len(norms(fused)) == 1 and isinstance(fused.body[1], nn.Identity)
    assert relative_error(fused(x), model(x)) < 1e-6


def test_a_half_precision_model_folds_into_half_precision():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), trained(4, torch.float32)).bfloat16().eval()
    x = torch.randn(2, 3, 5).bfloat16()
    fused = fuse_conv_rbn(model)
    assert fused[0].weight.dtype == fused(x).dtype == torch.bfloat16
    assert relative_error(fused(x), model(x)) < 0.03


def test_converting_an_ordinary_model_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse_conv_rbn(convert_batchnorm(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))).eval())
