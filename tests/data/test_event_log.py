"""Rows to predict from an event log: places, ties, negatives, and a run that trains on them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from unbraid import config
from unbraid.cli.main import app
from unbraid.data.encode import encode
from unbraid.data.event_log import (
    FILES,
    EventLog,
    Ordered,
    Prepared,
    Targets,
    Touched,
    draw_negatives,
    prepare_targets,
    unique_times,
    write,
)  # fmt: skip
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.types import BUILT_IN

LOG = EventLog(
    table="log", user="who", item="what", time="at", fields={"category": "what % 7", "action": "did"},
    of_item=("category",),
)  # fmt: skip
RULE = Targets(least=12, train=(3, 5, 7))


def make(users: int = 30, seed: int = 0, spread: int = 400, items: int = 60) -> pl.DataFrame:
    """Users with 1 to 40 events in shuffled file order; popular items first; many ties when ``spread`` is small."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(users) * 3 + 100, rng.integers(1, 41, users))
    rng.shuffle(who)
    n = len(who)
    return pl.DataFrame({
        "who": who, "what": np.minimum(rng.geometric(0.07, n), items) + 1000,
        "at": rng.integers(10_000, 10_000 + spread, n), "did": rng.choice(["view", "buy"], n),
    })  # fmt: skip


def prepared(log: pl.DataFrame, rule: Targets = RULE, declared: EventLog = LOG, **options: Any) -> Prepared:
    return prepare_targets(declared, rule, tables={"log": log}, **options)


def by_hand(log: pl.DataFrame, rule: Targets) -> list[tuple]:
    """Targets by a loop over users: user, time, item, split, events strictly before."""
    rows = []
    events: dict[int, list[tuple]] = {}
    for order, (who, what, at, _) in enumerate(log.rows()):
        events.setdefault(who, []).append((at, order, what))
    for user in sorted(events):
        mine = sorted(events[user])
        if len(mine) < rule.least:
            continue
        for back in sorted([*rule.train, rule.valid, rule.test], reverse=True):
            at, _, what = mine[-back]
            split = {rule.valid: "valid", rule.test: "test"}.get(back, "train")
            rows.append((user, at, what, split, sum(1 for when, _, _ in mine if when < at)))
    return rows


# --------------------------------------------------------------------------------------------------------------- places
def test_the_papers_numbers():
    rule = Targets()
    assert len(rule.train) == 19 and rule.train[0] == 3 and rule.train[1] == 8 and rule.train[-1] == 93
    assert (rule.valid, rule.test, rule.least, rule.negatives, rule.reject) == (2, 1, 210, 2, "ever")


@pytest.mark.parametrize("spread", [100_000, 15])
@pytest.mark.parametrize("places", [{}, {"train": (12, 4), "valid": 1, "test": 9}])
def test_targets_are_those_of_a_loop(spread, places):
    log, rule = make(spread=spread), replace(RULE, **places)
    made = prepared(log, rule)
    rows = made.tables["rows.parquet"]
    positives = rows.filter(pl.col("label") == 1)
    want = by_hand(log, rule)
    assert 30 < len(want) < 150 and rows.columns == ["user", "time", "item", "category", "label", "split"]
    assert positives.select("user", "time", "item", pl.col("split").cast(pl.String)).rows() == [w[:4] for w in want]
    assert made.lengths[::3].tolist() == [w[4] for w in want]
    assert (rows["label"].to_numpy().reshape(-1, 3) == [1, 0, 0]).all()
    for name in ("user", "time", "split"):  # a negative stands after its positive and differs by its item alone
        column = rows[name].cast(pl.String).to_numpy().reshape(-1, 3)
        assert (column == column[:, :1]).all()
    assert (rows["category"] == rows["item"] % 7).all()


def test_events_are_those_of_kept_users_in_order():
    log = make()
    events = prepared(log).tables["events.parquet"]
    counts = Counter(log["who"])
    want = log.filter(pl.col("who").is_in([u for u, n in counts.items() if n >= 12])).sort(
        "who", "at", maintain_order=True
    )
    assert events.columns == ["user", "item", "category", "action", "time"]
    assert events["user"].equals(want["who"], check_names=False) and events["time"].equals(
        want["at"], check_names=False
    )
    assert events["action"].equals(want["did"], check_names=False)
    assert set(counts.values()) & {10, 11, 12, 13} and counts.most_common()[-1][1] < 12


def test_enough_is_enough():
    log = pl.DataFrame({"who": [1] * 8 + [2] * 7, "what": range(15), "at": range(15), "did": "x"})
    rows = prepared(log, Targets(least=8, train=(8,), negatives=0)).tables["rows.parquet"]
    assert rows.select("user", "item").rows() == [(1, 0), (1, 6), (1, 7)] and rows["label"].to_list() == [1, 1, 1]


def test_histories_of_a_run_are_what_was_counted(tmp_path):
    made = prepared(make(spread=60))
    facts = write(made, tmp_path / "out", "toy")
    run = config.load(tmp_path / "out" / "run.toml")
    assert run.data.histories[0].fields == ("item", "category", "action", *BUILT_IN)
    table = Encoded(encode(run.data, tmp_path / "out"))
    lengths = table.batch(np.arange(table.rows)).features["seen"].lengths
    assert lengths.tolist() == made.lengths.tolist()
    assert facts["history"] == {"median": float(np.median(made.lengths)), "max": max(made.lengths)}
    assert facts["rows"]["train"] == 3 * facts["rows"]["test"] == 9 * facts["positives"]["test"] == 9 * facts["users"]
    assert facts["events"] == len(pl.read_parquet(tmp_path / "out" / "events.parquet"))


# ----------------------------------------------------------------------------------------------------------------- ties
def test_ties_stay_or_become_a_nanosecond():
    log = pl.DataFrame({"who": [1] * 6, "what": [5, 4, 3, 2, 1, 0], "at": [9, 7, 9, 7, 9, 9], "did": "x"})
    rule = Targets(least=6, train=(3,), negatives=0)
    made = prepared(log, rule)
    assert made.tables["rows.parquet"]["item"].to_list() == [3, 1, 0]  # in time, file order: 4 2 | 5 3 1 0
    assert made.lengths.tolist() == [2, 2, 2] and made.data.time_unit == "s"
    assert "3 of 3 targets follow an event of the same instant" in made.notes[-1]
    fine = prepared(log, replace(rule, ties="file_order"))
    assert fine.tables["rows.parquet"]["item"].to_list() == [3, 1, 0]
    assert fine.lengths.tolist() == [3, 4, 5] and fine.data.time_unit == "ns"
    assert not any("instant" in note for note in fine.notes)
    second = 10**9
    assert fine.tables["events.parquet"]["time"].to_list() == [
        7 * second,
        7 * second + 1,
        *(9 * second + i for i in range(4)),
    ]


def test_file_order_needs_room():
    frame = pl.DataFrame({"user": [1] * 4 + [2] * 2, "time": [5, 5, 5, 6, 5, 5]})
    with pytest.raises(DataError, match="more events than nanoseconds"):
        unique_times(Ordered(frame), 1e9)
    assert unique_times(Ordered(frame), 1e6)["time"].to_list() == [5000, 5001, 5002, 6000, 5000, 5001]
    with pytest.raises(DataError, match="more events than nanoseconds"):  # 5, 5 + 1 and 6
        unique_times(Ordered(pl.DataFrame({"user": [1] * 3, "time": [5, 5, 6]})), 1e9)
    for far in (-(10**13), 2 * 10**10):
        with pytest.raises(DataError, match="too far from 1970.*time_unit"):
            unique_times(Ordered(pl.DataFrame({"user": [1], "time": [far]})), 1.0)


def test_users_of_one_instant_share_nothing():
    log = pl.DataFrame({"who": [2, 1] * 3, "what": range(6), "at": 7, "did": "x"})
    made = prepared(log, Targets(least=3, train=(3,), negatives=0))
    assert made.lengths.tolist() == [0] * 6 and made.tables["rows.parquet"]["item"].to_list() == [1, 3, 5, 0, 2, 4]


def test_dates_and_other_units(tmp_path):
    day = pl.DataFrame({"who": [1] * 5, "what": range(5), "at": [829, 829, 830, 901, 1111], "did": "x"})
    declared = replace(LOG, time="DATE(CONCAT('2014', RIGHT(CONCAT('0', at), 4)), '%Y%m%d')")
    rule = Targets(least=5, train=(4,), negatives=0, ties="file_order")
    times = prepared(day, rule, declared).tables["events.parquet"]["time"]
    assert np.diff(times.to_numpy()).tolist() == [1, 86400 * 10**9 - 1, 2 * 86400 * 10**9, 71 * 86400 * 10**9]
    assert prepared(day, replace(rule, ties="drop"), declared).data.time_unit == "us"
    assert prepared(day, replace(rule, ties="drop"), replace(LOG, time_unit="ms")).data.time_unit == "ms"


# ------------------------------------------------------------------------------------------------------------ negatives
@pytest.mark.parametrize("reject", ["ever", "before", "none"])
def test_what_is_rejected(reject):
    log = make(users=60, spread=50)
    rows = prepared(log, replace(RULE, reject=reject, negatives=6)).tables["rows.parquet"].filter(pl.col("label") == 0)
    first: dict[tuple, int] = {}
    for who, what, at, _ in log.rows():
        first[who, what] = min(at, first.get((who, what), at))
    touched = [first.get((user, item)) for user, item in rows.select("user", "item").rows()]
    ever = sum(t is not None for t in touched)
    before = sum(t is not None and t <= at for t, at in zip(touched, rows["time"], strict=True))
    at_row = sum(t is not None and t == at for t, at in zip(touched, rows["time"], strict=True))
    if reject == "ever":
        assert ever == 0
    elif reject == "before":
        assert before == 0 and ever > 20
    else:
        assert before > 100 and at_row > 0


def chi_square(found: Counter, law: dict[Any, float]) -> float:
    """Per degree of freedom: 1 when the law holds, give or take sqrt(2 / df)."""
    total = sum(found.values())
    assert set(found) <= set(law)
    return sum((found[k] - total * p) ** 2 / (total * p) for k, p in law.items()) / (len(law) - 1)


def test_items_are_drawn_by_frequency():
    log = make(users=300, items=25)
    counts = Counter(log["what"])
    rules = [replace(RULE, negatives=1, seed=seed, reject="none") for seed in range(8)]
    drawn = pl.concat(prepared(log, rule).tables["rows.parquet"] for rule in rules).filter(pl.col("label") == 0)
    law = {item: n / len(log) for item, n in counts.items()}
    assert len(drawn) > 5000 and chi_square(Counter(drawn["item"]), law) < 1.9  # 24 degrees: five deviations is 2.4
    assert chi_square(Counter(drawn["item"]), dict.fromkeys(law, 1 / len(law))) > 20


def test_rejection_leaves_the_proportions_of_the_rest():
    """Users who touched the most popular items; the others, all dropped for few events, set frequencies."""
    rng = np.random.default_rng(1)
    crowd = pl.DataFrame({"who": range(4000), "what": rng.choice(6, 4000, p=[0.4, 0.25, 0.15, 0.1, 0.06, 0.04])})
    those = pl.DataFrame({"who": np.repeat(np.arange(-600, 0), 12), "what": [0, 1] * 3600})
    log = pl.concat([crowd, those]).with_columns(at=pl.int_range(pl.len()), did=pl.lit("x"))
    drawn = prepared(log, replace(RULE, negatives=1)).tables["rows.parquet"].filter(pl.col("label") == 0)["item"]
    counts = Counter(log["what"])
    rest = {item: counts[item] / sum(counts[i] for i in range(2, 6)) for item in range(2, 6)}
    assert len(drawn) == 5 * 600 and chi_square(Counter(drawn), rest) < 5


def test_a_negative_has_its_own_items_fields_and_seeds_differ():
    log = make().with_columns(pl.col("what").cast(pl.String) + "!")
    declared = replace(LOG, fields={"category": "RIGHT(what, 2)", "action": "did"})
    one = prepared(log, declared=declared).tables["rows.parquet"]
    assert (one["category"] == one["item"].str.tail(2)).all() and "action" not in one.columns
    assert one.equals(prepared(log, declared=declared).tables["rows.parquet"])
    other = prepared(log, replace(RULE, seed=1), declared).tables["rows.parquet"]
    assert (one["label"] == other["label"]).all() and not one["item"].equals(other["item"])


def test_nothing_left_to_draw():
    log = pl.DataFrame({"who": [1] * 12, "what": [0, 1, 2] * 4, "at": range(12), "did": "x"})
    with pytest.raises(DataError, match="10 negatives were rejected 1,000 times.*touched almost every item.*`reject`"):
        prepared(log)
    assert len(prepared(log, replace(RULE, reject="none")).tables["rows.parquet"]) == 15


def test_negatives_of_a_target_are_different_items():
    """Also against the law of drawing one after the other from three items, each from those that are left."""
    rows = prepared(make(items=12), replace(RULE, negatives=5, reject="none")).tables["rows.parquet"]
    drawn = rows.filter(pl.col("label") == 0)["item"].to_numpy().reshape(-1, 5)
    assert all(len(set(row)) == 5 for row in drawn.tolist())
    assert (drawn[1:] != drawn[:-1]).any(1).all(), "targets draw for themselves"
    item, n = np.repeat([0, 1, 2], [6, 3, 1]), 20_000
    pairs = item[draw_negatives(item, None, np.zeros(n, np.int64), np.zeros(n), 2, 0)]
    share = {0: 0.6, 1: 0.3, 2: 0.1}
    law = {(a, b): share[a] * share[b] / (1 - share[a]) for a in share for b in share if a != b}
    assert chi_square(Counter(map(tuple, pairs.tolist())), law) < 4  # 5 degrees: five deviations is 4.2
    touched = Touched(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1), 3)  # nobody may have item 0
    pairs = item[draw_negatives(item, touched, np.zeros(n, np.int64), np.full(n, 9), 2, 0)]
    assert set(map(tuple, np.sort(pairs).tolist())) == {(1, 2)}
    with pytest.raises(DataError, match="fewer items than negatives"):
        draw_negatives(item, None, np.zeros(3, np.int64), np.zeros(3), 4, 0)


def test_touched_is_a_set_with_first_times():
    rng = np.random.default_rng(0)
    user, item = np.sort(rng.integers(0, 40, 900)), rng.integers(0, 25, 900)
    time = np.concatenate([np.sort(rng.integers(0, 99, n)) for n in np.bincount(user, minlength=40)])
    first: dict[tuple, int] = {}
    for u, i, t in zip(user, item, time, strict=True):
        first.setdefault((u, i), t)
    asked = rng.integers(0, 40, 2000), rng.integers(0, 25, 2000), rng.integers(0, 99, 2000)
    want = [first.get((u, i), 1000) <= t for u, i, t in zip(*asked, strict=True)]
    assert Touched(user, item, time, 25).by(*asked).tolist() == want and 200 < sum(want) < 1800
    drawn = draw_negatives(item, None, user[:7], time[:7], 3, 0)
    assert drawn.shape == (7, 3) and drawn.max() > 600


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": ()}, "some for training"),
        ({"train": (3, 2)}, "should be different"),
        ({"valid": 1}, "should be different"),
        ({"test": 0}, "at least 1"),
        ({"least": 6}, "`least` should be at least the farthest place, 7. Found 6"),
        ({"negatives": -1}, "`negatives` and `seed`.*-1, 0"),
        ({"seed": -1}, "`negatives` and `seed`.*2, -1"),
        ({"reject": "always"}, "ever, before or none. Found always"),
        ({"ties": "keep"}, "drop or file_order. Found keep"),
    ],
)
def test_bad_rules(change, words):
    with pytest.raises(ValueError, match=words):
        replace(RULE, **change)


def test_bad_declarations_and_tables():
    with pytest.raises(ValueError, match="names other than user, item.*Found \\['gap', 'time'\\]"):
        replace(LOG, fields={"time": "at", "gap": "at"}, of_item=())
    with pytest.raises(ValueError, match="`of_item`.*\\['category', 'action'\\].*Found \\['brand'\\]"):
        replace(LOG, of_item=("brand",))
    log = make()
    with pytest.raises(DataError, match="No user has 50 events; the most active of 30 users has 39. Lower `least`"):
        prepared(log, replace(RULE, least=50))
    with pytest.raises(DataError, match="Event log `log`: `where` leaves none of its events. Found `at < 0`"):
        prepared(log, declared=replace(LOG, where="at < 0"))
    for empty in (log.clear(), log.clear().cast(pl.String)):  # a CSV without lines has text columns
        with pytest.raises(DataError, match="Event log `log` holds no events"):
            prepared(empty)
    with pytest.raises(DataError, match="Event log `log`: there is no column `waht`"):
        prepared(log, declared=replace(LOG, item="waht"))
    with pytest.raises(DataError, match="time `did` should be an integer, a date or a date-time. Found String"):
        prepared(log, declared=replace(LOG, time="did"))
    floats = log.with_columns(at=pl.when(pl.int_range(pl.len()) >= 3).then("at").otherwise(float("nan")))
    with pytest.raises(DataError, match="time `at` should be an integer.*Found Float64.*`CAST\\(at AS BIGINT\\)`.$"):
        prepared(log.cast({"at": pl.Float64}))
    with pytest.raises(DataError, match=r"BIGINT\)`. 3 are NaN: leave them out with `where`, such as `at < 1e18`"):
        prepared(floats)
    cast = replace(LOG, time="CAST(at AS BIGINT)")
    whole, part = prepared(log.cast({"at": pl.String}), declared=cast), prepared(log)
    assert whole.tables["rows.parquet"].equals(part.tables["rows.parquet"])
    assert prepared(floats, declared=replace(cast, where="at < 1e18")).facts()["users"] > 3
    for name, column in {"user": "who", "item": "what", "time": "at"}.items():
        holed = log.with_columns(pl.when(pl.int_range(pl.len()) >= 3).then(column).alias(column))
        with pytest.raises(DataError, match=f"3 events have no {name}. Leave them out with `where`"):
            prepared(holed)
        assert prepared(holed, declared=replace(LOG, where=f"{column} IS NOT NULL")).facts()["users"] > 3
    with pytest.raises(DataError, match="`did` should hold one value per event. Found List"):
        prepared(log.with_columns(pl.col("did").str.split("i")))


def test_what_looks_wrong_is_said():
    good = make().with_columns(at=pl.col("at") + 1_600_000_000).unique(maintain_order=True)

    def notes(log: pl.DataFrame, declared: EventLog = LOG) -> str:
        return "\n".join(prepared(log, declared=declared).notes)

    assert not any(word in notes(good) for word in ("equal another", "time_unit", "several values"))
    assert f"2 of {len(good) + 2:,} events equal another one in user, item" in notes(pl.concat([good, good[:2]]))
    said = notes(good.with_columns(pl.col("at") * 1000))
    assert "Times reach to 16000" in said and "`time_unit` right? Found s" in said
    assert "Times reach to 2246-" in notes(good.with_columns(pl.col("at") + 7_140_000_000))
    assert "time_unit" not in notes(good.with_columns(pl.col("at") * 1000), replace(LOG, time_unit="ms"))
    assert "Times reach to 1970-01-" in notes(good, replace(LOG, time_unit="ms"))
    changing = good.group_by("what").agg(pl.col("did").n_unique()).filter(pl.col("did") > 1)
    said = notes(good, replace(LOG, of_item=("category", "action")))
    assert f"`action` has several values for {len(changing)} items" in said and "--field action=did" in said
    assert "`category`" not in said and len(changing) > 5


# -------------------------------------------------------------------------------------------------------------- command
def call(*words: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


COLUMNS = (
    "--user",
    "who",
    "--item",
    "what",
    "--time",
    "at",
    "--item-field",
    "category=what % 7",
    "--field",
    "action=did",
)


def test_prepare_train_evaluate(tmp_path):
    make().write_csv(tmp_path / "log.csv")
    out = tmp_path / "made" / "here"
    rule = (
        "--least",
        20,
        "--targets",
        3,
        "--step",
        4,
        "--negatives",
        1,
        "--reject",
        "before",
        "--length",
        9,
        "--seed",
        5,
    )
    done = call("data", "prepare", "events", tmp_path / "log.csv", out, *COLUMNS, *rule, "--ties", "file_order")
    assert done.exit_code == 0, done.output
    want = prepared(make(), Targets(20, (3, 7, 11), negatives=1, reject="before", seed=5, ties="file_order"))
    assert pl.read_parquet(out / "rows.parquet").equals(want.tables["rows.parquet"])
    assert pl.read_parquet(out / "events.parquet").equals(want.tables["events.parquet"])
    facts = want.facts()
    n = facts["users"]
    assert f"users    {n:,}, events {facts['events']:,}" in done.output
    assert f"train {6 * n} ({3 * n} positive), valid {2 * n} ({n} positive), test {2 * n} ({n} positive)" in done.output
    assert f"median {np.median(want.lengths):.0f}, max {want.lengths.max()}" in done.output
    assert "users have fewer than 20 events" in done.output and done.output.endswith(
        f"next     unbraid train {out / 'run.toml'}\n"
    )
    assert config.load(out / "run.toml").data.histories[0].length == 9
    trained = call("train", out / "run.toml", "--steps", 5, "--out", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
    measured = call("evaluate", tmp_path / "run", "--json")
    assert json.loads(measured.output)["test"]["click"]["rows"] == 2 * n


def test_a_folder_in_the_way(tmp_path):
    make().write_parquet(tmp_path / "log.parquet")
    out = tmp_path / "out"
    words = ("data", "prepare", "events", tmp_path / "log.parquet", out, *COLUMNS, "--targets", 2, "--least", 12)
    assert call(*words).exit_code == 0
    (out / "mine.txt").write_text("keep me")
    (out / "items.parquet").write_text("of an earlier prepare")
    again = call(*words)
    assert again.exit_code == 2 and "is not empty" in again.output and "--overwrite" in again.output
    assert (out / "items.parquet").exists()
    done = call(*words, "--overwrite", "--seed", 1, "--json")
    assert done.exit_code == 0 and json.loads(done.output)["rows"]["test"] > 0
    assert {p.name for p in out.iterdir()} == {*FILES, "mine.txt"} - {"items.parquet"}
    before = (out / "rows.parquet").read_bytes()
    assert call(*words, "--overwrite", "--least", 900).exit_code == 2 and (out / "rows.parquet").read_bytes() == before
    own = call("data", "prepare", "events", out / ".." / "out" / "events.parquet", out, "--overwrite", *COLUMNS)
    assert own.exit_code == 2 and "would be overwritten" in own.output and (out / "events.parquet").exists()
    file = call(*words[:4], tmp_path / "log.parquet", *words[5:], "--overwrite")
    assert file.exit_code == 2 and "is a file. Name a folder" in file.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("movilens",), "No such command 'movilens'. Did you mean 'movielens'?"),
        (("events", *COLUMNS, "--threshold", 3), "No such option: --threshold"),
        (("taobao", "--user", "u"), "No such option: --user"),
        (("movielens", "--negatives", 3), "No such option: --negatives"),
        (("events", "--user", "who"), "Missing option '--item'"),
        (("events", *COLUMNS, "--field", "action"), "should look like `category=cat_id`. Found `action`"),
        (("events", *COLUMNS, "--field", "=did"), "should look like"),
        (("events", *COLUMNS, "--field", "x="), "should look like"),
        (("events", *COLUMNS, "--time-unit", "h"), "--time-unit should be s, ms, us or ns. Found h"),
        (("events", *COLUMNS, "--targets", 0), "'--targets': Input should be greater than or equal to 1"),
        (("events", *COLUMNS, "--step", 0), "'--step': Input should be greater than or equal to 1"),
        (("events", *COLUMNS, "--length", 0), "'--length': Input should be greater than or equal to 1"),
        (("events", *COLUMNS, "--where", "nope > 1"), "no column `nope`"),
        (("events", *COLUMNS), "No user has 210 events"),
    ],
)
def test_bad_commands(words, message, tmp_path):
    make().write_csv(tmp_path / "log.csv")
    done = call("data", "prepare", words[0], tmp_path / "log.csv", tmp_path / "out", *words[1:])
    assert done.exit_code == 2 and message in done.output, done.output
    assert not (tmp_path / "out").exists()
