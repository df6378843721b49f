"""Working memory that a thread keeps between calls, since the first write to new memory costs a page fault each 4 KiB."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

MOST = 2**26  # bytes of one piece that is kept
_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor with whatever was in it, valid until the thread asks for the same name again.  Only the CPU's is kept."""
    size = math.prod(shape) * dtype.itemsize
    if size > MOST or torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    kept: dict[str, Tensor] = _local.__dict__.setdefault("kept", {})
    if name not in kept or len(kept[name]) < size:
        kept[name] = torch.empty(size, dtype=torch.uint8)
    return kept[name][:size].view(dtype).view(shape)
