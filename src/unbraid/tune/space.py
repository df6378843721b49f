"""What a search varies: dotted keys of the run file, each with choices or a range.

In the run file's own table ``tune``, or in a file of its own::

    [tune]
    "update.lr" = { low = 1e-4, high = 1e-2, log = true }
    "model.tables.width" = [8, 16, 32]
    "model.history" = [{ kind = "mean" }, { kind = "din" }]

A choice may be a whole table, so that one key swaps a member of a slot with all of its own keys.  A candidate is the run with one
value for each key; the order of the keys does not matter: a slot's ``kind`` and whole tables come before what stands in them.
"""

from __future__ import annotations

import difflib
import json
import math
import random
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid import config

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RANGE = ("low", "high", "log", "step", "int")
DRAWS = 50  # candidates in which a value that does not fit the run alone is looked for
LIKE_THIS = "`[8, 16]` or `{ low = 1e-4, high = 1e-2, log = true }`"
Drawn = str | int | float  # what a study holds of a value


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included.

    Args:
        key: of the run file, dotted; log: equal ratios are equally far (low above 0).
        step: of a grid from ``low``, None: without one; whole: integers alone.
    """

    key: str
    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or not math.isfinite(self.low) or not math.isfinite(self.high):
            raise config.RunError(f"`tune.{self.key}`: `low` should be below `high`. Found {self.low} and {self.high}.")
        if self.log and (self.low <= 0 or self.step is not None):
            found = f"`low` {self.low}" if self.low <= 0 else f"`step` {self.step}"
            raise config.RunError(f"`tune.{self.key}`: `log` needs `low` above 0, and no `step`. Found {found}.")
        if self.step is not None and (self.step <= 0 or not self._on_grid(self.high)):
            raise config.RunError(
                f"`tune.{self.key}`: `step` should be above 0 and lead from `low` to `high`. "
                f"Found {self.step}, {self.low} and {self.high}."
            )
        if self.whole and any(value != int(value) for value in (self.low, self.high, self.step or 1)):
            raise config.RunError(f"`tune.{self.key}`: `int` needs `low`, `high` and `step` that are integers.")

    def _on_grid(self, value: float) -> bool:
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-6

    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def value(self, drawn: Drawn) -> Any:
        """The value of what a study holds."""
        return drawn

    def own(self, run: config.Run) -> Drawn | None:
        """The run's own value as a study holds it; None if the range has it not."""
        value = present(run, self.key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return None
        if (self.whole and value != int(value)) or not self._on_grid(value):
            return None
        return int(value) if self.whole else float(value)

    def ends(self) -> list[Drawn]:
        """Values that a check tries."""
        return [int(value) if self.whole else float(value) for value in (self.low, self.high)]

    def plain(self) -> dict[str, Any]:
        """As a file has it."""
        said = {"low": self.low, "high": self.high, "log": self.log, "step": self.step, "int": self.whole}
        return {name: value for name, value in said.items() if value not in (False, None) or name in ("low", "high")}


@dataclass(frozen=True)
class Choices:
    """One of several values, which may be tables.  ``names`` are the values as JSON, by which a study knows them."""

    key: str
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise config.RunError(
                f"`tune.{self.key}` should be a list of different values, at least one. Found [{', '.join(self.names)}]."
            )

    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.names)

    def value(self, drawn: Drawn) -> Any:
        """The value of what a study holds."""
        return json.loads(str(drawn))

    def own(self, run: config.Run) -> Drawn | None:
        """The name of the choice that changes nothing of the run; None if each does."""
        for name in self.names:
            try:
                if candidate(run, (self,), {self.key: name}) == run:
                    return name
            except config.RunError:
                continue
        return None

    def ends(self) -> list[Drawn]:
        """Values that a check tries: all."""
        return list(self.names)

    def plain(self) -> list[Any]:
        """As a file has it."""
        return [json.loads(name) for name in self.names]


Dimension = Range | Choices
Space = tuple[Dimension, ...]


# -------------------------------------------------------------------------------------------------------------- reading
def load(path: Path, run: config.Run) -> Space | None:
    """The space of a file: its table ``tune``, or of a file that is no run file, all of it.  None: it has none.

    Raises:
        RunError: as `parse`, or the file cannot be read.
    """
    try:
        plain = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise config.RunError(f"There is no file {path}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise config.RunError(f"{path} is not TOML: {error}.") from None
    found = plain.get("tune") if "tune" in plain or "data" in plain else plain
    return None if found is None else parse(found, run)


def parse(plain: Any, run: config.Run) -> Space:
    """The space that plain tables say, checked against the run.

    Raises:
        RunError: nothing to tune, something that is neither choices nor a range, a key that the run has not, or a value that it
            does not take.
    """
    if not isinstance(plain, Mapping) or not plain:
        raise config.RunError(
            f"There is nothing to tune: `tune` should have keys of the run file, such as `update.lr`, each with {LIKE_THIS}."
        )
    space = tuple(_dimension(key, value, run) for key, value in _leaves(plain))
    keys = [dimension.key for dimension in space]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise config.RunError(f"`tune` should have each key once. Found twice: {', '.join(twice)}.")
    check(run, space)
    return space


def _leaves(plain: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, whether they were written as one name in quotes or as tables in tables."""
    for key, value in plain.items():
        at = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and not {"low", "high"} & value.keys():
            yield from _leaves(value, at)
        else:
            yield at, value


def _dimension(key: str, value: Any, run: config.Run) -> Dimension:
    if isinstance(value, list):
        return Choices(key, tuple(json.dumps(choice, sort_keys=True) for choice in value))
    if not isinstance(value, Mapping):
        raise config.RunError(f"`tune.{key}` should be a list of choices or a range: {LIKE_THIS}. Found {value!r}.")
    if unknown := [name for name in value if name not in RANGE]:
        near = difflib.get_close_matches(unknown[0], RANGE, 1)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        raise config.RunError(f"unknown key `tune.{key}.{unknown[0]}`.{meant} Allowed: {', '.join(RANGE)}.")
    numbers = {name: value[name] for name in ("low", "high", "step") if name in value}
    wrong = [name for name, n in numbers.items() if isinstance(n, bool) or not isinstance(n, int | float)]
    wrong += [name for name in ("log", "int") if not isinstance(value.get(name, False), bool)]
    if wrong or not {"low", "high"} <= value.keys():
        raise config.RunError(
            f"`tune.{key}` should have numbers `low` and `high`, perhaps `step`, and true or false for `log` and `int`. "
            f"Found {dict(value)}."
        )
    whole = all(isinstance(n, int) for n in numbers.values()) and type(present(run, key)) is int
    return Range(key, value["low"], value["high"], value.get("log", False), value.get("step"), value.get("int", whole))


def default(run: config.Run) -> Space:
    """What is varied where nothing is said: what most runs gain from, around the run's own values.

    ``update.lr`` from a tenth to ten times; the tables' ``width`` halved and doubled (of one width); ``dropout`` of a tower that
    has it, 0 to 0.5.
    """
    found: list[Dimension] = []
    rate, width = run.update.lr, run.model.tables.width
    if rate > 0:
        found.append(Range("update.lr", rate / 10, rate * 10, log=True))
    if not run.model.tables.widths:
        found.append(Choices("model.tables.width", tuple(map(str, sorted({max(1, width // 2), width, 2 * width})))))
    if hasattr(run.model.tower, "dropout"):
        found.append(Range("model.tower.dropout", 0.0, 0.5))
    check(run, tuple(found))
    return tuple(found)


# ------------------------------------------------------------------------------------------------------------ candidates
def candidate(run: config.Run, space: Sequence[Dimension], drawn: Mapping[str, Drawn]) -> config.Run:
    """The run with what was drawn for each key.  Raises RunError."""
    ordered = sorted((d for d in space if d.key in drawn), key=lambda d: _depth(d.key))
    values = [(d.key, d.value(drawn[d.key])) for d in ordered]
    return config.changed(run, [(key, value, f"tune.{key} = {text(value)}") for key, value in values])


def _depth(key: str) -> int:
    """How deep a key stands; a slot's ``kind``, which sets all others to their defaults, as deep as its slot."""
    return key.removesuffix(".kind").count(".")


def present(run: config.Run, key: str) -> Any:
    """The run's own value of a dotted key; None if there is none."""
    at: Any = config.to_dict(run)
    for step in key.split("."):
        if isinstance(at, list):
            named = {item.get("name"): item for item in at if isinstance(item, dict)}
            at = named.get(step, at[int(step)] if step.isdigit() and int(step) < len(at) else None)
        else:
            at = at.get(step) if isinstance(at, dict) else None
    return at


def check(run: config.Run, space: Space) -> None:
    """Build candidates: every choice and both ends of every range, in the run or, where that does not fit, beside other values.

    Raises:
        RunError: a key that the run has not, or a value that fits nowhere.
    """
    rng = random.Random(0)
    for dimension in space:
        for drawn in dimension.ends():
            try:
                candidate(run, space, {dimension.key: drawn})
            except config.RunError:
                others = ({d.key: rng.choice(d.ends()) for d in space} | {dimension.key: drawn} for _ in range(DRAWS))
                if not any(_fits(run, space, each) for each in others):
                    raise


def _fits(run: config.Run, space: Space, drawn: Mapping[str, Drawn]) -> bool:
    try:
        candidate(run, space, drawn)
    except config.RunError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------- words
def text(value: Any) -> str:
    """A value in a table or a sentence: three digits, and of a table with nothing but a kind the kind."""
    if isinstance(value, Mapping):
        kind = [str(value["kind"])] if "kind" in value else []
        return " ".join(kind + [f"{key}={text(inner)}" for key, inner in value.items() if key != "kind"]) or "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text, value))}]"
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def short(keys: Sequence[str]) -> dict[str, str]:
    """The keys by as few of their last steps as tell them apart."""
    found = {}
    for key in keys:
        steps = key.split(".")
        names = (".".join(steps[-count:]) for count in range(2 if steps[-1] == "kind" else 1, len(steps) + 1))
        found[key] = next((name for name in names if sum(f".{other}".endswith(f".{name}") for other in keys) == 1), key)
    return found


def said(drawn: Mapping[str, Any], space: Space) -> str:
    """``lr 0.00214, width 16``."""
    names = short([dimension.key for dimension in space])
    return ", ".join(f"{names[d.key]} {text(d.value(drawn[d.key]))}" for d in space if d.key in drawn)
