"""get_dls and DataBunch: which loader is made for which data, and what a bunch knows."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from fastrbn.data import DataBunch, Dataset, get_dls, glyphs, image_databunch

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
