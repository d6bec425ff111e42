"""`load_run`: the model of a run predicts and measures as in the training, and what a folder lacks is named."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastrbn import EMA, RunError, load_run, saved_run
from fastrbn.data import BadDataError, DataBunch, load_folder
from fastrbn.learn import checkpoint_file


@pytest.fixture(scope="module")
def run(trained_run):
    return load_run(trained_run / "run")


def change(folder, **config):
    """Replace parts of config.json; None deletes them."""
    path = folder / "config.json"
    whole = {**json.loads(path.read_text(encoding="utf-8")), **config}
    path.write_text(json.dumps({k: v for k, v in whole.items() if v is not None}), encoding="utf-8")


def part(folder, name):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))[name]


def test_a_run_is_ready_for_inference(run, trained_run):
    assert not run.model.training and run.classes == ("cat", "dog")
    assert (run.settings.bs, run.results["status"], len(run.history)) == (4, 0, 2)
    assert run.weights == trained_run / "run" / "best.pt"
    assert repr(run).endswith("run', cnn of conv_rbn, weights of best.pt, 2 classes of images of (3, 8, 8))")


def test_loading_draws_no_random_numbers(trained_run):
    before = torch.get_rng_state()
    load_run(trained_run / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_transform_is_that_of_the_validation_images(run, trained_run):
    images, xs = load_folder(trained_run / "photos", size=8), []
    for file in sorted((trained_run / "photos").rglob("*.png")):
        xs.append(run.transform(file))
        assert torch.equal(run.transform(Image.open(file)), xs[-1])
    for x in next(iter(run.data().valid_dl))[0]:
        assert any(torch.equal(x, other) for other in xs)
    assert (run.transform.size, run.transform.mean, run.transform.std) == ((8, 8), images.mean, images.std)


def test_images_of_other_colours_become_those_of_the_training(run):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    x = run.transform.bytes(Image.fromarray(grey))
    assert x.shape == (3, 8, 8) and torch.equal(x[2], torch.from_numpy(grey))
    one = type(run.transform)((8, 8), (0.5,), (0.5,))
    assert one.bytes(Image.fromarray(np.stack([grey] * 3, 2))).equal(torch.from_numpy(grey)[None])
    with pytest.raises(TypeError, match="an image is a path or a Pillow image; got ndarray: Image.fromarray makes one"):
        run.transform(grey)


def test_predictions_are_the_models(run, trained_run):
    files = sorted((trained_run / "photos").rglob("*.png"))
    found = run.predict(trained_run / "photos", bs=3)
    assert [p.path for p in found] == [str(file) for file in files]
    with torch.no_grad():
        want = run.model(torch.stack([run.transform(file) for file in files])).softmax(1)
    torch.testing.assert_close(torch.stack([p.probabilities for p in found]), want)
    assert [p.label for p in found] == [run.classes[i] for i in want.argmax(1)]
    assert all(p.probability == p.probabilities.max() for p in found)
    assert run.predict(files[3]).label == found[3].label, "one image, one prediction"
    assert [p.path for p in run.predict([Image.open(files[0]), str(files[1])])] == [None, str(files[1])]


def test_predicting_what_is_no_image_is_an_error_that_names_it(run, tmp_path):
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for path, words in (
        ("notes.txt", "cannot identify"),
        ("gone.png", "No such file"),
        ("empty", "there are no images"),
    ):
        with pytest.raises(ValueError, match=f"{path}: no image can be read: .*{words}"):
            run.predict([tmp_path / path])


@pytest.mark.parametrize("weights", ["best", "last"])
def test_the_evaluation_is_that_of_the_training(trained_run, weights):
    run = load_run(trained_run / "run", weights)
    row = min(run.history, key=lambda row: row["valid_loss"]) if weights == "best" else run.history[-1]
    assert run.trained == row
    found = run.evaluate()
    assert found.loss == pytest.approx(row["valid_loss"], rel=1e-5)
    assert found.accuracy == pytest.approx(row["valid_accuracy"])
    assert found.confusion.diagonal().sum() / found.confusion.sum() == found.accuracy


def test_other_images_can_be_evaluated(run, trained_run, tmp_path):
    shutil.copytree(trained_run / "photos" / "dog", tmp_path / "some" / "dog")
    found = run.evaluate(tmp_path / "some")
    labels = [p.label for p in run.predict(tmp_path / "some")]
    assert found.confusion.tolist() == [[0, 0], [labels.count("cat"), labels.count("dog")]]
    assert found.per_class == {"dog": labels.count("dog") / 8}
    x = torch.stack([run.transform(file) for file in sorted((tmp_path / "some" / "dog").iterdir())])
    batches = [(x[:5], torch.ones(5, dtype=torch.int64)), (x[5:], torch.ones(3, dtype=torch.int64))]
    for data in (batches, (x, torch.ones(8, dtype=torch.int64)), DataBunch(None, batches)):
        assert run.evaluate(data).loss == pytest.approx(found.loss)
    with torch.no_grad():
        want = F.cross_entropy(run.model(x), torch.ones(8, dtype=torch.int64), label_smoothing=0.1)
    assert found.loss == pytest.approx(want.item())


def test_images_that_cannot_be_evaluated_are_refused(run, tmp_path):
    for inner, words in (
        ("a/dgo", "got dgo. Did you mean 'dog'?"),
        ("b/train/dog", f"got train. Do you mean {tmp_path}"),
    ):
        (tmp_path / inner).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / inner / "0.png")
        with pytest.raises(RunError, match="must have folders named after the run's classes") as e:
            run.evaluate(tmp_path / inner[0])
        assert words in str(e.value)
    (tmp_path / "c" / "dog").mkdir(parents=True)
    (tmp_path / "c" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(BadDataError, match=r"1 of 1 are not: .*0\.png"):
        run.evaluate(tmp_path / "c")
    with pytest.raises(ValueError, match="at least one batch"):
        run.evaluate([])
    with pytest.raises(ValueError, match="split is for the run's own data"):
        run.evaluate(tmp_path, split="test")


def test_the_data_are_those_of_the_training_with_the_runs_statistics(run, trained_run, run_copy, tmp_path):
    data = run.data()
    assert (len(data.train_ds), len(data.valid_ds), data.train_dl.bs) == (12, 4, 4)
    photos = shutil.copytree(trained_run / "photos", tmp_path / "photos")
    change(run_copy, arguments={**part(run_copy, "arguments"), "data": str(photos)})
    Image.new("RGB", (8, 8)).save(photos / "cat" / "9.png")
    later = load_run(run_copy)
    with pytest.warns(UserWarning, match="there were 12 training and 4 validation images, now there are 13 and 4"):
        assert later.data().train_dl.normalize == data.train_dl.normalize
    (photos / "dog").rename(photos / "fox")
    with pytest.raises(RunError, match="has other classes than .* dog, fox"):
        later.data()


def test_the_last_weights_are_those_of_the_newest_checkpoint_if_it_is_newer(trained_run, run_copy, monkeypatch):
    (run_copy / "best.pt").unlink()
    change(run_copy, result=None)
    state = torch.load(run_copy / "model.pt", weights_only=True)
    (run_copy / "checkpoints").mkdir()
    file = run_copy / "checkpoints" / "checkpoint-0001-step-9.pt"
    file.touch()
    with pytest.raises(RunError, match="checkpoint-0001-step-9.pt is not whole"):
        load_run(run_copy)
    monkeypatch.setattr(checkpoint_file, "find", lambda folder: (file, {"model": state}))
    run = load_run(run_copy)
    assert (run.weights, run.results, run.trained) == (file, {}, None), "killed"
    change(run_copy, result={"steps": 9})
    assert load_run(run_copy).weights == run_copy / "model.pt", "ended"


def test_the_averages_validation_is_not_that_of_weights_without_them(run_copy):
    for keep, compared in ((False, False), (True, True)):
        change(run_copy, callbacks=[repr(EMA(keep=keep))])
        assert (load_run(run_copy, "last").trained is not None) == compared and load_run(run_copy).trained is not None


def without(**data):
    return lambda run: change(run, data={k: v for k, v in {**part(run, "data"), **data}.items() if v is not None})


def arguments(**given):
    return lambda run: change(run, arguments={**part(run, "arguments"), **given})


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda run: shutil.rmtree(run), "needs the folder of a run of `fastrbn train`; RUN is no folder"),
        (lambda run: (run / "config.json").unlink(), "RUN is not the folder of a run: it has no config.json"),
        (lambda run: (run / "config.json").write_text("{", encoding="utf-8"), "RUN/config.json is no configuration of"),
        (lambda run: change(run, command=None), "is no configuration of a run: command is missing"),
        (lambda run: change(run, arguments=None), "lacks `arguments`, the run's settings, because an old version"),
        (arguments(norm="rnning"), "RUN/config.json: --norm must be one of running, "),
        (arguments(novel=1), "there is no arguments.novel"),
        (without(mean=None), "lacks data.mean, without which images cannot be prepared"),
        (without(classes=[1]), "lacks data.classes"),
        (without(shape=[3]), "data.shape must be channels, height, width"),
        (
            without(classes=["cat", "dog", "fox"]),
            "does not fit the model that RUN/config.json describes (cnn of conv_rb",
        ),
        (lambda run: (run / "best.pt").unlink(), "best weights, is gone: put it back, or take weights='last'"),
        (lambda run: (run / "best.pt").write_bytes(b"PK"), "RUN/best.pt is damaged, or no file of weights"),
        (lambda run: (change(run, result=None), [f.unlink() for f in run.glob("*.pt")]), "RUN has no weights: the run"),
    ],
)
def test_what_a_folder_lacks_is_named(run_copy, damage, words):
    damage(run_copy)
    with pytest.raises(RunError) as e:
        load_run(run_copy)
    assert words in str(e.value).replace(str(run_copy), "RUN")


def test_a_model_that_cannot_be_made_here_is_named(run_copy, monkeypatch):
    def missing(*_):
        raise ValueError("there is no package mine")

    monkeypatch.setattr(saved_run, "build_data", missing)
    with pytest.raises(RunError, match="run: the run's loaders cannot be made here: there is no package mine"):
        load_run(run_copy).evaluate()
    monkeypatch.setattr(saved_run, "build_model", missing)
    with pytest.raises(RunError, match="run: the run's model cannot be made here: there is no package mine"):
        load_run(run_copy)


def test_a_run_of_another_machine_needs_neither_its_device_nor_its_plug_ins(run_copy):
    arguments(device="cuda:7", cb=["NotInstalled:x=1"], threads=3)(run_copy)
    assert load_run(run_copy).settings.device == "cpu"
    with pytest.raises(ValueError, match="^device must be auto, cpu, "):
        load_run(run_copy, device="cuda:77")
    with pytest.raises(ValueError, match="weights must be one of best, last; got 'bst'. Did you mean 'best'?"):
        load_run(run_copy, "bst")
