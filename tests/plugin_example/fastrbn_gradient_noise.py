"""A callback from another package: noise on the gradients."""

import torch

from fastrbn import Callback


class GradientNoise(Callback):
    """Adds normal noise to each gradient before the step, less and less of it.

    - `std`: standard deviation of the noise in the first step.
    - `decay`: in step t it is `std / (1 + t) ** decay`; 0.55 is the paper's.

    `.steps` counts the steps. Source: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep
    Networks", 2015.
    """

    def __init__(self, std=0.01, decay=0.55):
        if not std >= 0:
            raise ValueError(f"std must be 0 or more; got {std!r}")
        self.std, self.decay, self.steps = std, decay, 0

    def begin_fit(self):
        self.steps = 0

    def after_backward(self):
        std = self.std / (1 + self.steps) ** self.decay
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.add_(torch.randn_like(p.grad), alpha=std)
        self.steps += 1

    def after_fit(self):
        self.logger(f"GradientNoise: {self.steps} steps")

    # so that Checkpoint can go on with it

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def __repr__(self):
        return f"GradientNoise(std={self.std})"
