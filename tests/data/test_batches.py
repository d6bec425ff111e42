"""BatchLoader: what it yields, in which order, and that an epoch can be resumed anywhere."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrbn.data import BatchLoader, Dataset, RandomCrop, RandomFlip, view_tfm
from fastrbn.data.batches import mix

law = settings(deadline=None, max_examples=50, database=None)


def numbered(n, width=3):
    """Rows that say their own number, so that any mix-up shows."""
    y = torch.arange(n)
    return y[:, None] * 10.0 + torch.arange(width), y


def images(n=20, c=3, side=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, c, side, side), generator=g, dtype=torch.uint8), torch.arange(n)


def labels(loader):
    return torch.cat([yb for _, yb in loader])


def assert_same_batches(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b)
    for (xa, ya), (xb, yb) in zip(a, b):
        assert torch.equal(xa, xb) and torch.equal(ya, yb)


sizes = st.tuples(st.integers(1, 60), st.integers(1, 20))


@law
@given(sizes, st.booleans(), st.integers(0, 2**40), st.integers(0, 5))
def test_every_sample_comes_once_per_epoch_with_its_target(size, shuffle, seed, epoch):
    n, bs = size
    x, y = numbered(n)
    loader = BatchLoader(x, y, bs, shuffle=shuffle, seed=seed)
    loader.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all(len(xb) == bs for xb, _ in batches[:-1])
    xs, ys = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    assert torch.equal(ys.sort().values, y)
    assert torch.equal(xs, x[ys])


@law
@given(sizes, st.booleans())
def test_drop_last_keeps_whole_batches_only(size, shuffle):
    n, bs = size
    if n < bs:
        return
    loader = BatchLoader(*numbered(n), bs, shuffle=shuffle, seed=1, drop_last=True)
    batches = list(loader)
    assert len(batches) == len(loader) == n // bs
    assert all(len(xb) == len(yb) == bs for xb, yb in batches)


@law
@given(st.data(), sizes, st.booleans(), st.booleans(), st.booleans())
def test_iter_from_is_exactly_the_tail_of_the_epoch(data, size, shuffle, drop_last, augment):
    n, bs = size
    if n < bs:
        return
    x, y = images(n, c=2, side=4)
    tfms = [RandomCrop(2), RandomFlip()] if augment else None
    loader = BatchLoader(x, y, bs, shuffle=shuffle, seed=5, drop_last=drop_last, tfms=tfms)
    k, epoch = data.draw(st.integers(0, len(loader))), data.draw(st.integers(0, 3))
    loader.set_epoch(epoch)
    whole = list(loader)
    loader.set_epoch(epoch)
    assert_same_batches(loader.iter_from(k), whole[k:])
    assert loader.epoch == epoch + 1


def test_two_loaders_of_one_seed_agree_and_epochs_differ():
    a, b = (BatchLoader(*numbered(50), 8, shuffle=True, seed=3) for _ in range(2))
    first, second = labels(a), labels(a)
    assert torch.equal(first, labels(b)) and torch.equal(second, labels(b))
    assert not torch.equal(first, second)
    assert not torch.equal(first, labels(BatchLoader(*numbered(50), 8, shuffle=True, seed=4)))


def test_unshuffled_batches_are_in_order_and_views_of_the_data():
    x, y = numbered(10)
    batches = list(BatchLoader(x, y, 4))
    assert torch.equal(torch.cat([xb for xb, _ in batches]), x)
    assert [xb.data_ptr() for xb, _ in batches] == [x[i:].data_ptr() for i in (0, 4, 8)]


def test_an_epoch_left_early_is_counted_and_not_repeated():
    loader = BatchLoader(*numbered(50), 8, shuffle=True, seed=3)
    first = next(iter(loader))[1]
    assert loader.epoch == 1
    assert not torch.equal(first, next(iter(loader))[1])


def test_the_global_random_state_is_untouched_with_a_seed():
    before = torch.get_rng_state()
    list(BatchLoader(*images(), 4, shuffle=True, seed=3, tfms=[RandomCrop(2), RandomFlip()]))
    list(BatchLoader(*images(), 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_torchs_manual_seed_repeats_the_batches():
    orders = []
    for global_seed in (7, 7, 8):
        torch.manual_seed(global_seed)
        orders.append(labels(BatchLoader(*numbered(50), 8, shuffle=True)))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_the_state_continues_the_next_epoch_in_another_loader():
    a = BatchLoader(*images(), 4, shuffle=True, seed=3, tfms=RandomFlip())
    list(a), list(a)
    b = BatchLoader(*images(), 4, shuffle=True, seed=99, tfms=RandomFlip())
    b.load_state_dict(a.state_dict())
    assert_same_batches(a, b)


def test_the_mid_epoch_state_continues_the_started_epoch():
    a = BatchLoader(*images(), 4, shuffle=True, seed=3, tfms=RandomCrop(2))
    list(a)
    batches = iter(a)
    next(batches), next(batches)
    b = BatchLoader(*images(), 4, shuffle=True, seed=99, tfms=RandomCrop(2))
    b.load_state_dict(a.state_dict(mid_epoch=True))
    assert_same_batches(b.iter_from(2), batches)
    assert_same_batches(b, a)


def test_a_fresh_loaders_mid_epoch_state_is_the_first_epoch():
    assert BatchLoader(*numbered(5), 2, seed=3).state_dict(mid_epoch=True) == {"seed": 3, "epoch": 0}


@pytest.mark.parametrize("state", [{}, {"seed": 1}, {"seed": 1, "epoch": "2"}, {"seed": 1, "epoch": -1}, None])
def test_a_bad_state_is_refused_and_changes_nothing(state):
    loader = BatchLoader(*numbered(5), 2, seed=3)
    with pytest.raises(ValueError, match="epoch"):
        loader.load_state_dict(state)
    assert loader.state_dict() == {"seed": 3, "epoch": 0}


@law
@given(st.integers(0, 1000), st.sampled_from([torch.uint8, torch.float32, torch.float64]))
def test_normalisation_equals_the_float64_formula(seed, dtype):
    x, y = images(6, seed=seed)
    x = x if dtype == torch.uint8 else x.to(dtype) / 255
    g = torch.Generator().manual_seed(seed)
    mean, std = torch.rand(3, generator=g, dtype=torch.float64), torch.rand(3, generator=g, dtype=torch.float64) + 0.1
    got = torch.cat([xb for xb, _ in BatchLoader(x, y, 4, normalize=(mean.tolist(), std))])
    unit = 255 if dtype == torch.uint8 else 1
    want = (x.double() / unit - mean[:, None, None]) / std[:, None, None]
    assert got.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    tight = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(got.double(), want, rtol=tight, atol=tight)


@pytest.mark.parametrize("normalize", [None, (0.0, 1.0)])
def test_bytes_become_floats_in_0_to_1_for_any_default_dtype(normalize):
    x, y = images()
    torch.set_default_dtype(torch.float64)
    try:
        (xb, _), *_ = BatchLoader(x, y, len(x), normalize=normalize)
    finally:
        torch.set_default_dtype(torch.float32)
    assert xb.dtype == torch.float32
    torch.testing.assert_close(xb, x.float() / 255)


def test_a_single_mean_normalises_flat_rows_without_changing_the_data():
    x, y = numbered(6)
    before = x.clone()
    (xb, _), *_ = BatchLoader(x, y, 6, normalize=(5.0, 2.0))
    torch.testing.assert_close(xb, (before - 5) / 2)
    assert torch.equal(x, before)


def test_integers_other_than_bytes_are_unchanged():
    x, y = torch.arange(12).reshape(6, 2), torch.arange(6)
    (xb, _), *_ = BatchLoader(x, y, 6)
    assert xb.dtype == torch.int64 and torch.equal(xb, x)


def test_transforms_run_in_order_after_normalisation():
    x, y = images(4, c=1, side=2)
    loader = BatchLoader(x, y, 4, normalize=(0.0, 1.0), tfms=[lambda xb: xb * 2, view_tfm(4), lambda xb: xb + 1])
    (xb, _), *_ = loader
    torch.testing.assert_close(xb, x.float().view(4, 4) / 255 * 2 + 1)


def test_augmentation_differs_between_epochs_and_batches_of_equal_images():
    x = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(40, -1, -1, -1)
    loader = BatchLoader(x, torch.zeros(40), 20, seed=1, tfms=RandomCrop(4))
    (a, _), (b, _) = loader
    (c, _), _ = loader
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_the_data_set_is_the_stored_pair():
    x, y = images()
    loader = BatchLoader(x, y, 4)
    assert isinstance(loader.dataset, Dataset) and loader.dataset.x is x and loader.dataset.y is y
    assert loader.bs == loader.batch_size == 4


def test_to_moves_the_tensors_and_returns_the_loader():
    loader = BatchLoader(*images(), 4, normalize=(0.5, 0.5))
    assert loader.to("meta") is loader
    assert loader.device.type == loader.dataset.y.device.type == "meta"
    xb, yb = next(iter(loader))
    assert xb.device.type == yb.device.type == "meta"
    assert BatchLoader(*numbered(3), 2, device="meta").device.type == "meta"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["deepcopy", "pickle"])
def test_a_copy_continues_as_the_original(clone):
    a = BatchLoader(*images(), 4, shuffle=True, seed=3, normalize=(0.5, 0.5), tfms=RandomFlip())
    list(a)
    assert_same_batches(clone(a), a)


def test_the_repr_names_what_matters():
    text = repr(BatchLoader(*images(), 4, shuffle=True, seed=3, normalize=(0.123456, 0.5), tfms=RandomFlip()))
    for word in ("bs=4", "shuffle=True", "seed=3", "(20, 3, 8, 8)", "uint8", "0.1235", "RandomFlip"):
        assert word in text


X, Y = numbered(6)


@pytest.mark.parametrize(
    "args, kwargs, error, words",
    [
        ((X, Y[:5], 2), {}, ValueError, ["6", "5"]),
        ((X[:0], Y[:0], 2), {}, ValueError, ["at least one sample"]),
        ((X, Y, 0), {}, ValueError, ["batch size", "0"]),
        ((X, Y, -1), {}, ValueError, ["batch size", "-1"]),
        ((X, Y, 2.5), {}, ValueError, ["batch size", "2.5"]),
        ((X, Y, True), {}, ValueError, ["batch size", "True"]),
        ((X, Y, "8"), {}, ValueError, ["batch size", "'8'"]),
        ((X.numpy(), Y, 2), {}, TypeError, ["ndarray", "as_tensor"]),
        ((X, [1] * 6, 2), {}, TypeError, ["y is a list"]),
        ((torch.tensor(1.0), Y, 2), {}, ValueError, ["without dimensions"]),
        ((X, Y, 7), {"drop_last": True}, ValueError, ["drop_last", "6", "7"]),
        ((X, Y, 2), {"tfms": [3]}, TypeError, ["tfms", "3"]),
        ((X, Y, 2), {"normalize": ([0, 0], [1, 1])}, ValueError, ["1 or 3", "2"]),
        ((X, Y, 2), {"normalize": (0, 0)}, ValueError, ["positive", "constant"]),
        ((X, Y, 2), {"normalize": (float("nan"), 1)}, ValueError, ["finite"]),
        ((X.long(), Y, 2), {"normalize": (0, 1)}, ValueError, ["int64", "float()"]),
    ],
)
def test_bad_arguments_are_named_with_what_came(args, kwargs, error, words):
    with pytest.raises(error) as e:
        BatchLoader(*args, **kwargs)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize("k", [-1, 4])
def test_iter_from_refuses_a_batch_beyond_the_epoch(k):
    loader = BatchLoader(X, Y, 2)
    with pytest.raises(ValueError, match=f"0 to 3.*got {k}"):
        loader.iter_from(k)
    assert loader.epoch == 0


def test_set_epoch_refuses_a_negative_number():
    with pytest.raises(ValueError, match="-2"):
        BatchLoader(X, Y, 2).set_epoch(-2)


def test_mixed_seeds_do_not_collide_in_their_low_bits():
    low = {mix(s, e, b) & 0xFFFFFFFF for s in range(10) for e in range(10) for b in range(100)}
    assert len(low) == 10_000


def test_a_data_set_pairs_and_refuses_unequal_lengths():
    ds = Dataset(X, Y)
    assert len(ds) == 6 and torch.equal(ds[2][0], X[2]) and ds[2][1] == 2
    xs, ys = ds[[1, 3]]
    assert torch.equal(xs, X[[1, 3]]) and ys.tolist() == [1, 3]
    with pytest.raises(ValueError, match="6 inputs and 4 targets"):
        Dataset(X, Y[:4])


@pytest.mark.parametrize("n", [32, 45, 43, 40])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_parts_make_the_batches_of_one_loader_with_world_times_the_size(n, shuffle, drop_last):
    x, y = torch.arange(n).float(), torch.arange(n)
    world, bs = 3, 4
    whole = BatchLoader(x, y, bs * world, shuffle, 5, drop_last)
    parts = [BatchLoader(x, y, bs, shuffle, 5, drop_last).shard(r, world) for r in range(world)]
    for epoch in range(2):
        batches, cut = list(whole), [list(p) for p in parts]
        assert [len(p) for p in parts] == [len(c) for c in cut] == [len(batches)] * world
        for i, (xb, yb) in enumerate(batches):
            assert torch.equal(torch.cat([c[i][0] for c in cut]), xb) and torch.equal(
                torch.cat([c[i][1] for c in cut]), yb
            )
            assert {len(c[i][0]) for c in cut} <= {len(xb) // world, -(-len(xb) // world)}
    for p in parts:
        p.set_epoch(1)
        tail = list(p.iter_from(1))
        p.set_epoch(1)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(tail, list(p)[1:], strict=True))


def test_a_last_batch_with_fewer_samples_than_parts_is_left_out_of_training_only():
    x = torch.arange(26).float()
    with pytest.warns(
        UserWarning, match="the last 2 samples of each epoch are not trained on: there are fewer of them than the 3"
    ):
        first = BatchLoader(x, x, 4).shard(0, 3)
    parts = [first, BatchLoader(x, x, 4).shard(1, 3), BatchLoader(x, x, 4).shard(2, 3)]
    assert [len(p) for p in parts] == [len(list(p)) for p in parts] == [2, 2, 2]
    parts = [p.shard(r, 3, even=False) for r, p in enumerate(parts)]
    assert [len(p) for p in parts] == [len(list(p)) for p in parts] == [3, 3, 2]
    assert sorted(torch.cat([xb for p in parts for xb, _ in p]).tolist()) == x.tolist()
    assert len(first.shard()) == 7 and first.world == 1 and "part" not in repr(first)


def test_parts_draw_different_transforms_and_the_first_those_of_one_loader():
    x = torch.rand(16, 1, 4, 4)

    def draws(rank, world):
        seen = []
        noise = lambda xb, generator: seen.append(torch.rand(3, generator=generator)) or xb
        noise.takes_generator = True
        list(BatchLoader(x, x, 4, seed=1, tfms=[noise]).shard(rank, world))
        return torch.stack(seen)

    assert torch.equal(draws(0, 2), draws(0, 1)[:2]) and not torch.equal(draws(0, 2), draws(1, 2))


@pytest.mark.parametrize(
    "args, text",
    [
        ((2, 2), "shard needs a rank from 0 to world - 1; got rank 2 with world 2"),
        ((0, 9), "needs 9 samples; there are 8"),
    ],
)
def test_impossible_parts_are_refused_and_change_nothing(args, text):
    loader = BatchLoader(torch.rand(8, 2), torch.rand(8), 4)
    with pytest.raises(ValueError, match=text):
        loader.shard(*args)
    assert len(loader) == 2
