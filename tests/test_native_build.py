"""C sources compiled on first use: once a machine, by many processes alike, and anew when something they depend on changes."""

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastrbn import native_build

COMPILER = native_build._compiler() if os.name == "posix" else None
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTRBN_NATIVE", raising=False)
    return tmp_path / "cache" / "fastrbn"


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "answer.c"
    file.write_text("int answer(void) { return ANSWER; }\n")
    return file


def test_options_make_libraries_of_their_own(cache, source):
    libraries = [native_build.load(source, f"-DANSWER={n}")[0] for n in (7, 8)]
    assert [library.answer() for library in libraries] == [7, 8]
    assert len([*cache.glob("answer_*.so")]) == 2


def test_a_library_is_built_once_and_by_many_at_a_time_alike(cache, source):
    code = (
        "import pathlib, sys; from fastrbn import native_build;"
        "assert native_build.load(pathlib.Path(sys.argv[1]), '-DANSWER=7')[0].answer() == 7"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(source)]) for _ in range(3)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    (made,) = [p for p in cache.rglob("*") if p.is_file()]
    before = made.stat().st_mtime_ns
    assert native_build._built(COMPILER, source, ("-DANSWER=7",)) == made and made.stat().st_mtime_ns == before


def test_a_change_of_the_source_or_of_a_header_makes_another_library(cache, source, tmp_path, monkeypatch):
    headers = tmp_path / "headers"
    headers.mkdir()
    monkeypatch.setattr(native_build, "_HEADERS", headers)
    (headers / "more.h").write_text("#define MORE 1\n")
    source.write_text('#include "more.h"\nint answer(void) { return MORE; }\n')
    first = native_build._built(COMPILER, source, ())
    (headers / "more.h").write_text("#define MORE 2\n")
    second = native_build._built(COMPILER, source, ())
    assert first != second and ctypes.CDLL(str(second)).answer() == 2
    source.write_text("int answer(void) { return 3; }\n")
    assert native_build._built(COMPILER, source, ()) not in (first, second)


def test_a_compiler_that_fails_is_warned_of_once_and_not_asked_again(cache, source, tmp_path, monkeypatch):
    broken, other = tmp_path / "cc", tmp_path / "other.c"
    broken.write_text(f"#!/bin/sh\necho called >>{tmp_path}/calls\necho no room on this planet >&2\nexit 1\n")
    broken.chmod(0o755)
    shutil.copy(source, other)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setattr(native_build, "_broken", {})
    with pytest.warns(RuntimeWarning, match="could not be built with .*cc: no room on this planet"):
        assert native_build.load(source, "-DANSWER=9")[0] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library, why = native_build.load(other, "-DANSWER=9")
    assert library is None and "no room on this planet" in why
    assert (tmp_path / "calls").read_text() == "called\n"
    assert not [*cache.rglob("*.so")]


def test_it_can_be_turned_off(source, monkeypatch):
    monkeypatch.setenv("FASTRBN_NATIVE", "0")
    library, why = native_build.load(source, "-DANSWER=10")
    assert library is None and why == "FASTRBN_NATIVE=0 turns the C kernels off"


def test_a_cache_that_others_can_write_to_is_not_used(cache):
    assert native_build._cache() == cache
    cache.chmod(0o777)
    own = native_build._cache()
    assert cache.parent not in own.parents and own.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("real", ["float", "double"])
def test_every_c_source_of_the_package_compiles(cache, real):
    sources = [*Path(native_build.__file__).parent.rglob("*.c")]
    assert len(sources) > 1
    for file in sources:
        assert native_build.load(file, f"-DREAL={real}", "-Wall", "-Wextra")[1] == "", file
