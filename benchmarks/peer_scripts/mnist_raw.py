"""MNIST in plain PyTorch."""

import torch
from common import BS, LR
from fastprogress import progress_bar
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def fit(model, train, valid):
    train_dl = DataLoader(TensorDataset(*train), BS, shuffle=True)
    valid_dl = DataLoader(TensorDataset(*valid), 2 * BS)
    opt = torch.optim.SGD(model.parameters(), LR)
    losses, lrs = [], []
    model.train()
    total, right, n = 0.0, 0, 0
    for xb, yb in progress_bar(train_dl):
        out = model(xb)
        loss = cross_entropy(out, yb)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        lrs.append(opt.param_groups[0]["lr"])
        total, n = total + losses[-1] * len(xb), n + len(xb)
        right += (out.argmax(1) == yb).sum().item()
    print(f"train: {total / n:.4f} {right / n:.4f}")
    model.eval()
    total, right, n = 0.0, 0, 0
    with torch.no_grad():
        for xb, yb in valid_dl:
            out = model(xb)
            total, n = total + cross_entropy(out, yb).item() * len(xb), n + len(xb)
            right += (out.argmax(1) == yb).sum().item()
    print(f"valid: {total / n:.4f} {right / n:.4f}")
    return right / n
