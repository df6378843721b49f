"""Convex combinations of states: exact where branches agree, by row, by who trained what."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from unbraid import sharding
from unbraid.schedules.merging import Branches, combine, combine_states, same

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_combination_is_the_weighted_mean_and_exact_where_parts_agree(dtype: torch.dtype) -> None:
    for seed in range(20):
        parts = [draw(3 * seed + b, 40, 3, dtype=dtype) for b in range(3)]
        for b in (1, 2):
            parts[b][:20] = parts[0][:20]
        shares = np.random.default_rng(seed).dirichlet(np.ones(3)) * 7.0
        found = combine(parts, shares.tolist())
        want = sum(s / shares.sum() * p.double() for s, p in zip(shares, parts, strict=True))
        assert found.dtype == dtype and torch.equal(found[:20], parts[0][:20])
        assert (found.double() - want).abs().max() <= torch.finfo(dtype).eps * 4
        for b in range(3):
            assert torch.equal(combine(parts, [float(b == c) * 0.3 for c in range(3)]), parts[b])
    assert combine([1.0, 2.0], [1.0, 3.0]) == pytest.approx(1.75, abs=1e-15)


def test_a_part_of_share_zero_is_not_read() -> None:
    broken = torch.full((3,), torch.nan)
    assert torch.equal(combine([torch.ones(3), broken], [1.0, 0.0]), torch.ones(3))


def merged(fork: dict[str, Any], branches: list[dict[str, Any]], shares: list[float], **options: Any) -> dict[str, Any]:
    held = Branches(fork, **options)
    for branch in branches:
        held.add(branch)
    live = {name: value.clone() for name, value in fork.items()}
    for other in itertools.permutations([1.0, *[0.0] * (len(shares) - 1)]):
        held.write(live, other)  # what an earlier write left must not matter
    held.write(live, shares)
    return live


def test_only_rows_that_some_branch_moved_are_written() -> None:
    fork = {"table": draw(0, 1000, 4).float(), "few": draw(1, 3, 2), "scalar": torch.tensor(1.5)}
    one, two = ({k: v.clone() for k, v in fork.items()} for _ in range(2))
    one["table"][[3, 500]] += 1.0
    two["table"][[500, 999]] -= 2.0
    one["few"] += 1.0
    two["few"][0] += 3.0
    two["scalar"] += 4.0
    held = Branches(fork)
    held.add(one)
    held.add(two)
    ids, values, _ = held.parts["table"]
    assert ids is not None and ids.tolist() == [3, 500, 999] and all(v.shape == (3, 4) for v in values)
    found = merged(fork, [one, two], [0.7, 0.3])
    untouched = torch.ones(1000, dtype=torch.bool)
    untouched[[3, 500, 999]] = False
    assert torch.equal(found["table"][untouched], fork["table"][untouched])
    near = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found["table"][3], fork["table"][3] + 0.7, **near)
    torch.testing.assert_close(found["table"][500], fork["table"][500] + 0.7 - 0.6, **near)
    torch.testing.assert_close(found["table"][999], fork["table"][999] - 0.6, **near)
    torch.testing.assert_close(found["few"], 0.7 * one["few"] + 0.3 * two["few"])
    assert float(found["scalar"]) == 5.5, "only the second branch moved it"
    assert merged(fork, [one, two], [0.7, 0.3], everywhere=True)["scalar"] == pytest.approx(1.5 + 0.3 * 4)


def test_a_tensor_is_a_mean_over_the_branches_that_moved_it() -> None:
    fork = {"trunk": draw(0, 5), "head": draw(1, 5), "nobody": draw(2, 5)}
    branches = [{k: v.clone() for k, v in fork.items()} for _ in range(3)]
    for seed, branch in enumerate(branches):
        branch["trunk"] += draw(10 + seed, 5)
    branches[1]["head"] += 1.0
    branches[2]["head"] -= 3.0
    found = merged(fork, branches, [0.5, 0.1, 0.4])
    torch.testing.assert_close(
        found["trunk"], sum(w * b["trunk"] for w, b in zip([0.5, 0.1, 0.4], branches, strict=True))
    )
    torch.testing.assert_close(found["head"], 0.2 * branches[1]["head"] + 0.8 * branches[2]["head"])
    assert torch.equal(found["nobody"], fork["nobody"])
    alone = merged(fork, branches, [1.0, 0.0, 0.0])
    assert torch.equal(alone["trunk"], branches[0]["trunk"])
    assert torch.equal(alone["head"], fork["head"]), "who trained it has no share"
    only = merged(fork, branches, [0.0, 1.0, 0.0])
    assert all(torch.equal(only[name], branches[1][name]) for name in fork)
    everywhere = merged(fork, branches, [1.0, 0.0, 0.0], everywhere=True)
    assert torch.equal(everywhere["head"], fork["head"])


def test_whole_numbers_are_the_heaviest_branchs_and_keep_their_type() -> None:
    fork = {"count": torch.tensor(3), "mask": torch.tensor([True, False]), "mean": torch.zeros(2)}
    branches = [{"count": torch.tensor(3 + b), "mask": torch.tensor([b == 0, True]), "mean": torch.full((2,), float(b))}
                for b in range(3)]  # fmt: skip
    found = merged(fork, branches, [0.2, 0.5, 0.3])
    assert int(found["count"]) == 4 and found["count"].dtype == torch.int64
    assert found["mask"].tolist() == [False, True] and found["mask"].dtype == torch.bool
    torch.testing.assert_close(found["mean"], torch.full((2,), (0.5 + 0.6) / 0.8))


def test_nothing_is_shared_between_branches_fork_and_result() -> None:
    fork = {"w": draw(0, 4)}
    branches = [{"w": draw(b, 4)} for b in (1, 2)]
    kept = [fork["w"].clone(), *(b["w"].clone() for b in branches)]
    for shares in ([1.0, 0.0], [0.5, 0.5]):
        found = merged(fork, branches, shares)
        found["w"].fill_(9.0)
        assert all(torch.equal(a, b) for a, b in zip(kept, [fork["w"], *(b["w"] for b in branches)], strict=True))


# --------------------------------------------------------------------------------------------------- optimisers' states
def adam(seed: int, step: int, rows: tuple[int, ...] = ()) -> dict[str, Any]:
    mean = torch.zeros(50, 2)
    mean[list(rows)] = draw(seed, len(rows), 2).float()
    last = torch.full((50,), -0.1 * step, dtype=torch.float64)
    return {
        "kind": "joint", "step": step,
        "dense": {"w": {"step": torch.tensor(float(step)), "exp_avg": draw(seed, 3), "exp_avg_sq": draw(seed, 3) ** 2}},
        "rows": {"t": {"step": step, "clock": -0.1 * step, "mean": mean, "last": last}},
    }  # fmt: skip


def test_states_are_combined_and_counters_take_the_largest() -> None:
    one, two = adam(1, 5, (1, 7)), adam(2, 8, (7, 9))
    found = combine_states(None, [one, two], [0.25, 0.75])
    assert found["kind"] == "joint" and found["step"] == 8 and float(found["dense"]["w"]["step"]) == 8.0
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            found["dense"]["w"][key], 0.25 * one["dense"]["w"][key] + 0.75 * two["dense"]["w"][key]
        )
    rows = found["rows"]["t"]
    assert rows["step"] == 8 and rows["clock"] == pytest.approx(0.25 * -0.5 + 0.75 * -0.8, abs=1e-15)
    assert (rows["last"] == rows["clock"]).all(), "no row owes any decay"
    torch.testing.assert_close(rows["mean"][1], 0.25 * one["rows"]["t"]["mean"][1])
    torch.testing.assert_close(rows["mean"][7], 0.25 * one["rows"]["t"]["mean"][7] + 0.75 * two["rows"]["t"]["mean"][7])
    assert not rows["mean"][[0, *range(10, 50)]].any()
    found["dense"]["w"]["exp_avg"].fill_(0.0)
    assert one["dense"]["w"]["exp_avg"].any() and two["dense"]["w"]["exp_avg"].any()


def test_state_of_a_parameter_is_a_mean_over_the_branches_that_changed_it() -> None:
    fork = adam(0, 3, (4,))
    one, two = adam(0, 3, (4,)), adam(2, 6, (4, 5))
    one["step"] = 6
    one["dense"]["w"]["step"] = torch.tensor(3.0)  # a head that this branch does not train
    one["dense"]["head"] = {"step": torch.tensor(6.0), "exp_avg": draw(9, 2)}  # the other one has never had it
    found = combine_states(fork, [one, two], [0.9, 0.1])
    assert same(found["dense"]["w"], two["dense"]["w"]) and same(found["rows"]["t"], two["rows"]["t"])
    assert same(found["dense"]["head"], one["dense"]["head"])
    none = combine_states(fork, [adam(0, 3, (4,)), adam(0, 3, (4,))], [0.9, 0.1])
    assert same(none, fork)
    both = combine_states(fork, [one, two], [0.9, 0.1], everywhere=True)
    want = 0.9 * one["dense"]["w"]["exp_avg"] + 0.1 * two["dense"]["w"]["exp_avg"]
    torch.testing.assert_close(both["dense"]["w"]["exp_avg"], want)


def test_state_per_task_is_combined_per_task() -> None:
    def of(tasks: dict[str, int], reached: list[str]) -> dict[str, Any]:
        each = {name: {"dense": {"w": {"step": n, "square": draw(n, 3)}}, "rows": {}} for name, n in tasks.items()}
        return {"kind": "adatask", "step": 9, "reached": {"w": reached}, "tasks": each}

    one, two = of({"click": 4}, ["click"]), of({"click": 5, "like": 6}, ["click", "like"])
    found = combine_states(None, [one, two], [0.5, 0.5])
    assert found["reached"] == {"w": ["click", "like"]}
    click, like = (found["tasks"][name]["dense"]["w"] for name in ("click", "like"))
    assert click["step"] == 5 and like["step"] == 6
    torch.testing.assert_close(click["square"], 0.5 * draw(4, 3) + 0.5 * draw(5, 3))
    assert torch.equal(like["square"], draw(6, 3)), "only one branch has it"


def test_a_branch_of_share_zero_gives_no_state() -> None:
    one, two = adam(1, 5), adam(2, 8)
    two["dense"]["head"] = {"exp_avg": draw(3, 2)}
    assert same(combine_states(adam(0, 3), [one, two], [1.0, 0.0]), one)


def test_states_of_different_updates_are_refused() -> None:
    with pytest.raises(ValueError, match="should agree in `kind`. Found .'adatask', 'joint'"):
        combine_states(None, [{"kind": "joint"}, {"kind": "adatask"}], [0.5, 0.5])
    assert combine_states(None, [{"a": [1.0, 2], "n": None}, {"a": [3.0, 1], "n": None}], [0.5, 0.5]) == {
        "a": [2.0, 2],
        "n": None,
    }


def test_what_a_branch_moved_on_another_process_it_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a divided table, this process has rows that the first branch left alone; elsewhere it moved some."""
    fork = {"rows": torch.zeros(3, 1), "layer": torch.zeros(2)}
    for anywhere, expected in ((False, 1.0), (True, 0.5)):
        monkeypatch.setattr(sharding, "any_of", lambda flags, more=anywhere: [flag or more for flag in flags])
        branches = Branches(fork, divided=["rows"])
        branches.add(fork)
        branches.add({"rows": torch.tensor([[1.0], [0.0], [0.0]]), "layer": torch.ones(2)})
        live = {name: value.clone() for name, value in fork.items()}
        branches.write(live, (0.5, 0.5))
        assert live["rows"].flatten().tolist() == [expected, 0.0, 0.0] and live["layer"].tolist() == [1.0, 1.0]
