"""A multi-task loop in plain torch, and the two lines by which an update of this library takes its place."""

import sys

import torch
from torch import nn

from unbraid.optim.adatask import AdaTask
from unbraid.optim.own import Stepper

torch.manual_seed(0)
x = torch.randn(4096, 16)
w = torch.randn(16, 2) + torch.randn(16, 1)
y = (x @ w + torch.randn(4096, 2) > torch.tensor([0.0, 6.0])).float()  # two tasks that share a direction; one is rare


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.heads = nn.ModuleDict({"click": nn.Linear(32, 1), "buy": nn.Linear(32, 1)})

    def forward(self, x):
        hidden = self.bottom(x)
        return {task: head(hidden)[:, 0] for task, head in self.heads.items()}


model, plain = Model(), "--plain" in sys.argv
opt = torch.optim.Adam(model.parameters(), lr=3e-3) if plain else Stepper(AdaTask(lr=3e-3), model)
for _ in range(300):
    rows = torch.randint(0, 3072, (128,))
    loss = nn.functional.binary_cross_entropy_with_logits
    losses = {task: loss(z, y[rows, k]) for k, (task, z) in enumerate(model(x[rows]).items())}
    if plain:
        opt.zero_grad(), sum(losses.values()).backward(), opt.step()
    else:
        opt(losses)
for k, (task, z) in enumerate(model(x[3072:]).items()):
    yes, no = z[y[3072:, k] > 0], z[y[3072:, k] < 1]
    print(f"{task}: AUC {(yes[:, None] > no).float().mean():.3f}")
