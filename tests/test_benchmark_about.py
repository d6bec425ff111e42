"""`benchmarks/about.py`: damaged CSV files and devices that are not there, in one line each."""

import sys

import pytest

RUNS = """\
task,norm,lr,seed,step,return,seconds,machine,torch,date
pendulum,default,0.001,0,250,-1419.19,3.1,some (2 cores),2.14,2026-11-28
pendulum,default,0.001,0,500,-190.2,3.3,some (2 cores),2.14,2026-11-28
"""
STREAMS = """\
task,norm,mode,bs,order,seed,segment,accuracy,machine,torch,date
drift-digits,batchnorm,batch,1,shuffled,0,0,,some (2 cores),2.14,2026-11-28
drift-objects-full,default,frozen,any,shuffled,0,1,96.5,some (2 cores),2.14,2026-11-28
"""


@pytest.fixture
def about(benchmark_script):
    return benchmark_script("about")


@pytest.mark.parametrize(
    "name, text, old, new, words",
    [
        ("crossq", RUNS, "step,return", "return", "must have the columns task,norm,lr,seed,step,return"),
        (
            "crossq",
            RUNS,
            "pendulum,default",
            "cart,default",
            "row 1 is damaged: task must be one of pendulum; got 'cart'",
        ),
        ("crossq", RUNS, "-190.2,3.3,some (2 cores),2.14,2026-11-28\n", "-190", "row 2 .* 10 fields, and has fewer"),
        ("crossq", RUNS, "some (2", "some, (2", "row 1 is damaged: it must have 10 fields, and has more"),
        ("crossq", RUNS, "-1419.19", "low", "row 1 is damaged: could not convert string to float: 'low'"),
        (
            "drift",
            STREAMS,
            "digits",
            "glyphs",
            "row 1 is damaged: task must be one of drift-digits, drift-objects; got",
        ),
        ("drift", STREAMS, ",0,1,", ",0,first,", "row 2 is damaged: .* 'first'"),
    ],
)
def test_a_damaged_file_ends_a_script_with_file_rule_and_advice(
    name, text, old, new, words, about, benchmark_script, tmp_path
):
    path, script = tmp_path / "rows.csv", benchmark_script(name)
    path.write_text(text)
    assert len(about.rows_of(path, script.KINDS)) == 2
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(SystemExit, match=f"^{path}.*{words}.* move the file away, and the same command measures again"):
        script.rows_of(path)


def test_a_file_that_is_no_text_is_named(about, tmp_path):
    path = tmp_path / "rows.csv"
    assert about.rows_of(path) == about.rows_of(None) == []
    path.write_bytes(b"task\nM\xfcnze\n")
    with pytest.raises(SystemExit, match=f"^{path} must be a CSV file in UTF-8: .* move the file away"):
        about.rows_of(path)


@pytest.mark.parametrize("name", ["callbacks", "cifar", "drift", "evidence", "norm", "small_batch", "zoo"])
def test_a_device_that_is_not_there_is_told_in_a_line(name, benchmark_script, tmp_path, monkeypatch, capsys):
    script = benchmark_script(name)
    out = "--out" if name in ("cifar", "evidence") else "--csv"
    monkeypatch.setattr(sys, "argv", [name, "--device", "cuda:99", out, str(tmp_path / "new")])
    with pytest.raises(SystemExit) as end:
        script.main()
    *_, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert "error: argument --device: must be a device of this machine, such as cpu; got 'cuda:99': " in line


def test_several_devices_are_checked_one_by_one(about):
    assert about.device_names("cpu,cpu") == "cpu,cpu"
    with pytest.raises(about.argparse.ArgumentTypeError, match="got 'gpu'"):
        about.device_names("cpu,gpu")
