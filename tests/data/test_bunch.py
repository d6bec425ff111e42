"""get_dls and DataBunch: which loader is made for which data, and what a bunch knows."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from fastrbn.data import BatchLoader, DataBunch, Dataset, get_dls, glyphs, image_databunch, overfit

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
        return ((torch.randn(4), i % 2) for i in range(6))


class SizedStream(Stream):
    def __len__(self):
        return 6


@pytest.mark.parametrize("stream", [Stream, SizedStream])
def test_a_stream_goes_into_a_bunch_in_its_own_order(stream):
    data = DataBunch(*get_dls(stream(), stream(), 4), c=2)
    assert (data.c, data.c_in) == (2, None)
    assert [yb.tolist() for _, yb in data.train_dl] == [[0, 1, 0, 1], [0, 1]]


def test_a_data_set_whose_items_have_names_goes_into_a_bunch():
    class Named(dict):
        pass

    loader = DataLoader(Named(a=(1, 2)), sampler=["a"])
    assert DataBunch(loader, loader).c_in is None


def test_names_of_classes_give_their_number_and_come_with_images():
    loader = [(torch.zeros(1), torch.zeros(1))]
    data = DataBunch(loader, loader, c_in=1, classes=["cat", 7])
    assert (data.c, data.classes) == (2, ("cat", "7"))
    assert DataBunch(loader, loader, c_in=1).classes is None
    images = glyphs(16, 10)
    assert image_databunch(images, 8).classes == images.classes


# --- overfit


class Draws(Dataset):
    def __getitem__(self, i):
        return self.x[i] + torch.rand(()), self.y[i]


LOADERS = {
    "BatchLoader": lambda: BatchLoader(X, Y, 4, shuffle=True),
    "DataLoader": lambda: DataLoader(Draws(X, Y), 4, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 2),
    "list": lambda: [(X[i : i + 4], {"y": Y[i : i + 4]}) for i in (0, 4)],
}


@pytest.mark.parametrize("name", LOADERS)
def test_overfit_keeps_the_same_batches_for_every_epoch_and_for_validation(name):
    data = overfit(SimpleNamespace(train_dl=LOADERS[name](), c=7), 2)
    passes = [[xb.tolist() for xb, _ in dl] for dl in (data.train_dl, data.train_dl, data.valid_dl)]
    assert passes[0] == passes[1] == passes[2]
    assert len(data.train_dl) == len(passes[0]) == 2 and data.c == 7
    assert "2 of the batches of" in repr(data)


def test_overfit_knows_what_pictures_have_to_undo():
    data = image_databunch(glyphs(16, 10), 8)
    assert overfit(data).train_dl.normalize == data.train_dl.normalize is not None


def test_overfit_needs_as_many_batches():
    with pytest.raises(ValueError, match="cannot keep 3 batches: the training loader has 2. Use a smaller n"):
        overfit(SimpleNamespace(train_dl=LOADERS["list"]()), 3)
    with pytest.raises(ValueError, match="overfit: n must be a whole number, 1 or more; got 0"):
        overfit(SimpleNamespace(train_dl=[]), 0)
