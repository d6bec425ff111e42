"""Compilers and functional transforms: torch.compile, torch.export, ONNX, functional_call, vmap, CUDA graphs."""

import copy
import io

import pytest
import torch
from checks import relative_error
from norm.steps import assert_same, buffers, grads, layer_of
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastrbn.norm import RECIPES, convert_batchnorm, to_batchnorm
from fastrbn.norm.recipes import Skip

# torch 2.9's own tracer instantiates the functions that it traces
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be:DeprecationWarning")

# torch 2.9 and 2.11 were tried: there these raise (no number is wrong), see "Known limits" in fastrbn/norm/README.md
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
newer_than_2_9 = pytest.mark.skipif(VERSION < (2, 10), reason="torch 2.9's compiler cannot do this")
newer_than_2_11 = pytest.mark.skipif(VERSION < (2, 12), reason="torch 2.11's compiler cannot do this")

RECIPES_HERE = {
    **RECIPES,
    "few": RECIPES["default"].but(elements=500, order="strided"),
    "skipping": RECIPES["default"].but(skip=Skip(every=2, after=3)),
    "unclamped": RECIPES["default"].but(clamp=None),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def data(n, shape=(4, 3, 5, 6), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=g) * (1 + i % 2) + i / 2).to(dtype) for i in range(n)]


def step(f, layer, x, dy):
    layer.zero_grad()
    z = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = f(z)
    y.backward(dy)
    return {"y": y.detach(), "dx": z.grad, **grads(layer), **buffers(layer)}


def assert_compiled_equals_eager(xs, dys, tol, compiler="aot_eager", graphs=1, dynamic=None, **settings):
    """Same outputs, gradients and buffers in every step, and nothing compiled after the second."""
    eager, compiled = layer_of(**settings), layer_of(**settings)
    counter = CompileCounterWithBackend(compiler)
    f = torch.compile(compiled, fullgraph=True, backend=counter, dynamic=dynamic)
    for i, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        got, want = step(f, compiled, x, dy), step(eager, eager, x, dy)
        assert got["y"].stride() == want["y"].stride()
        assert_same(got, want, tol, f"at step {i}")
        if i == 1:
            compilations = counter.frame_count
    assert counter.frame_count == compilations and counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("recipe", RECIPES_HERE)
def test_a_compiled_layer_trains_like_the_eager_one_and_is_compiled_once(recipe):
    recipe = RECIPES_HERE[recipe]
    assert_compiled_equals_eager(data(7), data(7, seed=1), 1e-5, recipe=recipe)


@pytest.mark.parametrize("settings", [{"affine": False}, {"backend": "reference"}, {"dtype": torch.float64}], ids=str)
def test_every_setting_compiles(settings):
    dtype = settings.get("dtype", torch.float32)
    assert_compiled_equals_eager(data(3, dtype=dtype), data(3, seed=1, dtype=dtype), 1e-5, **settings)


@pytest.mark.parametrize("kind", ["channels_last", "bfloat16", "large mean", "large"])
def test_every_kind_of_input_compiles(kind):
    xs, dys, tol = data(4), data(4, seed=1), 1e-5
    if kind == "channels_last":
        xs, dys = ([t.contiguous(memory_format=torch.channels_last) for t in ts] for ts in (xs, dys))
    if kind == "bfloat16":
        xs, dys, tol = [x.bfloat16() for x in xs], [dy.bfloat16() for dy in dys], 2e-2
    if kind == "large mean":
        xs, tol = [x / 10 + 1e4 for x in xs], 3e-2
    if kind == "large":
        xs, dys = data(4, (6, 3, 70, 71)), data(4, (6, 3, 70, 71), seed=1)
    assert_compiled_equals_eager(xs, dys, tol)


@newer_than_2_9
@pytest.mark.parametrize("recipe", ["default", "few", "batch"])
def test_one_graph_serves_every_batch_size_under_dynamic_shapes(recipe):
    sizes = [(4, 3, 5, 6), (7, 3, 5, 6), (6, 3, 9, 4), (13, 3, 5, 5), (5, 3, 6, 6)]
    xs = [data(1, size, seed=i)[0] for i, size in enumerate(sizes)]
    dys = [data(1, size, seed=9 + i)[0] for i, size in enumerate(sizes)]
    assert_compiled_equals_eager(xs, dys, 1e-5, dynamic=True, recipe=RECIPES_HERE[recipe])


def test_one_graph_serves_every_batch_size_that_is_marked_dynamic():
    xs = [data(1, (bs, 3, 4, 4), seed=bs)[0] for bs in (4, 7, 2, 9)]
    for x in xs:
        torch._dynamo.mark_dynamic(x, 0)
    layer = layer_of()
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(layer, fullgraph=True, backend=counter)
    for x in xs:
        f(x).backward(x)
    assert counter.frame_count == 1


def test_inductors_gradients_are_right():
    """Its partitioner once recomputed in the backward pass what the forward had changed: see replay.snapshot."""
    assert_compiled_equals_eager(data(5), data(5, seed=1), 1e-4, compiler="inductor", recipe=RECIPES_HERE["few"])


@pytest.mark.parametrize("recipe", ["default", "course"])
def test_a_compiled_net_uses_a_norm_twice_before_one_backward(recipe):
    def twice(layer):
        return lambda x: layer(layer(x).relu())

    eager, compiled = layer_of(recipe=recipe), layer_of(recipe=recipe)
    f = torch.compile(twice(compiled), fullgraph=True, backend="aot_eager")
    for x, dy in zip(data(4), data(4, seed=1), strict=True):
        assert_same(step(f, compiled, x, dy), step(twice(eager), eager, x, dy), 1e-5)


@newer_than_2_9
@pytest.mark.parametrize("order", [1, -1])
def test_several_compiled_forwards_before_their_backwards(order):
    eager, compiled = layer_of(), layer_of()
    f = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found = []
        for run, layer in ((eager, eager), (f, compiled)):
            layer.zero_grad()
            xs = [x.requires_grad_() for x in data(3)]
            ys = [run(x) for x in xs]
            for y, dy in list(zip(ys, data(3, seed=1), strict=True))[::order]:
                y.backward(dy)
            dxs = {f"dx{i}": x.grad for i, x in enumerate(xs)}
            found.append({**dxs, **grads(layer), **buffers(layer)})
        assert_same(found[1], found[0], 1e-5)


def test_a_compiled_layer_can_be_evaluated_frozen_and_trained_again():
    layer = layer_of()
    twin, f = copy.deepcopy(layer), torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mode in ("train", "eval", "freeze", "train"):
        for m in (layer, twin):
            m.unfreeze().train(mode != "eval")
            if mode == "freeze":
                m.freeze()
        x, dy = data(1)[0], data(1, seed=1)[0]
        assert_same(step(f, layer, x, dy), step(twin, twin, x, dy), 1e-5)


@newer_than_2_11
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_checkpointed_segment_inside_a_compiled_function_is_right(compiler):
    eager = nn.Sequential(nn.Linear(3, 4), layer_of(4), nn.ReLU(), nn.Linear(4, 3))
    compiled = copy.deepcopy(eager)
    f = torch.compile(lambda x: checkpoint(compiled, x, use_reentrant=False), fullgraph=True, backend=compiler)
    for x, dy in zip(data(3, (5, 3)), data(3, (5, 3), seed=1), strict=True):
        assert_same(step(f, compiled, x, dy), step(eager, eager, x, dy), 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_layer_inside_an_eager_checkpoint_is_refused_with_advice(reentrant):
    f = torch.compile(layer_of(), backend="aot_eager")
    y = checkpoint(f, data(1)[0].requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="cannot run twice.*compile the function that calls checkpoint"):
        y.backward(torch.ones_like(y))


def test_a_nan_batch_leaves_the_state_of_a_compiled_layer():
    layer = layer_of()
    f = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for i, x in enumerate(data(3)):
        before = buffers(layer)
        if i == 1:
            x[0, 1, 2, 3] = float("nan")
        y = f(x)
        assert y.isnan().any() == (i == 1)
        assert torch.equal(before["num_batches_tracked"], layer.num_batches_tracked) == (i == 1)
    assert all(b.isfinite().all() for b in layer.buffers())


def small_net():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)]
    net = convert_batchnorm(nn.Sequential(*layers))
    for x in data(3, (4, 3, 8, 8)):
        net(x)
    return net.eval()


def test_export_in_evaluation_runs_with_any_batch_size():
    net = small_net()
    shapes = {"input": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(net, (torch.randn(4, 3, 8, 8),), dynamic_shapes=shapes)
    for bs in (2, 5):
        x = torch.randn(bs, 3, 8, 8)
        assert relative_error(program.module()(x), net(x)) < 1e-6
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert relative_error(torch.export.load(file).module()(x), net(x)) < 1e-6


# the exporter's own dependencies warn of what comes in Python and torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_in_evaluation_gives_the_same_in_onnxruntime(tmp_path):
    pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    net, x, path = small_net(), torch.randn(4, 3, 8, 8), str(tmp_path / "net.onnx")
    torch.onnx.export(net, (x,), path, opset_version=18, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [got] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(got), net(x)) < 1e-5


def test_functional_call_trains_with_given_parameters_and_buffers():
    layer, other = layer_of(), layer_of()
    given = {k: v.detach().clone() for k, v in layer.state_dict().items()}
    weight = (layer.weight.detach() * 2).requires_grad_()
    other.weight.data.mul_(2)
    x, dy = data(1)[0], data(1, seed=1)[0]
    before = buffers(layer)
    y = torch.func.functional_call(layer, {**given, "weight": weight}, x)
    y.backward(dy)
    want = step(other, other, x, dy)
    assert torch.equal(y, want["y"]) and torch.equal(weight.grad, want["dweight"])
    assert torch.equal(given["running_mean"], want["running_mean"])  # the given buffers are those that move
    assert_same(buffers(layer), before, 0)


def test_vmap_evaluates_an_ensemble():
    nets = [small_net() for _ in range(3)]
    params, state = torch.func.stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")

    def run(params, state, x):
        return torch.func.functional_call(base, (params, state), (x,))

    x = torch.randn(4, 3, 8, 8)
    got = torch.func.vmap(run, in_dims=(0, 0, None))(params, state, x)
    for one, net in zip(got, nets, strict=True):
        assert relative_error(one, net(x)) < 1e-5
    grad = torch.func.grad(lambda p: run(p, {k: v[0] for k, v in state.items()}, x).square().mean())
    assert all(g.isfinite().all() for g in grad({k: v[0] for k, v in params.items()}).values())


@pytest.mark.parametrize("recipe", ["default", "course", "batch"])
def test_functional_derivatives_of_a_training_step_take_the_state_as_an_argument(recipe):
    layer, x, dy = layer_of(recipe=recipe), data(1)[0], data(1, seed=1)[0]
    params, before = dict(layer.named_parameters()), buffers(layer)

    def loss(params, x, state):
        return (torch.func.functional_call(layer, (params, state), x) * dy).sum()

    want = step(layer, layer, x, dy)
    for derivative in (torch.func.grad, torch.func.jacrev):
        state = {name: b.clone() for name, b in before.items()}
        got, dx = derivative(loss, argnums=(0, 1))(params, x, dict(state))
        assert_same({f"d{k}": g for k, g in got.items()}, grads(layer), 1e-5)
        assert relative_error(dx, want["dx"]) < 1e-5
        assert_same(
            {"running_mean": state["running_mean"]}, {"running_mean": layer.running_mean}, 1e-6
        )  # the given buffers


# torch's own rules for them are scripted
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
def test_forward_mode_derivatives_agree_with_backward_ones():
    x, dy, tangent = (data(1, seed=i)[0].double() for i in range(3))
    one, two = (layer_of(recipe="course", dtype=torch.float64) for _ in range(2))
    with forward_ad.dual_level():
        along = forward_ad.unpack_dual(one(forward_ad.make_dual(x, tangent))).tangent
    dx = step(two, two, x, dy)["dx"]
    assert ((along * dy).sum() - (tangent * dx).sum()).abs() < 1e-8


def test_tensors_without_values_pass_through():
    layer = layer_of(device="meta")
    x = torch.empty(4, 3, 5, device="meta", requires_grad=True)
    layer(x).backward(torch.empty(4, 3, 5, device="meta"))
    assert x.grad.shape == layer.eval()(x).shape == x.shape
    with FakeTensorMode():
        layer, x = layer_of(), torch.empty(4, 3, 5, requires_grad=True)
        layer(x).backward(torch.empty(4, 3, 5))
        assert x.grad.shape == layer.eval()(x).shape == x.shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pre_dispatch", [True, False])
@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("recipe", ["default", "batch"])
def test_make_fx_records_the_computation_and_the_state_updates(recipe, mode, pre_dispatch, training):
    layer, twin = (layer_of(recipe=recipe).train(training) for _ in range(2))
    settings = {"tracing_mode": mode, "pre_dispatch": pre_dispatch, "_allow_non_fake_inputs": mode != "real"}
    graph = make_fx(layer, **settings)(data(1)[0])
    layer.load_state_dict(twin.state_dict())  # in "real" mode, the recorded step was taken
    for x in data(3, (6, 3, 4, 4) if mode == "symbolic" else (4, 3, 5, 6), seed=1):
        assert_same({"y": graph(x), **buffers(layer)}, {"y": twin(x), **buffers(twin)}, 1e-5)


@newer_than_2_9
@pytest.mark.parametrize("strict", [True, False])
def test_export_in_training_keeps_the_state_updates(strict):
    layer, twin = layer_of(), layer_of()
    exported = torch.export.export(layer, (data(1)[0],), strict=strict).module()
    for x in data(3, seed=1):
        assert relative_error(exported(x), twin(x)) < 1e-6
        moved = {k: b for k, b in buffers(twin).items() if "grad" not in k}  # those move in the backward pass
        assert_same({k: exported.state_dict()[k] for k in moved}, moved, 1e-5)


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_computation():
    layer, twin, (x, dy) = layer_of(), layer_of(), data(2)
    with Recorded() as seen:
        assert "not the C kernels: a TorchDispatchMode cannot see a call into C" in layer.explain(x)
        got = step(layer, layer, x, dy)
    assert {"native_batch_norm.default", "native_batch_norm_backward.default"} <= seen.names
    assert_same(got, step(twin, twin, x, dy), 1e-5)


def fx_nets():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    net = convert_batchnorm(net)
    return net, symbolic_trace(copy.deepcopy(net))


def test_symbolic_trace_treats_a_layer_as_a_leaf_that_trains_and_evaluates():
    net, traced = fx_nets()
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2.0", "2.1"]
    for mode in (True, True, False):
        net.train(mode), traced.train(mode)
        x, dy = data(1, (4, 3, 8, 8))[0], data(1, (4, 4, 6, 6), seed=1)[0]
        assert_same(step(traced, traced, x, dy), step(net, net, x, dy), 1e-6)


def test_symbolic_trace_of_a_layer_alone_says_what_to_trace():
    with pytest.raises(ValueError, match="one call of a submodule.*nn.Sequential"):
        symbolic_trace(layer_of())


def test_torchvisions_feature_extractor_finds_the_layers():
    pytest.importorskip("torchvision", reason="needs torchvision")
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor

    net, x, seen = convert_batchnorm(resnet18()), torch.randn(2, 3, 32, 32), []
    net(x)
    extract = create_feature_extractor(net, {"layer1.0.bn2": "norm", "layer2": "features"}).eval()
    net.eval().layer1[0].bn2.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    net.layer2.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    got = extract(x)
    seen.clear()
    net(x)
    assert torch.equal(got["norm"], seen[0]) and torch.equal(got["features"], seen[1])


TORCHSCRIPT = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning"
)


@TORCHSCRIPT
def test_jit_script_is_refused_with_advice_and_leaves_the_model_unchanged():
    net = small_net()
    with pytest.raises(RuntimeError, match=r"cannot compile RunningBatchNorm2d.*to_batchnorm\(model.eval\(\)\)"):
        torch.jit.script(net)
    x = torch.randn(4, 3, 8, 8)
    want = net(x)
    assert torch.equal(torch.jit.script(to_batchnorm(net))(x), want)


@TORCHSCRIPT
@pytest.mark.parametrize("recipe", ["default", "course", "batch"])
def test_jit_trace_in_training_moves_the_state_and_takes_any_size(recipe):
    layer, twin = layer_of(recipe=recipe), layer_of(recipe=recipe)
    traced = torch.jit.trace(layer, data(1)[0].requires_grad_(), check_trace=False)
    traced.load_state_dict(twin.state_dict())
    for shape in [(4, 3, 5, 6), (2, 3, 7, 4), (9, 3, 2, 2)]:
        x, dy = data(1, shape, seed=1)[0], data(1, shape, seed=2)[0]
        assert_same(step(traced, traced, x, dy), step(twin, twin, x, dy), 1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
def test_jit_trace_in_evaluation_takes_any_size():
    net = small_net()
    traced = torch.jit.trace(net, torch.randn(4, 3, 8, 8))
    x = torch.randn(2, 3, 11, 9)
    assert relative_error(traced(x), net(x)) < 1e-6


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", RECIPES_HERE)
def test_a_cuda_graph_captures_a_training_step(recipe):
    eager, captured = (layer_of(recipe=RECIPES_HERE[recipe]).cuda() for _ in range(2))
    x, dy = (torch.zeros(4, 3, 5, 6, device="cuda") for _ in range(2))
    x.requires_grad_()
    for p in captured.parameters():
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(captured.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured(x).backward(dy)
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p in captured.parameters():
            p.grad.zero_()
        x.grad.zero_()
        y = captured(x)
        y.backward(dy)
    captured.load_state_dict(before)
    for new, up in zip(data(7), data(7, seed=1), strict=True):
        x.data.copy_(new)
        dy.copy_(up)
        graph.replay()
        got = {"y": y.detach(), "dx": x.grad, **grads(captured), **buffers(captured)}
        assert_same(got, step(eager, eager, new.cuda(), up.cuda()), 1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", RECIPES_HERE)
def test_a_training_step_on_cuda_never_waits_for_the_device(recipe):
    layer = layer_of(recipe=RECIPES_HERE[recipe]).cuda()
    x = torch.randn(4, 3, 5, 6, device="cuda", requires_grad=True)
    dy = torch.randn(4, 3, 5, 6, device="cuda")
    layer(x).backward(dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            layer(x).backward(dy)
            layer.eval()(x)
            layer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
