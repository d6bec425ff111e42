"""Orders of correlated samples: what each batch holds, for every batch size."""

from itertools import pairwise

import pytest
import torch

from fastrbn.compare import get_task, task_data, tasks
from fastrbn.data import glyphs

LABELS = torch.arange(400) % 10


def stream(kind, y, bs, steps, seed=0):
    """The batches, and all their samples in a row."""
    found = list(tasks.BATCHES[kind](y, bs, steps, torch.Generator().manual_seed(seed)))
    assert len(found) == steps and all(len(i) == bs for i in found)
    return torch.cat(found)


@pytest.mark.parametrize("bs", [2, 5, 8, 32])
def test_a_run_is_16_samples_of_one_class_whatever_the_batch_size(bs):
    seen = LABELS[stream("runs of 16 samples of one class", LABELS, bs, 320 // bs)]
    runs = seen[:304].view(-1, 16)
    assert (runs == runs[:, :1]).all() and len(runs[:, 0].unique()) > 4
    assert torch.equal(seen, LABELS[stream("runs of 16 samples of one class", LABELS, 1, len(seen))])


@pytest.mark.parametrize("bs", [2, 5, 8, 32])
def test_clips_come_whole_and_in_random_order(bs):
    y = torch.arange(20).repeat_interleave(task_data.FRAMES)
    clips = stream("clips frame by frame", y, bs, 320 // bs)
    whole = clips[: len(clips) // 8 * 8].view(-1, 8)
    assert torch.equal(whole - whole[:, :1], torch.arange(8).expand_as(whole)) and (whole[:, 0] % 8 == 0).all()
    assert len(whole[:20, 0].unique()) == len(whole[:20]), "an epoch has each clip once"
    assert whole[:20, 0].tolist() != sorted(whole[:20, 0].tolist())


@pytest.mark.parametrize("kind", ["runs of 16 samples of one class", "clips frame by frame"])
def test_the_order_is_a_function_of_the_seed(kind):
    first, again, other = (stream(kind, LABELS, 8, 10, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_frames_of_a_clip_are_one_digit_that_wanders_under_noise(monkeypatch):
    digits = glyphs(60, 20)
    monkeypatch.setattr(task_data, "_images", lambda name, root=None: digits)
    still, y, *valid = task_data.digits()
    x, labels, *filmed_valid = task_data.filmed(noise=0)
    assert x.shape == (480, 1, 28, 28) and torch.equal(labels, y.repeat_interleave(8))
    assert all(map(torch.equal, valid, filmed_valid))

    def place(images):
        """Centre of mass, (N, 2)."""
        ink = images[:, 0] - images.min()
        rows = torch.arange(28.0)
        return torch.stack([(ink.sum(2) * rows).sum(1), (ink.sum(1) * rows).sum(1)], 1) / ink.sum((1, 2))[:, None]

    moved = (place(x) - place(still.repeat_interleave(8, 0))).view(60, 8, 2)
    assert 1.5 < moved.abs().max() < 2.1 and (moved[:, 1:] - moved[:, :-1]).abs().max() < 1.1
    assert (moved.flatten(1).std(1) > 0.1).all(), "every clip moves"
    noisy = task_data.filmed()[0]
    assert (noisy - x).std().item() == pytest.approx(0.2, rel=0.05)
    assert torch.equal(noisy, task_data.filmed()[0])


def test_every_order_is_trained_alike():
    names = ["shuffled", "video", "one-class", "runs"]
    for end in ("", "-full"):
        found = [get_task(f"order-{name}{end}") for name in names]
        assert len({t.batches for t in found}) == 4 and len({t.net for t in found}) == 1
        assert all(a.steps == b.steps and a.lr(8) == b.lr(8) and a.schedule == b.schedule for a, b in pairwise(found))
