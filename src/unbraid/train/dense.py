"""How the dense parts of a model compute while they train: in bfloat16, and compiled.

**Precision.**  With ``bfloat16`` the networks that a model names in ``dense_parts`` (backbones, interactions, the tower) run
under ``torch.autocast``: their matrix products read and write bfloat16 and add up in float32.  What they give is float32 again,
so that all else stays in it: tables, histories and their searches, heads, losses, gradients of parameters, every update and its
moments.
Validation and all that comes after training compute in float32, too: that is the model which the bundle holds.

There is no float16.  Its gradients vanish below 6e-8, so that losses need a scale that is found by skipping steps, and an update
with accumulators per task cannot skip a step of one task alone; bfloat16 has float32's range and needs none.

**Compilation.**  ``torch.compile`` of the parts that say ``compiles``.  Those give one tensor.  A tower gives one per task, and a
compiled function returns gradients of zeros where a task has no loss in a batch: they would move its parameters by their
momentum, and tell an update per task that every parameter is shared.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.slots import TowerOutput
from unbraid.train.options import Training

Forward = Callable[..., Any]


@contextlib.contextmanager
def dense(model: nn.Module, training: Training) -> Iterator[None]:
    """Until the block ends, the model's dense parts compute as ``training`` says whenever they train.

    The parts stay what they are: names of weights do not change, and a copy of the model reads its own.
    """
    low = training.precision == "bfloat16"
    parts = dense_parts(model) if low or training.compile else []
    with contextlib.ExitStack() as until:
        if training.compile:
            import torch._functorch.config as functorch  # late: 0.2 s that no other run needs

            # a graph may be read once per task: its backward pass must not reuse the memory of what it read
            until.enter_context(functorch.patch(donated_buffer=False))
            until.enter_context(warnings.catch_warnings())  # of torch's own, as it looks at what a graph reads
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        for part in parts:
            forward = type(part).forward
            if training.compile and getattr(part, "compiles", False):
                forward = partial(_any_rows, compiled(forward))
            elif not low:
                continue
            part.forward = partial(_in_bfloat16 if low else _training, part, forward)  # type: ignore[method-assign]
            until.callback(delattr, part, "forward")
        yield


def dense_parts(model: nn.Module) -> list[nn.Module]:
    """The dense parts of all models inside a module, each once."""
    found = [part for module in model.modules() for part in getattr(module, "dense_parts", ())]
    return list({id(part): part for part in found}.values())


def check_dense(model: nn.Module, training: Training, device: str) -> None:
    """Raises ValueError, before a step is taken, where ``precision`` or ``compile`` cannot do what they say."""
    if training.precision == "bfloat16" and device.startswith("cuda") and not torch.cuda.is_bf16_supported(False):
        raise ValueError(
            f"`training.precision` is `bfloat16`, which {torch.cuda.get_device_name(device)} does not compute in. Set it to "
            "`float32`."
        )
    if not training.compile:
        return
    parts = dense_parts(model)
    if not any(getattr(part, "compiles", False) for part in parts):
        kinds = sorted({type(part).__name__ for part in parts})
        raise ValueError(
            "`training.compile` compiles interactions of fields, and this model has none to compile (found "
            f"{', '.join(kinds)}). Set it to false, or choose another `model.interaction`."
        )
    try:
        compiled(_probe)(torch.ones(2, device=device))
    except Exception as error:
        why = [line.strip() for line in str(error).splitlines() if line.strip()][:1]
        raise ValueError(
            "`training.compile` needs a compiler that torch can call: g++ or clang++ with Python's headers for a CPU, Triton "
            f"and a C compiler for CUDA. torch says: {''.join(why) or type(error).__name__}. Install it, or set "
            "`training.compile` to false."
        ) from error


def _probe(x: Tensor) -> Tensor:
    return x + 1


@cache
def compiled(forward: Forward) -> Forward:
    """One compiled function for all parts of a class and all calls: what was compiled once is found again."""
    return torch.compile(forward)


def _any_rows(forward: Forward, part: nn.Module, *args: Any) -> Any:
    """Say that batches have any number of rows, so that the last one of a pass compiles nothing anew."""
    for x in _tensors(args):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return forward(part, *args)


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))
    elif isinstance(given, Sequence) and not isinstance(given, str):
        for each in given:
            yield from _tensors(each)


def _training(part: nn.Module, forward: Forward, *args: Any) -> Any:
    """The part's ``forward`` as given while it trains, else its own."""
    own = type(part).forward
    return forward(part, *args) if part.training and torch.is_grad_enabled() else own(part, *args)


def _in_bfloat16(part: nn.Module, forward: Forward, *args: Any) -> Any:
    """As `_training`, in bfloat16; what it gives is float32."""
    if not (part.training and torch.is_grad_enabled()):
        return type(part).forward(part, *args)
    device = next(x.device.type for x in _tensors(args))
    with torch.autocast(device, torch.bfloat16):
        found = forward(part, *args)
    return _widened(found)


def _widened(found: Any) -> Any:
    """float32 in the place of bfloat16; other tensors as they are."""
    if isinstance(found, Tensor):
        return found.float() if found.dtype == torch.bfloat16 else found
    if isinstance(found, TowerOutput):
        shared = _widened(found.shared) if isinstance(found.shared, Tensor) else partial(_trunk, found)
        return replace(found, tasks=_widened(found.tasks), shared=shared, extras=_widened(found.extras))
    return {name: _widened(value) for name, value in found.items()}


def _trunk(found: TowerOutput) -> Tensor:
    trunk: Tensor = _widened(found.trunk)
    return trunk
