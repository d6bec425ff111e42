"""One framework in a process of its own: answers the questions of `benchmarks/peers.py`, a JSON line each.

    python worker.py NAME DATA_ROOT STEPS

What frameworks print goes to the terminal the driver gives this process; answers go to the descriptor in PEERS_ANSWERS.
"""

import importlib
import json
import os
import sys
import time
from importlib import metadata

import torch
from common import BS, Batches, mnist, net, tiny

PACKAGES = {"raw": "torch", "ignite": "pytorch-ignite"}


class Worker:
    def __init__(self, name, root, steps):
        import steps as loops

        self.name, self.root = name, root
        self.loops = {"raw": loops.raw, name: getattr(loops, name)}
        self.train, self.valid, self.epochs = Batches(steps), Batches(1), loops.EPOCHS

    def about(self):
        """Versions, and whether a training ends with the parameters of the raw loop, bit for bit."""
        package = PACKAGES.get(self.name, self.name)
        ends = {mode: self._parameters(self.name, mode == "full") for mode in ("bare", "full")}
        wanted = self._parameters("raw", False)
        same = {mode: all(torch.equal(a, b) for a, b in zip(end, wanted, strict=True)) for mode, end in ends.items()}
        return {"version": metadata.version(package), "torch": torch.__version__, "same": same}

    def _parameters(self, name, full):
        model = tiny()
        self.loops[name](model, self.train, self.valid, full)
        return list(model.parameters())

    def step(self, name, full):
        """Microseconds a step: from the beginning of the fit's last but one epoch to that of its last."""
        self.train.starts.clear()
        self._parameters(name, full)
        starts = self.train.starts
        if len(starts) < self.epochs:  # Lightning begins once more to see that it can
            raise RuntimeError(f"{name} went {len(starts)} times through its batches in {self.epochs} epochs")
        return (starts[-1] - starts[-2]) / len(self.train) * 1e6

    def steps(self):
        return {"raw": self.step("raw", False), "bare": self.step(self.name, False), "full": self.step(self.name, True)}

    def epoch(self):
        """Seconds of one epoch of MNIST with validation, everything from the tensors on, and the accuracy."""
        fit = importlib.import_module(f"mnist_{self.name}").fit
        train, valid = mnist(self.root)
        model = net()
        torch.manual_seed(0)
        start = time.perf_counter()
        accuracy = fit(model, train, valid)
        return {"seconds": time.perf_counter() - start, "accuracy": float(accuracy)}

    def loaders(self):
        """Seconds for the batches of one epoch, without any training."""
        from torch.utils.data import DataLoader, TensorDataset
        from torchvision import transforms
        from torchvision.datasets import MNIST

        from fastrbn import Dataset, get_dls

        train, valid = mnist(self.root)
        to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.1307, 0.3081)])
        found = {}
        for name, dl in {
            "fastrbn": get_dls(Dataset(*train), Dataset(*valid), BS)[0],
            "DataLoader, tensors": DataLoader(TensorDataset(*train), BS, shuffle=True),
            "DataLoader, torchvision MNIST": DataLoader(
                torch.utils.data.Subset(MNIST(self.root, transform=to_tensor), range(len(train[0]))), BS, shuffle=True
            ),
        }.items():
            start = time.perf_counter()
            n = sum(len(xb) for xb, _ in dl)
            found[name] = time.perf_counter() - start
            assert n == len(train[0]), f"{name}: {n} images in an epoch"
        return found


def main():
    name, root, steps = sys.argv[1:]
    torch.set_num_threads(1)
    worker = Worker(name, root, int(steps))
    with os.fdopen(int(os.environ["PEERS_ANSWERS"]), "w") as answers:
        for line in sys.stdin:
            try:
                answer = getattr(worker, line.strip())()
            except Exception as error:  # noqa: BLE001 - the driver says it
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
