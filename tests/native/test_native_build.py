"""C sources are compiled on first use, once per machine, and again when something they depend on changes."""

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastrbn import native

COMPILER = native._compiler() if os.name == "posix" else None
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


def test_each_set_of_options_has_its_own_library(cache, source):
    libraries = [native.load(source, f"-DANSWER={n}")[0] for n in (7, 8)]
    assert [library.answer() for library in libraries] == [7, 8]
    assert len([*cache.glob("answer_*.so")]) == 2


def test_a_library_is_built_once_even_by_several_processes_at_a_time(cache, source):
    code = (
        "import pathlib, sys; from fastrbn import native;"
        "assert native.load(pathlib.Path(sys.argv[1]), '-DANSWER=7')[0].answer() == 7"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(source)]) for _ in range(3)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    (made,) = [p for p in cache.rglob("*") if p.is_file()]
    before = made.stat().st_mtime_ns
    assert native._built(COMPILER, source, ("-DANSWER=7",)) == made and made.stat().st_mtime_ns == before


def test_a_change_of_the_source_or_of_a_header_makes_another_library(cache, source, tmp_path, monkeypatch):
    headers = tmp_path / "headers"
    headers.mkdir()
    monkeypatch.setattr(native, "_HEADERS", headers)
    (headers / "more.h").write_text("#define MORE 1\n")
    source.write_text('#include "more.h"\nint answer(void) { return MORE; }\n')
    first = native._built(COMPILER, source, ())
    (headers / "more.h").write_text("#define MORE 2\n")
    second = native._built(COMPILER, source, ())
    assert first != second and ctypes.CDLL(str(second)).answer() == 2
    source.write_text("int answer(void) { return 3; }\n")
    assert native._built(COMPILER, source, ()) not in (first, second)


def test_a_failing_compiler_warns_once_and_is_not_tried_again(cache, source, tmp_path, monkeypatch):
    other = tmp_path / "other.c"
    fake_compiler(tmp_path, monkeypatch, f"echo called >>{tmp_path}/calls", "echo no room on this planet >&2", "exit 1")
    shutil.copy(source, other)
    with pytest.warns(RuntimeWarning, match="could not be built with .*cc: no room on this planet"):
        assert native.load(source, "-DANSWER=9")[0] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library, why = native.load(other, "-DANSWER=9")
    assert library is None and "no room on this planet" in why
    assert (tmp_path / "calls").read_text() == "called\n"
    assert not [*cache.rglob("*.so")]


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "one bit": lambda data: data[:4000] + bytes([data[4000] ^ 1]) + data[4001:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_built_again_and_never_loaded(damage, cache, source):
    code = (
        "import pathlib, sys; from fastrbn import native;"
        "print(native.load(pathlib.Path(sys.argv[1]), '-DANSWER=7')[0].answer())"
    )
    whole = native._built(COMPILER, source, ("-DANSWER=7",))
    data = whole.read_bytes()
    whole.write_bytes(DAMAGE[damage](data))
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")
    assert [p.read_bytes() for p in cache.iterdir()] == [data]


def test_without_a_home_libraries_go_to_a_temporary_folder(source, monkeypatch):
    """As in a container whose user id has no entry in the password file."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("FASTRBN_NATIVE", raising=False)

    def no_entry(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    library, why = native.load(source, "-DANSWER=11")
    assert (library.answer(), why) == (11, "")
    assert native._cache() == native._of_this_process()


def fake_compiler(tmp_path, monkeypatch, *lines):
    file = tmp_path / "cc"
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    file.chmod(0o755)
    monkeypatch.setenv("CC", str(file))
    monkeypatch.setattr(native, "_broken", {})


@pytest.mark.parametrize(
    "lines, text",
    [
        ([r"printf 'ung\374ltig' >&2", "exit 1"], "could not be built with .*cc: ung\ufffdltig"),
        ([r"printf 'ung\374ltig' >&2"], "could not be built with .*cc: .*No such file"),
        (["printf waiting >&2", "exec sleep 60"], "could not be built with .*cc: .*timed out.* waiting"),
    ],
    ids=["bytes that are not UTF-8", "no library", "a compiler that hangs"],
)
def test_every_compiler_failure_is_reported(lines, text, cache, source, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, *lines)
    monkeypatch.setattr(native, "_SECONDS", 1)
    with pytest.warns(RuntimeWarning, match=text):
        assert native.load(source, f"-DANSWER={len(text)}")[0] is None
    assert not [*cache.rglob("*.so")]


def test_a_library_that_cannot_be_loaded_is_reported(cache, source, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, 'while [ "$1" != -o ]; do shift; done; echo no library >"$2"')
    with pytest.warns(RuntimeWarning, match="were built with .*cc but cannot be loaded: .*answer"):
        assert native.load(source, "-DANSWER=12")[0] is None


def test_a_noexec_cache_is_reported(cache, source, monkeypatch):
    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object: Operation not permitted")

    class Noexec:
        f_flag = os.ST_NOEXEC

    monkeypatch.setattr(native, "_broken", {})
    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    monkeypatch.setattr(os, "statvfs", lambda path: Noexec)
    text = (
        "cannot be loaded: .*/cache/fastrbn is on a file system mounted noexec; "
        "set XDG_CACHE_HOME to a folder that is not"
    )
    with pytest.warns(RuntimeWarning, match=text):
        _, why = native.load(source, "-DANSWER=13")
    assert "mounted noexec" in why


def test_it_can_be_turned_off(source, monkeypatch):
    monkeypatch.setenv("FASTRBN_NATIVE", "0")
    library, why = native.load(source, "-DANSWER=10")
    assert library is None and why == "FASTRBN_NATIVE=0 turns the C kernels off"


def test_a_cache_that_others_can_write_to_is_not_used(cache):
    assert native._cache() == cache
    cache.chmod(0o777)
    own = native._cache()
    assert cache.parent not in own.parents and own.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("real", ["float", "double"])
def test_every_c_source_of_the_package_compiles(cache, real):
    sources = [*Path(native.__file__).parents[1].rglob("*.c")]
    assert sources
    for file in sources:
        assert native.load(file, f"-DREAL={real}", "-Wall", "-Wextra")[1] == "", file
