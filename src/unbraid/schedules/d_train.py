"""D-Train (Decoupled Training): train for all domains, then with a head per domain, then the heads alone.

Paper: "Decoupled Training: Return of Frustratingly Easy Multi-Domain Learning", Wang, Pan, Guo, Liu and Jiang, AAAI 2024,
https://arxiv.org/abs/2309.10302.

Idea: domains with many rows steer what is shared, and those with few suffer.  The network stays a plain shared one with a
head per domain; only *when* each part trains changes, from the general to the particular::

    1 pre-train    trunk psi and one head h, all domains            min over psi, h      sum_t w_t E_t l(h(psi(x)), y)
    2 post-train   psi and heads h_1 .. h_T, which begin as h       min over psi, h_t    sum_t w_t E_t l(h_t(psi(x)), y)
    3 fine-tune    each h_t on its domain's rows, psi frozen        min over h_t         E_t l(h_t(psi(x)), y)

There is no official code, and of the paper no more than its abstract, its opening and captions was read; the three phases are
as stated there.  Ours: that h_t begins as a copy of h (so that the split changes no prediction), the lengths of the phases,
a new optimiser state in each, weights w_t by rows or equal, and all that keeps phase 3 from over-fitting small domains: a
domain's head of phase 2 stays unless the domain's validation rows say that the new one is better (`DTrain.keep`), an L2
penalty on the distance from it, and the exact solution of the convex problem that linear heads then have.

In phase 3 the trunk is in evaluation mode and no optimiser knows it.  Its output is computed once for the rows that will be
read, so that a step costs a head.  Domains' problems share nothing, not even random numbers: neither their order nor another
domain's rows can change a head.

The relative whose last phase trains everything per domain is `unbraid.schedules.post_train`.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from unbraid import parallel
from unbraid.schedules import domains
from unbraid.schedules.domains import Domains
from unbraid.slots import Look, Session
from unbraid.types import FORBID, Batch, Output, State

BIBTEX = """
@inproceedings{wang2024decoupled,
  title     = {Decoupled Training: Return of Frustratingly Easy Multi-Domain Learning},
  author    = {Wang, Ximei and Pan, Junwei and Guo, Xingzhuo and Liu, Dapeng and Jiang, Jie},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2024},
  eprint    = {2309.10302},
  archiveprefix = {arXiv},
}
"""

ORDERS = ((1,), (2,), (1, 2), (1, 3), (2, 3), (1, 2, 3))
HIDDEN = "hidden."  # HIDDEN + task -> (B, H): a feature of batches whose trunk is cached
FEW = 16  # products of fewer rows take another kernel, whose last bits differ: such batches are filled up


@dataclass(frozen=True)
class DTrain:
    """Three phases over domains.  Needs ``model.heads.by = "domain"``; the head is what `unbraid.heads.Heads` says.

    Args:
        phases: which phases run; the steps of the others go to these.
        shares: of the run's steps, phases 1, 2, 3.
        head_init: with what a domain's head begins phase 2 (or 3, without a phase 2): a copy of phase 1's, or at random.
        weighting: of domains in phases 1 and 2: by their rows, or equal.
        freeze: freeze the trunk in phase 3; else that phase trains everything on all domains, as phase 2 does.
        tune: steps of phase 3: ``divided`` equally among the domains, or ``each`` domain has them all, so that the run has
            more steps than others of its length.
        keep: whose head of phase 3 is kept: that of each domain whose validation rows say it is better than phase 2's, or
            every one (``last``).  A domain that validation cannot judge keeps phase 2's.
        looks: how often a domain's validation rows are looked at in phase 3, at even distances; the best look is kept.
        l2: weight of half the squared distance from the head of phase 2, in phase 3.  An extension.
        solver: ``update``: the run's update trains phase 3; ``lbfgs``: it solves each domain's convex problem instead.
        cache: where the trunk's output lies in phase 3; ``off``: it is computed again in every step.

    Raises:
        ValueError: phases in another order, shares that leave a phase no step, ``lbfgs`` without ``l2``, a negative value.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["d_train"] = field(default="d_train", kw_only=True)
    phases: tuple[int, ...] = (1, 2, 3)
    shares: tuple[float, float, float] = (0.4, 0.4, 0.2)
    head_init: Literal["copy", "random"] = "copy"
    weighting: Literal["proportional", "uniform"] = "proportional"
    freeze: bool = True
    tune: Literal["divided", "each"] = "divided"
    keep: Literal["better", "last"] = "better"
    looks: int = 1
    l2: float = 0.0
    solver: Literal["update", "lbfgs"] = "update"
    cache: Literal["memory", "disk", "off"] = "memory"

    def __post_init__(self) -> None:
        if self.phases not in ORDERS:
            raise ValueError(
                f"Parameter `phases` should be one of {[list(o) for o in ORDERS]}. Found {list(self.phases)}."
            )
        if not all(0 <= share < math.inf for share in self.shares) or not sum(self.shares[p - 1] for p in self.phases):
            raise ValueError(
                f"Parameter `shares` should not be negative, nor 0 for all of `phases`. Found {list(self.shares)}."
            )
        if not 0 <= self.l2 < math.inf:
            raise ValueError(f"Parameter `l2` should be finite and not negative. Found {self.l2}.")
        if self.looks < 1:
            raise ValueError(f"Parameter `looks` should be at least 1. Found {self.looks}.")
        if self.solver == "lbfgs" and not (self.l2 > 0 and 3 in self.phases and self.freeze):
            raise ValueError(
                "Solver `lbfgs` needs phase 3 with a frozen trunk and `l2` above 0: without a penalty the optimum of a domain "
                "whose labels can be told apart is at infinity."
            )

    @property
    def budget(self) -> tuple[str, ...]:
        """What makes its number of steps differ from that of another run with the same ``training``."""
        return ("tune",) if self.tune == "each" and 3 in self.phases and self.freeze else ()

    @property
    def keeps_root(self) -> bool:
        """Is there a head from before there was one per domain?"""
        return 1 in self.phases

    def split(self, steps: int) -> dict[int, int]:
        """Phase -> its steps: all of them are used; what rounding leaves over goes to the last phase."""
        whole, ends, before = sum(self.shares[p - 1] for p in self.phases), [0], 0.0
        for phase in self.phases:
            before += self.shares[phase - 1]
            ends.append(round(steps * before / whole))
        return {phase: ends[i + 1] - ends[i] for i, phase in enumerate(self.phases)}

    def __call__(self, session: Session, model: nn.Module, steps: int) -> nn.Module:
        """Train for ``steps`` in all phases together and return the model.

        Raises:
            ValueError: the heads are not per domain; ``lbfgs`` and heads that are not linear.
        """
        if getattr(model, "heads_by", "") != "domain":
            raise ValueError('D-Train needs a head per domain. Set `model.heads.by` to "domain".')
        if self.solver == "lbfgs" and any(len(head.towers) for head in cast(Any, model).heads.values()):
            raise ValueError("Solver `lbfgs` needs linear heads: leave out `model.heads.hidden`, or solver `lbfgs`.")
        training = _Phases(self, session, model, steps)
        training.run()
        session.keep(training.record)
        return model

    def report(self, record: Mapping[str, Any]) -> str:
        """The record as Markdown: what was done, and a table of domains."""
        done = [f"{n:,} in phase {phase} ({record['seconds'][phase]:.1f} s)" for phase, n in record["steps"].items()]
        lines = ["", f"D-Train: steps: {', '.join(done)}. Domains weigh {record['weighting']}."]
        if rows := record["cache"]["rows"]:
            lines.append(f"The trunk's output of {rows:,} rows was cached, {record['cache']['bytes'] / 1e6:.1f} MB.")
        if none := [f"{name} ({why})" for name, why in record["without"].items()]:
            lines.append(f"Nothing to learn from: {', '.join(none)}.")
        lines += ["", f"Validation, {record['metric']}. {domains.READING}", ""]
        columns = {f"after phase {phase}": found for phase, found in record["validation"].items()}
        heads = {name: f"{t['head']} ({t['why']})" if t["why"] else t["head"] for name, t in record["tuned"].items()}
        more = {"its head": heads} if heads else {}
        return "\n".join([*lines, domains.table(record["rows"], columns, record["lower is better"], more)])


class _Phases:
    """One training: what is done, what comes next, and the record."""

    def __init__(self, config: DTrain, session: Session, model: nn.Module, steps: int) -> None:
        self.config, self.session, self.model = config, session, cast(Any, model)
        self.domains, self.steps = Domains.of(session), config.split(steps)
        self.done = 0  # the last phase that is finished
        self.record: dict[str, Any] = {
            "kind": config.kind, "steps": {}, "seconds": {}, "weighting": config.weighting, "weights": self._shares(),
            "rows": self.domains.counts(), "labels": self.domains.labels(), "without": self.domains.without,
            "metric": session.metric, "lower is better": domains.falls(session),
            "validation": {}, "tuned": {}, "cache": {"rows": 0, "bytes": 0},
        }  # fmt: skip
        self._restore()

    def run(self) -> None:
        """All phases that are not done."""
        told = ", ".join(f"{name} {share:.3g}" for name, share in self.record["weights"].items())
        self.session.tell(f"domains weigh {self.config.weighting}: {told}")
        for phase in self.config.phases:
            if phase <= self.done:
                continue
            before = self.session.seconds
            if phase == 1:
                self._root()
            elif phase == 3 and self.config.freeze:
                Tuning(self.config, self.session, self.model, self.domains, self.steps[3], self.record).run()
            else:
                self._joint(self.steps[phase])
            self._finish(phase, self.session.seconds - before)

    def _root(self) -> None:
        """Phase 1: one head for all domains, then a head for each."""
        self.model.tie_heads()
        self._joint(self.steps[1])
        fresh = self.domains.codes if self.config.head_init == "random" and len(self.config.phases) > 1 else ()
        self.model.untie_heads(fresh, self.session.seed)

    def _joint(self, steps: int) -> None:
        """All parameters on all rows."""
        if steps:
            read = self._read_weighted if self.config.weighting == "uniform" else None
            self.session.fit(self.model, steps, weights=self._weights(), read=read)

    # ---------------------------------------------------------------------------------------------------------- weights
    def _shares(self) -> dict[str, float]:
        """Domain -> w_t, which sum to 1."""
        counts = self.domains.counts()
        equal = self.config.weighting == "uniform"
        return {name: 1 / len(counts) if equal else count / sum(counts.values()) for name, count in counts.items()}

    def _weights(self) -> dict[str, float]:
        """Objective -> weight, whichever objectives the losses have: tasks, domains or tasks in domains."""
        tasks = {task.name: task.weight for task in self.session.schema.tasks}
        shares = self.record["weights"]
        pairs = {f"{task}@{name}": weight * share for task, weight in tasks.items() for name, share in shares.items()}
        return {**shares, **pairs, **tasks}

    def _read_weighted(self, rows: np.ndarray) -> Batch:
        """A batch whose rows count n / (T n_t): what makes domains equal where losses are means over rows of all."""
        batch = self.session.batch(rows)
        factors = torch.ones(len(self.domains.names))
        for code in self.domains.codes:
            factors[code] = sum(self.record["rows"].values()) / (
                len(self.domains.codes) * len(self.domains.train[code])
            )
        weight = factors[batch.domain]
        return replace(batch, weight=weight if batch.weight is None else batch.weight * weight)

    # ------------------------------------------------------------------------------------------------------- resumption
    def _finish(self, phase: int, seconds: float) -> None:
        """Write down what a phase did, and keep it."""
        self.done = phase
        tuned = self.config.freeze and phase == 3
        self.record["steps"][str(phase)] = (
            sum(t["steps"] for t in self.record["tuned"].values()) if tuned else self.steps[phase]
        )
        self.record["seconds"][str(phase)] = seconds
        self.record["validation"][str(phase)] = domains.values(self.session, self.model)
        if phase != self.config.phases[-1]:
            state: State = {"phase": phase, "model": self.model.state_dict(), "record": self.record}
            self.session.checkpoint("d_train", state, done=True)

    def _restore(self) -> None:
        state = self.session.restore("d_train")
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.done, self.record = state["phase"], state["record"]


class FrozenHead(nn.Module):
    """The heads of one domain as a module of their own: they train, and the trunk below them is looked at only.

    Reads the features ``hidden.TASK`` (B, H) of a batch, if it has them, else computes them.
    """

    def __init__(self, model: Any, domain: int) -> None:
        super().__init__()
        self.heads = model.domain_heads(domain)
        self.below = (model,)  # in a tuple: not a part whose mode changes, nor one that is saved
        self.tables: dict[str, Any] = {}
        self.gives = frozenset(name for head in self.heads.values() for name in head.gives)

    def forward(self, batch: Batch) -> Output:
        """As the model, for rows of the domain."""
        (model,) = self.below
        tasks = [task.name for task in model.schema.tasks]
        known = HIDDEN + tasks[0] in batch.features
        below = {task: batch.features[HIDDEN + task] for task in tasks} if known else hidden_of(model, batch)
        logits, hidden, two = {}, {}, {}
        for task, head in zip(tasks, self.heads.values(), strict=True):
            found, hidden[task] = head(below[task])
            for name in head.gives:
                two[name], found = found, found[:, 1] - found[:, 0]
            logits[task] = found
        return Output(logits, hidden, _no_trunk, two)


def _no_trunk() -> Tensor:
    raise ValueError("In phase 3 of D-Train the trunk is frozen: a loss that reads it has nothing to train there.")


@torch.no_grad()
def hidden_of(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Task -> (B, H) what its heads read, in evaluation mode; a row's is the same bit for bit in any batch (see `FEW`)."""
    was, count = model.training, len(batch)
    model.eval()
    if count < FEW:
        batch = batch.select(torch.arange(FEW, device=batch.row.device) % count)
    found = model.trunk(batch)[0].tasks
    model.train(was)
    return {task: hidden[:count] for task, hidden in found.items()}


class Tuning:
    """Phase 3: one problem per domain.

    Args:
        record: that of the phases; its ``tuned`` says what became of each domain, ``cache`` what was computed once.
    """

    def __init__(
        self, config: DTrain, session: Session, model: Any, domains_: Domains, steps: int, record: dict[str, Any]
    ) -> None:
        self.config, self.session, self.model, self.domains, self.record = config, session, model, domains_, record
        count = max(len(domains_.codes), 1)
        self.steps = {
            code: steps if config.tune == "each" else _part(steps, place, count)
            for place, code in enumerate(domains_.codes)
        }

    def run(self, order: Callable[[list[int]], list[int]] = list) -> None:
        """All domains, in any ``order`` of their codes."""
        self._restore()
        self.model.requires_grad_(False)
        for code in order(list(self.domains.codes)):
            if self.domains.names[code] not in self.record["tuned"]:
                self.record["tuned"][self.domains.names[code]] = self._domain(code)
                self._checkpoint()
        self.model.requires_grad_(True)
        cached = self.record["cache"]
        self.session.tell(
            f"phase 3 cached the trunk's output of {cached['rows']:,} rows: {cached['bytes'] / 1e6:.1f} MB"
        )

    def _domain(self, code: int) -> dict[str, Any]:
        """Tune one domain's heads; returns what became of them."""
        head, valid, steps = FrozenHead(self.model, code), self.domains.valid[code], self.steps[code]
        found: dict[str, Any] = {"steps": 0, "before": None, "after": None, "head": "phase 2", "why": ""}
        if 2 not in self.config.phases:
            found["head"] = "phase 1"
        if self.config.keep == "better" and not len(valid):
            return {**found, "why": "no validation row"}
        if not steps and self.config.solver == "update":
            return {**found, "why": "no step"}
        with self._reader(code, head) as read:
            return found | self._tuned(code, head, valid, steps, read)

    def _tuned(self, code: int, head: FrozenHead, valid: np.ndarray, steps: int, read: Any) -> dict[str, Any]:
        """As `_domain`, once the trunk's output is there."""
        before, falls, why = self._judge(head, valid, read)
        if before is None and self.config.keep == "better":
            return {"why": why}
        old = copy.deepcopy(head.heads.state_dict())
        found: dict[str, Any] = {"before": before}
        if self.config.solver == "lbfgs":
            found |= self._solve(code, head, read)
        else:
            self._fit(code, head, valid, steps, read)
            found["steps"] = steps
        after, _, _ = self._judge(head, valid, read)
        better = after is not None and before is not None and (after < before if falls else after > before)
        if self.config.keep == "better" and not better:
            head.heads.load_state_dict(old)
            return found | {"after": after, "why": "not better"}
        return found | {"after": after, "head": "phase 3"}

    def _judge(self, head: FrozenHead, valid: np.ndarray, read: Any) -> tuple[float | None, bool, str]:
        if not len(valid):
            return None, False, "no validation row"
        scores = self.session.score(head, "valid", valid, **({} if read is None else {"read": read}))
        return domains.judge(scores, self.session.schema, self.session.metric)

    # --------------------------------------------------------------------------------------------------------- training
    def _fit(self, code: int, head: FrozenHead, valid: np.ndarray, steps: int, read: Any) -> None:
        """The run's update on the domain's rows, with random numbers that only the run's seed and the domain decide."""
        better = self.config.keep == "better"
        every = -(-steps // self.config.looks) if better and self.config.looks > 1 else -1
        look = Look(rows=valid, keep_best=better, every=every, read=read)
        head.requires_grad_(True)
        hooks = [p.register_hook(_pull(p, self.config.l2)) for p in head.parameters() if self.config.l2 > 0]
        try:
            self.session.fit(
                head, steps, rows=self.domains.train[code], stream=True, seed=self._seed(code), look=look, read=read
            )
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _seed(code: int) -> list[int]:
        return [3, code]

    def _solve(self, code: int, head: FrozenHead, read: Any) -> dict[str, Any]:
        """The optimum of the loss of all rows of the domain as one batch and the penalty, in double precision."""
        began, rows = time.monotonic(), self.domains.train[code]
        dtype, losses = next(head.parameters()).dtype, list[float]()
        batch = (read or self.session.batch)(rows).to(self.session.device)
        below = {HIDDEN + task: hidden.double() for task, hidden in self._below(batch).items()}
        batch = replace(batch, features=below)
        if self.session.loss(head.double(), batch) is None:  # all its labels are of tasks without a weight
            head.to(dtype)
            return {"evaluations": 0}
        parameters = list(head.parameters())
        anchors = [p.detach().clone() for p in parameters]
        head.requires_grad_(True)
        solver = torch.optim.LBFGS(parameters, max_iter=2000, tolerance_grad=1e-9, tolerance_change=0.0, history_size=20,
                                   line_search_fn="strong_wolfe")  # fmt: skip

        def closure() -> Tensor:
            solver.zero_grad()
            loss = self.session.loss(head, batch)
            assert loss is not None
            pull = sum(((p - a) ** 2).sum() for p, a in zip(parameters, anchors, strict=True))
            (total := loss + self.config.l2 / 2 * pull).backward()
            losses.append(float(loss.detach()))
            return total

        solver.step(closure)
        calls = len(losses)
        closure()
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        head.to(dtype)
        self.session.charge(time.monotonic() - began)
        return {"evaluations": calls, "gradient": norm, "loss before": losses[0], "loss after": losses[-1]}

    def _below(self, batch: Batch) -> dict[str, Tensor]:
        tasks = [task.name for task in self.session.schema.tasks]
        if HIDDEN + tasks[0] in batch.features:
            return {task: cast(Tensor, batch.features[HIDDEN + task]) for task in tasks}
        return hidden_of(self.model, batch)

    # ------------------------------------------------------------------------------------------------------------ cache
    @contextmanager
    def _reader(self, code: int, head: FrozenHead) -> Iterator[Any]:
        """What makes batches of the domain's rows from the trunk's output, computed once; None: nothing is cached."""
        if self.config.cache == "off":
            yield None
            return
        began, rows = time.monotonic(), self._rows_read(code)
        with tempfile.TemporaryDirectory(prefix="unbraid-trunk-") as place:
            found = cached(self.session, self.model, rows, Path(place) if self.config.cache == "disk" else None)
            self.session.charge(time.monotonic() - began)
            self.record["cache"]["rows"] += len(rows)
            self.record["cache"]["bytes"] += sum(part.nbytes for part in found.values())

            def read(asked: np.ndarray) -> Batch:
                at = np.searchsorted(rows, asked)
                return self.session.batch(asked, {name: torch.from_numpy(part[at]) for name, part in found.items()})

            yield read

    def _rows_read(self, code: int) -> np.ndarray:
        """Ascending: the rows of a domain that its training, and its validation, will read."""
        rows, steps = self.domains.train[code], self.steps[code]
        if self.config.solver == "update":
            rows = self.session.reads(rows, steps, self._seed(code), stream=True)
        return np.union1d(rows, self.domains.valid[code])

    # ------------------------------------------------------------------------------------------------------- resumption
    def _checkpoint(self) -> None:
        state: State = {
            "heads": self.model.heads.state_dict(),
            "tuned": self.record["tuned"],
            "cache": self.record["cache"],
        }
        self.session.checkpoint("d_train-heads", state, done=True)

    def _restore(self) -> None:
        state = self.session.restore("d_train-heads")
        if state is not None:
            self.model.heads.load_state_dict(state["heads"])
            self.record["tuned"], self.record["cache"] = state["tuned"], state["cache"]


def _pull(parameter: nn.Parameter, l2: float) -> Callable[[Tensor], Tensor]:
    """A gradient plus that of ``l2 / 2`` times the squared distance from where the parameter is now."""
    anchor, part = parameter.detach().clone(), l2 / parallel.world()  # gradients of all processes are added up
    return lambda grad: grad + part * (parameter.detach() - anchor)


def _part(steps: int, place: int, count: int) -> int:
    """The share of one of ``count`` domains: equal up to 1, and they sum to ``steps``."""
    return steps * (place + 1) // count - steps * place // count


def cached(session: Session, model: Any, rows: np.ndarray, folder: Path | None) -> dict[str, np.ndarray]:
    """``hidden.TASK`` -> (n, H) the trunk's output of rows in order, in memory, or mapped from files in ``folder``."""
    found: dict[str, np.ndarray] = {}
    at = 0
    for batch in session.batches(rows):
        for number, (task, hidden) in enumerate(hidden_of(model, batch).items()):
            part = hidden.cpu().numpy()
            if not at:
                shape = (len(rows), part.shape[1])
                found[HIDDEN + task] = (
                    np.empty(shape, part.dtype) if folder is None
                    else np.memmap(folder / f"{number}.bin", dtype=part.dtype, mode="w+", shape=shape)
                )  # fmt: skip
            found[HIDDEN + task][at : at + len(part)] = part
        at += len(batch)
    return found
