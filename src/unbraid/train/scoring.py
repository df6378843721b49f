"""A model's predictions on rows, and the one value that runs are selected by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from unbraid import parallel, sharding
from unbraid.evaluate import lower_is_better
from unbraid.layers import device_of
from unbraid.measures import NAMES, RANKING
from unbraid.types import Batch, Schema, Scores


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[Batch], schema: Schema, *, hidden: bool = False, device: str = ""
) -> Scores:
    """The model's logits on some batches, with what metrics need.

    Args:
        hidden: keep each task's (N, H) hidden vectors, too.
        device: where the model is, if that is known; batches may lie anywhere.
    """
    was_training = model.training
    model.eval()
    found = scores_of(model, batches, schema, hidden=hidden, device=device)
    model.train(was_training)
    return found


@torch.no_grad()
def scores_of(
    model: nn.Module, batches: Iterable[Batch], schema: Schema, *, hidden: bool = False, device: str = ""
) -> Scores:
    """As `predict`, of a model that is in evaluation mode: to say so again takes longer than a small batch."""
    parts: list[dict[str, Any]] = []
    there = torch.device(device) if device else device_of(model)
    for batch, counts in sharding.in_step(batches, model):
        output = model(batch.to(there))
        if not counts:
            continue
        parts.append({
            "logits": {k: v.float().cpu().numpy() for k, v in output.logits.items()},
            "hidden": {k: v.cpu().numpy() for k, v in output.hidden.items()} if hidden else {},
            "labels": {k: v.cpu().numpy() for k, v in batch.labels.items()},
            "observed": {k: v.cpu().numpy() for k, v in batch.observed.items()},
            "meta": {k: v.cpu().numpy() for k, v in batch.meta.items()},
            "domain": batch.domain.cpu().numpy(), "row": batch.row.cpu().numpy(),
            "weight": None if batch.weight is None else batch.weight.cpu().numpy(),
        })  # fmt: skip
    if not parts:
        raise ValueError("There are no rows to predict.")
    joined = {key: _join([part[key] for part in parts]) for key in parts[0]}
    meta = joined.pop("meta")
    group = meta.pop("user", None)
    if group is None:  # requests nest in users, so without these each request is one, and every other row
        group = joined["row"]
        if "request" in meta:
            group = np.where(meta["request"] >= 0, meta["request"], -1 - group)
    return Scores(group=group, meta=meta, domains=schema.domains, **joined)


def shared_scores(score: Callable[[np.ndarray], Scores], rows: np.ndarray) -> Scores:
    """The scores of rows, of which every process computes a part; all processes get all."""
    if parallel.world() == 1 or len(rows) < parallel.world():
        return score(rows)
    return join_scores(parallel.gather(score(rows[parallel.share(len(rows))])))


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of all parts, one part after the other."""
    names = [part.name for part in fields(Scores) if part.name != "domains"]
    return replace(parts[0], **{name: _join([getattr(part, name) for part in parts]) for name in names})


def _join(parts: list[Any]) -> Any:
    if parts[0] is None:
        return None
    if isinstance(parts[0], dict):
        return {key: _join([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


def check_metric(metric: str, schema: Schema, tasks: Sequence[str] = (), key: str = "training.metric") -> None:
    """Raises ValueError, before a step is taken, for a metric that none of the tasks of `selected` can have."""
    task, _, name = metric.rpartition(".")
    names = [task] if task else list(tasks) or [t.name for t in schema.tasks if t.role == "target"]
    have = {t.name: sorted(NAMES[t.kind]) for t in schema.tasks}
    ranks = name.partition("@")[0] in RANKING  # whether there are requests to rank in, the first look will tell
    if not any(name in have[n] or (ranks and schema.task(n).kind == "binary") for n in names if n in have):
        raise ValueError(f"`{key}` is `{metric}`, which no task has. Metrics: {have}.")


def selected(
    metrics: Mapping[str, Any], metric: str, schema: Schema, tasks: Sequence[str] = (), key: str = "training.metric"
) -> tuple[float | None, bool]:  # fmt: skip
    """The value that selection goes by, and whether lower is better.

    ``auc`` averages over the target tasks (or ``tasks``) that have it (a task too small to judge has none); ``click.auc`` is
    one task's.  ``key`` is what the user set it by.

    Raises:
        ValueError: no task has such a metric.
    """
    task, _, name = metric.rpartition(".")
    names = [task] if task else list(tasks) or [t.name for t in schema.tasks if t.role == "target"]
    found = [metrics[n][name] for n in names if n in metrics and name in metrics[n]]
    if not found:
        have = {n: sorted(k for k, v in metrics[n].items() if isinstance(v, dict) and "value" in v) for n in metrics}
        raise ValueError(f"`{key}` is `{metric}`, which no task has. Metrics: {have}.")
    values = [f["value"] for f in found if f["value"] is not None]
    return (sum(values) / len(values) if values else None), lower_is_better(name)
