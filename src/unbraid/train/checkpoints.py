"""What a checkpoint holds beside a model and an update: the state of the random numbers; and copies of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unbraid.types import State


def copies(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and buffers, apart from it."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def random_state() -> State:
    """The generators that training draws from, on the CPU and on the current CUDA device."""
    state: State = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: State) -> None:
    """Go on drawing from where `random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
