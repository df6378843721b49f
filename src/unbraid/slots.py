"""The protocols of the slots: what each part of a run must do, and what it is told to do it.

The nouns they speak of (a batch, an output, a schema) and the letters of shapes are in `unbraid.types`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from unbraid.types import Batch, Finding, Losses, Output, Schema, Scores, State, Task, WithTrunk


# ------------------------------------------------------------------------------------------------------------ the model
class Backbone(Protocol):
    """A module that makes vectors of pictures ((B, C, H, W) float32) or of texts ((B, L) int64 tokens): (B, ``width``).

    ``reads`` is ``image`` or ``text``.  One of pictures has ``transform``; one of texts has ``tokens(texts)``: (n, L) int64,
    shorter rows filled with ``padding``, a token that no text holds; None: all texts have one length.
    """

    width: int
    reads: str


class Interaction(Protocol):
    """Config of an interaction: ``build(widths)`` gives a module (view: field -> (B, D)) -> (B, width)."""

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        """Of a view's fields, field -> width."""


@dataclass(frozen=True)
class TowerOutput(WithTrunk):
    """What a tower gives: task -> (B, H); the (B, H) shared representation or what computes it; ``"slot.name"`` extras."""

    tasks: dict[str, Tensor]
    shared: Tensor | Callable[[], Tensor]
    extras: dict[str, Tensor]


class Tower(Protocol):
    """Config of a tower: ``build(tasks, views, widths)`` gives a module (hidden: one (B, width) per view) -> `TowerOutput`
    with an attribute ``widths``: task -> H.  A module whose attribute ``reads_domain`` is true is also given the rows'
    domain codes (B,) and which rows count for some loss (B,) bool.  A config whose ``reads_roles`` is true is built with a
    fourth argument, the names of the tasks of role ``target``, one whose ``reads_domains`` is true with ``domains``, how many
    training knew; a run with it needs data with domains.

    ``views`` names the views in order: ``("shared",)``, one per task and ``"shared"`` last, one per task, or any other names.
    """

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> nn.Module:
        """The module, for tasks and views in order; ``widths``: of each view's hidden vector."""


class ExtraHead(Protocol):
    """Config of networks that only losses read, and only while training (a classifier of domains ...).

    ``build(schema, trunk, hidden)``, with the width of the trunk and task -> width of `Output.hidden`, gives a module `Output` ->
    extras ``extra_heads.KIND.NAME``, whose attribute ``gives`` names them.  ``loss`` is the kind of the loss that trains it.
    """

    @property
    def kind(self) -> str:
        """The member's name in a run file."""

    @property
    def loss(self) -> str:
        """Kind of the loss that trains it."""

    def build(self, schema: Schema, trunk: int, hidden: Mapping[str, int]) -> nn.Module:
        """The networks, for a trunk of this width and task -> width of `Output.hidden`."""


# ----------------------------------------------------------------------------------------------------------- a training
class Augmentation(Protocol):
    """Config of what makes two views of a training row.

    ``bind(data)``, with the encoded table, gives a function (batch, strong, seed) -> the same rows as they look under a weak or
    a strong change.  It reads nothing but the batch (on the CPU) and the table, and what it draws is a function of ``seed`` and
    the batch.  ``of`` says which rows also get a strong view.
    """

    @property
    def of(self) -> Literal["unlabelled", "all"]:
        """Rows that also get a strong view."""

    def bind(self, data: Any) -> Callable[[Batch, bool, int], Batch]:
        """What changes a batch: (batch, strong, seed) -> the same rows, changed."""


@runtime_checkable
class Term(Protocol):
    """(output, batch, step) -> objective -> scalar.  An objective without an observed row is absent, never 0 or NaN.

    Where several processes train together, output and batch are of the rows of all of them (`unbraid.parallel`).

    ``needs`` names the ``Output.extras`` it reads; a missing one is an error when the run is built.  A term may have a
    method ``check(orphans)``: it is called once before training with `unbraid.data.table.Encoded.orphans` of the
    training rows, and raises ValueError where the loss would make no sense of them.  It may have ``reads``, what the data must
    declare of each row (``user``, ``request``), ``objectives``, the only names that its losses have, and ``trains``, the tasks
    whose own logits it trains (all, without it): a run in which no term trains some task is an error, and so is one in which
    only terms with ``relative``, which see no more than differences between rows, do.  One that depends on how much of a
    training is done has ``over(before, total)``: the term in a call of `Session.fit` whose step 0 is step ``before`` of them.
    One that remembers anything between steps has ``fresh(rows, labels, observed)``, the term for a call that trains on rows of
    these numbers ((n,) int64 array, ascending), with their labels and which of these are known in all batches (task -> (n,)); it
    then has ``state_dict`` and ``load_state_dict`` for checkpoints.  One with ``unlabelled``, tasks, teaches rows without a label
    of these: a run in which there is none is an error.  A config with ``views`` says which rows it needs two views of (``none``,
    ``unlabelled``, ``all``).
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the extras that it reads."""

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        """Losses of a batch's rows, a scalar for each objective with an observed row."""


class Rehearsal(Protocol):
    """More forward passes for an update that asks for them.  They leave random states and buffers as they found them."""

    def again(self) -> tuple[Losses, Output]:
        """Losses of the current training batch by the model as it is now; each call of a step draws the same numbers."""

    def valid(self, step: int) -> tuple[Losses, Output]:
        """Losses of a batch of the validation split, which one is a function of ``step``."""


@dataclass(frozen=True)
class Course:
    """What an update may know of the training that it is built for.

    Args:
        per_epoch: steps of one pass over the training rows; 0: unknown.
        seed: of whatever the update draws.
        targets: names of the tasks of role ``target``.
        tasks: names of all tasks; empty: unknown.
        rehearse: see `Rehearsal`; None: there are no more forward passes.
    """

    per_epoch: int = 0
    seed: int = 0
    targets: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    rehearse: Rehearsal | None = None


class Update(Protocol):
    """Several losses become one parameter change.

    An update with weights of its own may have a method ``told()``: objective -> its weight now, for the log and the report.
    """

    def __call__(self, losses: Losses, output: Output) -> None:
        """Take one step; losses that are not finite raise before anything moves."""

    def settle(self) -> None:
        """Bring lazily kept parameters up to date, before they are read by evaluation or saved."""

    def state_dict(self) -> State:
        """All that a resumed training needs to go on bit for bit."""

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` gave."""

    def seek(self, step: int) -> None:
        """Set the number of steps done, for step sizes that go by it."""


@dataclass(frozen=True)
class Look:
    """How one call of `Session.fit` looks at the validation split, where that is not what the run's ``training`` says.

    Args:
        metric: what is judged, as in ``training.metric``; empty: that.
        tasks: which tasks the metric is a mean over; empty: those of role ``target``.
        rows: validation rows; None: all.
        patience: stop after so many looks without a better value; 0: never.
        keep_best: end with the weights of the best look instead of the last ones.
        every: steps between looks; 0: as ``training`` says; -1: no look at all.
        read: what makes a batch of row numbers, as in `Session.fit`, which reads its own for training alone.
    """

    metric: str = ""
    tasks: tuple[str, ...] = ()
    rows: Any = None
    patience: int = 0
    keep_best: bool = False
    every: int = 0
    read: Callable[[Any], Batch] | None = None


class Session(Protocol):
    """All that a schedule may use.  The test split cannot be reached from here."""

    @property
    def schema(self) -> Schema:
        """What the columns mean."""

    @property
    def metric(self) -> str:
        """What the run selects by."""

    @property
    def device(self) -> str:
        """Where the model and its batches are: ``cpu``, ``cuda`` ..."""

    @property
    def seed(self) -> int:
        """The run's seed."""

    @property
    def seconds(self) -> float:
        """Seconds spent on training so far, those before an interruption included."""

    @property
    def look(self) -> Look:
        """How the run looks at the validation split, unless a call says otherwise."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names that the run's losses can have on the training rows."""

    def rows(self, split: str) -> Any:
        """Ascending row numbers (n,) of ``train``, ``valid`` or ``train+valid``; the test split is refused."""

    def column(self, name: str, rows: Any) -> Any:
        """(n,) what is known of each row beside features and labels (``user``, ``domain`` ...); None: no such column."""

    def times(self, rows: Any) -> tuple[Any, float]:
        """(n,) int64 times of rows in the log's unit since 1970, and how many of these units make a second."""

    def steps_of(self, rows: int, epochs: int) -> int:
        """Steps in which `fit` with ``stream`` reads so many rows ``epochs`` times."""

    def fit(
        self, model: nn.Module, steps: int, *, weights: Mapping[str, float] | None = None, rows: Any = None,
        trainable: Callable[[str], bool] | None = None, update_state: State | None = None,
        seed: int | Sequence[int] | None = None, stream: bool = False, total: int = 0, start: int = 0,
        look: Look | None = None, sample: Mapping[str, float] | None = None, read: Callable[[Any], Batch] | None = None,
    ) -> tuple[nn.Module, State]:  # fmt: skip
        """Train the model in place; gives it back with the update's state.  `unbraid.train.session` has the arguments."""

    def fit_apart(
        self, model: nn.Module, steps: int, calls: Sequence[Mapping[str, Any]], *, jobs: int = 1, **common: Any
    ) -> Iterator[tuple[State, State]]:
        """Several calls of `fit` that begin alike, ``jobs`` at once; yields the weights and the update's state of each."""

    def score(
        self, model: nn.Module, split: str = "valid", rows: Any = None, read: Callable[[Any], Batch] | None = None
    ) -> Scores:
        """Predictions on a split, or on some of its rows."""

    def batch(self, rows: Any, features: Mapping[str, Any] | None = None) -> Batch:
        """Rows as a batch on the CPU; ``features``: what to give in the place of the table's."""

    def batches(self, rows: Any) -> Iterator[Batch]:
        """Rows in order, in batches of the training's size on the session's device."""

    def reads(self, rows: Any, steps: int, seed: Sequence[int], stream: bool = False) -> Any:
        """Ascending: those of the rows that `fit` with these arguments reads."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """The run's weighted loss of rows as one batch, a scalar to differentiate; None: no label is known."""

    def charge(self, seconds: float) -> None:
        """Count time that a schedule spent on training outside `fit`."""

    def fork(self, model: nn.Module, state: State) -> tuple[nn.Module, State]:
        """Independent copies of a model and an update's state."""

    def checkpoint(self, tag: str, state: State, *, done: bool = False) -> None:
        """Keep a schedule's own state under a tag; ``done``: it holds all that the calls of `fit` so far made."""

    def restore(self, tag: str) -> State | None:
        """The state kept under a tag, when a run is resumed; else None."""

    def keep(self, record: Mapping[str, Any]) -> None:
        """What the schedule found on its way (plain values), for ``metrics.json``."""

    def tell(self, text: str) -> None:
        """A line for who watches the run."""


class Schedule(Protocol):
    """Which parameters, rows and weights train when.

    A schedule that keeps a record (`Session.keep`) may have a method ``report(record)``: Markdown for ``report.md``.
    One that returns another module than the run's model has ``module(model, weights)``: that module, made of the model, for
    weights of these names.  What decides the number of its steps beside ``training`` is named by ``budget``;
    ``same`` names keys that change nothing of the result, so that a run may be resumed with others.
    """

    def __call__(self, session: Session, model: nn.Module, steps: int) -> nn.Module:
        """Train ``steps`` steps through the session; gives the trained module."""


# ------------------------------------------------------------------------------------------------------ a trained model
@dataclass(frozen=True)
class Judged:
    """What a selection says of a model: a value, or None and ``why`` there is none; ``numbers`` that tell how far to trust it."""

    value: float | None
    why: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


class Selection(Protocol):
    """Config of what judges a model on the validation split in the place of a metric.

    ``check(scores, schema)`` raises ValueError where the rows (of scores without logits) or tasks do not fit.
    ``reads_hidden``: does it need `Scores.hidden`?  ``oracle``: does it read labels of rows that stand for those without?
    Then everything that shows what it selected says so.
    """

    @property
    def kind(self) -> str:
        """The member's name in a run file."""

    @property
    def lower_is_better(self) -> bool:
        """Is a lower value the better one?"""

    @property
    def reads_hidden(self) -> bool:
        """Does it need `Scores.hidden`?"""

    @property
    def oracle(self) -> bool:
        """Does it read labels of rows that stand for those without?"""

    def check(self, scores: Scores, schema: Schema) -> None:
        """Raise ValueError where rows (of scores without logits) or tasks do not fit."""

    def __call__(self, scores: Scores, schema: Schema) -> Judged:
        """Judge a model by its scores on the validation split."""


class Calibrator(Protocol):
    """Config of a calibrator of one task, after training: ``fit`` gives a map, and what is not fitted cannot be called.

    The map (`unbraid.calibration.maps.Calibration`) makes of (N,) or (N, K) logits calibrated logits, whose sigmoid or softmax
    are the probabilities.  ``keeps_argmax``: no order changes, neither of classes nor of a binary task's rows.
    ``needs_target``: ``fit`` reads target rows and all hidden vectors; the labels of the target are never read.
    """

    keeps_argmax: ClassVar[bool]
    needs_target: ClassVar[bool]

    def fit(
        self, task: Task, held_out: Scores, target: Scores | None = None, train: Scores | None = None
    ) -> Callable[[Any], Any]:
        """Fit on rows that did not train the model.

        Args:
            task: which one; held_out: labelled source rows; target: rows of the target; train: source rows that trained the
                model, for their hidden vectors alone.

        Raises:
            ValueError: the task's kind or the rows do not do.
        """


class Probe(Protocol):
    """A trained model and data become a finding."""

    def __call__(self, model: nn.Module, schema: Schema, batches: Iterable[Batch]) -> Finding:
        """Look at a model by means of batches."""
