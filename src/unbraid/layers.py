"""Dense building blocks that interactions, towers and heads share: an MLP, the initialiser, names of tasks' parts.

Every model starts from the same initialiser (`initialise`), so that a comparison of two methods never measures two ways
to draw the first weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unbraid import parallel


def mlp(width: int, hidden: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear and ReLU for every entry of ``hidden``, the last included: (B, width) -> (B, `mlp_width`).

    Args:
        width: width of the input.
        hidden: width of each layer; empty gives the identity.
        dropout: after every ReLU.
    """
    layers: list[nn.Module] = []
    for before, after in zip((width, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]  # in place: a Linear needs no copy of its result
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def mlp_width(width: int, hidden: Sequence[int]) -> int:
    """Width of what `mlp` gives."""
    return (width, *hidden)[-1]


REFUSES = (
    "rows of unknown domains are an `error`, and a graph cannot refuse a row"  # why there is no graph (`no_graph`)
)


def by_domain(
    domain: Tensor, codes: int, of: Callable[[int, Tensor], Sequence[Tensor]], empty: int = 0, together: bool = False
) -> list[Tensor]:
    """What ``of`` gives, each row by its own domain: (n, ...) tensors of the rows of one domain become (B, ...).

    Args:
        domain: (B,) int64 codes, below ``codes``.
        of: (code, places (n,) of its rows) -> tensors; called once per domain that occurs.  In a graph, where nothing may
            depend on which domains occur, once per code with all rows.
        empty: the code that a batch without rows is given to.
        together: all processes call ``of`` for the domains that any of them has, with some row where it has none: they read
            tables that are divided over them.
    """
    if torch.compiler.is_exporting():
        every = torch.arange(domain.shape[0], device=domain.device)
        found = list(of(0, every))
        for code in range(1, codes):
            for at, part in enumerate(of(code, every)):
                mine = (domain == code).view(-1, *[1] * (part.dim() - 1))
                found[at] = torch.where(mine, part, found[at])
        return found
    rows, parts = [], []
    here = domain.unique().tolist() or [empty]
    for code in sorted({code for each in parallel.gather(here) for code in each}) if together else here:
        if code in here:
            rows.append((domain == code).nonzero().squeeze(1))
            parts.append(of(code, rows[-1]))
        else:
            of(code, torch.zeros(1, dtype=torch.int64, device=domain.device))
    place = torch.cat(rows).argsort()
    return [torch.cat(each)[place] for each in zip(*parts, strict=True)]


def average(states: Sequence[Tensor]) -> Tensor:
    """(B, D) mean of several (B, D); adding them up needs no stack of all.

    Towers hand it out uncomputed (`unbraid.types.WithTrunk`): most losses never read a trunk, and it cost 2 % of a step.
    """
    return sum(states[1:], states[0]) / len(states)


def initialise(module: nn.Module) -> nn.Module:
    """Draw every Linear inside ``module`` anew, in place: Xavier-normal weights, zero biases.  Returns ``module``."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def task_key(task: str) -> str:
    """Name of a task's part inside an ``nn.ModuleDict``.

    A dot is not allowed in a module's name, and the slash keeps a task called ``keys`` or ``type`` from being refused
    because a ModuleDict has an attribute of that name.
    """
    return f"task/{task}".replace(".", "_")


def require_positive(**sizes: int | Sequence[int]) -> None:
    """Raise ValueError, naming the parameter, if a size (or one of its entries) is not at least 1."""
    for name, size in sizes.items():
        if any(entry < 1 for entry in ([size] if isinstance(size, int) else size)):
            raise ValueError(f"Parameter `{name}` should be positive. Found {size}.")


def require_dropout(dropout: float) -> None:
    """Raise ValueError unless ``dropout`` is in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"Parameter `dropout` should be in [0, 1). Found {dropout}.")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
