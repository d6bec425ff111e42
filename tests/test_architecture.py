"""The house rules that can be read off the source: who imports whom, what a module carries, what an import does."""

import ast
import importlib.util
import os
import pkgutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastrbn
from fastrbn import callbacks
from fastrbn.learn import Callback

PACKAGE = Path(fastrbn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
SUBPACKAGES = ("callbacks", "compare", "data", "graph", "learn", "norm")  # with a list of public names

# What each room may import of the package, itself apart; a room's name covers all that is in it. `cli` puts the others
# together and may import them all. The rooms stand in the order of the house: those below do not import those above.
MAY_IMPORT = {
    "_version": [],
    "util": [],
    "random_state": [],
    "native": ["util"],
    "norm": ["native", "random_state", "util"],
    "data": ["random_state", "util"],
    "learn": ["_version", "random_state", "util"],
    "graph": ["util"],
    "plots": ["util"],
    "models": ["norm", "util"],
    "summary": ["learn.snapshot", "learn.unpack", "util"],
    "show": ["learn.predict", "learn.unpack", "plots", "random_state", "util"],
    "callbacks.step": ["callbacks.track.monitor", "learn", "util"],  # ReduceLROnPlateau follows an average, too
    "callbacks.track": ["learn", "util"],
    "callbacks.diagnose": ["learn", "graph", "util"],
    "callbacks.distributed": ["learn", "random_state", "util"],
    "callbacks": ["callbacks.step", "callbacks.track", "callbacks.diagnose", "callbacks.distributed", "learn.callback"],
    "watching": ["callbacks", "learn", "util"],
    "lightning": ["callbacks", "learn", "watching"],
    "fastai": ["callbacks", "learn", "watching"],
    "build": ["callbacks", "learn", "models", "norm", "util"],
    "compare.peers": [],
    "compare": ["_version", "callbacks", "compare.peers", "data", "learn", "models", "norm", "plots", "util"],
    "trainer.settings": ["norm", "util"],
    "trainer.augment": ["trainer.nets", "data"],
    "trainer.nets": ["norm", "util"],
    "trainer.build": ["trainer.augment", "trainer.nets", "trainer.settings", "data", "models"],
    "cli.options": ["_version", "trainer.settings", "util"],
    "export": ["norm", "util"],
    "saved_run": ["callbacks", "data", "export", "learn", "trainer.build", "trainer.settings", "util"],
}
# Imports from inside functions that point upward, each with its reason
UPWARD = {
    ("learn.learner", "summary"): "Learner.summary returns a table that is made above",
    ("norm.recompute", "learn.unpack"): "recompute_statistics understands the batches that Learner understands",
}
PLOT_FROM_INSIDE_FUNCTIONS = {"callbacks", "graph"}  # so that training does not load matplotlib
# modules for packages that are not among the requirements
EXTRAS = {"fastai": ["fastai"], "lightning": ["lightning", "pytorch_lightning"]}
DRAW = {"plots", "basics"}  # may import matplotlib.pyplot


def module_name(file: Path) -> str:
    """`norm.layers` for fastrbn/norm/layers.py; `norm` for its `__init__`, `` for the package's."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False):
    """(absolute name, inside a function?) of all that `source`, module `fastrbn.<module>`, imports when it runs."""

    def walk(node, inside):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["fastrbn", *filter(None, module.split("."))]
                here = here[: len(here) + is_package - node.level]
                base = ".".join([*here, *filter(None, [node.module])])
            for alias in node.names:
                yield f"{base}.{alias.name}", inside

    return list(walk(ast.parse(source), False))


def _is_or_under(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def room_of(module: str) -> str:
    """The room of MAY_IMPORT that `module` lies in, else the first part of its name."""
    within = [room for room in MAY_IMPORT if _is_or_under(module, room)]
    return max(within, key=len, default=module.split(".")[0])


def forbidden_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `fastrbn.<module>` imports against the rules."""
    room = room_of(module)
    part = module.split(".")[0]
    wrong = []
    for name, inside in imports(source, module, is_package):
        if _is_or_under(name, "matplotlib") and part not in DRAW:
            allowed = module == "data.glyphs" and not _is_or_under(name, "matplotlib.pyplot")
            wrong += [] if allowed else [name]
        if not _is_or_under(name, "fastrbn") or room not in MAY_IMPORT:
            continue
        inner = name.removeprefix("fastrbn").removeprefix(".")
        own = room_of(inner) == room
        plots = inside and part in PLOT_FROM_INSIDE_FUNCTIONS and _is_or_under(inner, "plots")
        runner = part == "callbacks" and (_is_or_under(inner, "learn.runner") or inner in ("learn.Runner", "learn"))
        upward = inside and (module, ".".join(inner.split(".")[:-1])) in UPWARD
        if runner or not (own or plots or upward or any(_is_or_under(inner, ok) for ok in MAY_IMPORT[room])):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_each_module_imports_only_what_its_place_allows(file):
    assert forbidden_imports(file.read_text(), module_name(file), file.name == "__init__.py") == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("norm.layers", "from ..learn import Callback"),
        ("norm.layers", "import fastrbn.learn.runner"),
        ("norm.layers", "def f():\n    from fastrbn import Learner"),
        ("learn.runner", "from ..norm.layers import RunningBatchNorm"),
        ("learn.runner", "from .. import callbacks"),
        ("data.image_data", "from ..learn.callback import Callback"),
        ("data.image_data", "import matplotlib.font_manager"),
        ("data.glyphs", "import matplotlib.pyplot as plt"),
        ("data.glyphs", "from matplotlib import pyplot"),
        ("callbacks.track.recorder", "from fastrbn.learn.runner import Runner"),
        ("callbacks.track.recorder", "from fastrbn.learn import Runner"),
        ("callbacks.track.recorder", "from ..diagnose.hooks import Hook"),
        ("callbacks.track.recorder", "from fastrbn.callbacks import Hook"),
        ("callbacks", "from fastrbn.learn import Callback"),
        ("callbacks.track.recorder", "from fastrbn.plots import lines"),
        ("callbacks.track.recorder", "class C:\n    import fastrbn.plots"),
        ("callbacks.track.recorder", "import matplotlib.pyplot"),
        ("models", "from .learn import Learner"),
        ("plots", "from .callbacks.track.recorder import Recorder"),
        ("graph", "from .norm import RunningBatchNorm"),
        ("build", "from .plots import lines"),
        ("cli", "import matplotlib.pyplot as plt"),
    ],
)
def test_the_rule_catches(module, source):
    assert forbidden_imports(source, module) != []


@pytest.mark.parametrize(
    "module, source",
    [
        ("norm.layers", "import torch\nfrom .recipes import Recipe\nfrom . import reference"),
        ("data.glyphs", "from matplotlib import font_manager"),
        (
            "callbacks.track.recorder",
            "from fastrbn.learn.callback import Callback\nfrom fastrbn.learn.events import CancelTrainException",
        ),
        ("callbacks.track.recorder", "def plot():\n    from fastrbn import plots\n    from fastrbn.plots import lines"),
        ("callbacks.track.recorder", "from .metrics import accuracy"),
        ("callbacks.track.recorder", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
        ("models", "from .norm import RunningBatchNorm"),
        ("plots", "import matplotlib.pyplot as plt"),
        ("cli", "from .learn.runner import Runner"),
    ],
)
def test_the_rule_allows(module, source):
    assert forbidden_imports(source, module) == []


def test_the_packages_own_list_may_import_its_modules():
    assert forbidden_imports("from .track.recorder import Recorder", "callbacks", is_package=True) == []
    assert forbidden_imports("from fastrbn.learn import Runner", "callbacks", is_package=True) != []


MODULES = {module_name(f): f for f in FILES}


def module_of(name: str) -> str:
    """The module that `fastrbn.<name>` is, or that it is in."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def edges(modules: dict[str, Path]) -> dict[str, set[str]]:
    """The modules that each one imports, also from inside functions; upward exceptions apart."""
    found = {}
    for module, file in modules.items():
        names = imports(file.read_text(), module, file.name == "__init__.py")
        inner = {
            module_of(name.removeprefix("fastrbn").removeprefix("."))
            for name, _ in names
            if _is_or_under(name, "fastrbn")
        }
        found[module] = {other for other in inner - {module} if (module, other) not in UPWARD}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A way round from a node back to itself, empty if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as e:
        return e.args[1]
    return []


def test_no_modules_import_one_another_in_a_circle():
    assert circle(edges(MODULES)) == []


def test_no_rooms_import_one_another_in_a_circle():
    rooms = {}
    for module, others in edges(MODULES).items():
        rooms.setdefault(room_of(module), set()).update(room_of(other) for other in others)
    assert circle({room: others - {room} for room, others in rooms.items()}) == []


def test_the_rule_of_circles_catches(tmp_path):
    sources = {"learn.runner": "def f():\n    from fastrbn.learn import resume", "learn.resume": "from . import runner"}
    files = {name: tmp_path / f"{name}.py" for name in sources}
    for name, file in files.items():
        file.write_text(sources[name])
    assert set(circle(edges(files))) == set(sources)
    assert circle({"a": {"b"}, "b": {"c"}}) == []


def test_exceptions_are_in_use():
    for module, other in UPWARD:
        names = [name for name, inside in imports(MODULES[module].read_text(), module) if inside]
        assert any(_is_or_under(name, f"fastrbn.{other}") for name in names)


def test_close_matches_are_looked_for_in_one_place():
    """`util.suggestion` and `util.nearest` have one cutoff and one wording."""
    users = [
        m for m, f in MODULES.items() if any(_is_or_under(name, "difflib") for name, _ in imports(f.read_text(), m))
    ]
    assert users == ["util"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_each_module_has_a_docstring_and_no_star_import(file):
    source = file.read_text()
    tree = ast.parse(source)
    stars = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
    assert stars == [], f"star imports in lines {stars}"
    if file.name != "_version.py":  # setuptools reads that one
        assert (ast.get_docstring(tree) or "").strip(), "no docstring"


def callbacks_of_the_package(cls=Callback):
    for sub in cls.__subclasses__():
        if sub.__module__.startswith(("fastrbn.callbacks", "fastrbn.learn")) and not sub.__name__.startswith("_"):
            yield sub
        yield from callbacks_of_the_package(sub)


def test_the_order_of_callbacks_stands_in_one_table():
    table = [(cls, order) for cls, order, _ in callbacks.ORDER]
    assert sorted(cls.__name__ for cls, _ in table) == sorted({cls.__name__ for cls in callbacks_of_the_package()})
    assert [order for _, order in table] == sorted(order for _, order in table)
    assert [cls._order for cls, _ in table] == [order for _, order in table]
    assert all(reason for _, _, reason in (*callbacks.ORDER, *callbacks.LAST, *callbacks.OUTSIDE_FIT))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_callback_of_the_package_sets_its_order_itself(file):
    if file == PACKAGE / "learn" / "callback.py":
        return  # the defaults
    bodies = [n.body for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ClassDef)]
    names = [ast.unparse(t) for body in bodies for n in body if isinstance(n, ast.Assign) for t in n.targets]
    assert not {"_order", "_last", "_outside_fit"} & set(names)


def texts_of_no_encoding(source: str) -> list[int]:
    """Lines that open, read or write a text file in the encoding of the machine."""
    lines = []
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        given = {k.arg: k.value for k in call.keywords}
        mode = given.get("mode", call.args[1] if len(call.args) > 1 else None)
        binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
        module = name == "open" and isinstance(call.func, ast.Attribute)  # os.open, Image.open
        nowhere = [ast.unparse(a) for a in call.args[:1]] == ["os.devnull"]
        if name in ("open", "read_text", "write_text") and not (binary or module or nowhere or "encoding" in given):
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_text_files_are_utf_8_on_every_machine(file):
    assert texts_of_no_encoding(file.read_text(encoding="utf-8")) == []


def test_the_rule_of_encodings_catches():
    assert texts_of_no_encoding("open(p)\np.read_text()\nopen(p, 'w')\nopen(p, 'rb')\nopen(p, encoding='utf-8')") == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("name", ["", *SUBPACKAGES, "basics"])
def test_each_package_lists_names_that_exist_once_each(name):
    package = importlib.import_module(f"fastrbn.{name}" if name else "fastrbn")
    assert len(set(package.__all__)) == len(package.__all__)
    assert [n for n in package.__all__ if getattr(package, n, None) is None] == []


def test_the_subpackages_are_all_there_and_say_what_they_hold():
    assert {"norm", "learn", "callbacks", "data"} <= set(SUBPACKAGES)
    folders = {p.parent for p in FILES}
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == [], "a folder without __init__.py"


def test_every_module_can_be_imported():
    names = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "fastrbn.") if not m.name.endswith("__main__")]
    assert len(names) == len(FILES) - 2, "the package's __init__ and __main__ apart"
    for name in names:
        other = name.removeprefix("fastrbn.")
        if other in EXTRAS and not any(map(importlib.util.find_spec, EXTRAS[other])):
            with pytest.raises(
                ImportError, match=rf"{name} needs the package {other}.*pip install 'fastrbn\[{other}\]'"
            ):
                importlib.import_module(name)
        elif "triton" not in name:  # imported only when chosen, and only where Triton is
            importlib.import_module(name)


def _run(code: str, *flags: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, env=env, check=False)


def test_importing_every_public_name_changes_no_setting_and_warns_of_nothing():
    code = """if True:
        import random, threading, torch, numpy as np
        def world():
            return (torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
                    torch.random.get_rng_state().sum().item(), hash(random.getstate()),
                    hash(np.random.get_state()[1].tobytes()), torch.is_grad_enabled(), threading.active_count(),
                    str(np.geterr()), torch.backends.cudnn.benchmark)
        before = world()
        from fastrbn import *
        import fastrbn
        assert all(name in globals() for name in fastrbn.__all__)
        assert world() == before, (before, world())
        print("same")
    """
    done = _run(code, "-W", "error")
    assert (done.stdout, done.stderr, done.returncode) == ("same\n", "", 0)


def test_importing_the_package_and_its_names_leaves_pyplot_out():
    code = "import sys; from fastrbn import *; print([m for m in ('matplotlib.pyplot', 'IPython') if m in sys.modules])"
    done = _run(code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_help_needs_no_torch():
    code = "import sys; from fastrbn.cli import main; main(['train', '--help']); print('torch' in sys.modules)"
    done = _run(code)
    assert done.stdout.splitlines()[-1] == "False" and done.stderr == ""


def test_what_editors_see_of_the_package_is_what_it_exports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == sorted(fastrbn.__all__)
    for name, home in seen.items():
        assert getattr(fastrbn, name) is getattr(importlib.import_module(f"fastrbn.{home}"), name)


# public in their part only: too general a name for `from fastrbn import *`, or for those who build recipes
KEPT_INSIDE = {"NAMES", "Clamp", "Memory", "Skip", "get_recipe"}


@pytest.mark.parametrize("home", fastrbn._HOMES)
def test_what_a_part_makes_public_the_package_does_too(home):
    names = set(importlib.import_module(f"fastrbn.{home}").__all__) - KEPT_INSIDE
    assert sorted(names - set(fastrbn.__all__)) == []


def test_a_misspelt_name_gets_the_nearest_and_submodules_are_attributes():
    with pytest.raises(AttributeError, match="no public name 'RuningBatchNorm'. Did you mean 'RunningBatchNorm'?"):
        fastrbn.RuningBatchNorm  # noqa: B018
    done = _run(
        "import fastrbn; print(fastrbn.norm.RunningBatchNorm is fastrbn.RunningBatchNorm, 'Learner' in dir(fastrbn))"
    )
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_basics_gives_a_notebook_all_it_uses():
    code = """if True:
        from fastrbn.basics import *
        import fastrbn
        missing = [n for n in fastrbn.__all__ if n not in globals()]
        used = [torch, nn, F, optim, init, tensor, partial, math, np, plt, Path, DataLoader]
        print(missing, len(used), F.relu(tensor([-1.0])).item())
    """
    done = _run(code, "-W", "error")
    assert (done.stdout, done.stderr) == ("[] 12 0.0\n", "")
