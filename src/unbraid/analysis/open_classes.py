"""How a classifier does away from what it was trained on: other domains, classes known by name alone, both at once.

Paper: "CLIPood: Generalizing CLIP to Out-of-Distributions", Shu, Guo, Wu, Wang, Wang, Long, ICML 2023,
https://arxiv.org/abs/2302.00864.

A `Protocol` says of the rows of a table which train, and which are tested against which class names:

| protocol | rows that train | rows that are tested, and the names that compete |
|---|---|---|
| `domain_shift` | all classes of the other domains | the held-out domain, all names |
| `open_class` | base classes | base rows against base names; new rows against new names |
| `in_the_wild` | base classes of the other domains | the held-out domain: base rows and new rows, each against *all* names |

It gives a column for a split by column (`Protocol.split`), and `measure` reads the scores of a model that knows all names
(`unbraid.bundle.with_classes`).  With b and n the accuracies of base and new classes, H = 2 b n / (b + n).

How this differs from the authors' code: its in-the-wild script calls a function with an argument that this function does not
have; its domain shift is tested on a fifth of the held-out domain, here on all of it; base classes are the first half of the
names in the given order, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from unbraid.evaluate import evaluate
from unbraid.types import Schema, Scores

Array = np.ndarray
Words = Sequence[str] | Array  # (N,) text


class Tested(NamedTuple):
    """(N,) bool: which rows are tested, and the names that compete for them."""

    rows: Array
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Protocol:
    """Which rows train, and which are tested against which names.

    Args:
        kind: its name; names: all classes; base: those that train.
        train: (N,) bool; tests: what is measured (``target``, or ``base`` and ``new``) -> its test.
    """

    kind: Literal["domain_shift", "open_class", "in_the_wild"]
    names: tuple[str, ...]
    base: tuple[str, ...]
    train: Array
    tests: Mapping[str, Tested]

    @property
    def new(self) -> tuple[str, ...]:
        """The classes that do not train."""
        return tuple(name for name in self.names if name not in self.base)

    def split(self, labels: Words, valid: float = 0.2, seed: int = 0) -> pl.Series:
        """A column for ``data.split`` of kind ``column``: ``train``, ``valid``, ``test`` (tested rows of base classes) or null.

        Rows of new classes are null: a table to train on must not have them (``data.keep = "split is not null"``).

        Args:
            labels: (N,) as given to the protocol; valid: share of the training rows that validate, drawn by ``seed``.

        Raises:
            ValueError: ``valid`` is not in [0, 1).
        """
        if not 0 <= valid < 1:
            raise ValueError(f"Parameter `valid` should be in [0, 1). Found {valid}.")
        found = np.full(len(self.train), "", dtype=object)
        tested = np.any([test.rows for test in self.tests.values()], axis=0) & np.isin(
            np.asarray(labels, str), self.base
        )
        found[tested], found[self.train] = "test", "train"
        rows = np.random.default_rng(seed).permutation(np.flatnonzero(self.train))
        found[rows[: round(valid * len(rows))]] = "valid"
        return pl.Series("split", [word or None for word in found], dtype=pl.String)

    def measure(self, scores: Scores, schema: Schema, task: str) -> dict[str, Any]:
        """Accuracies with intervals from a bootstrap over users (without users: over rows), and ``H`` where there are two.

        Args:
            scores: of the N rows in their order, by a model that knows all names; schema: the model's; task: the classifier's.

        Returns:
            test -> ``{"value", "low", "high"}`` (in [0, 1]) and its number of ``rows``; ``H`` -> ``{"value"}``.

        Raises:
            ValueError: the scores are those of other rows, or the model does not know a name or a row's class.
        """
        if len(scores.row) != len(self.train):
            raise ValueError(f"There should be scores of all {len(self.train):,} rows. Found {len(scores.row):,}.")
        found: dict[str, Any] = {}
        for name, test in self.tests.items():
            cut = restricted(scores, schema, task, test)
            metric = evaluate(cut, schema)[task]
            found[name] = {**metric["accuracy"], "rows": metric["rows"]}
        if set(found) == {"base", "new"}:
            found["H"] = {"value": harmonic(found["base"]["value"], found["new"]["value"])}
        return found


def restricted(scores: Scores, schema: Schema, task: str, test: Tested) -> Scores:
    """The scores of a test's rows, with the logits of its names alone.  Raises ValueError as `Protocol.measure`."""
    known = schema.classes[task]
    if missing := [name for name in test.names if name not in known]:
        raise ValueError(
            f"The model does not know the classes {missing[:5]}: add them, with `unbraid.bundle.with_classes`."
        )
    rows, columns = np.flatnonzero(test.rows), [known.index(name) for name in test.names]
    place = np.full(len(known), -1)
    place[columns] = np.arange(len(columns))
    labels = place[scores.labels[task][rows]]
    observed = scores.observed[task][rows]
    if not observed.all() or (labels < 0).any():
        raise ValueError(f"Rows of a test should have labels among its {len(test.names)} names. Found others.")

    def pick(values: Any) -> Any:
        return None if values is None else values[rows]

    return replace(
        scores, logits={task: scores.logits[task][rows][:, columns]}, labels={task: labels}, observed={task: observed}, hidden={},
        domain=pick(scores.domain), weight=pick(scores.weight), group=pick(scores.group), row=pick(scores.row), meta={},
    )  # fmt: skip


def harmonic(base: float | None, new: float | None) -> float | None:
    """2 b n / (b + n); 0 if both are, None if one is not known."""
    if base is None or new is None:
        return None
    return 2 * base * new / (base + new) if base + new else 0.0


def domain_shift(labels: Words, domain: Words, held_out: str, names: Sequence[str] = ()) -> Protocol:
    """Leave one domain out: see the module's docstring.

    Args:
        labels, domain: (N,) of each row; held_out: the domain that is tested; names: all classes in order, by default as they
            first occur in the rows.

    Raises:
        ValueError: there is no such domain, or no other; a label is not among the names.
    """
    known = _names(labels, names)
    there = _held_out(domain, held_out)
    return Protocol("domain_shift", known, known, ~there, {"target": Tested(there, known)})


def open_class(
    labels: Words, test: Sequence[bool] | Array, names: Sequence[str] = (), base: int | None = None
) -> Protocol:
    """Base and new classes of the same domains: see the module's docstring.

    Args:
        labels: (N,) of each row; test: (N,) rows that are tested, the others train; names: as in `domain_shift`.
        base: how many names, the first ones, are base classes; None: half of them, rounded down.

    Raises:
        ValueError: a label is not among the names; there would be no base or no new class.
    """
    known = _names(labels, names)
    first, mine = _base(labels, known, base)
    tested = np.asarray(test, bool)
    tests = {"base": Tested(tested & mine, first), "new": Tested(tested & ~mine, known[len(first) :])}
    return Protocol("open_class", known, first, ~tested & mine, tests)


def in_the_wild(
    labels: Words, domain: Words, held_out: str, names: Sequence[str] = (), base: int | None = None
) -> Protocol:
    """A new domain with base and new classes, where all names compete: see the module's docstring.

    Arguments and errors as in `domain_shift` and `open_class`.
    """
    known = _names(labels, names)
    first, mine = _base(labels, known, base)
    there = _held_out(domain, held_out)
    tests = {"base": Tested(there & mine, known), "new": Tested(there & ~mine, known)}
    return Protocol("in_the_wild", known, first, ~there & mine, tests)


def _names(labels: Words, names: Sequence[str]) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(map(str, labels)))
    if other := [label for label in found if names and label not in names]:
        raise ValueError(f"Labels should be among the {len(names)} names. Found {other[:5]}.")
    return tuple(names) or found


def _base(labels: Words, names: tuple[str, ...], base: int | None) -> tuple[tuple[str, ...], Array]:
    count = len(names) // 2 if base is None else base
    if not 0 < count < len(names):
        raise ValueError(f"There should be base and new classes. Found {count} base classes among {len(names)} names.")
    return names[:count], np.isin(np.asarray(labels, str), names[:count])


def _held_out(domain: Words, held_out: str) -> Array:
    there = np.asarray(domain, str) == str(held_out)
    if not there.any() or there.all():
        raise ValueError(f"`{held_out}` should be one of several domains. Found {sorted(set(map(str, domain)))}.")
    return there
