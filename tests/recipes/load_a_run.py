"""Load a run of `fastrbn train`: model, classes and transform, and predictions for image files."""

from pathlib import Path

from PIL import Image

from fastrbn import glyphs, load_run
from fastrbn.cli import main

main("train glyphs --bs 8 --limit 320 --out digits".split())  # in a shell: fastrbn train glyphs …

Path("scans").mkdir()
valid = glyphs(n_train=10, n_valid=20).valid
for i, (image, label) in enumerate(zip(valid.x, valid.y)):
    Image.fromarray(image[0].numpy()).save(f"scans/{label}-{i}.png")

run = load_run("digits")
print(run.classes, run.evaluate().accuracy)
for file in sorted(Path("scans").iterdir()):
    found = run.predict(file)
    print(file, found.label, round(found.probability, 3))
