"""A device that is not there: tensors of it are real ones, and an operation that mixes it with the CPU fails as on a GPU.

It is called ``meta``, so that any torch knows its name and code under test needs no word about it.  `Apart` sees every operation
below autograd: it computes on the CPU, and remembers which results lie on the other device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = "meta"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(Tensor):
    """A tensor of the other device; ``here`` holds its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE, requires_grad=False
        )
        made.here = here
        return made

    def tolist(self) -> Any:  # torch refuses it of subclasses
        return self.here.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"There({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("A tensor of the other device is read outside `Apart`.")


class Mixed(RuntimeError):
    """An operation read tensors of two devices."""


class Apart(TorchDispatchMode):
    """Until the block ends, the other device exists.  ``operations``: how many it did."""

    operations = 0

    def __enter__(self) -> Apart:
        """``torch.tensor`` of numbers is below no dispatch: while the block lasts it is made here and copied there."""
        self._made = torch.tensor

        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            found = self._made(*args, **kwargs)
            return found if device is None else found.to(device)

        torch.tensor = made  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.tensor = self._made  # type: ignore[assignment]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat, tree = tree_flatten((args, kwargs))
        there = [x for x in flat if isinstance(x, There)]
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if there and func not in COPIES:
            for x in flat:  # a number is read wherever it lies
                if isinstance(x, Tensor) and not isinstance(x, There) and x.dim():
                    raise Mixed(f"{func} reads the device and a CPU tensor of shape {tuple(x.shape)}")
        if not there and (asked is None or asked.type != DEVICE):
            return func(*args, **kwargs)
        self.operations += 1
        out_there = asked.type == DEVICE if asked is not None else isinstance(flat[0], There) or func not in COPIES
        if torch.Tag.inplace_view in func.tags:  # it changes the shape of the tensor that it is given
            with no_dispatch():
                func(*args, **kwargs)
        plain = [x.here if isinstance(x, There) else x for x in flat]
        plain = [torch.device("cpu") if isinstance(x, torch.device) and x.type == DEVICE else x for x in plain]
        args, kwargs = tree_unflatten(plain, tree)
        kwargs.pop("pin_memory", None)
        known = {id(x.here): x for x in there}

        def back(x: Any) -> Any:
            if not isinstance(x, Tensor) or isinstance(x, There):
                return x
            return known[id(x)] if id(x) in known else There(x) if out_there else x

        return tree_map(back, func(*args, **kwargs))
