"""CudaCallback and BatchTransformXCallback. The meta device stands in for an accelerator."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn

from fastrbn.callbacks import BatchTransformXCallback, CudaCallback
from fastrbn.learn import Callback, CancelBatchException, Runner


class Sees(Callback):
    _order = 3

    def begin_fit(self):
        self.batches = []

    def begin_batch(self):
        self.batches.append((self.run.xb, self.run.yb))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_batches_on_the_device_are_left_alone(make_learn, device):
    learn = make_learn()
    run = Runner([CudaCallback(device), Sees])
    run.fit(1, learn)
    given = [*learn.data.train_dl, *learn.data.valid_dl]
    assert all(a is b for seen, pair in zip(run.sees.batches, given) for a, b in zip(seen, pair))


def test_batches_on_other_devices_are_moved(make_learn):
    learn = make_learn(n_train=2, n_valid=0)
    Pair = namedtuple("Pair", "a b")
    run = Runner([CudaCallback("meta"), Sees, StopsAfter()])
    x, y = learn.data.train_dl[0]
    for xb in (x, (x, [x]), {"a": x, "b": (x, "text")}, Pair(x, x)):
        learn.data.train_dl = [(xb, y)]
        run.fit(1, copy.deepcopy(learn))
        moved = run.sees.batches[0][0]
        assert type(moved) is type(xb)
        assert devices(moved) == {"meta"}
        assert devices(run.sees.batches[0][1]) == {"meta"}
    assert devices(x) == {"cpu"}, "the loader's own batch was changed"


class StopsAfter(Callback):
    _order = 9

    def begin_batch(self):
        raise CancelBatchException


def devices(value):
    if isinstance(value, torch.Tensor):
        return {value.device.type}
    if isinstance(value, dict):
        value = value.values()
    return set().union(*map(devices, value)) if not isinstance(value, str) else set()


def test_a_loader_that_can_be_moved_is_moved_once(make_learn):
    class Loader(list):
        moves = ()

        def to(self, device):
            self.moves = [*self.moves, str(device)]
            return self

    learn = make_learn()
    learn.data.train_dl = learn.data.valid_dl = both = Loader(learn.data.train_dl)
    Runner([CudaCallback("cpu")]).fit(2, learn)
    assert both.moves == ["cpu"]


def test_model_and_optimiser_state_move_and_the_optimiser_keeps_its_parameters(make_learn):
    learn = make_learn(opt=torch.optim.Adam)
    Runner().fit(1, learn)
    Runner([CudaCallback("meta"), StopsAfter()]).fit(1, learn)
    assert devices(list(learn.model.parameters())) == {"meta"}
    assert [id(p) for p in learn.opt.param_groups[0]["params"]] == [id(p) for p in learn.model.parameters()]
    states = [learn.opt.state[p] for p in learn.model.parameters()]
    assert {s["exp_avg"].device.type for s in states} == {"meta"}
    assert {s["step"].device.type for s in states} == {"cpu"}, "Adam keeps its counter on the host"
    assert len(learn.opt.state) == len(states), "the state of the parameters before the move was kept"


@pytest.mark.parametrize("option", ["capturable", "fused"])
def test_step_counters_move_if_the_optimiser_counts_on_the_device(make_learn, option):
    learn = make_learn(opt=torch.optim.Adam)
    Runner().fit(1, learn)
    learn.opt.param_groups[0][option] = True
    Runner([CudaCallback("meta"), StopsAfter()]).fit(1, learn)
    assert {learn.opt.state[p]["step"].device.type for p in learn.model.parameters()} == {"meta"}


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpux", "xpu:7"])
def test_a_missing_device_is_an_error_that_lists_the_devices(make_learn, device):
    with pytest.raises(ValueError, match=f"device must be one of cpu.*; got '{device}'"):
        Runner([CudaCallback(device)]).fit(1, make_learn())


def test_the_default_is_the_accelerator(make_learn):
    best = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    learn = make_learn()
    Runner([CudaCallback]).fit(1, learn)
    assert devices(list(learn.model.parameters())) == {best}


def test_a_transform_replaces_xb_in_training_and_validation(make_learn):
    learn = make_learn(n_train=2, n_valid=1)
    run = Runner([BatchTransformXCallback(lambda x: x * 0 + 7), Sees])
    run.fit(1, learn)
    assert len(run.sees.batches) == 3
    assert all((x == 7).all() for x, _ in run.sees.batches)


def test_transforms_follow_one_another_after_the_move(make_learn):
    double, add = BatchTransformXCallback(lambda x: x * 2), BatchTransformXCallback(lambda x: x + 1)
    learn = make_learn(n_train=1, n_valid=0)
    run = Runner([double, add, CudaCallback("cpu"), Sees])
    run.fit(1, learn)
    assert torch.equal(run.sees.batches[0][0], learn.data.train_dl[0][0] * 2 + 1)


def test_random_transforms_of_torchvision_are_warned_of_once_and_others_are_not(make_learn):
    from torchvision.transforms import v2

    learn = make_learn(n_train=3, n_valid=1)
    images = [(x.view(-1, 1, 2, 2), y) for x, y in learn.data.train_dl]
    learn.data.train_dl, learn.data.valid_dl = images, images[:1]
    learn.model.insert(0, nn.Flatten())
    flip = v2.Compose([v2.RandomHorizontalFlip()])
    with pytest.warns(
        UserWarning, match=r"RandomHorizontalFlip.* draws once for all .*image_databunch\(…, aug"
    ) as told:
        Runner([BatchTransformXCallback(flip)]).fit(1, learn)
    assert len(told) == 1
    Runner([BatchTransformXCallback(v2.Resize(2)), BatchTransformXCallback(lambda x: x + torch.rand(1))]).fit(1, learn)


def test_a_transform_must_be_a_function():
    with pytest.raises(TypeError, match="needs a function of xb; got 3"):
        BatchTransformXCallback(3)


def test_a_loss_functions_tensors_move_and_its_parameters_stay_in_the_optimiser(make_learn):
    learn = make_learn(loss_func=nn.CrossEntropyLoss(weight=torch.ones(3)))
    learn.loss_func.scale = nn.Parameter(torch.ones(()))
    learn.opt.add_param_group({"params": [learn.loss_func.scale]})
    Runner([CudaCallback("meta"), StopsAfter()]).fit(1, learn)
    assert learn.loss_func.weight.device.type == learn.loss_func.scale.device.type == "meta"
    assert learn.opt.param_groups[1]["params"][0] is learn.loss_func.scale
