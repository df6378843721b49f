"""AdaTask: every task has accumulators of its own on the parameters that tasks share.

Paper: "AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning", Yang, Pan, Wang, Yu, Shen, Chen, Xiao,
Jiang, Guo, AAAI 2023, https://arxiv.org/abs/2211.15055.

Idea.  An adaptive optimiser divides a gradient by the root of what it has accumulated of earlier ones.  On a shared parameter
one accumulator collects the gradients of all tasks, so that the task with the largest owns the direction and, by filling the
accumulator, shrinks the steps of the others.  Here each task's gradient is divided by the root of that task's own accumulator,
and the steps are added.

Equations, elementwise, for a shared parameter w and the gradients g_k of all losses L_k at the same w::

    Adam      m_k <- b1 m_k + (1 - b1) g_k      v_k <- b2 v_k + (1 - b2) g_k^2
              d_k = m_k / (1 - b1^t) / (sqrt(v_k / (1 - b2^t)) + eps)
    RMSprop   v_k <- alpha v_k + (1 - alpha) g_k^2                 d_k = g_k / (sqrt(v_k) + eps)
    AdaGrad   v_k <- v_k + g_k^2                                   d_k = g_k / (sqrt(v_k) + eps)

    w <- (1 - lr * weight_decay) w - lr * s * sum_k weight_k d_k         s = 1 (sum) or 1 / K (mean)

A parameter that one objective alone reaches, such as a head, takes the ordinary step on its weighted loss; one objective alone
makes this torch's optimiser (`unbraid.optim.rows` for the rows of lazy tables).

**Weights.**  d_k does not change when L_k is multiplied by a constant (as eps goes to 0): a weight inside a loss, and with it
every method that balances losses by weights, does nothing to shared parameters.  So weights stand behind the division.

**Steps are longer.**  Tasks that agree move a parameter up to K times as far as one optimiser would: compare at step sizes
that were tuned for each, or with ``scale = "mean"``.  And the sum of the steps need not descend: the first step with
Adam on gradients (1, 1, 1, -4) is -2 lr, and as their sum is -1, a step down would be positive.

How this differs from the paper and its code:

- The code released with the paper has Adam alone, and gives a task without a gradient zeros (``missing = "zero"``: its momentum
  still moves the parameter, and one clock counts the steps of all).  The default ``skip`` leaves such a task out, with a clock of
  its own per task and parameter: ours.
- RMSprop and AdaGrad follow torch's conventions for the place of eps; the paper's were not checked.
- ``mean``, weights behind the division, decoupled decay (once per step), clipping per task and rows of lazy tables are ours.
  The released code accepts a weight decay and ignores it.
- One backward pass per task, which also gives the heads' gradients; the code makes one more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop

from unbraid.optim.joint import Joint
from unbraid.optim.per_task import Gradients, PerTask
from unbraid.optim.rows import RowAdagrad, RowAdam, RowOptimizer, RowRMSprop, precise
from unbraid.slots import Course
from unbraid.types import FORBID, State

BIBTEX = """
@inproceedings{yang2023adatask,
  title     = {AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning},
  author    = {Yang, Enneng and Pan, Junwei and Wang, Ximei and Yu, Haibin and Shen, Li and Chen, Xihua and
               Xiao, Lei and Jiang, Jie and Guo, Guibing},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume    = {37},
  number    = {9},
  pages     = {10745--10753},
  year      = {2023},
  note      = {arXiv:2211.15055},
}
"""

DENSE = {"adam": ("exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg",), "adagrad": ("sum",)}  # torch's names of moments
FIRST = ("exp_avg", "mean")  # moments in the gradient's unit; the others are in its square


@dataclass(frozen=True)
class AdaTask(Joint):
    """Config of AdaTask: that of the joint update (``eps`` and ``betas`` are those of ``base``), and

    Args:
        base: the optimiser whose accumulators every task has.
        alpha: RMSprop's decay rate of squares.
        scale: steps of the tasks are added (``sum``) or averaged over those that take part (``mean``).
        missing: a task without a gradient for a shared parameter that others move takes no part (``skip``), or has a
            gradient of zeros, if it ever had another (``zero``).
        clip: ``clip_norm`` bounds the gradient of each task (``task``, before weights), or that of the weighted sum, by one
            factor for all tasks (``sum``).
        loss_scale: losses are multiplied by this before their backward passes and gradients divided by it after them, for
            models in half precision.

    Raises:
        ValueError: a value is out of its range, or belongs to another ``base``.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["adatask"] = field(default="adatask", kw_only=True)  # type: ignore[assignment]
    base: Literal["adam", "rmsprop", "adagrad"] = "adam"
    alpha: float = 0.99
    scale: Literal["sum", "mean"] = "sum"
    missing: Literal["skip", "zero"] = "skip"
    clip: Literal["task", "sum"] = "task"
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        permitted = {
            "base": tuple(DENSE),
            "scale": ("sum", "mean"),
            "missing": ("skip", "zero"),
            "clip": ("task", "sum"),
        }
        for name, allowed in permitted.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Parameter `{name}` should be one of {allowed}. Found `{getattr(self, name)}`.")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"Parameter `alpha` should be in [0, 1). Found {self.alpha}.")
        if not 0 < self.loss_scale < float("inf"):
            raise ValueError(f"Parameter `loss_scale` should be positive and finite. Found {self.loss_scale}.")
        for name, base, default in (("betas", "adam", (0.9, 0.999)), ("alpha", "rmsprop", 0.99)):
            if self.base != base and getattr(self, name) != default:
                raise ValueError(
                    f"Parameter `{name}` belongs to base `{base}`. Found base `{self.base}`: leave it out."
                )

    def build(
        self, model: nn.Module, *, steps: int, weights: Mapping[str, float], objectives: Collection[str] | None = None,
        course: Course | None = None,
    ) -> AdaTaskUpdate:  # fmt: skip
        """See `unbraid.optim.joint.Joint.build`."""
        return AdaTaskUpdate(self, model, steps, weights, objectives)


class Part(NamedTuple):
    """What one objective adds to a leaf in one step: ``share`` times the step that its accumulators make of ``grad``."""

    objective: str
    grad: Tensor
    share: float


class Moments:
    """One objective's accumulators: of dense parameters as torch keeps them, of table rows a `RowOptimizer`."""

    def __init__(self, config: AdaTask, tables: Mapping[str, nn.Parameter], fused: bool) -> None:
        self.config, self.fused, self.dense = config, fused, dict[str, dict[str, Tensor]]()
        self.rows = _row_optimizer(config, tables)

    def step_of(self, leaf: str) -> int:
        """Steps that the objective made on a leaf."""
        if leaf in self.rows.tables:
            return self.rows.state.get(self.rows.tables[leaf], {}).get("step", 0)
        return int(self.dense[leaf]["step"]) if leaf in self.dense else 0

    def start(self, leaf: str, like: Tensor, step: int) -> None:
        """Make a leaf's accumulators, unless they are there."""
        if leaf in self.rows.tables:
            self.rows.start(leaf, step)
        elif leaf not in self.dense:
            clock = torch.tensor(float(step), device=like.device if self.fused else "cpu")
            zeros = {name: torch.zeros_like(like, dtype=precise(like.dtype)) for name in DENSE[self.config.base]}
            self.dense[leaf] = {"step": clock, **zeros}

    def move(self, leaves: Sequence[str], params: list[Tensor], grads: list[Tensor], lr: float) -> None:
        """Torch's step of dense parameters, in place."""
        states, config = [self.dense[leaf] for leaf in leaves], self.config
        moments = [[state[name] for state in states] for name in DENSE[config.base]]
        clocks = [state["step"] for state in states]
        rest: dict[str, Any] = {"lr": lr, "weight_decay": 0.0, "eps": config.eps, "maximize": False}
        if config.base == "adam":
            means, squares = moments
            rest |= {"beta1": config.betas[0], "beta2": config.betas[1], "amsgrad": False}
            adam(params, grads, means, squares, [], clocks, fused=self.fused or None, **rest)
        elif config.base == "rmsprop":
            (squares,) = moments
            rest |= {"alpha": config.alpha, "momentum": 0.0, "centered": False}
            rmsprop(params, grads, squares, [], [], clocks, **rest)
        else:
            (sums,) = moments
            adagrad(params, grads, sums, clocks, lr_decay=0.0, **rest)

    def unweight(self, leaf: str, weight: float) -> None:
        """Turn accumulators of weighted gradients into those of plain ones."""
        state = self.rows.start(leaf) if leaf in self.rows.tables else self.dense[leaf]
        for name, part in state.items():
            if isinstance(part, Tensor) and name not in ("step", "last"):
                part.div_(weight if name in FIRST else weight**2)


class AdaTaskUpdate(PerTask):
    """See the module's docstring.

    Attributes:
        tasks: objective -> its accumulators.
        rows: of `JointUpdate`; here it holds the tables' step size and decay, and no moments.
        grad_norms: objective -> norm of its gradient before clipping, of the last step; empty while ``clip_norm`` is 0 or one
            factor clips all (then `grad_norm` is the sum's).
        observe: called with (objective, leaf, ids, change) for every step that an objective's accumulators make; of table rows
            the change is (U, D) at the distinct ids, else ids are None.  A leaf's new value is its decayed one plus all changes.
    """

    config: AdaTask
    all_rows: ClassVar[bool] = False

    def __init__(
        self, config: AdaTask, model: nn.Module, steps: int, weights: Mapping[str, float],
        objectives: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, model, steps, weights, objectives)
        self.loss_scale, self.tasks = config.loss_scale, dict[str, Moments]()
        self.grad_norms: dict[str, Tensor] = {}
        self.observe: Callable[[str, str, Tensor | None, Tensor], None] | None = None
        self.groups = {
            self.names[place]: group
            for group, places in enumerate(_places(self.dense.param_groups))
            for place in places
        }

    # ------------------------------------------------------------------------------------------------- who takes part
    def note(self, grads: Gradients) -> None:
        """As `PerTask`; a leaf that becomes shared is weighted behind its accumulators from now on, not before them."""
        alone = {leaf: owners[0] for leaf, owners in self.reached.items() if len(owners) == 1}
        super().note(grads)
        for leaf, owner in alone.items():
            weight = self.weight(owner)
            if len(self.reached[leaf]) > 1 and owner in self.tasks and weight not in (0, 1):
                self.tasks[owner].unweight(leaf, weight)

    def parts(self, leaf: str, grads: Gradients) -> list[Part]:
        """Who moves a leaf in this step, by which gradient."""
        here = grads.reaching(leaf)
        if len(self.reached[leaf]) == 1:
            weight = self.weight(here[0])
            grad = grads.of[here[0]][leaf]
            return [Part(here[0], grad if weight == 1 else grad * weight, 1.0)]
        found = {objective: grads.of[objective][leaf] for objective in here}
        if self.config.missing == "zero":
            zeros = torch.zeros_like(found[here[0]])
            found |= {o: zeros for o in self.reached[leaf] if o not in found and self.weight(o) != 0}
        count = len(found) if self.config.scale == "mean" else 1
        return [Part(objective, grad, self.weight(objective) / count) for objective, grad in found.items()]

    # ------------------------------------------------------------------------------------------------------- the step
    @torch.no_grad()
    def act(self, grads: Gradients) -> None:
        """Clip, let every objective move its accumulators, add up the steps."""
        if self.config.clip_norm > 0:
            grads = self.clipped(grads)
        plan = {leaf: self.parts(leaf, grads) for leaf in grads.leaves()}
        for leaf, parts in plan.items():
            self._start(leaf, parts)
        self._move_dense({leaf: parts for leaf, parts in plan.items() if leaf not in self.rows.tables})
        lr = self.rows.param_groups[0]["lr"]
        for leaf, parts in plan.items():
            if leaf in self.rows.tables:
                self.rows.move(leaf, grads.ids[leaf], (self._row_change(leaf, grads.ids[leaf], p, lr) for p in parts))
        self.seek(self.step + 1)

    def clipped(self, grads: Gradients) -> Gradients:
        """Gradients scaled down where they are too long."""
        if self.config.clip == "sum":
            weight = {objective: self.weight(objective) for objective in grads.of}
            self.grad_norm = self.norm({leaf: grads.weighted(leaf, weight) for leaf in grads.leaves()})
            norms = dict.fromkeys(grads.of, self.grad_norm)
        else:
            norms = {o: self.norm(found) for o, found in grads.of.items()}
            self.grad_norms = norms
        factors = {o: (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0) for o, norm in norms.items()}  # torch's
        of = {o: {leaf: g * factors[o].to(g.device) for leaf, g in found.items()} for o, found in grads.of.items()}
        return Gradients(of, grads.ids)

    def _start(self, leaf: str, parts: Sequence[Part]) -> None:
        """Make accumulators that are new in this step.  With ``zero`` all objectives of a leaf count the same steps."""
        for part in parts:
            if part.objective not in self.tasks:
                fused = bool(self.dense.defaults["fused"])
                self.tasks[part.objective] = Moments(self.config, self.rows.tables, fused)
        made = [self.tasks[part.objective].step_of(leaf) for part in parts]
        for part, steps in zip(parts, made, strict=True):
            if not steps:
                like = self.rows.tables[leaf] if leaf in self.rows.tables else self.parameters[leaf]
                self.tasks[part.objective].start(leaf, like, max(made) if self.config.missing == "zero" else 0)

    def _move_dense(self, plan: Mapping[str, Sequence[Part]]) -> None:
        # changes of half precision weights are added up in float32 and rounded once
        work = {leaf: self.parameters[leaf].to(precise(self.parameters[leaf].dtype)) for leaf in plan}
        calls: dict[tuple[str, float], list[tuple[str, Tensor]]] = {}
        for number, group in enumerate(self.dense.param_groups):
            mine = [leaf for leaf in plan if self.groups[leaf] == number]
            if mine and group["weight_decay"]:
                torch._foreach_mul_([work[leaf] for leaf in mine], 1 - group["lr"] * group["weight_decay"])
            for leaf in mine:
                for objective, grad, share in plan[leaf]:
                    calls.setdefault((objective, group["lr"] * share), []).append((leaf, grad))
        for (objective, lr), entries in calls.items():
            leaves, grads = [leaf for leaf, _ in entries], [grad.to(work[leaf].dtype) for leaf, grad in entries]
            params = [work[leaf] for leaf in leaves]
            before = [param.clone() for param in params] if self.observe else []
            self.tasks[objective].move(leaves, params, grads, lr)
            for leaf, param, old in zip(leaves, params, before, strict=False):
                self.observe(objective, leaf, None, param - old)  # type: ignore[misc]
        for leaf, weight in work.items():
            if weight is not self.parameters[leaf]:
                self.parameters[leaf].copy_(weight)

    def _row_change(self, table: str, ids: Tensor, part: Part, lr: float) -> Tensor:
        change = self.tasks[part.objective].rows.change(table, ids, part.grad, lr * part.share)
        if self.observe:
            self.observe(part.objective, table, ids, change)
        return change

    # ---------------------------------------------------------------------------------------------------------- states
    def state_dict(self) -> State:
        """Calls so far, who reached what, the tables' decay, and per objective its accumulators by parameter and by table.

        The tensors are the live ones.
        """
        tasks = {
            objective: {"dense": {leaf: dict(s) for leaf, s in found.dense.items()}, "rows": found.rows.state_dict()}
            for objective, found in self.tasks.items()
        }
        reached = {leaf: list(owners) for leaf, owners in self.reached.items()}
        head = {"kind": self.config.kind, "base": self.config.base, "step": self.step, "reached": reached}
        return {**head, "decay": self.rows.state_dict(), "tasks": tasks}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`; the tensors are copied.  Step sizes, decay and weights stay those of this config.

        State of parameters that this model has and does not train now is dropped.

        Raises:
            ValueError: the state is that of another kind of update, of another base, or of another model.
        """
        for key in ("kind", "base"):
            if state.get(key) != getattr(self.config, key):
                what = "update" if key == "kind" else "base"
                raise ValueError(
                    f"The state should be that of {what} `{getattr(self.config, key)}`. Found `{state.get(key)}`."
                )
        held = {name for part in state["tasks"].values() for kind in ("dense", "rows") for name in part[kind]}
        if unknown := sorted({*held, *state["decay"]} - self.known):
            raise ValueError(f"The state holds parameters that this model does not have: {unknown[:5]}.")
        self.rows.load_state_dict(self._trained(state["decay"]))
        self.tasks = {objective: self._loaded(found) for objective, found in state["tasks"].items()}
        self.load_reached(state["reached"])
        self.seek(state["step"])

    def _trained(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in tables.items() if name in self.rows.tables}

    def _loaded(self, state: State) -> Moments:
        """One objective's accumulators from their state."""
        found = Moments(self.config, self.rows.tables, bool(self.dense.defaults["fused"]))
        found.rows.load_state_dict(self._trained(state["rows"]))
        for leaf, value in state["dense"].items():
            if leaf not in self.parameters:
                continue
            like = self.parameters[leaf]
            for name in DENSE[self.config.base]:
                if value[name].shape != like.shape:
                    shapes = tuple(like.shape), tuple(value[name].shape)
                    raise ValueError(f"State of `{leaf}` should have shape {shapes[0]}. Found {shapes[1]}.")
            clock = like.device if found.fused else torch.device("cpu")
            found.dense[leaf] = {k: v.to(clock if k == "step" else like.device, copy=True) for k, v in value.items()}
        return found


def _places(groups: Sequence[Mapping[str, Any]]) -> list[range]:
    """The places of each group's parameters among those of all groups."""
    ends = [sum(len(group["params"]) for group in groups[: n + 1]) for n in range(len(groups))]
    return [range(end - len(group["params"]), end) for group, end in zip(groups, ends, strict=True)]


def _row_optimizer(config: AdaTask, tables: Mapping[str, nn.Parameter]) -> RowOptimizer:
    """Accumulators of table rows.  Decay and step size are those of the update, not of each objective."""
    if config.base == "adam":
        return RowAdam(tables, betas=config.betas, eps=config.eps)
    if config.base == "rmsprop":
        return RowRMSprop(tables, alpha=config.alpha, eps=config.eps)
    return RowAdagrad(tables, eps=config.eps)
