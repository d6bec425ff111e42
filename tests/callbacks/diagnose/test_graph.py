"""GraphMonitor: planted leaks are found and named, and nothing else is."""

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrbn import RECIPES, GraphMonitor, HaltOnNaN, ParamMagnitudes, Recorder, RunningBatchNorm
from fastrbn.callbacks import ActivationStats, AvgStatsCallback, accuracy
from fastrbn.learn import Callback, Runner


class Sums(nn.Module):
    """A norm in the manner of the course, which forgets to detach from a given forward on."""

    def __init__(self, nf, forgets_at=0, before=True):
        super().__init__()
        self.forgets_at, self.before, self.n = forgets_at, before, 0
        self.register_buffer("sums", torch.zeros(nf))
        self.weight = nn.Parameter(torch.ones(nf))

    def update(self, x):
        new = x.mean(0)
        self.sums = self.sums.lerp(new if self.n >= self.forgets_at else new.detach(), 0.1)
        self.n += 1

    def forward(self, x):
        if self.before:
            self.update(x)
        y = (x - self.sums) * self.weight
        if not self.before:
            self.update(x)
        return y


class Keeps(nn.Module):
    """Stores outputs of its forwards by `store(self, y)`."""

    def __init__(self, store):
        super().__init__()
        self.kept, self.store = [], store

    def forward(self, x):
        y = x * 1.5
        self.store(self, y)
        return y


def net(*inside):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), *inside, nn.Linear(8, 3))


def monitored(make_learn, model=None, cbs=(), n=7, n_valid=2, epochs=1, fails=False, **kwargs):
    loss_func = kwargs.pop("loss_func", F.cross_entropy)
    learn = make_learn(n_train=n, n_valid=n_valid, model=net() if model is None else model, loss_func=loss_func)
    said = []

    class Says(Callback):
        def begin_fit(self):
            self.run.logger = said.append

    run = Runner([Says(), *cbs, GraphMonitor(**kwargs)])
    if fails:  # as it does without the monitor
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            run.fit(epochs, learn)
    else:
        run.fit(epochs, learn)
    assert said == ([] if run.graph_monitor.report is None else [str(run.graph_monitor.report)]), "said once"
    return run.graph_monitor


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("forgets_at", [0, 17])
def test_a_buffer_that_is_not_detached_is_named_with_the_step(make_learn, forgets_at, before):
    monitor = monitored(make_learn, net(Sums(8, forgets_at, before)), n=20, fails=True)
    report = monitor.report
    assert (report.step, report.batch, report.made_in) == (forgets_at + 1, forgets_at + 1, forgets_at)
    (holder,) = report.holders
    assert (holder.name, holder.kind, holder.step, holder.last_step) == ("2.sums", "buffer", forgets_at, forgets_at)
    assert f"2.sums holds the graph of step {forgets_at}\n" in str(report)
    assert report.nodes == monitor.counts[-1] > report.first_nodes == monitor.counts[0]


def test_a_list_of_a_module_is_named_and_so_is_what_is_nested(make_learn):
    for store, name in [
        (lambda m, y: m.kept.append(y), "2.kept"),
        (lambda m, y: vars(m).setdefault("cache", {}).setdefault("a", []).append((y, 1)), "2.cache"),
        (lambda m, y: vars(m).setdefault("recent", collections.deque(maxlen=5)).append(y), "2.recent"),
    ]:
        (holder,) = monitored(make_learn, net(Keeps(store))).report.holders
        assert (holder.name, holder.kind, holder.step, holder.last_step) == (name, "attribute", 0, 2)


def test_an_attribute_that_the_next_step_reads_is_named_when_the_loss_reaches_it(make_learn):
    class Reads(nn.Module):
        def forward(self, x):
            y = x + vars(self).get("memory", 0)
            self.memory = y.mean(0)
            return y

    report = monitored(make_learn, net(Reads()), fails=True).report
    assert [(h.name, h.step) for h in report.holders] == [("2.memory", 0)] and report.made_in == 0


class Once(nn.Module):
    """Its buffer is left with a graph after one forward; the next uses it, and leaves it clean again."""

    def __init__(self, at):
        super().__init__()
        self.at, self.n = at, 0
        self.register_buffer("memory", torch.zeros(8))

    def forward(self, x):
        y = x + self.memory
        self.memory = x.mean(0) if self.n == self.at else x.mean(0).detach()
        self.n += 1
        return y


def test_a_buffer_that_has_dropped_its_graph_by_the_time_of_the_loss_is_named_all_the_same(make_learn):
    report = monitored(make_learn, net(Once(at=10)), n=14, every=1000, fails=True).report
    assert (report.step, [(h.name, h.step) for h in report.holders]) == (11, [("2.memory", 10)])


def test_what_an_earlier_fit_left_behind_is_older_than_this_one(make_learn):
    model = net(Once(at=6))
    assert monitored(make_learn, model, n=7, n_valid=0).report is None
    report = monitored(make_learn, model, fails=True).report
    assert (report.step, report.made_in, [h.name for h in report.holders]) == (0, -1, ["2.memory"])


def test_a_buffer_of_a_module_that_came_within_the_fit_is_named(make_learn):
    class Adds(Callback):
        def begin_epoch(self):
            if self.run.epoch == 1:
                self.run.model[2] = Once(at=5)

    report = monitored(make_learn, net(Once(at=99)), [Adds()], epochs=2, every=1000, fails=True).report
    assert (report.step, [h.name for h in report.holders]) == (13, ["2.memory"])


class ListOfLosses(Callback):
    def begin_fit(self):
        self.losses = []

    def after_batch(self):
        if self.run.in_train:
            self.losses.append(self.run.loss)


class RunningTotal(Callback):
    def begin_fit(self):
        self.total = 0.0

    def after_loss(self):
        if self.run.in_train:
            self.total = self.total + self.run.loss


class InAnObject(ListOfLosses):
    class Store:
        pass

    def begin_fit(self):
        self.store = self.Store()
        self.store.all = []

    def after_batch(self):
        if self.run.in_train:
            self.store.all.append(self.run.loss)


@pytest.mark.parametrize(
    ("cb", "name", "step"),
    [
        (ListOfLosses, "ListOfLosses.losses", 2),
        (RunningTotal, "RunningTotal.total", 1),
        (InAnObject, "InAnObject.store.all", 2),
    ],
)
def test_a_callback_that_keeps_the_loss_is_named(make_learn, cb, name, step):
    report = monitored(make_learn, cbs=[cb()]).report
    (holder,) = report.holders
    assert (holder.name, holder.kind, holder.step) == (name, "attribute", 0)
    assert (report.made_in, report.step) == (None, step)
    assert "keep it detached" in str(report)


def test_a_list_that_begins_late_is_found_by_the_losses_that_stay_alive(make_learn):
    class Late(Callback):
        def begin_fit(self):
            self.losses = []

        def after_loss(self):
            if self.run.in_train and self.run.n_iter >= 10:
                self.losses.append(self.run.loss)

    report = monitored(make_learn, cbs=[Late()], n=20, every=1000).report
    assert (report.step, [(h.name, h.step) for h in report.holders]) == (12, [("Late.losses", 10)])


KEPT_GLOBALLY = []


def test_a_list_in_a_global_variable_is_found(make_learn):
    class Global(Callback):
        def after_loss(self):
            if self.run.in_train:
                KEPT_GLOBALLY.append(self.run.loss)

    try:
        (holder,) = monitored(make_learn, cbs=[Global()]).report.holders
    finally:
        KEPT_GLOBALLY.clear()
    assert holder.name.endswith(".KEPT_GLOBALLY") and holder.kind == "global"


class Trainer:
    """As Lightning's, which each module of its kind refers to."""

    def __init__(self, model):
        self.model, self.losses, self.metric = model, [], nn.Module()
        self.metric.trainer = self


def test_an_object_that_leads_back_to_the_model_is_entered_once(make_learn):
    learn = make_learn()
    learn.model.trainer = trainer = Trainer(learn.model)
    run = Runner([GraphMonitor()])
    run.logger = lambda line: None
    learn.loss_func = lambda pred, yb: trainer.losses.append(F.cross_entropy(pred, yb)) or trainer.losses[-1]
    run.fit(1, learn)
    assert [h.name for h in run.graph_monitor.report.holders] == ["trainer.losses"]


def test_run_learner_loss_function_and_optimiser_are_looked_at_too(make_learn):
    class Stores(Callback):
        def __init__(self, where):
            self.where = where

        def after_loss(self):
            run = self.run
            if run.in_train:
                p = run.opt.param_groups[0]["params"][0]
                owner = {
                    "run": vars(run),
                    "learn": vars(run.learn),
                    "opt": run.opt.state[p],
                    "loss": vars(run.loss_func),
                }
                owner[self.where].setdefault("mine", []).append(run.loss * 1)

    for where, name in [("run", "run.mine"), ("learn", "learn.mine"), ("opt", "opt.state[0.weight]")]:
        monitor = monitored(make_learn, cbs=[Stores(where)])
        assert [h.name for h in monitor.report.holders] == [name]
    monitor = monitored(make_learn, cbs=[Stores("loss")], loss_func=nn.CrossEntropyLoss())
    assert [h.name for h in monitor.report.holders] == ["loss_func.mine"]


def test_what_was_made_before_the_fit_is_said_to_be(make_learn):
    model = net()
    model.scale = model[0].bias * 2

    class Uses(Callback):
        def after_loss(self):
            if self.run.in_train:
                self.run.loss = self.run.loss + self.run.model.scale.sum()

    report = monitored(make_learn, model, [Uses()], fails=True).report
    assert (report.step, report.made_in, [h.name for h in report.holders]) == (0, -1, ["scale"])
    assert "reaches nodes made in the time before the fit" in report.sentence


def test_growth_is_reported_alone_and_allowed_with_max_growth(make_learn):
    class Grows(nn.Module):
        n = 0

        def forward(self, x):
            self.n += 1
            for _ in range(3 if self.n > 4 else 1):
                x = x * 1.1
            return x

    report = monitored(make_learn, net(Grows())).report
    assert (report.step, report.nodes - report.first_nodes, report.holders, report.made_in) == (4, 2, [], None)
    assert "allow that with max_growth" in str(report) and report.sentence.startswith("the loss's graph grows")
    assert monitored(make_learn, net(Grows()), max_growth=2).report is None
    assert monitored(make_learn, net(Grows()), n=5).report.step == 4, "in the last step too"


@pytest.mark.parametrize(("recipe", "backend"), [("default", "fused"), *((recipe, "reference") for recipe in RECIPES)])
def test_no_recipe_of_the_layer_grows_or_holds_anything(make_learn, recipe, backend):
    monitor = monitored(make_learn, net(RunningBatchNorm(8, recipe=recipe, backend=backend)), n=8, epochs=2, every=1)
    assert monitor.report is None
    assert monitor.steps == list(range(16)) and len(set(monitor.counts)) == 1


def test_normal_training_with_other_callbacks_is_not_reported(make_learn):
    class LastOnes(Callback):
        """Keeps the tensors of one step at a time, as anyone may."""

        def after_loss(self):
            self.last, self.pair = self.run.loss, [self.run.loss, self.run.pred]
            if self.run.n_iter == 3:
                self.third = self.run.loss

    cbs = [LastOnes(), Recorder(), AvgStatsCallback(accuracy), HaltOnNaN(), ParamMagnitudes(), ActivationStats()]
    learn = make_learn(n_train=9)
    run = Runner([*cbs, GraphMonitor(every=1)])
    for _ in range(2):
        run.fit(2, learn)
        assert run.graph_monitor.report is None
        assert run.graph_monitor.steps == list(range(18))


@pytest.mark.parametrize("mine", [None, ListOfLosses], ids=["alone", "with a user's list"])
def test_what_belongs_to_this_package_is_not_named_for_what_a_users_object_holds(make_learn, mine):
    cbs = [HaltOnNaN(), Recorder(), ParamMagnitudes(), ActivationStats(), *([] if mine is None else [mine()])]
    report = monitored(make_learn, net(Sums(8)), cbs, fails=True).report
    assert [h.name for h in report.holders] == ["2.sums"]


def test_what_only_this_package_holds_is_named_all_the_same(make_learn):
    class Keeps(Recorder):
        pass

    Keeps.__module__ = "fastrbn.callbacks.track.recorder"
    recorder = Keeps()
    recorder.kept = []

    class Stores(Callback):
        def after_loss(self):
            recorder.kept.append(self.run.loss)

    (holder,) = monitored(make_learn, cbs=[recorder, Stores()], n_valid=0).report.holders
    assert holder.name == "Keeps.kept"


class InPlace(nn.Module):
    """The course's norm as it was first written by hand: running sums that are changed in place."""

    def __init__(self, nf, calls=1):
        super().__init__()
        self.calls = calls
        self.register_buffer("sums", torch.zeros(nf))
        self.register_buffer("sqrs", torch.ones(nf))
        self.register_buffer("count", torch.ones(()))

    def once(self, x):
        self.sums.detach_()
        self.sqrs.detach_()
        self.sums.lerp_(x.sum(0), 0.1)
        self.sqrs.lerp_((x * x).sum(0), 0.1)
        self.count.lerp_(torch.tensor(float(len(x))), 0.1)
        means = self.sums / self.count
        return (x - means) * (self.sqrs / self.count - means * means + 0.1).abs().rsqrt()

    def forward(self, x):
        return sum(self.once(x) for _ in range(self.calls))


def monitored_in_place(make_learn, model, cbs=()):
    run, said = Runner([*cbs, GraphMonitor()]), []
    run.logger = said.append
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run.fit(1, make_learn(model=model))
    assert said[-1] == str(run.graph_monitor.report)
    return run.graph_monitor.report


needs_saved_data = pytest.mark.skipif(torch.__version__ < "2.10", reason="torch before 2.10 does not tell")


@needs_saved_data
def test_a_buffer_that_a_second_forward_changes_in_place_is_named(make_learn):
    report = monitored_in_place(make_learn, nn.Sequential(nn.Linear(4, 8), InPlace(8, calls=2), nn.Linear(8, 3)))
    assert [(c.name, c.kind, c.nodes) for c in report.changed] == [("1.count", "buffer", ("DivBackward0",))]
    assert (report.step, report.made_in, report.holders) == (0, None, [])
    assert report.sentence.startswith("the backward pass needs what was changed in place since (step 0, epoch 0")
    assert "  1.count was changed in place after DivBackward0 had saved it\n" in str(report)
    assert "the model does more now" not in str(report)


@needs_saved_data
def test_a_buffer_that_is_changed_in_place_with_its_graph_kept_is_named_too(make_learn):
    class Keeps(Callback):
        def begin_fit(self):
            self.run.claim(self, backward=lambda loss: loss.backward(retain_graph=True))

    class Forgets(InPlace):
        def once(self, x):
            self.count.lerp_(torch.tensor(float(len(x))), 0.1)
            self.sums = (self.sums + x.sum(0)) / self.count
            return x - self.sums

    report = monitored_in_place(make_learn, nn.Sequential(nn.Linear(4, 8), Forgets(8), nn.Linear(8, 3)), [Keeps()])
    assert (report.step, report.made_in, [h.name for h in report.holders]) == (1, 0, ["1.sums"])
    assert report.changed[0][:2] == ("1.count", "buffer")


@needs_saved_data
def test_what_has_no_name_is_told_by_its_operation_and_an_error_of_another_kind_is_no_report(make_learn):
    class Overwrites(nn.Module):
        def forward(self, x):
            y = x.sigmoid()
            z = y * 2
            y.mul_(2)
            return z

    report = monitored_in_place(make_learn, net(Overwrites()))
    assert [(c.name, c.kind) for c in report.changed] == [("a tensor 6×8", "tensor")]
    assert "a tensor 6×8 was changed in place after SigmoidBackward0 had saved it" in str(report)
    run = Runner([GraphMonitor()])
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        run.fit(1, make_learn(loss_func=nn.CrossEntropyLoss(reduction="none")))
    assert run.graph_monitor.report is None


def test_two_monitors_and_a_second_fit_do_not_take_each_others_notes_for_old_nodes(make_learn):
    learn = make_learn()
    first, second = Runner([GraphMonitor(), GraphMonitor()]), Runner([GraphMonitor()])
    for run in (first, second, first):
        run.fit(2, learn)
        assert all(cb.report is None for cb in run.cbs if isinstance(cb, GraphMonitor))


def test_cancels_and_losses_without_a_graph_are_passed_over(make_learn):
    from fastrbn.learn import CancelBatchException

    class Cancels(Callback):
        def begin_batch(self):
            if self.run.n_iter % 3 == 1:
                raise CancelBatchException

    monitor = monitored(make_learn, cbs=[Cancels()])
    assert monitor.steps == [0, 2, 3, 5, 6] and monitor.report is None


def test_ctrl_c_ends_the_fit_with_what_was_counted(make_learn):
    class Stops(Callback):
        def after_loss(self):
            if self.run.n_iter == 2:
                raise KeyboardInterrupt

    monitor = monitored(make_learn, cbs=[Stops()])
    assert monitor.steps == [0, 1] and "interrupted" in monitor.run.stop_reason
    assert not monitor._recent and copy.deepcopy(monitor).counts == monitor.counts


@pytest.mark.parametrize("wrong", [{"max_growth": -1}, {"max_growth": 0.5}, {"every": 0}, {"every": True}])
def test_wrong_arguments_are_told(wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{name} must be a whole number, [01] or more; got"):
        GraphMonitor(**wrong)
