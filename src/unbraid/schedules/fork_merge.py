"""ForkMerge: branches with different mixtures of tasks train apart; the mixture of their weights that serves the target goes on.

Junguang Jiang, Baixu Chen, Junwei Pan, Ximei Wang, Dapeng Liu, Jie Jiang, Mingsheng Long: *ForkMerge: Mitigating Negative
Transfer in Auxiliary-Task Learning*, NeurIPS 2023, https://arxiv.org/abs/2301.12618.  Official code: ``thuml/ForkMerge``, branch
``develop``; again in ``thuml/Transfer-Learning-Library``, branch ``ATL``.  The paper and both were read.

An auxiliary task helps or hurts a target, and neither its gradient nor its loss says which: what counts is whether the target
is predicted better on rows that were not trained on.  One step of gradient descent with loss weight l on the auxiliary is exactly
the mean of two steps, ``theta(l) = (1 - l) theta(0) + l theta(1)``.  So instead of one training per l, train the ends, for many
steps, and choose l afterwards among the combinations of what they became.  Of T steps in all::

    theta* = theta_0
    repeat ceil(T / Dt) times:
        fork      theta_b = theta*                                               for each branch b of B
        train     min(Dt, steps left) steps on sum over objectives o of nu_b[o] L_o,  each branch apart
        search    Lambda = argmax over a grid in the simplex of P_valid(sum over b of Lambda_b theta_b)
        merge     theta* = sum over b of Lambda_b theta_b

Branch 0 trains the targets alone.  Lambda = (1, 0, ..) is always in a grid with 0: on the validation rows a merge is never worse
than any of its branches.  That is no promise for test rows, above all where few validation rows are searched.

``search = "greedy"`` (the paper's algorithm 3) ranks the branches by their own value and adds one after the other::

    w = (1);  for each further branch:  w_b = a U,  U = mean of the weights so far,  a the best of the grid (the least of equals)
    Lambda = w / sum(w)

Its later weights are at most the mean of the earlier ones: with two branches the worse one gets at most 1/2.

How this differs from the paper and its code:

- The branch as it is after its steps is merged, as in the paper; the code merges the best checkpoint that the branch has had,
  which may be older than the last merge.  ``branch_select = "best_in_round"`` looks at this round's alone.
- The paper sums the losses of a branch.  The code for domains draws one task per step, the target half of the times (``develop``)
  or as often as any other (``ATL``): ``sampling = "half"`` and ``"uniform"``.
- Two branches are searched over the whole grid, as in the paper; the code is always greedy (``search = "greedy"``).
- A branch that did not move a tensor (an auxiliary's head in the target's branch) takes no part in that tensor's mean; it
  stays as it was if no branch of positive weight moved it.  The code for domains averages all copies (``heads = "all"``); that
  for scenes keeps such heads apart for good.
- Whole numbers among the buffers are the heaviest branch's; the code rounds their mean.
- The target's branch is never pruned; in ``ATL`` it can be.  ``develop`` prunes before training, by short trainings: not here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from unbraid import sharding
from unbraid.evaluate import evaluate, lower_is_better
from unbraid.schedules import rounds
from unbraid.schedules.merging import Branches, combine_states
from unbraid.schedules.mixtures import SEARCHES, Shares, simplex
from unbraid.slots import Look, Session
from unbraid.train.scoring import selected
from unbraid.types import FORBID, NO_DOMAIN, State

BIBTEX = """
@inproceedings{jiang2023forkmerge,
  title     = {ForkMerge: Mitigating Negative Transfer in Auxiliary-Task Learning},
  author    = {Jiang, Junguang and Chen, Baixu and Pan, Junwei and Wang, Ximei and Liu, Dapeng and Jiang, Jie and
               Long, Mingsheng},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  volume    = {36},
  year      = {2023},
  eprint    = {2301.12618},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class Branch:
    """What one branch trains.  ``weights``: objective -> weight of its loss, beside the task's own; what is not named is 0."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    name: str
    weights: dict[str, float]

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"Weight of `{name}` should be finite and not negative. Found {weight}.")
        if not any(self.weights.values()):
            raise ValueError(f"Branch `{self.name}` trains nothing: give one of its `weights` a value above 0.")


@dataclass(frozen=True)
class ForkMerge:
    """See the module's docstring.  Objectives are tasks, or domains where the losses are ``by`` domain.

    Args:
        targets: objectives that matter; empty: the tasks of role ``target``.  Domains have no role and are named here.
        branches: beside the one of the targets, ``each``: targets and one auxiliary, for every auxiliary; ``two``: all together.
        own: the branches themselves, instead; the first trains targets alone.
        rounds: forks and merges over the training; interval: steps from one to the next instead, when above 0.
        search: ``grid``: all combinations whose weights of branches 1, 2, .. are in ``grid``; ``greedy``; ``auto``: the first
            of two branches, the second of more.
        grid: weights to try, in [0, 1].
        metric: what the search goes by, as in ``training.metric``; empty: that.  It is a mean over the target tasks, on rows
            of the target domains.
        search_rows: validation rows of the search (0: all), whole users if there are any; search_seed: which.
        prune: keep so many branches, those of largest weight, the targets' among them in any case; 0: all.
        prune_at: after the ``first`` merge, or after ``every`` one.
        optimiser_state: what a branch begins a round with: its own of the last round (``keep``), none (``reset``), or the
            combination of all branches' with the weights of the merge (``average``).
        branch_select: what of a branch is merged, its ``last`` weights or the ``best_in_round`` at this round's looks
            (``training.evaluate_every``).
        heads: a tensor that only some branches moved is a mean over these (``trained``) or over all (``all``).
        batches: branches draw batches of their own in each round (``own``), or the same ones where they draw from the
            same rows (``shared``).
        sampling: ``none``: the weighted sum of a branch's losses at each step.  Else one objective is drawn for each step: a
            target ``half`` of the times, or all alike (``uniform``).
        final: the ``best`` merge on the searched rows, or the ``last``.
        equal_cost: divide the steps by the number of branches, so that all together take as many as one training.
        jobs: branches that train at once, in processes of their own.  Changes nothing of the result.

    Raises:
        ValueError: a value is out of its range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    same: ClassVar[tuple[str, ...]] = ("jobs",)  # keys that change nothing of the result
    kind: Literal["fork_merge"] = field(default="fork_merge", kw_only=True)
    targets: tuple[str, ...] = ()
    branches: Literal["each", "two"] = "each"
    own: tuple[Branch, ...] = ()
    rounds: int = 10
    interval: int = 0
    search: Literal["auto", "grid", "greedy"] = "auto"
    grid: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    metric: str = ""
    search_rows: int = 0
    search_seed: int = 0
    prune: int = 0
    prune_at: Literal["first", "every"] = "first"
    optimiser_state: Literal["keep", "reset", "average"] = "keep"
    branch_select: Literal["last", "best_in_round"] = "last"
    heads: Literal["trained", "all"] = "trained"
    batches: Literal["own", "shared"] = "own"
    sampling: Literal["none", "half", "uniform"] = "none"
    final: Literal["best", "last"] = "best"
    equal_cost: bool = False
    jobs: int = 1

    def __post_init__(self) -> None:
        for name, low in (
            ("rounds", 1),
            ("interval", 0),
            ("search_rows", 0),
            ("search_seed", 0),
            ("prune", 0),
            ("jobs", 1),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"Parameter `{name}` should be at least {low}. Found {getattr(self, name)}.")
        if not self.grid or not all(0 <= a <= 1 for a in self.grid):
            raise ValueError(f"Parameter `grid` should be weights in [0, 1], at least one. Found {list(self.grid)}.")
        names = [branch.name for branch in self.own]
        if len(names) == 1 or len(set(names)) < len(names):
            raise ValueError(f"`own` should be two branches or more of different names. Found {names}.")

    @property
    def budget(self) -> tuple[str, ...]:
        """Keys that decide how long is trained, beside those of ``training``: B branches cost B trainings, or one."""
        return () if self.equal_cost else ("branches", "own", "prune", "prune_at", "equal_cost")

    def __call__(self, session: Session, model: nn.Module, steps: int) -> nn.Module:
        """Train in rounds, each branch for ``steps`` in all (a B-th of them with ``equal_cost``).

        Raises:
            ValueError: objectives, targets, branches or the metric do not fit the run; too many combinations.
        """
        run = _Run(self, session, model, steps)
        while run.done < run.steps:
            run.round()
        session.keep(run.record())
        return run.finish()

    def report(self, record: Mapping[str, Any]) -> str:
        """The record as Markdown: what was done and a line per round."""
        return f"\nForkMerge: {rounds.words(record)}"


# --------------------------------------------------------------------------------------------------------------- the plan
@dataclass(frozen=True)
class Plan:
    """What is trained and judged.

    Attributes:
        branches: name -> objective -> weight, all objectives; the first branch is the targets'.
        weights: the same with the tasks' own weights, as the update needs them.
        rows: name -> training rows, None for all.
        targets: the objectives that matter; tasks: those that the metric is a mean over; valid: rows of the search.
    """

    branches: dict[str, dict[str, float]]
    weights: dict[str, dict[str, float]]
    rows: dict[str, np.ndarray | None]
    targets: tuple[str, ...]
    tasks: tuple[str, ...]
    valid: np.ndarray


def plan(config: ForkMerge, session: Session) -> Plan:
    """The branches of a run.  Raises ValueError where targets or branches do not fit the objectives."""
    own = {task.name: task.weight for task in session.schema.tasks}
    full = session.objectives
    by_task = {name: name.partition("@")[0] in own for name in full}
    if len(set(by_task.values())) > 1 and not config.own:
        raise ValueError(
            f"Objectives are of tasks and of domains, {list(full)}: give the branches themselves in `own`, or make all losses "
            "of one kind (`by`)."
        )
    names = list(dict.fromkeys(name.partition("@")[0] if by_task[name] else name for name in full))
    targets = _targets(config, session, names, any(by_task.values()))
    branches = _own(config, names, full, targets) if config.own else _usual(config, names, targets)
    for name, vector in branches.items():
        branches[name] = {objective: vector.get(objective, 0.0) for objective in [*names, *vector]}
    weights = {
        name: {o: w * own.get(o.partition("@")[0], 1.0) for o, w in vector.items()} for name, vector in branches.items()
    }
    rows = {
        name: None if any(by_task.values()) else _rows(session, "train", vector) for name, vector in branches.items()
    }
    valid = session.rows("valid")
    if not any(by_task.values()):
        some = _rows(session, "valid", dict.fromkeys(targets, 1.0))
        valid = valid if some is None else some
    if not len(valid):
        raise ValueError(f"The search needs validation rows of {', '.join(targets)}, and there are none.")
    tasks = tuple(name for name in targets if name in own)
    return Plan(branches, weights, rows, targets, tasks, _subset(config, session, valid))


def _targets(config: ForkMerge, session: Session, names: Sequence[str], by_task: bool) -> tuple[str, ...]:
    found = config.targets or tuple(
        t.name for t in session.schema.tasks if by_task and t.role == "target" and t.name in names
    )
    if not found or not set(found) <= set(names):
        raise ValueError(f"`targets` should name objectives that matter, among {list(names)}. Found {list(found)}.")
    return found


def _usual(config: ForkMerge, names: Sequence[str], targets: Sequence[str]) -> dict[str, dict[str, float]]:
    """The targets' branch and those with auxiliaries."""
    auxiliaries = [name for name in names if name not in targets]
    if not auxiliaries:
        raise ValueError(
            f'All objectives are targets, {list(names)}: say which are auxiliary, with `role = "auxiliary"` of the tasks or '
            "`targets` of the schedule."
        )
    first = dict.fromkeys(targets, 1.0)
    if config.branches == "two":
        return {"target": first, "all": dict.fromkeys(names, 1.0)}
    return {"target": first, **{f"target + {name}": {**first, name: 1.0} for name in auxiliaries}}


def _own(
    config: ForkMerge, names: Sequence[str], full: Sequence[str], targets: Sequence[str]
) -> dict[str, dict[str, float]]:  # fmt: skip
    """The branches of the run file."""
    for branch in config.own:
        if unknown := sorted(set(branch.weights) - {*names, *full}):
            raise ValueError(
                f"Branch `{branch.name}` weighs {unknown}, which are no objectives. Permitted are {list(names)}."
            )
    first = config.own[0]
    others = [o for o, w in first.weights.items() if w and not {o, o.partition("@")[0]} & set(targets)]
    if others:
        raise ValueError(
            f"The first branch, `{first.name}`, should train targets alone, {list(targets)}: it is what a merge falls back on. "
            f"Found {others}, too."
        )
    return {branch.name: dict(branch.weights) for branch in config.own}


def _rows(session: Session, split: str, weights: Mapping[str, float]) -> np.ndarray | None:
    """Rows of the domains whose weight is not 0; None for all."""
    rows = session.rows(split)
    codes = session.column("domain", rows)
    if codes is None:
        return None
    wanted = [session.schema.domains.index(name) for name, weight in weights.items() if weight]
    chosen = rows[np.isin(codes, wanted)]
    return None if len(chosen) == len(rows) else chosen


def _subset(config: ForkMerge, session: Session, rows: np.ndarray) -> np.ndarray:
    """The rows of the search: whole users in a random order until there are enough."""
    if not config.search_rows or config.search_rows >= len(rows):
        return rows
    users = session.column("user", rows)
    rng = np.random.default_rng(config.search_seed)
    if users is None:
        return np.sort(rng.choice(rows, config.search_rows, replace=False))
    _, code, counts = np.unique(users, return_inverse=True, return_counts=True)
    order = rng.permutation(len(counts))
    chosen = order[: 1 + int(np.searchsorted(counts[order].cumsum(), config.search_rows))]
    return rows[np.isin(code, chosen)]


# -------------------------------------------------------------------------------------------------------------- the rounds
class _Run:
    """One training: the model, the branches' optimisers, the record."""

    def __init__(self, config: ForkMerge, session: Session, model: nn.Module, steps: int) -> None:
        self.config, self.session, self.model, self.plan = config, session, model, plan(config, session)
        self.names = list(self.plan.branches)  # those that still train
        self.steps = max(1, steps // len(self.names)) if config.equal_cost else steps
        self.interval = config.interval or -(-self.steps // config.rounds)
        self.metric = config.metric or session.metric
        self.falls = lower_is_better(self.metric.rpartition(".")[2])
        self.evaluations, self.seconds, self.trained = 0, 0.0, 0
        self.done, self.lines = 0, list[dict[str, Any]]()
        self.states: dict[str, State | None] = dict.fromkeys(self.names)
        self.average: State | None = None
        self.best: dict[str, Any] = {"round": 0, "step": 0, "value": None, "weights": None}
        if self._method(len(self.names)) == "grid":
            simplex(len(self.names), config.grid)  # what cannot be searched is said before anything trains
        self._restore()

    def _method(self, branches: int) -> str:
        method = self.config.search
        return ("grid" if branches == 2 else "greedy") if method == "auto" else method

    def round(self) -> None:
        """Fork, train, search, merge."""
        config, steps = self.config, min(self.interval, self.steps - self.done)
        fork = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        branches = Branches(fork, config.heads == "all", sharding.parts(self.model))
        found: list[State] = []
        apart = self.session.fit_apart(
            self.model, steps, [self._call(name) for name in self.names], jobs=config.jobs, total=self.steps,
            start=self.done, look=self._looks(),
        )  # fmt: skip
        for weights, state in apart:
            branches.add(weights)
            found.append(state)
        began, before = time.monotonic(), self.evaluations
        shares, value, tried = self._search(branches)
        branches.write(self.model.state_dict(), shares)
        spent = time.monotonic() - began
        self.done, self.trained, self.seconds = (
            self.done + steps,
            self.trained + steps * len(self.names),
            self.seconds + spent,
        )
        line = self._line(shares, value, tried) | {"evaluations": self.evaluations - before, "seconds": spent}
        self._hand_on(found, shares)
        line["pruned"] = self._prune(shares)
        self.lines.append(line)
        self._keep_best(value)
        self.session.tell(
            f"merge at step {self.done:,} of {self.steps:,}: "
            + ", ".join(f"{name} {share:.2f}" for name, share in line["weights"].items())
            + f"; {self.metric} {rounds.cell(line['value'])}"
        )
        self._checkpoint()

    def _call(self, name: str) -> dict[str, Any]:
        """What `Session.fit` is told of a branch."""
        config, place = self.config, list(self.plan.branches).index(name)
        weights, rows = self.plan.weights[name], self.plan.rows[name]
        seed = (len(self.lines),) if config.batches == "shared" else (len(self.lines), place)
        state = {"keep": self.states[name], "reset": None, "average": self.average}[config.optimiser_state]
        return {"weights": weights, "rows": rows, "seed": seed, "update_state": state, "sample": self._chances(weights)}

    def _chances(self, weights: Mapping[str, float]) -> dict[str, float] | None:
        """Objective -> how often it is drawn; None if the losses are summed."""
        live = [name for name, weight in weights.items() if weight]
        if self.config.sampling == "none":
            return None
        ours = [name for name in live if {name, name.partition("@")[0]} & set(self.plan.targets)]
        if self.config.sampling == "uniform" or not ours or len(ours) == len(live):
            return dict.fromkeys(live, 1.0)
        return {name: 0.5 / (len(ours) if name in ours else len(live) - len(ours)) for name in live}

    def _looks(self) -> Look:
        """How a branch looks at the validation rows during a round; it never stops early."""
        if self.config.branch_select == "last":
            return Look(every=-1)
        return Look(self.metric, self.plan.tasks, self.plan.valid, keep_best=True)

    # ---------------------------------------------------------------------------------------------------------- the merge
    def _search(self, branches: Branches) -> tuple[Shares, float, dict[Shares, float]]:
        """The best shares, their value (higher is better), and all that were tried."""
        tried: dict[Shares, float] = {}
        live = self.model.state_dict()

        def value(shares: Shares) -> float:
            if shares not in tried:
                branches.write(live, shares)
                tried[shares] = self._judge()
            return tried[shares]

        count = len(self.names)
        if count == 1:
            return (1.0,), value((1.0,)), tried
        shares = SEARCHES[self._method(count)](count, self.config.grid, value)
        if value(shares) == -math.inf:
            raise ValueError(
                f"`{self.metric}` has no value on the {len(self.plan.valid):,} validation rows that are searched: too few rows "
                "or labels. Search more of them (`search_rows`), or by another `metric`."
            )
        return shares, value(shares), tried

    def _judge(self) -> float:
        """How good the model is now, higher is better; -inf where the metric has no value."""
        scores = self.session.score(self.model, "valid", self.plan.valid)
        task, _, _ = self.metric.rpartition(".")
        wanted = (
            {task} if task else {*self.plan.tasks} or {t.name for t in self.session.schema.tasks if t.role == "target"}
        )
        few = {name: logits for name, logits in scores.logits.items() if name in wanted}
        scores = replace(scores, logits=few, domains=("", "", NO_DOMAIN))  # no metrics per domain
        found = evaluate(scores, self.session.schema, replicates=0)
        key = "schedule.metric" if self.config.metric else "training.metric"
        value, _ = selected(found, self.metric, self.session.schema, self.plan.tasks, key)
        self.evaluations += 1
        return -math.inf if value is None else -value if self.falls else value

    def _shown(self, value: float) -> float | None:
        """The metric itself."""
        return None if value == -math.inf else -value if self.falls else value

    def _line(self, shares: Shares, value: float, tried: Mapping[Shares, float]) -> dict[str, Any]:
        pure = {name: tuple(float(other == name) for other in self.names) for name in self.names}
        line: dict[str, Any] = {"step": self.done, "value": self._shown(value)}
        line["weights"] = dict(zip(self.names, shares, strict=True))
        line["branches"] = {name: self._shown(tried[at]) for name, at in pure.items() if at in tried}
        if len(self.names) == 2:
            line["line"] = [
                [at[1], self._shown(found)] for at, found in sorted(tried.items(), key=lambda one: one[0][1])
            ]
            inside = [found for at, found in tried.items() if 0 < at[1] < 1]
            if inside and len(line["branches"]) == 2:
                line["barrier"] = max(0.0, min(tried[at] for at in pure.values()) - min(inside))
        return line

    def _hand_on(self, states: Sequence[State], shares: Shares) -> None:
        """What the branches' optimisers begin the next round with."""
        if self.config.optimiser_state == "keep":
            self.states = dict(zip(self.names, states, strict=True))
        elif self.config.optimiser_state == "average":
            self.average = combine_states(self.average, states, shares, self.config.heads == "all")

    def _prune(self, shares: Shares) -> list[str]:
        """Drop branches of little weight, never the first; returns those dropped."""
        config = self.config
        if not config.prune or len(self.names) <= config.prune or (config.prune_at == "first" and self.lines):
            return []
        order = sorted(range(1, len(shares)), key=lambda b: -shares[b])
        kept = {0, *order[: config.prune - 1]}
        dropped = [name for b, name in enumerate(self.names) if b not in kept]
        self.names = [name for b, name in enumerate(self.names) if b in kept]
        self.states = {name: self.states.get(name) for name in self.names}
        return dropped

    def _keep_best(self, value: float) -> None:
        old = self.best["value"]
        if self.config.final == "last" or old is None or value > old:
            self.best = {"round": len(self.lines), "step": self.done, "value": value, "weights": None}
            if self.config.final == "best":
                self.best["weights"] = {name: part.detach().clone() for name, part in self.model.state_dict().items()}

    def finish(self) -> nn.Module:
        """The model that the run gives."""
        if self.best["weights"] is not None:
            self.model.load_state_dict(self.best["weights"])
        return self.model

    def record(self) -> dict[str, Any]:
        """What ``metrics.json`` holds under ``schedule``."""
        first = len(self.plan.branches)
        found: dict[str, Any] = {
            "kind": self.config.kind,
            "branches": self.plan.branches,
            "targets": list(self.plan.targets),
        }
        found |= {"metric": self.metric, "search": self._method(first), "interval": self.interval, "steps": self.steps}
        found |= {"total_steps": self.trained, "sampling": self.config.sampling, "rows": len(self.plan.valid)}
        found |= {"evaluations": self.evaluations, "seconds": self.seconds, "rounds": self.lines}
        final = {"round": self.best["round"], "step": self.best["step"], "value": self._shown(self.best["value"])}
        return found | {"final": final}

    # ------------------------------------------------------------------------------------------------------- resumption
    def _checkpoint(self) -> None:
        state: State = {"model": self.model.state_dict(), "done": self.done, "lines": self.lines, "names": self.names}
        state |= {"states": self.states, "average": self.average, "best": self.best}
        state |= {"evaluations": self.evaluations, "seconds": self.seconds, "trained": self.trained}
        self.session.checkpoint("fork_merge", state, done=True)

    def _restore(self) -> None:
        state = self.session.restore("fork_merge")
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        for name in ("done", "lines", "names", "states", "average", "best", "evaluations", "seconds", "trained"):
            setattr(self, name, state[name])
