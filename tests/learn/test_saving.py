"""learn.save and learn.load: every form of file, and nothing loaded in part."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn import RunningBatchNorm1d
from fastrbn.callbacks import AvgStatsCallback, Checkpoint, CheckpointError, SaveBest
from fastrbn.data import DataBunch, Dataset, get_dls
from fastrbn.learn import Learner, Runner

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


def make_learn(width=8, norm=nn.BatchNorm1d, opt=torch.optim.Adam, loss_func=F.cross_entropy, lr=0.1):
    model = nn.Sequential(nn.Linear(4, width), norm(width), nn.Linear(width, 3))
    data = DataBunch(*get_dls(Dataset(X, Y), Dataset(X, Y), 4, seed=0))
    return Learner(model, opt(model.parameters(), lr=lr), loss_func, data)


def weights(learn):
    return {name: value.clone() for name, value in learn.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_learner_goes_on_from_its_file_as_if_nothing_had_happened(tmp_path):
    learn = make_learn()
    Runner().fit(1, learn)
    path = learn.save(tmp_path / "new" / "a.pt")
    assert path == tmp_path / "new" / "a.pt"
    saved, ours = weights(learn), make_learn(lr=0.5)
    assert ours.load(path) is ours
    assert same(weights(ours), saved) and ours.opt.param_groups[0]["lr"] == 0.1
    for other in (learn, ours):
        other.data.train_dl.set_epoch(5)
        Runner().fit(1, other)
    assert same(weights(ours), weights(learn)) and not same(weights(learn), saved)
    learn.load(path)
    assert same(weights(learn), saved)


def test_the_file_is_plain_data_and_can_leave_the_optimiser_out(tmp_path):
    learn = make_learn()
    assert same(torch.load(learn.save(tmp_path / "a.pt"), weights_only=True)["model"], weights(learn))
    assert "opt" not in torch.load(learn.save(tmp_path / "b.pt", opt=False), weights_only=True)
    Runner().fit(1, learn)
    state = learn.opt.state_dict()["state"]
    learn.load(tmp_path / "b.pt")
    assert state and learn.opt.state_dict()["state"].keys() == state.keys()  # kept


def test_files_of_checkpoint_savebest_and_plain_state_dicts_are_loaded(tmp_path):
    learn = make_learn()
    run = Runner([AvgStatsCallback(), SaveBest(tmp_path / "best.pt"), Checkpoint(tmp_path / "ck")])
    run.logger = lambda line: None
    run.fit(1, learn)
    torch.save(learn.model.state_dict(), tmp_path / "sd.pt")
    torch.save(learn.model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": learn.model.state_dict(), "epoch": 3}, tmp_path / "other.pt")
    for file in ("best.pt", next((tmp_path / "ck").iterdir()), "sd.pt", "old.pt", "other.pt"):
        ours = make_learn().load(tmp_path / file)
        assert same(weights(ours), weights(learn)), file
        assert bool(ours.opt.state_dict()["state"]) == (str(file).endswith("-step-3.pt"))


def test_a_batch_norms_weights_load_into_running_batch_norm(tmp_path):
    learn = make_learn()
    Runner().fit(1, learn)
    ours = make_learn(norm=RunningBatchNorm1d).load(learn.save(tmp_path / "a.pt"), opt=False)
    assert torch.equal(ours.model[1].running_mean, learn.model[1].running_mean)


def test_a_loss_function_with_parameters_is_saved_too(tmp_path):
    class Learned(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, pred, yb):
            return F.cross_entropy(pred * self.scale, yb)

    path = make_learn(loss_func=Learned(2.0)).save(tmp_path / "a.pt")
    assert make_learn(loss_func=Learned(1.0)).load(path).loss_func.scale.item() == 2


def fails_with(message, learn, path, **kwargs):
    before, state = weights(learn), str(learn.opt.state_dict())
    with pytest.raises(CheckpointError, match=message):
        learn.load(path, **kwargs)
    assert same(weights(learn), before) and str(learn.opt.state_dict()) == state


def test_what_does_not_fit_is_refused_and_nothing_is_loaded_in_part(tmp_path):
    learn = make_learn()
    path = learn.save(tmp_path / "a.pt")
    first = re.escape("0.weight (float32 [8, 4] there, float32 [6, 4] here), 0.bias (float32 [8] there, ")
    fails_with(f"a.pt cannot be loaded: the checkpoint is of another model: {first}", make_learn(6), path, opt=False)
    fails_with("another model: 1.weight", make_learn(norm=lambda n: nn.Identity()), path, opt=False)
    sgd = make_learn(opt=torch.optim.SGD)
    fails_with(r"another optimiser than SGD: Adam; .*weights alone: learn.load\(.*opt=False\)", sgd, path)
    assert same(weights(sgd.load(path, opt=False)), weights(learn))
    torch.save({"epoch": 1, "best": math.pi}, tmp_path / "none.pt")
    fails_with("holds no weights; .* got 'epoch', 'best'", learn, tmp_path / "none.pt")
    torch.save(learn.model, tmp_path / "whole.pt")
    fails_with("more than plain data, so it is not opened", learn, tmp_path / "whole.pt")
    fails_with("cannot be read: No such file", learn, tmp_path / "missing.pt")
    fails_with("it is a folder: name a file in it", learn, tmp_path)
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-9])
    fails_with("cut.pt", learn, tmp_path / "cut.pt")


def test_a_folder_is_no_file_to_save_to(tmp_path):
    with pytest.raises(IsADirectoryError, match="add a name, such as weights.pt"):
        make_learn().save(tmp_path)


def test_a_fit_cannot_be_resumed_from_weights(tmp_path):
    learn = make_learn()
    with pytest.raises(CheckpointError, match="holds weights and no position in a fit.*load it with learn.load"):
        Runner().fit(1, learn, resume=learn.save(tmp_path / "a.pt"))
