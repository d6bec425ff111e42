"""Checks run by two or three gloo processes together; `test_groups.py` starts them and reports each check as a test.

Every rank runs every function of CHECKS in the same order; they compare with one process that has the whole batch.
Run as `python -m norm.ranks FOLDER WORLD` with tests/ on the path; writes FOLDER/RANK.json.
"""

import copy
import inspect
import json
import sys
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # DistributedDataParallel imports it
import torch.distributed as dist
from norm.steps import assert_same, assert_unmoved, buffers, grads, layer_of, step
from processes import fork_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastrbn.norm import RECIPES, RunningBatchNorm2d, convert_batchnorm, to_batchnorm
from fastrbn.norm.recipes import Skip

RANK, WORLD = 0, 1
CHECKS = []
# samples on each rank, step by step; the unequal and empty ones come early, where the share a is large
EQUAL = [(4, 4, 4), (2, 2, 2), (5, 5, 5)]
UNEQUAL = [(3, 1, 2), (1, 6, 1), (5, 2, 3), (2, 4, 1)]
EMPTY = [(3, 0, 2), (0, 4, 0), (2, 0, 0), (0, 1, 5)]


def check(f):
    CHECKS.append(f)
    return f


def wholes(sizes, dtype=torch.float64, features=3):
    """Whole batches and this rank's slice of each."""
    g = torch.Generator().manual_seed(0)
    for i, split in enumerate(sizes):
        split = split[:WORLD]
        x, dy = (torch.randn(sum(split), features, 3, 2, generator=g) for _ in range(2))
        start = sum(split[:RANK])
        yield (x * (1 + i % 2) + i / 2).to(dtype), dy.to(dtype) + 0.1, slice(start, start + split[RANK])


def summed(tensors):
    """The sum over ranks of each tensor: DDP's result up to its factor."""
    for t in tensors.values():
        dist.all_reduce(t)
    return tensors


def assert_equals_whole(sizes, recipe="default", dtype=torch.float64, tol=1e-10, run=step, **settings):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    ours = layer_of(recipe=recipe, process_group=dist.group.WORLD, dtype=state, **settings)
    alone = layer_of(recipe=recipe, dtype=state, **settings)
    for i, (x, dy, mine) in enumerate(wholes(sizes, dtype)):
        got, want = run(ours, x[mine], dy[mine]), step(alone, x, dy)
        want |= {"y": want["y"][mine], "dx": want["dx"][mine]}
        got |= summed({k: got[k] for k in ("dweight", "dbias") if k in got})
        assert_same(got, want, tol, f"at step {i} of {sizes}")
    return ours


@check
def equal_unequal_and_empty_ranks_are_one_process_with_the_whole_batch():
    skipping = RECIPES["default"].but(skip=Skip(2, 5))
    for recipe in (*RECIPES, skipping):
        for sizes in (EQUAL, UNEQUAL, EMPTY):
            assert_equals_whole(sizes, recipe)


@check
def ranks_without_affine_and_in_float32_and_bfloat16_are_one_process_too():
    assert_equals_whole(UNEQUAL, affine=False)
    assert_equals_whole(UNEQUAL, dtype=torch.float32, tol=1e-5)
    assert_equals_whole(UNEQUAL, "batch", dtype=torch.bfloat16, tol=2e-2)


@check
def one_value_a_channel_on_every_rank_works():
    layer = layer_of(process_group=dist.group.WORLD, recipe="batch")
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(RANK))
    got = step(layer, x, torch.randn(1, 3))
    assert got["y"].isfinite().all() and got["dx"].isfinite().all() and layer.num_samples_tracked == WORLD


@check
def batches_that_are_empty_on_every_rank_leave_the_state():
    layer = assert_equals_whole(UNEQUAL)
    before = buffers(layer)
    got = step(layer, torch.zeros(0, 3, 3, 2).double(), torch.zeros(0, 3, 3, 2).double())
    assert got["y"].shape == got["dx"].shape == (0, 3, 3, 2)
    assert_unmoved(layer, before)
    fresh = layer_of(process_group=dist.group.WORLD)
    before = buffers(fresh)
    step(fresh, torch.zeros(0, 3, 3, 2), torch.zeros(0, 3, 3, 2))
    assert_unmoved(fresh, before)


@check
def a_nan_on_one_rank_leaves_the_state_of_all():
    layer = assert_equals_whole(UNEQUAL)
    for x, dy, mine in wholes(UNEQUAL[:1]):
        before, x, dy = buffers(layer), x[mine], dy[mine]
        if RANK == 1:
            x[0, 2, 1, 1] = float("nan")
        y = step(layer, x, dy)["y"]
        assert_unmoved(layer, before)
        assert y.isnan().any() == (RANK == 1)


@check
def a_nan_gradient_on_one_rank_leaves_the_averages_of_all():
    layer = assert_equals_whole(UNEQUAL)
    for x, dy, mine in wholes(UNEQUAL[:1]):
        before, dy = buffers(layer), dy[mine]
        if RANK == 0:
            dy[0, 0, 0, 0] = float("inf")
        step(layer, x[mine], dy)
        assert torch.equal(layer.running_grad, before["running_grad"])
        assert torch.equal(layer.running_grad_weight, before["running_grad_weight"])


@check
def evaluation_and_frozen_layers_need_no_other_rank():
    layer = assert_equals_whole(UNEQUAL)
    if RANK == 0:
        before = buffers(layer)
        layer.eval()(torch.randn(2, 3, 3, 2).double())
        layer.train().freeze()(torch.randn(2, 3, 3, 2).double())
        assert_unmoved(layer, before)


@check
def checkpointed_segments_move_the_shared_statistics_once():
    for reentrant in (True, False):

        def run(layer, x, dy, reentrant=reentrant):
            z = x.clone().requires_grad_()
            layer.zero_grad()
            y = checkpoint(layer, z, use_reentrant=reentrant)
            y.backward(dy)
            return {"y": y.detach(), "dx": z.grad, **grads(layer), **buffers(layer)}

        assert_equals_whole(UNEQUAL, run=run)


@check
def a_second_derivative_is_refused_instead_of_wrong():
    layer, x = layer_of(process_group=dist.group.WORLD, recipe="course"), torch.randn(4, 3).requires_grad_()
    g = torch.autograd.grad(layer(x), x, torch.randn(4, 3), create_graph=True)[0]
    try:
        g.square().sum().backward()
    except RuntimeError as e:
        assert "twice" in str(e), e
    else:
        raise AssertionError("no error")


@check
def a_subgroup_of_ranks_shares_what_the_others_do_not():
    group = dist.new_group([0, 1])
    if RANK < 2:
        layer, alone = layer_of(process_group=group), layer_of()
        layer(torch.full((2, 3), float(RANK)))
        alone(torch.tensor([[0.0], [0.0], [1.0], [1.0]]).expand(4, 3))
        assert torch.equal(layer.running_mean, alone.running_mean)
        assert layer.num_samples_tracked == 4


@check
def subsets_of_elements_are_read_on_every_rank_and_agree_over_ranks():
    layer = layer_of(process_group=dist.group.WORLD, recipe=RECIPES["default"].but(elements=7))
    for x, dy, mine in wholes([(18, 25, 33), *UNEQUAL], torch.float32):
        step(layer, x[mine], dy[mine])
    for b in layer.buffers():
        theirs = b.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(theirs, b)


def net_of(**settings):
    torch.manual_seed(0)
    norm = layer_of(4, dtype=torch.float64, **settings)
    conv, last = nn.Conv2d(3, 4, 1, dtype=torch.float64), nn.Conv2d(4, 3, 1, dtype=torch.float64)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True), last)


def train(net, data, pick, factor=1.0, accumulate=1):
    """SGD over `data`; every `accumulate` batches one step; `factor` undoes DDP's mean over ranks."""
    opt = torch.optim.SGD(net.parameters(), 0.1 * factor)
    for i, (x, dy, mine) in enumerate(data):
        last = (i + 1) % accumulate == 0
        waiting = nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync()
        with waiting:
            rows = mine if pick is None else pick
            net(x[rows]).backward(dy[rows])
        if last:
            opt.step()
            opt.zero_grad()


def in_ddp(net, synced):
    """DDP, with or without copying rank 0's buffers to the others before each forward."""
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # its name since torch 2.15
    return DistributedDataParallel(net, **{"forward_sync_buffers" if new else "broadcast_buffers": synced})


@check
def ddp_with_the_process_group_trains_as_one_process_does():
    for synced in (True, False):
        for accumulate in (1, 2):
            sizes = UNEQUAL * 2
            alone, ours = net_of(), net_of(process_group=dist.group.WORLD)
            train(in_ddp(ours, synced), wholes(sizes), None, WORLD, accumulate)
            train(alone, wholes(sizes), slice(None), 1.0, accumulate)
            assert_same(dict(ours.state_dict()), dict(alone.state_dict()), 1e-9, f"{synced} {accumulate}")


@check
def ddp_without_a_process_group_keeps_each_ranks_own_statistics_or_those_of_rank_0():
    for synced in (True, False):
        ours, alone = net_of(), net_of()
        train(in_ddp(ours, synced), wholes(UNEQUAL), None, factor=0.0)
        train(alone, wholes(UNEQUAL), None, factor=0.0)
        mine, zero = ours[1].running_mean.clone(), ours[1].running_mean.clone()
        dist.broadcast(zero, 0)
        assert torch.equal(mine, zero) == (RANK == 0)  # after the last step each has moved by its own batch
        # what a rank has learned by itself is lost to rank 0's buffers; without a group no rank sees the others'
        assert torch.allclose(mine, alone[1].running_mean) == (RANK == 0 or not synced)


@check
def a_converted_syncbatchnorm_keeps_its_group_and_copies_share_it():
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    net = convert_batchnorm(sync)
    assert net[1].process_group is not None
    twin = copy.deepcopy(net)
    assert twin[1].process_group is net[1].process_group
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(RANK))
    twin(x)
    assert twin[1].num_samples_tracked == 2 * WORLD and net[1].num_samples_tracked == 0
    assert isinstance(to_batchnorm(twin)[1], nn.BatchNorm2d)
    layer = RunningBatchNorm2d(3, process_group=dist.group.WORLD)
    assert layer.explain(x) == "reference: statistics are merged over a process group"
    try:
        RunningBatchNorm2d(3, process_group=dist.group.WORLD, backend="fused")(x)
    except ValueError as e:
        assert "'fused' cannot be used here: statistics are merged over a process group" in str(e)
    else:
        raise AssertionError("no error")


def main(rank, world, folder):
    global RANK, WORLD
    RANK, WORLD = rank, world
    store = f"file://{folder.absolute()}/store"
    dist.init_process_group("gloo", init_method=store, rank=RANK, world_size=WORLD, timeout=timedelta(minutes=2))
    results = {}
    for f in CHECKS:
        try:
            f()
            results[f.__name__] = ""
        except Exception:
            results[f.__name__] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        # a rank that failed has left its collectives: all stop, instead of waiting for it
        failed = torch.tensor(float(results[f.__name__] != ""))
        dist.all_reduce(failed)
        if failed:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, world = Path(sys.argv[1]), int(sys.argv[2])
    fork_ranks(folder, world, lambda rank: main(rank, world, folder))
