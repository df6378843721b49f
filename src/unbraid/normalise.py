"""Batch normalisation over the rows of all processes (docs/distributed.md), on any device.

torch's ``SyncBatchNorm`` needs GPUs, and modules in the place of those of a model.  Here the model's own batch normalisations, of
whatever library, take the mean and the variance over all processes' rows of a batch while they train::

    m = sum over processes of sum x / n        v = sum over processes of sum (x - m)^2 / n        n: rows of all processes

Both sums carry gradients: what a process does to m changes the rows of all.  Deviations are taken from the common mean, so that
nothing is lost where it is large.  Running statistics move to the same values on all processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from unbraid import parallel


@contextlib.contextmanager
def over_processes(model: nn.Module) -> Iterator[None]:
    """Until the block ends, the model's batch normalisations see the rows of all processes."""
    parts = [part for part in model.modules() if isinstance(part, _BatchNorm)] if parallel.world() > 1 else []
    for part in parts:
        part.forward = partial(_forward, part)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def sums_by(x: Tensor, group: Tensor, count: int) -> Tensor:
    """(count, D) sums over all processes of rows (n, D) by group (n,), below ``count``; those of a spare row are 0."""
    x = x.to(
        torch.promote_types(x.dtype, torch.float32)
    )  # counts and sums of bfloat16 would be rounded to three digits
    return parallel.all_sum(x.new_zeros(count, x.shape[1]).index_add(0, group, x * parallel.counts()))


def _forward(part: _BatchNorm, x: Tensor) -> Tensor:
    """As the module's own ``forward``."""
    if not part.training:
        return type(part).forward(part, x)
    own = x.transpose(0, 1).flatten(1).T  # (n, C): a row, or a place of a picture
    one = torch.zeros(len(own), dtype=torch.int64, device=x.device)
    found = sums_by(torch.cat([own, torch.ones_like(own[:, :1])], 1), one, 1)[0]
    n, mean = found[-1], found[:-1] / found[-1]
    if float(n.detach()) < 2:  # one row has no variance
        return F.batch_norm(x, part.running_mean, part.running_var, part.weight, part.bias, False, 0.0, part.eps)
    apart = own - mean
    variance = sums_by(apart.square(), one, 1)[0] / n
    _move(part, mean.detach(), variance.detach() * (n / (n - 1)).detach())
    normal = apart * (variance + part.eps).rsqrt()
    if part.weight is not None:
        normal = normal * part.weight + part.bias
    return normal.T.reshape(x.transpose(0, 1).shape).transpose(0, 1)


@torch.no_grad()
def _move(part: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics as torch does; ``variance`` is that of a sample."""
    if part.running_mean is None or part.running_var is None:
        return
    share = part.momentum
    if part.num_batches_tracked is not None:
        part.num_batches_tracked.add_(1)
        share = share if share is not None else 1 / float(part.num_batches_tracked)
    part.running_mean.lerp_(mean.to(part.running_mean), share or 0.0)
    part.running_var.lerp_(variance.to(part.running_var), share or 0.0)
