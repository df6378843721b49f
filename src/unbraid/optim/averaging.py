"""Weighted means of a model's weights along its training, kept online beside it.

A member of the slot ``average`` says one number per step, its *share* s_t; the mean then is::

    mean_0 = theta_0        mean_t = mean_{t-1} + s_t (theta_t - mean_{t-1})            t = 1..N

With any weights a_t of the iterates, s_t = a_t / (a_0 + ... + a_t) makes mean_N the mean of all theta_t under them.  Nothing
of it reaches the training: no gradient, no optimiser state, no random number.

- **Precision.**  Accumulators are float64, or float32 if asked; never less, whatever the model is in.  An online mean in half
  precision stops moving once s_t (theta_t - mean) is below its spacing.
- **One copy.**  There is one accumulator per trained parameter.  A look at the validation split by the averages holds the
  model's own weights beside them meanwhile.
- **Buffers** are those of the last model.  Means of weights have other activations than the last weights, so running
  statistics of normalisations are measured anew (`remeasure`), by passes over training batches.
- **Lazy tables.**  Only rows that a batch reads change.  Between two of its reads a row is some constant v, and over the
  steps (s, t] its mean moves to v + P (mean - v), with P the product of all 1 - s_u: exactly what t - s single steps do.  So
  a row is brought up to date when it is read, and a step costs O(rows read).  With weight decay that catches up, rows change
  unread: every step with a share then settles and passes over the whole table, O(rows of the table).

How this differs from ``torch.optim.swa_utils``: shares are a function of the step, lazy tables, precision of its own.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from unbraid.sharding import Part
from unbraid.types import FORBID, Batch, Lookup, State

MEASURED = 200  # batches that running statistics are measured on, at most


@dataclass(frozen=True)
class Average(ABC):
    """What all averages have.

    Args:
        precision: of the accumulators.

    Attributes:
        looks: does the run look at the validation split by the averages, so that it may also select by them?  One that does
            not is made once, at the end, of a training whose length is known: early stopping is refused.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    looks: ClassVar[bool] = False
    precision: Literal["float64", "float32"] = "float64"

    @abstractmethod
    def shares(self, steps: int) -> np.ndarray:
        """(steps + 1,) float64 in [0, 1]: how far each step's weights move the mean; the first, of the start, is 1."""

    def begin(self, model: nn.Module, steps: int) -> Running:
        """The mean of a training of so many steps that begins with the model's present weights."""
        return Running(model, self.shares(steps), torch.float64 if self.precision == "float64" else torch.float32)


class Running:
    """A mean of a model's trained parameters (those that require gradients now).

    Args:
        model: its tables are read through ``tables``, if it has any; their update must have been built.
        shares: (N + 1,) see `Average.shares`; dtype: of the accumulators.
    """

    def __init__(self, model: nn.Module, shares: np.ndarray, dtype: torch.dtype) -> None:
        self.model, self.step = model, 0
        self.shares = np.asarray(shares, np.float64)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().to(dtype, copy=True) for name, p in named.items()}
        names = {id(p): name for name, p in named.items()}
        tables = {name: t for name, t in getattr(model, "tables", {}).items() if t.lazy and id(t.weight) in names}
        self.settles = any(table.before_read is not None for table in tables.values())
        # table -> name of its parameter, for those that only reads change
        self.lazy = {name: names[id(table.weight)] for name, table in tables.items() if table.before_read is None}
        self.last = {key: torch.zeros(len(named[key]), dtype=torch.int64) for key in self.lazy.values()}
        self.last = {key: last.to(named[key].device) for key, last in self.last.items()}
        self._parameters = named
        kept = 1 - self.shares
        whole = kept == 0  # a share of 1 forgets all before it
        self._forgot = np.maximum.accumulate(np.where(whole, np.arange(len(kept)), -1))
        logs = torch.from_numpy(np.cumsum(np.log1p(-np.where(whole, 0.0, self.shares))))
        self._logs = logs.to(next((mean.device for mean in self.means.values()), None))

    @torch.no_grad()
    def before(self, lookups: Iterable[Lookup]) -> None:
        """Called before an update: bring rows of lazy tables up to date that it may change."""
        for name, ids, _ in lookups:
            if name in self.lazy:
                weight = self._parameters[self.lazy[name]]
                self._sync(self.lazy[name], ids[weight.own(ids)] - weight.start if isinstance(weight, Part) else ids)

    @torch.no_grad()
    def after(self, settle: Callable[[], None]) -> None:
        """Called after an update: one more step.  ``settle``: `unbraid.slots.Update.settle`."""
        self.step += 1
        share = float(self.shares[self.step])
        if share == 0:
            return
        if self.settles:
            settle()
        for name, mean in self.means.items():
            if name not in self.last:
                mean.lerp_(self._parameters[name].to(mean.dtype), share)

    @torch.no_grad()
    def write(self) -> None:
        """Give the model the means."""
        for key in self.last:
            self._sync(key, None)
        for name, mean in self.means.items():
            self._parameters[name].copy_(mean)

    def _sync(self, key: str, ids: Tensor | None) -> None:
        """Rows (all without ``ids``) of a lazy table's mean, as of now."""
        mean, last, weight = self.means[key], self.last[key], self._parameters[key].detach()
        if ids is not None and not len(ids):
            return
        value = weight.to(mean.dtype) if ids is None else weight.index_select(0, ids).to(mean.dtype)
        since = last if ids is None else last.index_select(0, ids)
        old = mean if ids is None else mean.index_select(0, ids)
        fresh = value + self._kept(since).to(mean.dtype).unsqueeze(1) * (old - value)
        if ids is None:
            mean.copy_(fresh)
            last.fill_(self.step)
        else:
            mean.index_copy_(0, ids, fresh)
            last.index_fill_(0, ids, self.step)

    def _kept(self, since: Tensor) -> Tensor:
        """(U,) products of 1 - share over the steps after ``since`` (U,) up to now."""
        kept = (self._logs[self.step] - self._logs[since]).exp()
        return torch.where(since < int(self._forgot[self.step]), torch.zeros_like(kept), kept)

    def state_dict(self) -> State:
        """All that changes.  The tensors are the live ones."""
        return {"step": self.step, "means": dict(self.means), "last": dict(self.last)}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`.  Raises ValueError if it is that of other parameters."""
        found, wanted = ({k: tuple(v.shape) for k, v in each.items()} for each in (state["means"], self.means))
        if found != wanted or set(state["last"]) != set(self.last):
            raise ValueError(f"The state should be that of averages of {sorted(wanted)}. Found {sorted(found)}.")
        self.step = state["step"]
        for mine, theirs in ((self.means, state["means"]), (self.last, state["last"])):
            for name, value in mine.items():
                value.copy_(theirs[name])


@torch.no_grad()
def remeasure(model: nn.Module, batches: Callable[[], Iterator[Batch]], count: int) -> int:
    """Running statistics of normalisations that train, as means over batches; all else as in evaluation.

    Args:
        batches: gives training batches on the model's device, closed afterwards; not called where nothing is to be measured.
        count: how many there are to a pass over the rows; at most `MEASURED` are read.

    Returns:
        How many batches were read.
    """
    was_training = model.training
    model.train()  # one that stays in evaluation is frozen on purpose
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.running_mean is not None]
    model.train(was_training)
    if not norms:
        return 0
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    read, given = 0, batches()
    try:
        for batch in itertools.islice(given, min(count, MEASURED)):
            model(batch)
            read += 1
    finally:
        cast(Any, given).close()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(was_training)
    return read
