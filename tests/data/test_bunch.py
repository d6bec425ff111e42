"""get_dls and DataBunch: which loader comes for which data, and what a bunch knows."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from fastrbn.data import BatchLoader, DataBunch, Dataset, get_dls

X, Y = torch.arange(20.0).view(10, 2), torch.arange(10) % 4


class CourseDataset:
    """The course's own class, without ours as base."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Noisy(Dataset):
    def __getitem__(self, i):
        return self.x[i] + 1, self.y[i]


class Half(Dataset):
    def __len__(self):
        return len(self.x) // 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(2), 0)])


@pytest.mark.parametrize("make", [Dataset, CourseDataset, TensorDataset])
def test_tensors_in_memory_give_batch_loaders(make):
    train, valid = get_dls(make(X, Y), make(X[:6], Y[:6]), 2, seed=1)
    assert type(train) is type(valid) is BatchLoader
    assert (train.bs, valid.bs, train.shuffle, valid.shuffle) == (2, 4, True, False)
    assert train.dataset.x is X and valid.dataset.x.shape == (6, 2)
    assert torch.equal(torch.cat([yb for _, yb in valid]), Y[:6])


@pytest.mark.parametrize(
    "ds",
    [Dataset(list(X), Y.tolist()), Subset(Dataset(X, Y), range(5)), TensorDataset(X, Y, Y), Noisy(X, Y), Half(X, Y)],
    ids=["lists", "subset", "three-tensors", "items-changed", "length-changed"],
)
def test_other_data_sets_give_torch_loaders(ds):
    train, valid = get_dls(ds, ds, 2, seed=1)
    assert type(train) is type(valid) is DataLoader
    assert (train.batch_size, valid.batch_size) == (2, 4)
    assert torch.equal(next(iter(valid))[0][0], ds[0][0])


def test_asking_for_a_torch_option_gives_torch_loaders_that_have_it():
    train, valid = get_dls(Dataset(X, Y), Dataset(X, Y), 2, pin_memory=False, timeout=0, drop_last=True)
    assert type(train) is type(valid) is DataLoader and train.drop_last and not valid.drop_last


def test_one_seed_gives_one_order_with_either_loader():
    for kwargs in ({}, {"num_workers": 0}):
        runs = [torch.cat([yb for _, yb in get_dls(Dataset(X, Y), Dataset(X, Y), 2, seed=5, **kwargs)[0]])
                for _ in range(2)]
        assert torch.equal(*runs)


def test_normalisation_goes_to_both_loaders_and_transforms_to_training_only():
    train, valid = get_dls(Dataset(X, Y), Dataset(X, Y), 10, seed=1, normalize=(3, 2), tfms=lambda xb: xb * 0)
    assert next(iter(train))[0].abs().max() == 0
    torch.testing.assert_close(next(iter(valid))[0], (X - 3) / 2)


def test_drop_last_is_for_training():
    train, valid = get_dls(Dataset(X, Y), Dataset(X, Y), 3, drop_last=True)
    assert (len(train), len(valid)) == (3, 2)


@pytest.mark.parametrize("kwargs, words", [
    ({"normalize": (0, 1), "num_workers": 0}, "asked for by num_workers"),
    ({"device": "meta", "num_workers": 0}, "CudaCallback"),
])
def test_options_that_do_not_go_together_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        get_dls(Dataset(X, Y), Dataset(X, Y), 2, **kwargs)


def test_the_reason_for_torch_loaders_names_the_data_set():
    with pytest.raises(ValueError, match="valid_ds does not hold plain tensors"):
        get_dls(Dataset(X, Y), Dataset([1], [2]), 2, normalize=(0, 1))


def test_a_bad_batch_size_is_refused_for_torch_loaders_too():
    with pytest.raises(ValueError, match="batch size.*0"):
        get_dls(Dataset([1], [2]), Dataset([1], [2]), 0)


def bunch(x, y=Y, **kwargs):
    return DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), 2), **kwargs)


def test_a_bunch_gives_its_data_sets():
    data = bunch(X)
    assert data.train_ds.x is X and data.valid_ds.y is Y


@pytest.mark.parametrize("shape, c_in", [((10, 784), 1), ((10, 3, 4, 4), 3), ((10, 1, 4, 4), 1), ((10, 5, 5), None)])
def test_the_channels_are_read_off_the_data(shape, c_in):
    assert bunch(torch.zeros(shape)).c_in == c_in


def test_the_classes_are_counted_over_both_sets_and_only_for_labels():
    train, valid = Dataset(X, Y), Dataset(X, torch.full((10,), 6))
    assert DataBunch(*get_dls(train, valid, 2)).c == 7
    assert bunch(X, y=torch.rand(10)).c is None


def test_what_is_passed_wins():
    data = bunch(X, c=10, c_in=2)
    assert (data.c, data.c_in) == (10, 2)


def test_torch_loaders_and_streams_make_a_bunch():
    dl = DataLoader(TensorDataset(torch.zeros(4, 3, 2, 2), torch.zeros(4)), 2)
    assert DataBunch(dl, dl).c_in == 3
    stream = DataLoader(Stream(), 1)
    assert DataBunch(stream, stream).c_in is None and DataBunch(stream, stream, c=3).c == 3


def test_any_iterable_of_batches_makes_a_bunch():
    assert DataBunch([(X, Y)], [(X, Y)]).c is None
