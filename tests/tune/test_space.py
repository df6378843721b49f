"""What a search varies: what can be written, what it makes of a run, and what is said of mistakes."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toylog import make_run

from unbraid import config, recipes
from unbraid.tune.space import Choices, Range, candidate, check, default, load, parse, present, said, short, text

RUN = make_run()


def keys(plain: Any, run: config.Run = RUN) -> dict[str, Any]:
    return {dimension.key: dimension.plain() for dimension in parse(plain, run)}


def test_quoted_keys_and_tables_in_tables_are_the_same() -> None:
    low = {"low": 1e-4, "high": 1e-2, "log": True}
    want = {"update.lr": low, "model.tables.width": [4, 8]}
    assert keys({"update.lr": low, "model.tables.width": [4, 8]}) == want
    assert keys({"update": {"lr": low}, "model": {"tables": {"width": [4, 8]}}}) == want


def test_a_candidate_has_the_values_and_nothing_else_changes() -> None:
    space = parse({"update.lr": {"low": 0.001, "high": 0.1}, "model.tables.width": [4, 8]}, RUN)
    found = candidate(RUN, space, {"update.lr": 0.05, "model.tables.width": "8"})
    assert config.differences(RUN, found) == ["model.tables.width: 16 / 8", "update.lr: 0.01 / 0.05"]


def test_whole_tables_swap_a_member_with_all_of_its_keys() -> None:
    space = parse({"model.history": [{"kind": "mean"}, {"kind": "din", "softmax": True}]}, RUN)
    found = candidate(RUN, space, {"model.history": space[0].ends()[1]})
    assert (found.model.history.kind, found.model.history.softmax) == ("din", True)  # type: ignore[union-attr]
    assert space[0].own(RUN) == '{"kind": "mean"}', (
        "the choice that changes nothing, although its defaults are not written"
    )


def test_kinds_are_set_before_their_keys_whatever_the_order() -> None:
    plain = {"model.tower.experts": [2, 3], "model.tower.kind": ["mmoe"]}
    for order in (plain, dict(reversed(plain.items()))):
        space = parse(order, RUN)
        found = candidate(RUN, space, {"model.tower.kind": '"mmoe"', "model.tower.experts": "3"}).model.tower
        assert (found.kind, found.experts) == ("mmoe", 3)  # type: ignore[union-attr]
    with pytest.raises(config.RunError, match="unknown key `model.tower.experts`"):
        parse({"model.tower.experts": [2, 3]}, RUN)


def test_items_of_lists_go_by_their_names() -> None:
    space = parse({"data.tasks.buy.weight": {"low": 0.5, "high": 2}}, RUN)
    assert candidate(RUN, space, {"data.tasks.buy.weight": 0.5}).data.tasks[1].weight == 0.5
    assert present(RUN, "data.tasks.buy.weight") == 1.0 and present(RUN, "data.tasks.9.weight") is None


def test_integers_are_drawn_where_the_run_has_one() -> None:
    whole, real = parse({"model.tables.width": {"low": 4, "high": 16}, "update.lr": {"low": 0, "high": 1}}, RUN)
    assert isinstance(whole, Range) and isinstance(real, Range) and (whole.whole, real.whole) == (True, False)
    assert type(whole.ends()[0]) is int and type(real.ends()[0]) is float


@pytest.mark.parametrize(
    ("low", "high", "more", "own"),
    [
        (0.001, 0.1, {}, 0.01), (0.02, 0.1, {}, None), (0.0, 0.1, {"step": 0.01}, 0.01), (0.0, 0.1, {"step": 0.05}, None),
        (0.01, 0.1, {"log": True}, 0.01),
    ],
)  # fmt: skip
def test_the_own_value_is_known_if_the_range_has_it(low: float, high: float, more: dict[str, Any], own: Any) -> None:
    (found,) = parse({"update.lr": {"low": low, "high": high, **more}}, RUN)
    assert found.own(RUN) == own
    grid = found.distribution()
    assert own is None or grid._contains(grid.to_internal_repr(own)), "what is said to be in it can be tried first"


def test_values_that_fit_only_beside_others_are_allowed() -> None:
    # three views of tables belong to a tower that reads as many
    plain = {"model.tables": [{"kind": "shared"}, {"kind": "several", "widths": [4, 8]}],
             "model.interaction.kind": ["flat"]}  # fmt: skip
    assert len(keys(plain)) == 2
    heads = {"model.heads.by": ["task", "domain"], "data.domain": ["site", ""]}
    run = replace(RUN, data=replace(RUN.data, domain=""))
    with pytest.raises(config.RunError, match="needs domains"):
        parse({"model.heads.by": ["domain"]}, run)
    assert len(keys(heads, run)) == 2, "`domain` fits with the domain column"


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({}, "nothing to tune"),
        ({"update.lrr": [0.1]}, "unknown key `update.lrr`. Did you mean `lr`?"),
        ({"updat.lr": [0.1]}, "unknown key `updat`. Did you mean `update`?"),
        ({"update.lr.x": [0.1]}, "`update.lr` is 0.01, which has no keys"),
        ({"data.tasks.bui.weight": [1]}, "`bui` is not one of ['click', 'buy']"),
        ({"update.lr": 0.1}, "`tune.update.lr` should be a list of choices or a range"),
        ({"update.lr": []}, "`tune.update.lr` should be a list of different values"),
        ({"update.lr": [0.1, 0.1]}, "`tune.update.lr` should be a list of different values"),
        ({"update.lr": {"low": 1, "hihg": 2}}, "unknown key `tune.update.lr.hihg`. Did you mean `high`?"),
        ({"update.lr": {"low": 1}}, "should have numbers `low` and `high`"),
        ({"update.lr": {"low": 1, "high": True}}, "should have numbers `low` and `high`"),
        ({"update.lr": {"low": 2, "high": 1}}, "`low` should be below `high`. Found 2 and 1"),
        ({"update.lr": {"low": 0, "high": 1, "log": True}}, "`log` needs `low` above 0"),
        ({"update.lr": {"low": 0, "high": 1, "step": 0.3}}, "lead from `low` to `high`"),
        ({"update.lr": {"low": -1, "high": 1}}, "`lr` should be finite and not negative. Found -1.0"),
        ({"model.tables.width": {"low": 4.5, "high": 8}}, "`model.tables.width`"),
        ({"model.tower.kind": ["mmoe", "mmoee"]}, "has no kind `mmoee`. Did you mean `mmoe`?"),
        ({"update.lr": [0.1], "update": {"lr": [0.2]}}, "Found twice: update.lr"),
    ],
)  # fmt: skip
def test_mistakes_are_named(plain: Any, message: str) -> None:
    with pytest.raises(config.RunError) as error:
        parse(plain, RUN)
    assert message in str(error.value)


def test_the_table_of_a_run_file_and_a_file_of_its_own(tmp_path: Path) -> None:
    whole, own, none = (tmp_path / f"{name}.toml" for name in ("run", "space", "none"))
    table = '"update.lr" = [0.1, 0.2]\n'
    whole.write_text(f"{config.dumps(RUN)}\n[tune]\n{table}")
    own.write_text(table)
    none.write_text(config.dumps(RUN))
    assert load(whole, RUN) == load(own, RUN) == (Choices("update.lr", ("0.1", "0.2")),)
    assert load(none, RUN) is None
    assert config.dumps(config.load(whole)) == config.dumps(config.load(none)), "a run does not see the table"
    with pytest.raises(config.RunError, match="There is no file"):
        load(tmp_path / "nothing.toml", RUN)
    own.write_text("lr = = 1")
    with pytest.raises(config.RunError, match="is not TOML"):
        load(own, RUN)


@pytest.mark.parametrize("name", ["stem", "shared_bottom", "tencent"])
def test_the_default_space_is_around_the_run(name: str) -> None:
    run = recipes.get(name)
    space = default(run)
    check(run, space)
    assert space and all(dimension.own(run) is not None for dimension in space), (
        "so that the run itself is the first trial"
    )
    assert space[0].key == "update.lr" and space[0].plain()["low"] == pytest.approx(run.update.lr / 10)  # type: ignore[call-overload]


def test_words() -> None:
    assert short(["update.lr", "model.tower.kind", "a.width", "b.width"]) == {
        "update.lr": "lr", "model.tower.kind": "tower.kind", "a.width": "a.width", "b.width": "b.width",
    }  # fmt: skip
    assert text({"kind": "din", "softmax": True, "x": [1, 0.25]}) == "din softmax=true x=[1, 0.25]"
    space = parse({"update.lr": {"low": 0.001, "high": 0.1}, "model.history": [{"kind": "mean"}]}, RUN)
    assert said({"update.lr": 0.012345, "model.history": '{"kind": "mean"}'}, space) == "lr 0.0123, history mean"


def test_the_pages_space_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
    blocks = re.findall(r"^```toml\n(.*?)^```", page, re.M | re.S)
    assert blocks
    for block in blocks:
        assert len(parse(tomllib.loads(block)["tune"], RUN)) >= 3
