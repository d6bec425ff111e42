"""freeze, unfreeze and the callback Freeze: what stays fixed, until when, and who else has to live with it."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn.build import param_groups
from fastrbn.callbacks import (
    EMA,
    Checkpoint,
    Freeze,
    GradientAccumulation,
    GradientClip,
    HaltOnNaN,
    LR_Find,
    MixedPrecision,
    ParamMagnitudes,
    freeze,
    unfreeze,
)
from fastrbn.learn import Callback, CancelTrainException, Runner
from fastrbn.norm import RunningBatchNorm, convert_batchnorm, recompute_statistics, to_batchnorm


def model_of(norm):
    body = nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU())
    return nn.Sequential(OrderedDict(body=body, norm=norm(8), head=nn.Linear(8, 3)))


NORMS = {
    "batch norm": nn.BatchNorm1d,
    "running": RunningBatchNorm,
    "no affine": lambda c: nn.BatchNorm1d(c, affine=False),
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


def decaying(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model, before, part=""):
    return {
        name for name, v in model.state_dict().items() if name.startswith(part) and not torch.equal(v, before[name])
    }


# --- functions


@every_norm
def test_nothing_moves_what_is_frozen_until_it_is_unfrozen(norm, make_learn):
    learn = make_learn(model=model_of(norm), opt=decaying)
    Runner().fit(1, learn)  # the optimiser has momenta
    assert freeze(learn.model, "body") is learn.model
    before = copied(learn.model)
    for _ in range(2):
        Runner().fit(1, learn)
        assert not moved(learn.model, before, "body")
        assert {"norm.running_mean", "head.weight"} <= moved(learn.model, before)
    assert unfreeze(learn.model, "body") is learn.model
    Runner().fit(1, learn)
    assert {"body.0.weight", "body.1.running_mean", "body.1.num_batches_tracked"} <= moved(learn.model, before, "body")
    assert not learn.model.body[1]._forward_hooks and not learn.model.body[1]._forward_pre_hooks


@every_norm
def test_a_frozen_norm_evaluates_in_any_mode_also_as_a_copy(norm):
    model, x = model_of(norm), torch.randn(5, 4)
    model(x)
    expected = model.body.eval()(x)
    freeze(model, "body")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for m in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        m.train()
        before = copied(m)
        assert torch.equal(m.body(x), expected) and not moved(m, before) and m.body[1].training
        unfreeze(m)
        assert not torch.equal(m.body(x), expected) and moved(m, before)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, RunningBatchNorm])
def test_a_frozen_norm_stays_so_when_it_is_converted_or_others_are_recomputed(norm):
    model = freeze(model_of(norm), "body")
    model = convert_batchnorm(model) if norm is nn.BatchNorm1d else to_batchnorm(model, dims=1)
    before = copied(model.train())
    model(torch.randn(5, 4))
    recompute_statistics(model, [torch.randn(5, 4)])
    assert "norm.running_mean" in moved(model, before) and not moved(model, before, "body")
    unfreeze(model)(torch.randn(5, 4))
    assert moved(model, before, "body")


def test_in_evaluation_mode_a_converted_norm_has_no_hooks_which_torchscript_refuses():
    model = to_batchnorm(freeze(model_of(RunningBatchNorm)).eval(), dims=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_in_a_frozen_norm_does_not_leave_it_in_evaluation_mode():
    norm = freeze(nn.BatchNorm1d(8))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            norm(torch.randn(3, 5))
    assert unfreeze(norm).training and vars(norm).keys() == vars(nn.BatchNorm1d(8)).keys()


def test_names_are_those_without_compile():
    model = freeze(nn.ModuleDict({"_orig_mod": model_of(nn.BatchNorm1d)}), "body")  # as torch.compile wraps a model
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"_orig_mod.{name}" for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")
    ]
    assert model["_orig_mod"].body[1]._forward_hooks
    assert [group["name"] for group in param_groups(model, lr={"body": 1e-4})] == ["body", "body", "rest", "rest"]


def test_a_gradient_that_is_left_does_not_move_a_frozen_parameter():
    model = model_of(nn.BatchNorm1d)
    opt = decaying(model.parameters())
    F.cross_entropy(model(torch.randn(5, 4)), torch.arange(5) % 3).backward()
    before = copied(freeze(model, "head.*"))
    opt.step()
    assert moved(model, before) and not moved(model, before, "head")


def test_patterns_name_parameters_modules_or_both():
    model = model_of(nn.BatchNorm1d)

    def frozen(*patterns):
        unfreeze(model)
        freeze(model, *patterns)
        norms = [m for m in (model.body[1], model.norm) if m._forward_hooks]
        return [name for name, p in model.named_parameters() if not p.requires_grad], norms

    assert frozen("body.0", "head.bias") == (["body.0.weight", "body.0.bias", "head.bias"], [])
    assert frozen("*.weight")[1] == [], "the bias of the norms is trained"
    assert frozen("nor?") == (["norm.weight", "norm.bias"], [model.norm])
    assert len(frozen()[0]) == 8 and frozen()[1] == [model.body[1], model.norm]


@pytest.mark.parametrize("function", [freeze, unfreeze])
def test_a_pattern_that_matches_nothing_is_refused_and_nothing_changes(function):
    model = model_of(nn.BatchNorm1d)
    with pytest.raises(ValueError, match=f"^{function.__name__}: 'boddy' matches no name .* Did you mean 'body'"):
        function(model, "head", "boddy")
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="needs an nn.Module; got"):
        function(list(model), "body")


# --- the callback


class Watch(Callback):
    """For each epoch the names that moved in it."""

    def begin_fit(self):
        self.seen, self.before = [], copied(self.run.learn.model)

    def after_epoch(self):
        names = moved(self.run.learn.model, self.before)
        self.seen.append(sorted({name.partition(".")[0] for name in names}))
        self.before = copied(self.run.learn.model)

    def state_dict(self):
        return {}


@every_norm
def test_a_part_is_trained_from_its_epoch_on_in_each_fit(norm, make_learn):
    learn = make_learn(model=model_of(norm), opt=decaying)
    run = Runner([Freeze("body", until=2), Freeze("norm", until=1), Watch()])
    for _ in range(2):
        run.fit(3, learn)
        assert run.watch.seen == [["head"], ["head", "norm"], ["body", "head", "norm"]]
    Runner([Freeze("body")]).fit(1, learn)
    assert all(p.requires_grad for p in learn.model.parameters())
    assert not any(getattr(m, "frozen", False) or m._forward_hooks for m in learn.model.modules())


def test_what_was_frozen_before_stays_so(make_learn):
    learn = make_learn(model=freeze(model_of(RunningBatchNorm), "body"))
    Runner([Freeze("body", "norm", until=1)]).fit(2, learn)
    assert [name for name, p in learn.model.named_parameters() if not p.requires_grad] == [
        "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias",
    ]  # fmt: skip
    assert learn.model.body[1].frozen and not learn.model.norm.frozen


@pytest.mark.parametrize("at", [3, 4, 6])  # in the frozen epoch, at its end, after it; 4 batches an epoch
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, RunningBatchNorm])
def test_a_resumed_fit_unfreezes_at_the_same_epoch(norm, at, make_learn, tmp_path):
    def start(name):
        learn = make_learn(model=seeded(norm), opt=decaying)
        return Runner([Freeze("body", until=1), Watch(), Checkpoint(tmp_path / name, every=1, keep=None)]), learn

    def seeded(norm):
        torch.manual_seed(0)
        return model_of(norm)

    run, learn = start("whole")
    run.fit(2, learn)
    again, fresh = start("again")
    again.fit(2, fresh, resume=next((tmp_path / "whole").glob(f"*-step-{at}.pt")))
    assert not moved(fresh.model, learn.model.state_dict())
    assert all(p.requires_grad for p in fresh.model.parameters())


def test_a_fit_resumed_without_it_is_told_of_it(make_learn, tmp_path):
    Runner([Freeze("0"), Checkpoint(tmp_path)]).fit(1, make_learn())
    with pytest.warns(UserWarning, match="state of callbacks that this run does not have: freeze"):
        Runner([]).fit(2, make_learn(), resume=tmp_path)


def test_it_does_not_trip_others(make_learn, tmp_path):
    learn = make_learn(model=model_of(RunningBatchNorm), opt=torch.optim.AdamW)
    learn.data.train_dl = [learn.data.train_dl[0]] * 4
    frozen, precision = Freeze("body", until=1), MixedPrecision("fp16", init_scale=8.0)
    watching = [HaltOnNaN(), ParamMagnitudes(grads=True), EMA(0.5), Checkpoint(tmp_path)]
    run = Runner([GradientAccumulation(2), frozen, precision, GradientClip(0.1), *watching, Watch()])
    run.logger = lambda line: None
    run.fit(2, learn)
    assert run.watch.seen == [["head", "norm"], ["body", "head", "norm"]] and run.stop_reason is None
    assert run.halt_on_nan.report is None and run.param_magnitudes.names


def test_a_search_for_the_rate_beside_it_leaves_the_model_as_it_was(make_learn):
    learn = make_learn(model=model_of(RunningBatchNorm), n_train=12)
    before = copied(learn.model)
    Runner([Freeze("body"), LR_Find(max_iter=10)]).fit(1, learn)
    assert not moved(learn.model, before) and not learn.model.body[1].frozen
    assert all(p.requires_grad for p in learn.model.parameters())


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), CancelTrainException("enough")], ids=repr)
def test_a_fit_that_is_cut_unfreezes(error, make_learn):
    class Ends(Callback):
        def after_backward(self):
            raise error

    learn = make_learn(model=model_of(RunningBatchNorm))
    run = Runner([Freeze("body"), Ends()])
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            run.fit(1, learn)
    else:
        run.fit(1, learn)
    assert all(p.requires_grad for p in learn.model.parameters()) and not learn.model.body[1].frozen


def test_wrong_arguments_are_refused(make_learn):
    for args, kwargs in [((), {"until": 1}), ((3,), {})]:
        with pytest.raises(ValueError, match="Freeze needs names of parameters or modules, such as"):
            Freeze(*args, **kwargs)
    with pytest.raises(ValueError, match="until, the first epoch in which they train, must be a whole number, 1"):
        Freeze("body", until=0)
    with pytest.raises(ValueError, match="^Freeze: 'haed' matches no name .* Did you mean 'head'"):
        Runner([Freeze("haed")]).fit(1, make_learn(model=model_of(nn.BatchNorm1d)))
    learn = make_learn(model=model_of(nn.BatchNorm1d))
    learn.opt = decaying(learn.model.head.parameters())
    with pytest.raises(ValueError, match=r"^Freeze\('body', until=2\): the optimiser has none of these parameters"):
        Runner([Freeze("body", until=2)]).fit(1, learn)
    for cbs in ([Freeze("*", until=2)], [Freeze("body", "norm"), Freeze("head", until=2)]):
        with pytest.raises(ValueError, match=r"^Freeze\('.*', until=2\) leaves no parameter to train"):
            Runner(cbs).fit(1, make_learn(model=model_of(nn.BatchNorm1d)))
