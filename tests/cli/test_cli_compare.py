"""`fastrbn compare` as its users meet it: what it leaves and says, exit statuses, Ctrl-C, and the evidence's script."""

import os
import runpy
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

import fastrbn
from fastrbn.cli import compare, main, options
from fastrbn.compare import NETS, grid, read_rows, table, workers
from fastrbn.data import glyphs
from fastrbn.util import locked

ROOT = Path(fastrbn.__file__).parents[1]


@cache
def small():
    return glyphs(64, 100)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run the command here, on small images, in this process: cli("--bs", 8) returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    real = grid.load_images
    for module in (grid, workers):
        monkeypatch.setattr(module, "load_images", lambda name, *a: small() if name == "glyphs" else real(name, *a))
    monkeypatch.setattr(workers, "_IMAGES", {})

    def run(*args, data="glyphs"):
        status = main(["compare", data, "--jobs", "0", *map(str, args)])
        return status, *capsys.readouterr()

    return run


def test_a_comparison_leaves_rows_table_and_picture_and_prints_the_table(cli):
    status, out, err = cli("--norms", "default,batchnorm", "--bs", "8,16", "--seeds", "0,1")
    assert (status, err) == (0, "")
    assert sorted(os.listdir("compare")) == ["accuracy.png", "cells.csv", "table.md"]
    lines = out.splitlines()
    assert lines[0] == "8 cells, 0 finished, 8 to train" and lines[8].startswith(
        "[8/8] glyphs cnn batchnorm bs 16 seed 1:"
    )
    assert Path("compare/table.md").read_text() in out and "| batch size | 8 | 16 |" in lines
    assert "± " in next(line for line in lines if line.startswith("| default |"))
    with Image.open("compare/accuracy.png") as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_the_options_reach_the_cells(cli):
    options = "--norms groupnorm:groups=4 --bs 4 --seeds 7 --lr-factors 0.5,2 --net resnet-small --n-train 8 --epochs 2"
    assert cli(*options.split(), "--augment", "--record-norms", 2, "--out", "there")[0] == 0
    first, second = read_rows("there/cells.csv")
    want = {
        "norm": "groupnorm:groups=4",
        "bs": "4",
        "seed": "7",
        "net": "resnet-small",
        "n_train": "8",
        "epochs": "2",
        "augment": "1",
        "steps": "4",
    }
    assert {k: first[k] for k in want} == want
    assert (first["lr_factor"], second["lr_factor"]) == ("0.5", "2")
    assert {"sweep.png", "weight_norms.png", "cells_norms"} <= set(os.listdir("there"))


def test_a_folder_has_the_same_cells_with_a_slash_at_its_end_as_shells_write_it():
    assert compare._data("photos/, mnist") == ["photos", "mnist"]


def test_a_folder_of_one_class_is_refused(cli, tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    for i in range(4):
        Image.new("L", (9, 9), 50 * i).save(tmp_path / "set" / "a" / f"{i}.png")
    words = "training needs images of two classes or more; set has one, a"
    assert cli("--bs", 2, data="set") == (2, "", f"fastrbn compare: error: {words}\n")


def test_photos_of_differing_sizes_are_compared_at_one(cli, tmp_path):
    for i in range(8):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8 + i, 9), 30 * i).save(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png")
    status, out, err = cli("--norms", "batchnorm", "--bs", 2, "--seeds", 0, data="photos")
    assert status == 1 and "images must have one size" in err
    status, out, err = cli("--norms", "batchnorm", "--bs", 2, "--seeds", 0, "--size", 8, data="photos")
    assert status == 0 and [row["data"] for row in read_rows("compare/cells.csv")] == ["photos@8"], err


def test_the_table_can_be_drawn_again_without_training(cli):
    assert cli("--norms", "default", "--bs", 8, "--seeds", 0)[0] == 0
    Path("compare/table.md").unlink()
    before = Path("compare/cells.csv").read_bytes()
    status, out, _ = cli("--table", "compare")
    assert status == 0 and out.startswith("### glyphs") and Path("compare/table.md").is_file()
    assert Path("compare/cells.csv").read_bytes() == before


def test_a_failed_cell_is_named_its_traceback_kept_and_tried_again_by_the_next_call(cli, monkeypatch):
    def broken(cell, *args):
        if cell.norm == "frn":
            raise RuntimeError("out of luck")
        return real(cell, *args)

    real = workers.run_cell
    with monkeypatch.context() as patch:
        patch.setattr(workers, "run_cell", broken)
        status, out, err = cli("--norms", "default,frn", "--bs", 8, "--seeds", 0)
    assert status == 1 and "| default |" in out
    assert err.splitlines() == [
        "fastrbn compare: failed: glyphs cnn frn bs 8 seed 0: RuntimeError: out of luck",
        "1 of 2 cells are finished, in compare/cells.csv; compare/failed.txt says where the others failed, and the "
        "same command tries them again",
    ]
    assert "Traceback" in Path("compare/failed.txt").read_text()
    assert cli("--norms", "default,frn", "--bs", 8, "--seeds", 0)[0] == 0
    assert not Path("compare/failed.txt").exists() and len(read_rows("compare/cells.csv")) == 2


@pytest.mark.parametrize(
    "args, words",
    [
        ("--norms defalt", "got 'defalt'. Did you mean 'default'?"),
        (
            "--norms default:elements=0",
            "elements must be a whole number of elements per channel, 1 or more, or None for all; got 0",
        ),
        ("--bs 0", "--bs: must be a whole number, 1 or more; got '0'"),
        ("--bs 8,8", "--bs: must name each value once; got '8,8'"),
        ("--seeds a", "--seeds: must be a whole number, 0 or more; got 'a'"),
        ("--lr-factors 0", "--lr-factors: must be a finite number above 0; got '0'"),
        ("--net resnet", "got 'resnet'. Did you mean 'resnet9'?"),
        ("--n-train 65", "from the batch size, 2, to the 64 training images of glyphs; got 65"),
        ("--device cpu,tpu", "must be cpu, cuda, or devices such as cuda:0,cuda:1 of this machine; got 'tpu'"),
        ("--table nowhere", "there is no finished cell in nowhere/cells.csv: give the folder"),
    ],
)
def test_bad_arguments_get_a_sentence_before_anything_is_made(cli, args, words):
    status, _, err = cli(*args.split())
    assert status == 2 and words in err and "Traceback" not in err and os.listdir() == []


def test_missing_data_is_named(cli):
    status, _, err = cli(data="glyph")
    assert status == 2 and "Did you mean 'glyphs'?" in err
    status, _, err = cli(data="glyphs,glyphs")
    assert status == 2 and "each once; got 'glyphs,glyphs'" in err


def test_a_file_in_the_folders_place_and_a_csv_of_others_are_refused(cli):
    Path("file").write_text("")
    status, _, err = cli("--out", "file")
    assert status == 2 and "--out must be a folder; file is a file" in err
    Path("full").mkdir()
    Path("full/cells.csv").write_text("my,own\n1,2\n")
    status, _, err = cli("--out", "full")
    assert status == 2 and "other columns" in err and Path("full/cells.csv").read_text() == "my,own\n1,2\n"


def test_a_folder_that_cannot_be_made_and_a_full_disk_get_a_sentence_with_a_way_out(cli, monkeypatch):
    Path("file").touch()
    words = "the results cannot go to file/c: Not a directory; choose another folder with --out"
    assert cli("--out", "file/c")[::2] == (1, f"fastrbn compare: error: {words}\n")

    def full(path, row):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(table, "append", full)
    status, _, err = cli("--norms", "default", "--bs", 8, "--seeds", 0)
    words = "compare/cells.csv: No space left on device; once that is mended, the same command goes on"
    assert (status, err) == (1, f"fastrbn compare: error: {words}\n")


def test_a_second_command_into_the_same_folder_ends_with_a_clear_line(cli):
    Path("compare").mkdir()
    with locked("compare"):
        status, _, err = cli("--norms", "default", "--bs", 8)
    assert status == 1 and "another process is at work in compare: wait for its end" in err
    assert os.listdir("compare") == []


def test_the_help_lists_the_nets_there_are():
    assert tuple(NETS) == options.NETS


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a group of processes")
def test_ctrl_c_ends_at_once_keeps_finished_cells_and_says_how_to_go_on(tmp_path):
    for part, ds in (("train", small().train), ("valid", small().valid)):  # to be loaded at once, by both processes
        for i, (x, y) in enumerate(zip(ds.x, ds.y)):
            at = tmp_path / "digits" / part / f"{int(y)}"
            at.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[0].numpy()).save(at / f"{i}.png")
    command = "compare digits --norms batchnorm,default --bs 1 --seeds 0 --epochs 5000 --jobs 1"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "fastrbn", *command.split()],
        cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    said = [process.stdout.readline() for _ in range(2)]  # nn.BatchNorm refuses a batch of one: finished at once
    assert said[1].startswith("[1/2] digits cnn batchnorm bs 1 seed 0: refused")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err == (
        "interrupted (Ctrl-C): 1 of 2 cells are finished, in compare/cells.csv; the same command goes on with the "
        "others\n"
    )
    assert "| batchnorm | refused |" in out and len(read_rows(tmp_path / "compare" / "cells.csv")) == 1


def test_the_evidences_script_runs_a_grid_and_goes_on_with_it(tmp_path, monkeypatch, capsys):
    script = ROOT / "benchmarks" / "small_batch.py"
    if not script.is_file():
        pytest.skip("the tests run outside the repository")
    for module in (grid, workers):
        monkeypatch.setattr(module, "load_images", lambda *_: small())
    path = tmp_path / "small_batch_quick.csv"
    monkeypatch.syspath_prepend(script.parent)  # as Python does for a script
    monkeypatch.setattr(
        sys, "argv", [str(script), "--csv", str(path), "--n-train", "64", "--jobs", "0", "--bs", "8,32"]
    )
    for first in ("8 cells, 0 finished, 8 to train", "8 cells, 8 finished, 0 to train"):
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        assert end.value.code == 0 and capsys.readouterr().out.splitlines()[0] == first
    assert {p.name for p in tmp_path.iterdir()} == {f"small_batch_quick.{e}" for e in ("csv", "md", "png")}


def test_every_named_grid_of_the_evidence_is_made_of_cells_that_exist(monkeypatch):
    script = ROOT / "benchmarks" / "small_batch.py"
    if not script.is_file():
        pytest.skip("the tests run outside the repository")
    monkeypatch.syspath_prepend(script.parent)  # as Python does for a script
    grids = runpy.run_path(str(script))["GRIDS"]
    assert set(grids) == {"quick", "full", "sweep", "cifar"}
    for settings in grids.values():
        settings = dict(settings)
        assert len(grid.cells_of(settings.pop("norms").split(","), **settings)) >= 12
