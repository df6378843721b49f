"""An update of this library on a module and a training loop of your own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from unbraid.slots import Update
from unbraid.types import Losses, Output, State


class Config(Protocol):
    """A member of the slot `update`."""

    learning_rate: Any

    def build(self, model: nn.Module, *, steps: int, weights: Mapping[str, float]) -> Update:
        """See `unbraid.optim.joint.Joint.build`."""


class _Module(nn.Module):
    """A module as updates read it: no tables whose rows move lazily, parameters by their own names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.tables = inner, dict[str, Any]()

    def named_parameters(self, *args: Any, **options: Any) -> Any:
        """Those of the module."""
        return self.inner.named_parameters(*args, **options)


class Stepper:
    """What stands in the place of ``opt.zero_grad(); sum(losses).backward(); opt.step()``.

    Args:
        config: of the update, such as `unbraid.optim.joint.Joint`; model: any module, whose trained parameters are those that
            require gradients now.
        steps: length of the training, for a step size that goes by it.
        weights: name of a loss -> its weight; 1 where it is absent.

    Raises:
        ValueError: a step size that goes by ``steps`` without them, or what the update says of its config.
    """

    def __init__(
        self, config: Config, model: nn.Module, *, steps: int = 0, weights: Mapping[str, float] | None = None
    ) -> None:
        if config.learning_rate != "constant" and steps < 1:
            raise ValueError(f"`learning_rate = {config.learning_rate!r}` needs `steps`, the length of the training.")
        self.update = config.build(_Module(model), steps=max(steps, 1), weights=weights or {})

    def __call__(self, losses: Losses) -> None:
        """Take one step.

        Args:
            losses: name -> scalar of this batch; a loss without a row is left out, not 0.

        Raises:
            FloatingPointError: a loss is not finite.  Nothing has moved.
        """
        self.update(losses, Output({}, {}, torch.empty(0)))

    def state_dict(self) -> State:
        """All that a resumed training needs; the tensors are the live ones."""
        return self.update.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.update.load_state_dict(state)
