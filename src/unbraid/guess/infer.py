"""A first run file from a look at the columns: every guess is written with its reason, nothing is silently dropped.

A column that should not be a feature stays in the file as a commented-out line that says why; deleting the ``#`` takes
it in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from unbraid.data.text import stem
from unbraid.guess.columns import Guess, mean, of_column
from unbraid.guess.labels import NEGATIVES, Label
from unbraid.guess.look import Look
from unbraid.guess.times import calendar, unit_of
from unbraid.guess.words import DOMAINS, safe, sql_text

LENGTH = 50  # of the histories
SOURCE = "from_table"  # says which table an event is of
RARE = 0.05  # a label of fewer positives
RARE_RATE, RARE_DROPOUT = 0.005, 0.2  # with one beside others: `docs/commands.md` says what they are worth
STEPS, MOST_EPOCHS = 1_000, 20  # a table that is too small for so many steps in three epochs is read more often
Lines = Sequence[tuple[bool, dict[str, Any], str]]  # (commented out?, inline table, comment)


def infer(path: Path, labels: Sequence[str] = (), *, user: str = "", time: str = "", domain: str = "") -> str:
    """A commented run file.

    Args:
        path: a Parquet or CSV file, or a folder of them: the largest table that has the labels holds the rows, tables
            with a unique key that the rows have are joined, files of one schema are one table.
        labels: label columns, one task each; guessed if there is none.
        user, time, domain: columns with these roles; user and time are guessed if empty.

    Returns:
        TOML that `unbraid.config.load` reads.

    Raises:
        ValueError: there is no table, no such column (the message says what there is), or a label of one value.
    """
    return first_run(path, labels, user=user, time=time, domain=domain)[0]


def first_run(
    path: Path, labels: Sequence[str] = (), *, user: str = "", time: str = "", domain: str = ""
) -> tuple[str, list[str]]:
    """The run file of `infer`, and lines that say what was found.  Raises ValueError as `infer` does."""
    try:
        look = Look(Path(path), list(dict.fromkeys(labels)), {"user": user, "time": time, "domain": domain})
        return "\n".join(_lines(look)) + "\n", list(_found(look))
    except PolarsError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _found(look: Look) -> Iterable[str]:
    """What a terminal shows of it."""
    joined = f", joined with {', '.join(dict.fromkeys(join.table for join, _ in look.joins))}" if look.joins else ""
    yield f"{look.total:,} rows of {look.table}{joined}"
    if look.logs:
        yield f"histories of {', '.join(log.table for log in look.logs)}"
    yield f"user {look.user or '-'}, time {look.time or '-'}, item {look.item.column.name if look.item else '-'}"
    how = "given" if look.given else "guessed; the run file says why, and what else they could be"
    yield f"tasks {', '.join(f'{t.name} ({t.kind})' for t in look.labels.tasks)}: {how}"
    out = [g.column.name for g in look.features if g.out]
    yield f"features {len(look.features) - len(out)}" + (
        f"; left out, with the reason in the run file: {', '.join(out)}" if out else ""
    )
    if look.pictures:
        yield from (f"pictures in {look.pictures.rows:,} rows", *look.pictures.notes)


def _lines(look: Look) -> Iterable[str]:
    """The run file."""
    name = re.sub(r"\W+", "_", stem(look.path.resolve())).strip("_") or "run"
    seen = f"all {look.total:,} rows" if look.step == 1 else f"one in {look.step} of {look.total:,} rows"
    yield _comment(f"Written by `unbraid init` from a look at {seen} of {look.table}. Comments say why.")
    yield "# Check what was left out below, then: unbraid data describe THIS_FILE; unbraid train THIS_FILE"
    yield from (f"name = {inline(name)}", "", "[data]")
    yield from _data(look)
    yield from ("", *_array("tasks", _tasks(look)), "", *_array("features", _features(look)))
    yield from ("", *_histories(look), "", "[data.split]  " + _comment(look.split.why))
    yield from (f"{k} = {inline(v)}{_when(look, v)}" for k, v in look.split.keys.items())
    yield from ("", *_model(look))


# ---------------------------------------------------------------------------------------------------------------- TOML
def inline(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inline, value)) + "]"
    text = json.dumps(value, ensure_ascii=False)  # JSON's texts, numbers and booleans are TOML's
    return text.replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else inline(name)


def _comment(text: str) -> str:
    return "# " + " ".join(text.split())  # a name with a line break must not end the comment


def _array(key: str, members: Lines) -> list[str]:
    """An array of inline tables, one a line."""
    lines = (f"  {'# ' if out else ''}{inline(table)},  {_comment(why)}" for out, table, why in members)
    return [f"{key} = [", *lines, "]"]


# ------------------------------------------------------------------------------------------------------------ sections
def _data(look: Look) -> Iterable[str]:
    yield f"folder = {inline(str(look.tables.folder))}"
    yield f"rows = {inline(look.table)}"
    if look.tables.text:
        yield f"text = {inline([{'table': t.table, 'separator': t.separator} for t in look.tables.text])}  # between columns"
    if look.split.keep:
        yield f"keep = {inline(look.split.keep)}  # rows without a time cannot be split"
    if look.duplicates:
        fine = (look.user and look.time) or any(c.distinct > 0.5 * look.total for c in look.columns.values() if c.own)
        why = "" if fine else "; so few different values may be equal by chance"
        line = "drop_duplicates = true" if fine else "# drop_duplicates = true"
        yield f"{line}  # {look.duplicates:,} rows equal an earlier row in every column{why}"
    yield _user(look)
    if look.time:
        yield f"time = {inline(look.time_sql)}  {_comment(look.time_why)}"
        if look.time_is_number:
            yield f"time_unit = {inline(look.time_unit)}"
        elif any(log.unit for log in look.logs):
            yield 'time_unit = "us"  # of the events below whose times are no dates, as dates are read'
    else:
        yield '# time = ""  # no column looks like a time'
    yield from _domain(look)
    if look.labels.negatives and look.item:
        drawn = {"item": look.item.column.name, "per_positive": NEGATIVES, "labels": [look.labels.tasks[0].name]}
        yield f"negatives = {inline(drawn)}  # the rows are positives; see the task"
    joins = [(False, _join(join), why) for join, why in look.joins]
    joins += [(True, {"table": t, "on": ""}, f"not used: {why}") for t, why in look.unused]
    yield from _array("joins", joins) if joins else ()


def _join(join: Any) -> dict[str, str]:
    return {k: v for k in ("table", "on", "key", "prefix") if (v := getattr(join, k))}


def _user(look: Look) -> str:
    if not look.user:
        return f'# user = ""  {_comment(look.no_user)}: intervals are then over rows, and there are no histories'
    why = "given" if look.roles["user"] else f"named like a user, {look.columns[look.user].distinct:,} distinct"
    return f"user = {inline(look.user)}  {_comment(why)}"


def _domain(look: Look) -> Iterable[str]:
    given = look.roles["domain"]
    named = next((c.name for c in look.columns.values() if c.words == ["domain"] and 2 <= c.distinct <= 50), "")
    if found := given or (named if named not in look.taken else ""):
        why = "given" if given else "called so"
        yield f"domain = {inline(found)}  # {why}: metrics are printed for each of its values"
        return
    for c in look.columns.values():
        free = c.name not in (*look.taken, look.user, look.time) and not c.nested
        if free and c.named(DOMAINS) and 2 <= c.distinct <= 50:
            text = f"{c.distinct} values: if these are scenarios, metrics are printed for each"
            yield f"# domain = {inline(c.name)}  # {text}"


def _tasks(look: Look) -> Lines:
    """A line for each task, and a commented-out one for what else could be one."""
    lines: list[tuple[bool, dict[str, Any], str]] = []
    earlier: dict[str, pl.Series] = {}
    answers = {label.name: (known, yes) for label, known, yes in look.positives()}
    for label in look.labels.tasks:
        why = label.why
        if label.name in answers:
            known, yes = answers[label.name]
            values = label.values(look.frame)
            if (
                label.kind != "real"
                and values.filter(look.split.train & known).n_unique() < values.drop_nulls().n_unique()
            ):
                why += "; careful: some of its values never occur in the training split"
            if label.kind == "binary":
                parents = (p for p, theirs in earlier.items() if yes.any() and not (yes & ~theirs).any())
                if parent := next(parents, None):  # every positive is a positive of an earlier task
                    why += f'; only where `{parent}` is 1: given = "{safe(parent)}" would predict it among those'
                earlier[label.name] = yes
        lines.append((False, _task(label), why))
    tasks = {label.name for label in look.labels.tasks}
    lines += [
        (True, _task(label), f"could be a task, too: {label.why}")
        for label in look.labels.others
        if label.name not in tasks
    ]
    return lines


def _task(label: Label) -> dict[str, Any]:
    return of_column(label.name, label.kind, label.source)


def _features(look: Look) -> Lines:
    if all(g.out for g in look.features):
        reasons = "; ".join(f"{g.column.name}: {g.out}" for g in look.features)
        raise ValueError(f"No column is left to be a feature. {reasons or 'There is none besides labels and time'}.")
    return [(bool(g.out), g.feature, f"left out: {g.out}" if g.out else g.why) for g in look.features]


def _histories(look: Look) -> Iterable[str]:
    """Histories of the user's earlier rows with a positive first label, and of the tables of events."""
    item = look.item if look.user and look.time else None
    if item is None and not look.logs:
        need = [what for what, have in (("user", look.user), ("time", look.time), ("item id", look.item)) if not have]
        yield f"# no histories: they need a user, a time and an item id; there is no {' and no '.join(need)}"
        return
    fields: list[tuple[bool, dict[str, Any], str]] = []
    events: list[tuple[bool, dict[str, Any], str]] = []
    histories: list[tuple[bool, dict[str, Any], str]] = []
    if item is not None:
        _of_rows(look, item, fields, events, histories)
    for log in look.logs:
        known = {table["name"] for _, table, _ in fields}
        fields += [(False, table, why) for table, _, why in log.fields if table["name"] not in known]
        columns = {table["name"]: column for table, column, _ in log.fields} | {SOURCE: sql_text(log.name)}
        source = {"table": log.table, "columns": columns} | ({} if log.time == look.time_sql else {"time": log.time})
        events.append((False, source, f"events of the rows' users; time is {log.why}"))
        read = {"fields": [table["name"] for table, _, _ in log.fields], "where": f"{SOURCE} = {sql_text(log.name)}"}
        why = f"the user's last {LENGTH} events of {log.table}, strictly before the row's time"
        histories.append((False, {"name": log.name, **read, "length": LENGTH}, why))
    for key, members in (("fields", fields), ("events", events), ("histories", histories)):
        yield from _array(key, members)


def _of_rows(look: Look, item: Guess, fields: list[Any], events: list[Any], histories: list[Any]) -> None:
    """Add what the rows themselves are as events."""
    first, name = look.labels.tasks[0], item.feature["name"]
    columns, where = {name: item.column.name}, {}
    if first.kind == "binary" and not look.labels.negatives:
        columns["positive"] = first.source
        where = {"where": "positive" if first.values(look.frame).dtype == pl.Boolean else "positive = 1"}
    elif look.logs:  # others are events, too
        columns[SOURCE] = "'rows'"
        where = {"where": f"{SOURCE} = 'rows'"}
    title = "earlier"
    while title in {g.feature["name"] for g in look.features}:
        title += "_rows"
    what = f" with `{first.name}` = 1" if "positive" in columns else ""
    fields.append((False, {"name": name, **item.least}, f"same name as the feature: both read one table of `{name}`"))
    events.append((False, {"table": "rows", "columns": columns}, "the rows themselves are events for later rows"))
    why = f"the user's last {LENGTH} rows{what}, strictly before the row's time"
    histories.append((False, {"name": title, "fields": [name], **where, "length": LENGTH}, why))


def _when(look: Look, value: Any) -> str:
    """The date that a number means, as a comment."""
    if look.split.keys["kind"] != "time" or not isinstance(value, int) or not unit_of(pl.Series([value])):
        return ""
    return f"  # {calendar(value, look.moments[1]).isoformat(sep=' ', timespec='seconds')} UTC"


def _rare(look: Look) -> str:
    """A rare binary label of a log with others beside it, or an empty string."""
    if not (look.user and look.time) or look.pictures or len(look.labels.tasks) < 2:
        return ""
    shares = {label.name: mean(yes.filter(known).cast(pl.Float64)) for label, known, yes in look.positives()
              if label.kind == "binary"}  # fmt: skip
    return next((name for name, share in shares.items() if share < RARE), "")


def _model(look: Look) -> Iterable[str]:
    kinds = {label.kind for label in look.labels.tasks}
    metric = "auc" if "binary" in kinds else "accuracy" if "multiclass" in kinds else "rmse"
    tower = '"mmoe"  # several tasks: experts, mixed for each' if len(look.labels.tasks) > 1 else '"shared_bottom"'
    yield '[model.tower]  # shared_bottom, mmoe and stem are a good start; stem wants `model.tables.kind = "per_task"`'
    yield f"kind = {tower}"
    rare = _rare(look)
    if rare:
        yield f"dropout = {RARE_DROPOUT}  # what is frequent is soon known by heart"
    if look.logs or (look.item and look.user and look.time):
        yield from ("", "[model.history]", 'kind = "mean"  # target_attention weighs events by what is predicted')
    if rare:
        why = (
            f"five times the default: `{rare}` is rare, and should be learnt before frequent labels are known by heart"
        )
        yield from ("", "[update]", 'kind = "joint"', f"lr = {RARE_RATE}  # {why}")
    if look.pictures:
        from unbraid.config import to_dict

        backbone = to_dict(look.pictures.backbone, defaults=False)  # type: ignore[arg-type]  # any part of a run
        yield from ("", "[model.images]  # by the size of the pictures, and by what is installed")
        yield from (f"{key} = {inline(value)}" for key, value in backbone.items())
    batch = 32 if look.pictures else 1024 if look.total >= 50_000 else 256 if look.total >= 4_000 else 64
    epochs = min(max(-(-STEPS * batch // look.total), 3), MOST_EPOCHS)
    yield from (
        "",
        "[training]",
        f"batch_size = {batch}",
        f"epochs = {epochs}  # at most; a small table is read more often",
    )
    yield f"metric = {inline(metric)}  # on the validation split"
    yield "patience = 2  # stop after so many evaluations without a better value, and keep the best weights"
