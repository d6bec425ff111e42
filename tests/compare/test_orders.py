"""Orders of correlated samples: what each batch holds, for every batch size."""

from itertools import pairwise

import pytest
import torch

from fastrbn.compare import STUDIES, get_norm, get_task, task_data, tasks
from fastrbn.data.image_data import ImageData
from fastrbn.data.sets import Dataset

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
    x = torch.zeros(30, 1, 28, 28, dtype=torch.uint8)
    x[:, :, 10:14, 12:18] = 200
    part = Dataset(x, torch.arange(30) % 10)
    monkeypatch.setattr(task_data, "_images", lambda name, root=None: ImageData(name, part, part, list("0123456789")))
    still, y, *valid = task_data.digits()
    frames, labels, *filmed_valid = task_data.filmed(noise=0)
    assert frames.shape == (240, 1, 28, 28) and torch.equal(labels, y.repeat_interleave(8))
    assert all(map(torch.equal, valid, filmed_valid))

    corners = (frames == still.max()).flatten(1).float().argmax(1)
    at = torch.stack([corners // 28 - 10, corners % 28 - 12], 1).view(30, 8, 2)
    assert set(at.flatten().tolist()) == {-2, -1, 0, 1, 2} and at.diff(dim=1).abs().max() == 1
    assert all(len(clip.unique(dim=0)) > 1 for clip in at), "every clip moves"
    noisy = task_data.filmed()[0]
    assert (noisy - frames).std().item() == pytest.approx(0.2, rel=0.05)
    assert torch.equal(noisy, task_data.filmed()[0])


def test_every_order_is_trained_alike():
    names = ["shuffled", "video", "one-class", "runs"]
    for end in ("", "-full"):
        found = [get_task(f"order-{name}{end}") for name in names]
        assert len({t.batches for t in found}) == 4 and len({t.net for t in found}) == 1
        assert all(a.steps == b.steps and a.lr(8) == b.lr(8) and a.schedule == b.schedule for a, b in pairwise(found))


@pytest.mark.parametrize("name", ["correlated", "large-batch"])
def test_tasks_of_the_study_build_a_net_for_its_norms_at_both_lengths(name):
    study = STUDIES[name]
    for task in (*study.tasks, *study.full().tasks):
        model = get_task(task).net(get_norm("batchnorm")).eval()
        shape = (1, 196) if "mlp" in task else (1, 3, 32, 32) if "large" in task else (1, 1, 28, 28)
        assert model(torch.zeros(shape)).shape == (1, 10)
        assert get_task(task).n_steps(study.bs[0]) > get_task(task).n_steps(study.bs[-1])
