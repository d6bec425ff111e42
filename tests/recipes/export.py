"""Export a run in evaluation mode, for any batch size; the file is checked against the model before it is kept."""

import json

import torch

from fastrbn import load_run
from fastrbn.cli import main

main("train glyphs --bs 8 --limit 320 --out digits".split())  # in a shell: fastrbn train glyphs …
main("export digits --to torch --out digits.pt2".split())  # or --to onnx, with pip install 'fastrbn[export]'

extra = {"fastrbn.json": ""}
model = torch.export.load("digits.pt2", extra_files=extra).module()  # needs PyTorch alone
images = torch.randn(3, 1, 28, 28)
print(torch.allclose(model(images), load_run("digits").model(images), atol=1e-5))
print(json.loads(extra["fastrbn.json"])["classes"])
