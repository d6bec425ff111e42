"""`benchmarks/peers.py`: the workers it talks to, what it says of a peer that is not there, how it counts."""

import sys

import pytest


@pytest.fixture
def peers(benchmark_script):
    return benchmark_script("peers")


def test_fastrbn_and_a_plain_loop_are_checked_and_timed_and_a_peer_that_is_not_there_is_named(
    peers, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(peers, "ENVS", tmp_path)  # where there are none
    options = ["--only", "raw", "fastrbn", "skorch", "--rounds", "1", "--steps", "20", "--epochs", "0"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *options, "--csv", str(tmp_path / "out.csv")])
    peers.main()
    out = capsys.readouterr().out
    assert "skorch: skipped, not installed; `python benchmarks/peers.py --install --only skorch`" in out
    header, *rows = (tmp_path / "out.csv").read_text().splitlines()
    assert header.startswith("framework,version,plain_us,bare_added_us,full_added_us,epoch_s")
    assert [row.split(",")[0] for row in rows] == ["raw", "fastrbn"]


def test_a_training_that_ends_elsewhere_is_not_timed(peers, monkeypatch, capsys):
    class Elsewhere:
        def __init__(self, *args):
            pass

        def ask(self, question):
            return {"version": "1", "torch": "2", "same": {"bare": True, "full": False}}

        def close(self):
            pass

    monkeypatch.setattr(peers, "Worker", Elsewhere)
    assert peers.start(["fastrbn"], "", 10) == ({}, {})
    assert "fastrbn: not timed: full ends with other parameters than a plain loop" in capsys.readouterr().out


def test_an_error_in_a_worker_and_a_worker_that_ends_are_told(peers, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
    (tmp_path / "worker.py").write_text(
        "import os, sys\n"
        "answers = os.fdopen(int(os.environ['PEERS_ANSWERS']), 'w')\n"
        'sys.stdin.readline(); print(\'{"error": "KeyError: x"}\', file=answers, flush=True)\n'
        "sys.stdin.readline(); sys.exit('out of luck')\n"
    )
    worker = peers.Worker("raw", tmp_path, 10)
    with pytest.raises(RuntimeError, match="^KeyError: x$"):
        worker.ask("steps")
    with pytest.raises(RuntimeError, match="the process ended:\nout of luck"):
        worker.ask("steps")
    worker.close()


def test_lines_of_code_are_those_with_code_that_is_no_import(peers, tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        '"""Words\n\nof a module."""\nfrom os import (\n    path,\n)\n\n# a comment\ndef f(\n    x,  # why\n):\n'
        '    """More words."""\n    return """a\n\n    b"""\n'
    )
    assert peers.lines_of_code(file) == 6  # of def three, of return three
