"""Batches that are dictionaries: the keys are names of the model's arguments, and one holds the target."""

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastrbn import AvgStatsCallback, DataBunch, accuracy, get_runner


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.EmbeddingBag(20, 16), nn.Linear(17, 2)

    def forward(self, tokens, length):
        return self.out(torch.cat([self.embed(tokens), length[:, None] / 10], 1))


torch.manual_seed(0)
texts, ten = torch.randint(20, (512, 10)), torch.tensor(10.0)
samples = [{"tokens": t, "length": ten, "label": (t < 2).any().long()} for t in texts]
data = DataBunch(DataLoader(samples[:448], 16, shuffle=True), DataLoader(samples[448:], 64), c=2)
learn, run = get_runner(Tagger(), data, lr=0.5, cbs=[AvgStatsCallback(accuracy)])
run.fit(6, learn)
