"""Labels that nobody named: which column is taken, as what, and what else it could have been."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from unbraid import config
from unbraid.data.source import rows_plan
from unbraid.guess.columns import Column, columns_of
from unbraid.guess.infer import infer
from unbraid.guess.labels import good_from, guess, label_of
from unbraid.guess.leaks import follows_item, together

N = 1000
rng = np.random.default_rng(0)
USER, ITEM = [f"u{n % 90}" for n in range(N)], [f"i{n * n % 61}" for n in range(N)]


def columns(**values: object) -> dict[str, Column]:
    frame = pl.DataFrame(values)
    return columns_of(frame, frame.columns, {}, 1)


def numbers() -> np.ndarray:
    return rng.normal(size=N)


def flag(share: float = 0.4) -> np.ndarray:
    return (rng.random(N) < share).astype(int)


def chosen(user: str = "", item: str = "", **values: object) -> list[tuple[str, str, str]]:
    found = guess(columns(**values), user, item)
    return [(label.name, label.kind, label.source) for label in found.tasks] if found else []


def test_a_column_called_label_comes_before_feedback() -> None:
    assert chosen(x1=numbers(), target=flag(), is_click=flag()) == [("target", "binary", "target")]
    assert chosen(x=numbers(), y=numbers(), z=numbers(), price=numbers() * 9) == [("price", "real", "price")]
    assert chosen(a=numbers(), y=rng.integers(0, 4, N)) == [("y", "multiclass", "y")]


def test_flags_with_enough_of_both_answers_are_tasks_and_the_rest_is_named() -> None:
    found = guess(columns(is_hate=flag(), is_click=flag(), is_like=flag(), is_buy=[1] + [0] * (N - 1)), "", "")
    assert found is not None and [t.name for t in found.tasks] == ["is_click", "is_like", "is_hate"]
    assert [t.name for t in found.others] == ["is_buy"]


@pytest.mark.parametrize(
    ("answers", "sql"),
    [
        (["yes", "no"], "\"won\" = 'yes'"),
        (["N", "Y"], "\"won\" = 'Y'"),
        (["<=50K", ">50K"], "\"won\" = '>50K'"),
        (["yes", "no", "NA"], "CASE \"won\" WHEN 'yes' THEN 1 WHEN 'no' THEN 0 END"),
        ([1, 2], '"won" = 2'),
        (["blue"] * 3 + ["it's"], "\"won\" = 'it''s'"),  # the rarer one
    ],
)
def test_two_answers_are_a_binary_task(answers: list, sql: str) -> None:
    values = [answers[n % len(answers)] for n in range(N)]
    label = label_of(columns(won=values)["won"])
    assert (label.kind, label.source) == ("binary", sql)
    got = label.values(pl.DataFrame({"won": values})).cast(pl.Int8).to_list()
    yes = re.findall(r"(?:=|WHEN) '?(.+?)'?(?: THEN|$)", sql)[0].replace("''", "'")
    assert got == [None if v == "NA" else int(str(v) == yes) for v in values]


def test_ratings_become_liked_from_four_of_five_on() -> None:
    stars = rng.integers(1, 6, N)
    found = guess(columns(user_id=USER, item_id=ITEM, rating=stars), "user_id", "item_id")
    assert found is not None
    assert [(t.name, t.kind, t.source) for t in found.tasks] == [("liked", "binary", '"rating" >= 4')]
    assert ("rating", "real") in [(t.name, t.kind) for t in found.others]
    assert good_from(pl.Series([0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5] * 9)) == 4
    assert good_from(pl.Series(range(1, 11)).repeat_by(5).explode()) == 8
    assert good_from(pl.Series([1, 5] + [4] * 98)) == 4
    assert good_from(pl.Series([3] * 50 + [4] * 30 + [5] * 970)) == 5, "nearly all are good"


def test_what_was_done_makes_a_task_of_each_wanted_action() -> None:
    event = rng.choice(["view", "addtocart", "transaction"], N, p=[0.8, 0.15, 0.05])
    assert [t[:2] for t in chosen("visitorid", "itemid", visitorid=USER, event=event, itemid=ITEM)] == [
        ("addtocart", "binary"),
        ("transaction", "binary"),
    ]


def test_the_last_column_is_taken_and_nothing_about_a_person() -> None:
    assert chosen(a=numbers(), sort=rng.choice(list("abc"), N))[0][:2] == ("sort", "multiclass")
    assert chosen(a=numbers(), smoker=flag(), sex=rng.choice(["m", "f"], N)) == [("smoker", "binary", "smoker")]
    assert chosen(a=numbers(), b=numbers() * 3) == [("b", "real", "b")]
    assert chosen(name=[f"n{n}" for n in range(N)]) == []


def test_missing_together_and_belonging_to_the_item() -> None:
    known = pl.Series(rng.random(N) > 0.1)
    value = pl.Series(numbers())
    assert together(pl.select(pl.when(known).then(value)).to_series(), known)
    assert not together(pl.select(pl.when(pl.Series(rng.random(N) > 0.1)).then(value)).to_series(), known)
    assert not together(value, known)
    items = pl.Series(ITEM)
    assert follows_item(items.str.slice(1, 1), items) and not follows_item(pl.Series(rng.integers(0, 3, N)), items)


# ------------------------------------------------------------------------------------------------------- in a run file
def loaded(text: str, folder: Path) -> config.Run:
    (folder / "run.toml").write_text(text)
    return config.load(folder / "run.toml")


def test_a_log_without_labels_gets_sampled_negatives(tmp_path: Path) -> None:
    frame = {
        "user_id": USER,
        "item_id": ITEM,
        "ts": range(N),
        "maker": [i[1] for i in ITEM],
        "device": rng.integers(0, 3, N),
    }
    pl.DataFrame(frame).write_csv(tmp_path / "log.csv")
    text = infer(tmp_path / "log.csv")
    run = loaded(text, tmp_path)
    assert run.data.negatives is not None and run.data.negatives.item == "item_id" and run.data.tasks[0].name == "label"
    assert "goes with `item_id`" in text and {f.name for f in run.data.features} == {"user_id", "item_id", "device"}
    rows = rows_plan(run.data, tmp_path, None).collect()
    assert len(rows) == 5 * N and rows["label"].sum() == N


def test_the_log_with_a_rating_reads_its_own_past(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": USER, "item_id": ITEM, "rating": rng.integers(1, 6, N), "ts": range(N)}).write_csv(
        tmp_path / "r.csv"
    )
    run = loaded(infer(tmp_path / "r.csv"), tmp_path)
    assert run.data.events[0].columns == {"item_id": "item_id", "positive": '"rating" >= 4'}
    assert run.data.histories[0].where == "positive" and "rating" not in {f.name for f in run.data.features}


def test_labels_that_compete_are_listed(tmp_path: Path) -> None:
    pl.DataFrame({"a": numbers(), "smoker": flag(), "sort": rng.choice(list("abc"), N)}).write_csv(tmp_path / "t.csv")
    text = infer(tmp_path / "t.csv")
    assert '  {name = "sort", kind = "multiclass"},' in text and '  # {name = "smoker", kind = "binary"},' in text
    assert "could be a task, too" in text


def test_no_label_is_an_error_that_lists_columns(tmp_path: Path) -> None:
    pl.DataFrame({"name": [f"n{n}" for n in range(99)]}).write_csv(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="No column looks like a label.*--label.*t.csv: name"):
        infer(tmp_path / "t.csv")


def test_a_copy_and_what_is_recorded_at_once_are_left_out(tmp_path: Path) -> None:
    label = flag(0.3)
    hidden = rng.random(N) < 0.1
    frame = pl.DataFrame(
        {"a": numbers(), "copy": ["high" if v else "low" for v in label], "noise": label + 0.6 * numbers(), "y": label}
    )
    frame = frame.with_columns(
        pl.when(~pl.Series(hidden)).then("y").alias("y"), pl.when(~pl.Series(hidden)).then("a").alias("late")
    )
    frame.write_csv(tmp_path / "t.csv")
    text = infer(tmp_path / "t.csv")
    assert re.search(r'# \{name = "copy".*alone it tells `y`', text)
    assert re.search(r'# \{name = "late".*missing where `y` is missing', text)
    assert re.search(r'^  \{name = "noise".*careful: alone it has AUC 0\.[89]', text, re.M)
