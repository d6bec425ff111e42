"""The autograd graph as data: checked by an independent walk, on every recipe and backend, as text, DOT and picture."""

import gc
import os
import re
import stat
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastrbn import RECIPES, RunningBatchNorm, autograd_graph, conv_rbn, get_cnn_model, record_modules, resnet9


class Forgetful(nn.Module):
    """A norm in the manner of the course whose running sums are never detached."""

    def __init__(self, nf):
        super().__init__()
        self.register_buffer("sums", torch.zeros(nf))
        self.weight = nn.Parameter(torch.ones(nf))

    def forward(self, x):
        self.sums.lerp_(x.mean(0), 0.1)
        return (x - self.sums) * self.weight


def course_net(**kwargs):
    return get_cnn_model(SimpleNamespace(c=10, c_in=1), [8, 16, 32, 64, 64], conv_rbn, **kwargs)


def loss_of(model, n=4):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 1, 28, 28, generator=g), torch.randint(0, 10, (n,), generator=g)
    return F.cross_entropy(model(x), y)


def counted(node, seen):
    """An oracle: nodes and links, by recursion."""
    links = 0
    seen.add(node)
    for child in {c for c, _ in node.next_functions if c is not None}:
        links += 1 + (counted(child, seen) if child not in seen else 0)
    return links


def has_no_circle(graph):
    return all(a < b for a, b in graph.edges)


@pytest.mark.parametrize(("recipe", "backend"), [("default", "fused"), *((recipe, "reference") for recipe in RECIPES)])
def test_every_recipe_and_backend_is_read_completely_and_makes_one_box_per_layer(recipe, backend):
    model = get_cnn_model(SimpleNamespace(c=10, c_in=1), [4, 6], conv_rbn, recipe=recipe, backend=backend)
    for _ in range(2):
        with record_modules(model):
            loss = loss_of(model)
        graph, nodes = autograd_graph(loss, model), set()
        links = counted(loss.grad_fn, nodes)
        assert (len(graph), len(graph.nodes), len(graph.edges)) == (len(nodes), len(nodes), links)
        assert sorted(graph.parameters) == sorted(dict(model.named_parameters()))
        assert graph.holders == {} and has_no_circle(graph)
        view = graph.by_module()
        assert has_no_circle(view) and len(view) == len(graph)
        layers = [(name, type(m).__name__) for name, m in model.named_modules() if name and not list(m.children())]
        assert [(n.name, n.type) for n in view.nodes if n.kind == "module"] == layers
        assert view.edges == [(i, i + 1) for i in range(len(view.nodes) - 1)], "a chain"
        assert view.saved_bytes == graph.saved_bytes
        loss.backward()


def test_without_a_record_modules_are_inferred_from_parameters():
    model = course_net()
    graph = autograd_graph(loss_of(model), model)
    by_name = {}
    for n in graph.nodes:
        by_name.setdefault(n.name, []).append(n.module)
    assert by_name["ConvolutionBackward0"] == [f"{i}.0" for i in range(5)]
    assert [m for n, ms in by_name.items() if n.startswith("_Normalize") for m in ms] == [f"{i}.2" for i in range(5)]
    assert by_name["AddmmBackward0"] == by_name["TBackward0"] == ["7"]
    assert by_name["ReluBackward0"] == [None] * 5
    names = [n.name for n in graph.nodes]
    assert names[-6:-3] == ["7.weight", "TBackward0", "7.bias"], "parameters come right before their use"
    plain = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU())
    graph = autograd_graph(plain(torch.randn(2, 3)).sum(), plain)
    assert [(n.name, n.module) for n in graph.nodes if n.name == "MmBackward0"] == [("MmBackward0", "0")]
    names = [n.name for n in autograd_graph(loss_of(model)).nodes if n.kind == "parameter"]
    assert len(set(names)) == len(names) == 17, "without a model each has a name of its own"


def test_saved_bytes_are_those_that_pytorch_packs():
    model, packed = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), {}

    def pack(t):
        packed[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    x = torch.randn(5, 6)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).square().sum()
        graph = autograd_graph(loss, model)
    assert graph.saved_bytes == sum(packed.values()) > 0
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert graph.held_bytes == sum(size for ptr, size in packed.items() if ptr not in owned)


def test_after_backward_the_graph_remains_and_its_saved_tensors_are_freed():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    loss = model(torch.randn(3, 4)).square().sum()
    before = autograd_graph(loss, model)
    loss.backward()
    after = autograd_graph(loss, model)
    assert len(after) == len(before)
    assert after.saved_bytes == 0 < before.saved_bytes
    assert not any(n.freed for n in before.nodes)
    assert "a backward pass has freed the saved tensors of 4 nodes" in str(after)
    assert "freed" not in str(before)


def test_an_undetached_buffer_holds_the_graph_and_makes_it_grow():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Forgetful(8), nn.Linear(8, 2))
    sizes = []
    for _ in range(4):
        loss = model(torch.randn(3, 4)).sum()
        sizes.append(len(autograd_graph(loss, model)))
    assert [b - a for a, b in zip(sizes, sizes[1:])] == [5, 5, 5]
    graph = autograd_graph(loss, model)
    (name, node), *more = graph.holders.items()
    assert (name, graph.nodes[node].name, more) == ("2.sums", "LerpBackward0", [])
    assert "buffer 2.sums holds the graph up to LerpBackward0: detach it" in str(graph)
    assert "held by 2.sums" in graph.to_dot()
    assert graph.by_module().holders.keys() == {"2.sums"}
    assert autograd_graph(loss_of(course_net())).holders == {}


def test_buffers_saved_for_backward_are_named():
    model = course_net(backend="fused")
    graph = autograd_graph(loss_of(model), model)
    assert {"0.2.running_grad", "4.2.running_grad"} <= set(graph.buffers)
    assert graph.nodes[graph.buffers["0.2.running_grad"][0]].module == "0.2"


def test_saved_tensors_changed_in_place_are_reported():
    y = torch.ones(3, requires_grad=True).sigmoid()
    loss = y.sum()
    assert not any(n.changed for n in autograd_graph(loss).nodes)
    with torch.no_grad():
        y.mul_(2)
    graph = autograd_graph(loss)
    assert [n.name for n in graph.nodes if n.changed] == ["SigmoidBackward0"]
    assert "the backward pass will fail, saved tensors were changed in place: SigmoidBackward0" in str(graph)


class Running(nn.Module):
    """A norm in the manner of the course, which changes its statistics in place."""

    def __init__(self, nf):
        super().__init__()
        self.register_buffer("sums", torch.zeros(nf))
        self.register_buffer("count", torch.tensor(1.0))
        self.seen = torch.zeros(nf)  # not a buffer

    def forward(self, x):
        self.sums.detach_()
        self.sums.lerp_(x.sum(0), 0.1)
        self.count.lerp_(torch.tensor(float(len(x))), 0.1)
        self.seen += 1
        return (x - self.sums / self.count) * self.seen


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch before 2.10 does not tell which tensor was changed")
def test_a_buffer_changed_in_place_is_named():
    model = nn.Sequential(nn.Linear(4, 8), Running(8))
    x = torch.randn(6, 4)
    graph = autograd_graph((model(x) + model(x)).sum(), model)
    assert [(n.name, n.changed_tensors) for n in graph.nodes if n.changed] == [
        ("DivBackward0", ("1.count",)),
        ("MulBackward0", ("1.seen",)),
    ]
    assert "were changed in place: DivBackward0 (1.count), MulBackward0 (1.seen)" in str(graph)
    graph = autograd_graph(lambda: (model(x) + model(x)).sum(), model).by_module()
    assert [(n.name, n.call, n.changed_tensors) for n in graph.nodes if n.changed] == [("1", 1, ("1.count", "1.seen"))]


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch before 2.10 does not tell which tensor was changed")
def test_the_changed_one_of_several_saved_tensors_is_named():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(a, b)
            return x * a * b

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            return g * a * b, None, None

    model = nn.BatchNorm1d(3)
    loss = Scale.apply(torch.ones(3, requires_grad=True), model.running_mean, model.running_var).sum()
    model.running_var.mul_(2)
    (node,) = [n for n in autograd_graph(loss, model).nodes if n.changed]
    assert node.changed_tensors == ("running_var",)


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch before 2.10 does not tell which tensors are packed")
def test_looking_at_a_checkpointed_segment_does_not_run_it_again():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), RunningBatchNorm(4))
    loss = checkpoint(model, torch.randn(2, 3, 6, 6), use_reentrant=False).sum()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert len(autograd_graph(loss, model)) == 7
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_looking_keeps_nothing_alive_and_leaves_no_hook():
    model = course_net()
    loss = loss_of(model)
    alive = weakref.ref(loss)
    graph = autograd_graph(loss, model)
    graph.by_module()
    del loss
    gc.collect()
    assert alive() is None

    def fails():
        model(torch.randn(2, 1, 28, 28))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        autograd_graph(fails, model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_function_is_called_once_as_training_would():
    model = course_net()
    graph = autograd_graph(lambda: loss_of(model), model)
    assert model[0][2].num_batches_tracked == 1
    assert {n.module for n in graph.nodes if n.name == "ReluBackward0"} == {f"{i}.1" for i in range(5)}


def test_each_call_of_a_shared_module_is_a_box_and_residual_nets_have_no_cycles():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    view = autograd_graph(lambda: model(torch.randn(2, 4)).sum(), model).by_module()
    assert [(n.name, n.call) for n in view.nodes if n.kind == "module"] == [("0", 1), ("1", 1), ("0", 2)]
    assert "0 (call 2)" in view.summary()
    net = resnet9(width=8)
    graph = autograd_graph(lambda: net(torch.randn(2, 3, 32, 32)).sum(), net)
    for depth in (None, 1, 2):
        view = graph.by_module(depth)
        assert has_no_circle(view) and len(view) == len(graph)
    names = [n.name for n in graph.by_module(1).nodes]
    assert names == ["prep", "layer1", "layer2", "layer3", "pool", "flatten", "linear", "SumBackward0"]


class Around(nn.Module):
    """Operations of its own before and after, and beside, a child."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        a = x * self.scale
        return a + self.child(a)


def test_a_module_around_another_is_cut_in_two_rather_than_drawn_as_a_cycle():
    model = nn.Sequential(Around())
    view = autograd_graph(lambda: model(torch.randn(2, 3)).sum(), model).by_module()
    assert [n.name for n in view.nodes] == ["0", "0.child", "0", "SumBackward0"]
    assert view.edges == [(0, 1), (0, 2), (1, 2), (2, 3)]


def test_thousands_of_operations_in_a_row_are_read():
    x = torch.ones(2, requires_grad=True)
    y = x
    for _ in range(5000):
        y = y * 1.5
    graph = autograd_graph(y.sum())
    assert len(graph) == 5002 and len(graph.edges) == 5001


def test_several_tensors_leaves_and_graphs_of_gradients_are_read_too():
    x = torch.ones(3, requires_grad=True)
    assert [n.kind for n in autograd_graph(x).nodes] == ["leaf"]
    both = autograd_graph({"a": x * 2, "b": [x + 1]})
    assert len(both) == 3 and len(both.roots) == 2
    (dx,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    assert "PowBackward0" in {n.name for n in autograd_graph(dx.sum()).nodes}


def test_dot_text_has_every_node_and_edge_and_quotes_names():
    graph = autograd_graph(loss_of(model := course_net()), model)
    text = graph.to_dot()
    assert len(re.findall(r"^  n\d+ \[label=", text, re.M)) == len(graph.nodes)
    assert re.findall(r"n(\d+) -> n(\d+);", text) == [(str(a), str(b)) for a, b in graph.edges]
    odd = nn.ModuleDict({'a"b\\': nn.Linear(2, 2)})
    text = autograd_graph(lambda: odd['a"b\\'](torch.ones(1, 2)).sum(), odd).to_dot()
    assert r'label="a\"b\\.weight\n2×2"' in text


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("level", ["full", "modules"])
def test_the_picture_has_each_box_and_edge_once_and_no_box_on_another(level, columns, tmp_path):
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    graph = autograd_graph(lambda: loss_of(model), model := course_net())
    graph = graph if level == "full" else graph.by_module()
    fig = graph.plot(columns)
    (ax,) = fig.axes
    boxes = [p.get_bbox() for p in ax.patches if isinstance(p, FancyBboxPatch)]
    assert len(boxes) == len(graph.nodes)
    assert sum(isinstance(p, FancyArrowPatch) for p in ax.patches) == len(graph.edges)
    for i, a in enumerate(boxes):
        assert not any(a.overlaps(b) for b in boxes[:i])
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert all(left < b.x0 and b.x1 < right and low < b.y0 and b.y1 < high for b in boxes)
    assert {t.get_text() for t in ax.texts} >= ({"0.2.bias"} if level == "full" else {"0.2 RunningBatchNorm"})
    fig.savefig(tmp_path / "graph.png")


def test_graphviz_places_the_boxes_and_its_absence_is_an_error(monkeypatch, tmp_path):
    graph = autograd_graph(torch.ones(2, requires_grad=True).exp())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="needs Graphviz's program dot, which is not on the PATH"):
        graph.plot(engine="dot")
    fake = tmp_path / "dot"  # what dot -Tplain prints for two boxes
    fake.write_text(
        "#!/bin/sh\necho 'graph 1 2 3\nnode n0 1 3 1.5 0.4 x solid box black white\nnode n1 2 1 1.5 0.4 x solid box "
        "black white\nedge n0 n1 4 1 2.8 1.2 2.2 1.8 1.8 2 1.2 solid black\nstop'\n"
    )
    os.chmod(fake, fake.stat().st_mode | stat.S_IXUSR)
    (ax,) = graph.plot(engine="dot").axes
    assert [t.get_position()[0] for t in ax.texts][::2] == [1.0, 2.0]
    fake.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    with pytest.raises(RuntimeError, match="dot failed with status 3: broken"):
        graph.plot(engine="dot")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: autograd_graph(torch.ones(2)),
            ValueError,
            r"requires grad; got torch.float32 of shape \(2,\) without",
        ),
        (lambda: autograd_graph(3), TypeError, "needs a tensor, several in a list, or a function.*got int"),
        (lambda: autograd_graph(torch.ones(1, requires_grad=True), "model"), TypeError, "nn.Module or None; got str"),
        (lambda: record_modules(3).__enter__(), TypeError, "needs an nn.Module; got int"),
        (
            lambda: autograd_graph(torch.ones(1, requires_grad=True)).by_module(0),
            ValueError,
            "depth must be a whole number, 1 or more; got 0",
        ),
        (
            lambda: autograd_graph(torch.ones(1, requires_grad=True)).plot(0),
            ValueError,
            "columns must be a whole number, 1 or more; got 0",
        ),
        (
            lambda: autograd_graph(torch.ones(1, requires_grad=True)).plot(engine="x"),
            ValueError,
            "engine must be one of fastrbn, dot; got 'x'",
        ),
    ],
)
def test_wrong_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.cuda
def test_a_graph_on_the_gpu_is_read_the_same():
    model = course_net().cuda()
    x, y = torch.randn(4, 1, 28, 28, device="cuda"), torch.randint(0, 10, (4,), device="cuda")
    graph = autograd_graph(lambda: F.cross_entropy(model(x), y), model)
    assert sorted(graph.parameters) == sorted(dict(model.named_parameters()))
    assert graph.saved_bytes > graph.held_bytes > 0
