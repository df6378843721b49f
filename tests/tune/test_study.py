"""The study on disk: what is drawn, what is kept, what becomes of trials that were killed, when one is pruned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from unbraid.job import JobError
from unbraid.tune.space import Choices, Drawn, Range, Space
from unbraid.tune.study import FILE, Study, alone
from unbraid.tune.trial import Outcome

pytest.importorskip("optuna")

SPACE: Space = (Range("x", 0.0, 1.0), Choices("kind", ('"a"', '"b"')))
ABOUT = {"space": "this", "seeds": 1}


@contextlib.contextmanager
def study(folder: Path, about: Mapping[str, Any] = ABOUT, **more: Any) -> Iterator[Study]:
    with contextlib.closing(Study(folder, SPACE, about, **{"falls": False, "seed": 3, **more})) as found:
        yield found


def goodness(drawn: Mapping[str, Drawn]) -> float:
    return float(drawn["x"]) - (drawn["kind"] == '"b"')


def go(one: Study, count: int) -> list[Any]:
    """Trials to their end; what they tried."""
    tried = []
    for _ in range(count):
        number, drawn = one.ask()
        one.tell(number, Outcome("complete", (goodness(drawn),)))
        tried.append(drawn)
    return tried


def test_equal_seeds_draw_equal_trials(tmp_path: Path) -> None:
    found = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        with study(tmp_path / name, seed=seed) as one:
            found[name] = go(one, 13)
    assert found["a"] == found["b"] != found["c"]
    assert len({drawn["x"] for drawn in found["a"]}) == 13, "each draw has a seed of its own"
    late = [goodness(drawn) for drawn in found["a"][10:]]
    early = [goodness(drawn) for drawn in found["a"][:10]]
    assert sum(late) / len(late) > sum(early) / len(early), "what was found is made use of"


@pytest.mark.parametrize("killed", [0, 11])
def test_a_killed_trial_is_tried_again_and_nothing_else_is_lost(tmp_path: Path, killed: int) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    with study(tmp_path / "whole", first={"x": 0.5, "kind": '"a"'}) as one:
        want = go(one, 12)
        assert want[0] == {"x": 0.5, "kind": '"a"'}, "what is to be tried first is"
    with study(tmp_path / "killed", first={"x": 0.5, "kind": '"a"'}) as one:
        got = go(one, killed)
        _, lost = one.ask()  # and the process is gone
    with study(tmp_path / "killed", first={"x": 0.5, "kind": '"a"'}) as one:
        assert len(one.ended) == killed and not one.running
        got += go(one, 12 - killed)
        assert [line["as_it_is"] for line in one.table()] == [True] + [False] * 11
        assert got[killed] == lost and got == want, "as if nobody had killed it"
        assert one.best is not None and one.best.value == max(map(goodness, want))


def test_best_is_the_least_where_lower_is_better_and_failed_ones_never_are(tmp_path: Path) -> None:
    with study(tmp_path, falls=True) as one:
        assert one.best is None
        for state, values in (
            ("failed", ()),
            ("complete", (0.3, 0.5)),
            ("complete", (0.2,)),
            ("pruned", ()),
            ("complete", (0.9,)),
        ):
            number, _ = one.ask()
            one.tell(number, Outcome(state, values, 1.5, (0.1,), "why" if state == "failed" else ""))
        assert one.best is not None and (one.best.number, one.best.value) == (2, 0.2)
        table = one.table()
        assert [line["value"] for line in table] == [None, 0.4, 0.2, None, 0.9], "several seeds: their mean"
        assert table[0]["error"] == "why" and table[1]["seconds"] == 1.5 and table[1]["looks"] == [0.1]
        assert set(table[1]["params"]) == {"x", "kind"} and table[1]["params"]["kind"] in ("a", "b")
        twin = one.twin(table[1]["drawn"])
        assert twin is not None and twin.number == 1 and one.twin(table[0]["drawn"]) is None


@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_a_bad_trial_is_pruned_and_a_good_one_is_not(tmp_path: Path, pruner: str) -> None:
    with study(tmp_path, pruner=pruner) as one:
        for level in (0.71, 0.72, 0.73, 0.74, 0.75):
            number, _ = one.ask()
            for look in range(1, 5):
                if one.prune(number, look, level + look / 1000):
                    break
            one.tell(number, Outcome("complete", (level,)))
        stopped = {}
        for level in (0.2, 0.9):
            number, _ = one.ask()
            looks = (look for look in range(1, 5) if one.prune(number, look, level))
            stopped[level] = next(looks, None)
            one.tell(number, Outcome("pruned"))
        assert stopped[0.9] is None
        if pruner == "median":
            assert stopped[0.2] == 2, "never at the first look, which favours whoever starts fast"
        else:
            assert (stopped[0.2] is None) == (pruner == "none")


def test_importances_need_enough_trials_and_find_what_matters(tmp_path: Path) -> None:
    with study(tmp_path, falls=True) as one:
        for count in range(20):
            assert one.importances() == {} or count >= 10
            number, drawn = one.ask()
            one.tell(number, Outcome("complete", (abs(float(drawn["x"]) - 0.3),)))  # the kind is of no matter
        found = one.importances()
    assert sum(found.values()) == pytest.approx(1) and list(found)[0] == "x" and found["x"] > 0.7


def test_another_search_is_refused_with_what_differs(tmp_path: Path) -> None:
    with study(tmp_path) as one:
        go(one, 1)
    with pytest.raises(JobError, match="of another search: seeds not the same"), study(tmp_path, {**ABOUT, "seeds": 2}):
        pass
    (tmp_path / FILE).write_bytes(b"no database at all, but some text that is longer than a header" * 100)
    with pytest.raises(JobError, match="cannot be read as a study"), study(tmp_path):
        pass


def test_a_folder_has_one_search_at_a_time(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(JobError, match="Another `unbraid tune`"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
