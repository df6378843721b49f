"""What processes exchange: rows of batches, outputs, gradients, ids, errors.  Each test says what one process would have."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from together_kit import together
from torch import Tensor, nn

from unbraid import parallel
from unbraid.data.mix import batches
from unbraid.types import Batch, Lookup, Output, Ragged


def table(rows: np.ndarray) -> Batch:
    """Rows of a log in which what is known of a row is a function of its number."""
    n = torch.from_numpy(np.asarray(rows))
    known = n % 3 == 0
    return Batch(
        features={"x": n.double(), "bag": Ragged({"bag": n}, torch.arange(len(n) + 1))},
        labels={"a": (n % 2).float(), "b": n % 5}, observed={"a": ~known, "b": known}, domain=2 + n % 2,
        weight=n.float() / 7, row=n, view=torch.zeros(len(n), dtype=torch.int8), pair=torch.full((len(n),), -1),
        meta={"user": 10 * n, "time": n.double()},
    )  # fmt: skip


def alike(one: Batch, two: Batch) -> None:
    for name in ("labels", "observed", "meta"):
        a, b = getattr(one, name), getattr(two, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    for name in ("domain", "weight", "row", "view", "pair"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype), name


def jitter(batch: Batch, strong: bool, seed: int) -> Batch:
    return batch


def made(rows: int, hidden: int, views: str) -> Batch:
    numbers = np.random.default_rng(0).permutation(rows)
    given = iter([(numbers[hidden:], numbers[:hidden])])
    view = None if views == "none" else jitter
    return next(batches(given, table, 0, 0, view, "all" if views == "all" else "unlabelled"))


@pytest.mark.parametrize("world", [2, 3])
def test_the_whole_batch_is_that_of_one_process(world: int, tmp_path: Path) -> None:
    cases = [(11, 0, "none"), (11, 4, "none"), (11, 4, "unlabelled"), (11, 4, "all"), (2, 0, "none"), (1, 0, "all")]
    found = together(world, tmp_path, _joined, cases)
    for place, case in enumerate(cases):
        whole = made(*case)
        for each in found:
            alike(each[place].whole, whole)
            assert each[place].whole.features == {}
        assert sum(found[0][place].lengths) == len(whole)
        if min(found[0][place].lengths):
            assert sum(len(each[place]) for each in found) == len(whole), "every row is read once"


def _joined(cases: list[Any]) -> list[Batch]:
    return [parallel.join(made(*case)) for case in cases]


def test_losses_see_all_rows_and_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    for case in [(11, 4, "all"), (11, 0, "none"), (2, 0, "none")]:
        batch = made(*case)
        whole = grads_of(batch, batch.whole)
        for found in together(3, tmp_path, _grads, case):
            assert set(found) == {"weight", "loss"}, "a parameter that no loss reaches has no gradient"
            torch.testing.assert_close(found["weight"], whole["weight"], rtol=0, atol=1e-12)
            assert found["loss"] == pytest.approx(float(whole["loss"]), abs=1e-12)


def loss_of(output: Output, batch: Batch) -> Tensor:
    """A ratio, all pairs of rows, the trunk, hidden vectors, an extra, and one that is not of rows."""
    z = output.logits["a"]
    ratio = (z.square() * batch.weight).sum() / (batch.weight * (2 + z.sin())).sum()  # type: ignore[operator]
    pairs = (z[:, None] - z[None, :]).tanh().square().mean()
    rest = output.trunk.mean() * output.hidden["a"].square().mean() + output.extras["gate"].square().mean()
    return ratio + pairs + rest * output.extras["scale"].sum() + (output.extras["gate"].argmax() == 3)


def grads_of(batch: Batch, whole: Batch) -> dict[str, Tensor]:
    layer = nn.Linear(1, 2).double()
    nn.init.constant_(layer.weight, 0.3)
    nn.init.constant_(layer.bias, 0.1)
    other = nn.Linear(2, 2).double()
    h = layer(batch.features["x"][:, None]).sin()  # type: ignore[index]
    own = Output({"a": h[:, 0], "b": h}, {"a": h}, lambda: h.cos(), {"gate": h[:, 1], "scale": torch.ones(2)})
    output, seen = parallel.said(own, batch, ("scale",))
    assert seen is whole
    loss = loss_of(output, seen)
    loss.backward()
    named = {"weight": layer.weight, "other": other.weight}
    own_grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    found = parallel.total(own_grads, named) if parallel.world() > 1 else own_grads
    return {**found, "loss": loss.detach()}


def _grads(case: Any) -> dict[str, Tensor]:
    batch = parallel.join(made(*case))
    return grads_of(batch, batch.whole)


def test_rows_of_a_table_are_those_that_any_process_read(tmp_path: Path) -> None:
    for found in together(2, tmp_path, _union):
        assert found["a"].tolist() == [1, 3, 4, 9] and found["b"].tolist() == [5] and found["none"].tolist() == []
        assert [(name, ids.tolist()) for name, ids in found["lookups"]] == [("t", [0, 2, 3, 7, 8])]


def _union() -> dict[str, Any]:
    first = parallel.rank() == 0
    ids = {"a": torch.tensor([1, 3] if first else [3, 4, 9]), "b": torch.tensor([5] if first else []).long()}
    read = [torch.tensor([2, 7] if first else [0]), torch.tensor([3, 8])]
    lookups = [(x.table, x.ids) for x in parallel.read_by_any([Lookup("t", each, torch.zeros(1)) for each in read])]
    return {**parallel.union({**ids, "none": torch.zeros(0, dtype=torch.int64)}), "lookups": lookups}


def test_gradients_are_added_in_every_layout_and_type(tmp_path: Path) -> None:
    one, two = together(2, tmp_path, _sums)
    assert set(one) == set(two) == {"both", "one", "half", "image"}
    for name, grad in one.items():
        assert torch.equal(grad, two[name])
    assert (
        one["both"].tolist() == [3.0, 3.0] and one["one"].tolist() == [2.0, 2.0] and one["half"].dtype == torch.float16
    )
    assert one["image"].stride() == torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last).stride()
    assert torch.equal(one["image"], torch.full((2, 3, 4, 4), 3.0))


def _sums() -> dict[str, Tensor]:
    like = {
        "both": torch.zeros(2, dtype=torch.float64), "one": torch.zeros(2), "nobody": torch.zeros(3),
        "half": torch.zeros(2).half(), "image": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }  # fmt: skip
    mine = {name: torch.full_like(value, parallel.rank() + 1.0) for name, value in like.items() if name != "nobody"}
    return parallel.total(
        {name: None if name == "one" and not parallel.rank() else g for name, g in mine.items()}, like
    )


def test_the_first_process_speaks_for_all(tmp_path: Path) -> None:
    one, two = together(2, tmp_path, _first)
    assert one["value"] == two["value"] == 0
    assert one["error"] == "ValueError: no" and two["error"] == "Elsewhere: ValueError: no"
    assert one["turns"] == two["turns"] == "ok"
    assert one["late"] == "Elsewhere: OSError: disk" and two["late"] == "OSError: disk"
    assert (
        one["same"]
        == two["same"]
        == "ValueError: All processes should have the same seed. Process 0 has 0, process 1 has 1."
    )


def _first() -> dict[str, Any]:
    def refuse() -> None:
        raise ValueError("no")

    def late() -> None:
        if parallel.rank():
            raise OSError("disk")

    return {
        "value": parallel.on_first(parallel.rank), "error": _said(lambda: parallel.on_first(refuse)),
        "turns": parallel.one_by_one(lambda: "ok"), "late": _said(lambda: parallel.one_by_one(late)),
        "same": _said(lambda: parallel.require_same("seed", parallel.rank())),
    }  # fmt: skip


def _said(do: Any) -> str:
    try:
        do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_a_shared_batch_refuses(tmp_path: Path) -> None:
    for select, extra in together(2, tmp_path, _refused):
        assert select == "TypeError: A batch that several processes share has no selections. Select before `join`."
        assert extra.startswith("ValueError: What a model says should have one entry for each of ")
        assert extra.endswith(" rows, or be named by `constants`. Found shape (7,).")


def _refused() -> tuple[str, str]:
    batch = parallel.join(made(5, 2, "all"))
    assert batch.to("cpu").whole.row.tolist() == batch.whole.row.tolist()
    z = torch.zeros(len(batch))
    output, _ = parallel.said(Output({"a": z}, {}, z, {"events": torch.zeros(7)}), batch)
    return _said(lambda: batch.select(torch.arange(1))), _said(lambda: output.extras["events"])


def test_processes_that_start_again_do_not_meet_those_that_are_gone() -> None:
    store = dist.HashStore()
    names = []
    for _ in range(3):  # one start after the other, in one store; the first process comes last
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(parallel._meet, store, place, 3) for place in (1, 2)]
            time.sleep(0.1)
            names.append(pool.submit(parallel._meet, store, 0, 3).result(timeout=20))
            assert [each.result(timeout=20) for each in others] == [names[-1]] * 2
    assert len(set(names)) == 3


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert parallel.launched() == 1
    with pytest.raises(ValueError, match=r"There are 2 processes on a machine with 1 GPUs.*`training.device` to `cpu`"):
        with parallel.together("cuda"):
            raise AssertionError("not reached")


def test_one_process_exchanges_nothing() -> None:
    batch = made(5, 2, "all")
    output = Output({"a": torch.zeros(5)}, {}, torch.zeros(0))
    assert parallel.world() == 1 and parallel.rank() == 0
    assert parallel.join(batch) is batch and batch.whole is batch
    assert parallel.said(output, batch) == (output, batch)
    assert parallel.on_first(lambda: 3) == 3 and parallel.gather(4) == [4]
    lookups = [Lookup("t", torch.tensor([1]), torch.zeros(1, 2))]
    assert parallel.read_by_any(lookups) is lookups
    with parallel.together("cpu") as device:
        assert device == "cpu" and parallel.world() == 1
