"""`fastrbn predict`, `eval` and `export` as their users meet them."""

import csv
import json

import pytest

import fastrbn.export
from fastrbn import load_run
from fastrbn.cli import main, predict, run_folder


@pytest.fixture
def cli(trained_run, monkeypatch, capsys):
    """Run the command line beside the trained run: cli("predict", …) returns status, stdout and stderr."""
    monkeypatch.chdir(trained_run)

    def run(*args):
        status = main([*map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_predict_prints_a_line_an_image(cli):
    status, out, err = cli("predict", "run", "photos/dog", "photos/cat/1.png")
    want = load_run("run").predict(["photos/dog", "photos/cat/1.png"])
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"{p.path}\t{p.label}\t{p.probability:.4f}" for p in want]


def test_unreadable_images_are_named_and_counted_and_the_others_predicted(cli, tmp_path):
    (tmp_path / "notes.png").write_text("no image", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    files = [tmp_path / "notes.png", "photos/cat/0.png", tmp_path / "gone.png", tmp_path / "empty"]
    status, out, err = cli("predict", "run", *files, "--csv", tmp_path / "new" / "p.csv", "--top", 9)
    assert status == 1 and out.startswith("photos/cat/0.png\t") and len(out.splitlines()) == 1
    assert err.replace(f"{tmp_path}/", "").splitlines() == [
        "fastrbn predict: notes.png cannot be read: cannot identify image file",
        "fastrbn predict: gone.png cannot be read: No such file or directory",
        "fastrbn predict: empty cannot be read: there are no images in this folder",
        "fastrbn predict: error: 3 of 4 could not be read; the others are above",
    ]
    with open(tmp_path / "new" / "p.csv", newline="", encoding="utf-8") as f:
        (row,) = csv.DictReader(f)
    assert list(row) == ["path", "label", "probability", "label_2", "probability_2"]
    assert out.split() == list(row.values()) and float(row["probability"]) >= float(row["probability_2"])


def test_a_table_that_cannot_be_written_is_an_error(cli, tmp_path):
    status, out, err = cli("predict", "run", "photos", "--csv", tmp_path)
    assert (status, out) == (2, "") and "--csv must be a file" in err
    (tmp_path / "file").touch()
    status, out, err = cli("predict", "run", "photos", "--csv", tmp_path / "file" / "p.csv")
    assert status == 1 and len(out.splitlines()) == 16 and "cannot be written" in err and "the lines are above" in err


def test_an_interrupt_ends_predict_with_130_and_leaves_no_half_table(cli, monkeypatch, tmp_path):
    def interrupted(*_):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predictions", interrupted)
    status, _, err = cli("predict", "run", "photos", "--csv", tmp_path / "p.csv")
    assert (status, err) == (130, "fastrbn predict: interrupted (Ctrl-C)\n") and not list(tmp_path.iterdir())


def test_eval_prints_what_the_training_measured_beside(cli):
    status, out, err = cli("eval", "run", "--weights", "last")
    row = load_run("run").history[-1]
    measured = f"loss {row['valid_loss']:.4f}, accuracy {row['valid_accuracy']:.2%}"
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "cnn of conv_rbn, weights of run/model.pt, 4 validation images",
        f"{measured}; in training, epoch 1: {measured}",
    ]


def test_eval_measures_other_images_and_each_class(cli):
    status, out, _ = cli("eval", "run", "--data", "photos", "--per-class")
    found = load_run("run").evaluate("photos")
    assert status == 0 and out.splitlines() == [
        "cnn of conv_rbn, weights of run/best.pt, 16 images in photos",
        f"loss {found.loss:.4f}, accuracy {found.accuracy:.2%}",
        "class  images  accuracy",
        *(f"{name}         8  {share:8.2%}" for name, share in found.per_class.items()),
    ]


@pytest.mark.parametrize(
    "args, status, words",
    [
        ("predict nope photos", 2, "needs the folder of a run of `fastrbn train`; nope is no folder"),
        ("eval photos", 2, "photos is not the folder of a run: it has no config.json"),
        ("eval run --device tpu", 2, "device must be auto, cpu, "),
        ("eval run --data gone", 2, "there is no folder gone: give one with a folder of images for each class"),
        ("eval run --data run", 1, "run must contain a folder of images for each class"),
        ("eval run --data .", 2, "must have folders named after the run's classes (cat, dog); got photos"),
        ("eval run --data photos --split test", 2, "not allowed with argument"),
        ("eval run --data-dir gone", 2, "--data-dir must be a folder; there is none at gone"),
        ("eval run --split test", 2, "valid='test' needs the folders train and test; "),
        ("export run --to onxx", 2, "must be one of onnx, torch; got 'onxx'. Did you mean 'onnx'?"),
        ("export run --to torch --out photos", 1, "export needs a file; photos is a folder"),
        ("predict run", 2, "required: IMAGE"),
        ("predict run photos --top 0", 2, "must be a whole number, 1 or more; got '0'"),
    ],
)
def test_what_cannot_be_done_ends_with_a_sentence(cli, args, status, words):
    got, out, err = cli(*args.split())
    assert (got, out) == (status, "") and words in err.replace("\n", " "), err


def test_data_that_have_gone_get_a_way_out(cli, run_copy):
    config = json.loads((run_copy / "config.json").read_text(encoding="utf-8"))
    config["arguments"]["data"] = "/gone/pets"
    del config["result"]
    (run_copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    status, _, err = cli("eval", run_copy)
    assert status == 2 and "or --data for a folder of images" in err
    assert f"{run_copy} has not ended yet, or was killed: using best.pt\n" in err


def test_export_writes_beside_the_run_with_classes_and_transform(cli, run_copy, monkeypatch):
    told = {}

    def fake(model, shape, path, to, about):
        told.update(model=model, shape=shape, path=path, to=to, about=about)
        return 1e-6

    monkeypatch.setattr(fastrbn.export, "export_model", fake)
    status, out, err = cli("export", run_copy, "--to", "onnx")
    assert (status, err) == (
        0,
        "",
    ) and out == f"{run_copy}/model.onnx: scores differ from the model's by 1.0e-06 at most\n"
    assert (told["shape"], told["to"]) == ((3, 8, 8), "onnx") and not told["model"].training
    about = json.loads(json.dumps(told["about"]))
    assert about["classes"] == ["cat", "dog"] and about["mean"] == list(load_run(run_copy).transform.mean)
    assert about["input"] == {"channels": 3, "height": 8, "width": 8}

    def missing(*_):
        raise ImportError("export to onnx needs onnx")

    monkeypatch.setattr(fastrbn.export, "export_model", missing)
    assert cli("export", run_copy, "--to", "onnx")[::2] == (1, "fastrbn export: error: export to onnx needs onnx\n")


def test_a_new_run_in_the_folder_drops_the_best_weights_and_exports(cli, run_copy, monkeypatch):
    (run_copy / "model.onnx").touch()
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")
    assert cli("train", "photos", "--size", 9, "--epochs", 0, "--force", "--out", run_copy)[0] == 0
    assert not {"best.pt", "model.onnx"} & {p.name for p in run_copy.iterdir()}
    run = load_run(run_copy)
    assert (run.weights, run.transform.size, run.trained) == (run_copy / "model.pt", (9, 9), None)


def test_a_path_of_save_best_is_kept_and_found(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")
    spec = f"save_best:path={tmp_path / 'kept.pt'},monitor=accuracy"
    assert cli("train", "photos", "--size", 8, "--cb", spec, "--limit", 4, "--out", tmp_path / "run")[0] == 0
    run = load_run(tmp_path / "run")
    assert run.weights == tmp_path / "kept.pt" and run.trained == run.history[0]
    assert run.results["best"] == {"file": str(run.weights), "epoch": 0, "accuracy": run.history[0]["valid_accuracy"]}


def test_the_averages_of_ema_are_the_runs_weights(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.plots, "png", lambda figure: b"a picture")
    assert cli("train", "photos", "--size", 8, "--cb", "ema:decay=0.5", "--out", tmp_path / "run")[0] == 0
    run = load_run(tmp_path / "run")
    assert run.evaluate().loss == pytest.approx(run.trained["valid_loss"])
