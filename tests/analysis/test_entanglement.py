"""Entanglement: parity with a loop in Python, tables whose answer is known, which rows count, planted tastes, the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unbraid.analysis import entanglement
from unbraid.analysis.entanglement import Entanglement, Frequent
from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.planted import opposed_tastes
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.interactions.inner_product import InnerProduct
from unbraid.job import train
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.single_task import SingleTask
from unbraid.towers.stem import STEM
from unbraid.train import Training
from unbraid.types import Batch, Feature, Schema, Task

PROBE = Entanglement("a", "b", replicates=100)
SCHEMA = Schema(
    (Feature("user"), Feature("item"), Feature("shop"), Feature("price", kind="number")), (Task("a"), Task("b")),
    sizes={"user": 32, "item": 27, "shop": 5}, numbers={"price": (0.0, 1.0)},
)  # fmt: skip
TOWERS: dict[str, Any] = {
    "separate": SingleTask((4,), ()),
    "shared": SharedBottom((4,), ()),
    "per_task": STEM(expert=(4,)),
}


def model_of(kind: str, seed: int = 0, schema: Schema = SCHEMA, width: int = 3) -> Model:
    torch.manual_seed(seed)
    return Model(schema, TOWERS[kind], Views(kind=kind, width=width, std=1.0)).double()  # type: ignore[arg-type]


def batch_of(user: Any, item: Any, view: Any = None) -> Batch:
    n = len(user)
    known = torch.ones(n, dtype=torch.bool)
    return Batch(
        features={"user": torch.as_tensor(user), "item": torch.as_tensor(item), "shop": torch.full((n,), 2),
                  "price": torch.zeros(n, 2)},
        labels={t: torch.full((n,), torch.nan) for t in "ab"}, observed={t: known for t in "ab"},
        domain=torch.full((n,), 2), weight=None, row=torch.arange(n),
        view=torch.zeros(n, dtype=torch.int8) if view is None else torch.as_tensor(view), pair=torch.full((n,), -1),
    )  # fmt: skip


def drawn(rows: int, seed: int) -> list[Batch]:
    """Batches in which large codes are frequent; codes 0 and 1 are nobody."""
    rng = np.random.default_rng(seed)
    user, item = (np.floor(size * np.sqrt(rng.random(rows))).astype(np.int64) for size in (32, 27))
    view = (rng.random(rows) < 0.1).astype(np.int8)
    return [batch_of(user[at : at + 97], item[at : at + 97], view[at : at + 97]) for at in range(0, rows, 97)]


TRAIN, HELD_OUT = drawn(1500, 0), drawn(900, 1)


def set_tables(model: Model, view: str, user: torch.Tensor, item: torch.Tensor) -> None:
    for name, vectors in (("user", user), ("item", item)):
        model.tables[f"{view}/{name}/value"].weight.data.copy_(vectors)


# -------------------------------------------------------------------------------------------------------------- which rows
def test_frequent_users_and_items_by_a_loop() -> None:
    found = PROBE.count(SCHEMA, TRAIN)
    for name, codes in (("user", found.users), ("item", found.items)):
        counts: dict[int, int] = {}
        for batch in TRAIN:
            for code, view in zip(batch.features[name].tolist(), batch.view.tolist(), strict=True):  # type: ignore[union-attr]
                if code >= 2 and view == 0:
                    counts[code] = counts.get(code, 0) + 1
        ordered = sorted(counts.values())
        place = 0.6 * (len(ordered) - 1)
        below = int(place)
        cut = ordered[below] + (place - below) * (ordered[below + 1] - ordered[below])
        assert codes.tolist() == sorted(code for code, count in counts.items() if count > cut)
    everyone = replace(PROBE, frequent=0.0).count(SCHEMA, TRAIN)
    assert len(found.users) < 0.5 * len(everyone.users)
    one = Batch.join([batch_of([5, 5, 0, 1], [3, 4, 4, 4])])
    few = replace(PROBE, frequent=0.5).count(SCHEMA, [one])
    assert few.items.tolist() == [4], "items of rows without a user are read, too"
    assert few.users.tolist() == [], "the only user is not read more often than half of all"


def test_which_rows_count() -> None:
    frequent = Frequent(np.array([4, 7]), np.array([3, 9]))
    rows = batch_of([4, 7, 4, 5, 7, 4], [3, 9, 9, 3, 2, 3], [0, 0, 0, 0, 0, 1])
    values = PROBE(frequent, {"alone": model_of("separate")}, SCHEMA, [rows], against="alone").values
    assert values["pairs"] == 3 and values["left_out"] == 2, "the strong view is no row"
    assert values["tables"]["alone/a"]["counts"].sum() == 3


# ------------------------------------------------------------------------------------------------------------------ parity
def reference(models: dict[str, Model], views: dict[str, tuple[str, str]], keep: Frequent) -> dict[Any, Any]:
    """Everything by loops over pairs, in Python floats."""
    pairs = [
        (u, i)
        for batch in HELD_OUT
        for u, i, v in zip(batch.features["user"].tolist(), batch.features["item"].tolist(), batch.view.tolist(), strict=True)  # type: ignore[union-attr]
        if v == 0 and u in keep.users.tolist() and i in keep.items.tolist()
    ]  # fmt: skip

    def distances(model: Model, view: str) -> list[float]:
        user, item = (model.tables[f"{view}/{name}/value"].weight.tolist() for name in ("user", "item"))
        return [sum((x - y) ** 2 for x, y in zip(user[u], item[i], strict=True)) ** 0.5 for u, i in pairs]

    def quantile(values: list[float], share: float) -> float:
        ordered, place = sorted(values), share * (len(values) - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    def ranks(values: list[float]) -> list[float]:
        return [(sum(o < v for o in values) + (sum(o == v for o in values)) / 2) / len(values) for v in values]

    a, b = distances(models["alone"], "a"), distances(models["alone"], "b")
    n = len(pairs)
    sets = [
        [j for j in range(n) if one[j] > quantile(one, 0.6) and two[j] <= quantile(two, 0.4)]
        for one, two in ((a, b), (b, a))
    ]
    found: dict[Any, Any] = {"sizes": [len(s) for s in sets], "pairs": n}
    for name, model in models.items():
        first, second = (ranks(distances(model, view)) for view in views[name])
        gaps = [sum(first[j] - second[j] for j in mine) for mine in sets]
        found[name] = 1 - sum(map(abs, gaps)) / sum(map(len, sets))
        found[name, "by_set"] = [1 - abs(gap) / len(mine) for gap, mine in zip(gaps, sets, strict=True)]
        found[name, "rank"] = [[sum(r[j] for j in mine) / len(mine) for mine in sets] for r in (first, second)]
    return found


def test_parity_with_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entanglement, "CHUNK", 50)
    models = {"alone": model_of("separate", 1), "shared": model_of("shared", 2), "stem": model_of("per_task", 3)}
    views = {"alone": ("a", "b"), "shared": ("shared", "shared"), "stem": ("a", "b")}
    keep = PROBE.count(SCHEMA, TRAIN)
    values = PROBE(keep, models, SCHEMA, HELD_OUT, against="alone").values
    want = reference(models, views, keep)
    assert (
        values["pairs"] == want["pairs"] > 100 and values["sizes"].tolist() == want["sizes"] and min(want["sizes"]) > 5
    )
    for name, (first, second) in views.items():
        of = values["models"][name]
        assert of["views"] == (first, second)
        assert of["entanglement"] == pytest.approx(want[name], abs=1e-10)
        assert of["by_set"] == pytest.approx(want[name, "by_set"], abs=1e-10)
        for view, rank in zip((first, second), want[name, "rank"], strict=True):
            assert values["tables"][f"{name}/{view}"]["rank"] == pytest.approx(rank, abs=1e-10)
    assert list(values["tables"]) == ["alone/a", "alone/b", "shared/shared", "stem/a", "stem/b", "stem/shared"]
    assert values["sets"] == ("a far, b near", "b far, a near")


# ------------------------------------------------------------------------------------------------------------- known cases
def test_tables_whose_answer_is_known() -> None:
    keep = Frequent(np.arange(2, 32), np.arange(2, 27))
    shared, alone, stem = model_of("shared", 4), model_of("separate", 5), model_of("per_task", 6)
    for view in ("a", "b"):  # STEM's tables are the single-task ones, but for scale, a turn and a shift
        turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
        set_tables(
            stem, view, *(7 * alone.tables[f"{view}/{n}/value"].weight.data @ turn + 1 for n in ("user", "item"))
        )
    values = PROBE(keep, {"alone": alone, "shared": shared, "stem": stem}, SCHEMA, HELD_OUT, against="alone").values
    of = values["models"]
    assert of["shared"]["entanglement"] == of["shared"]["low"] == of["shared"]["high"] == 1, "one table, one distance"
    assert of["stem"]["entanglement"] == pytest.approx(of["alone"]["entanglement"], abs=1e-9)
    assert of["stem"]["agreement"] == pytest.approx([1, 1]) and abs(of["shared"]["agreement"]).max() < 0.6
    assert (
        0.3 < of["alone"]["entanglement"] < 0.5
        and of["alone"]["low"] < of["alone"]["entanglement"] < of["alone"]["high"]
    )
    for view in ("a", "b"):
        set_tables(stem, view, *(alone.tables[f"a/{name}/value"].weight.data for name in ("user", "item")))
    again = PROBE(keep, {"alone": alone, "stem": stem}, SCHEMA, HELD_OUT, against="alone").values["models"]["stem"]
    assert again["entanglement"] == 1 and again["agreement"][0] == pytest.approx(1), "two tables that are the same"


def test_opposed_distances_end_near_zero_and_equal_ones_have_no_conflict() -> None:
    """On a line: user at 0 and items at the ends of the scale for one task, at the other end for the other."""
    alone = model_of("separate", width=1)
    item = torch.linspace(1, 2, 27, dtype=torch.float64).unsqueeze(1)
    item[2], item[3] = 100.0, 0.1  # item 2 is the farthest of a, and item 3 the nearest
    swapped = item.clone()
    swapped[2], swapped[3] = 0.1, 100.0  # for b it is the other way round, and all else is the same
    nothing = torch.zeros(32, 1, dtype=torch.float64)
    set_tables(alone, "a", nothing, item)
    set_tables(alone, "b", nothing, swapped)
    rows = batch_of(torch.arange(900) % 30 + 2, torch.arange(900) % 25 + 2)
    keep = Frequent(np.arange(2, 32), np.arange(2, 27))
    values = PROBE(keep, {"alone": alone}, SCHEMA, [rows], against="alone").values
    assert values["sizes"].tolist() == [36, 36]
    assert values["models"]["alone"]["entanglement"] == pytest.approx(1 / 25, abs=1e-12)  # ranks (24.5, 0.5) / 25
    assert values["tables"]["alone/a"]["rank"] == pytest.approx([24.5 / 25, 0.5 / 25])
    set_tables(alone, "b", nothing, item)
    finding = PROBE(keep, {"alone": alone}, SCHEMA, [rows], against="alone")
    assert np.isnan(finding.values["models"]["alone"]["entanglement"]) and "No pair is in conflict" in finding.reading
    assert finding.values["sizes"].tolist() == [0, 0] and entanglement.plot(finding) is not None


def test_the_ends_of_the_quantiles() -> None:
    """Of six distances the third is the 40 % quantile, still near, and the fourth the 60 % quantile, not yet far."""
    alone, zero = model_of("separate", width=1), torch.zeros(32, 1, dtype=torch.float64)
    for view, distances in (("a", [1.0, 2, 3, 4, 5, 6]), ("b", [2.0, 4, 5, 1, 3, 6])):
        item = torch.zeros(27, 1, dtype=torch.float64)
        item[2:8, 0] = torch.tensor(distances)
        set_tables(alone, view, zero, item)
    rows = batch_of([2] * 6, list(range(2, 8)))
    keep = Frequent(np.array([2]), np.arange(2, 8))
    values = PROBE(keep, {"alone": alone}, SCHEMA, [rows], against="alone").values
    assert values["sizes"].tolist() == [1, 1], "5 of a with 3 of b; 5 of b with 3 of a"
    assert values["tables"]["alone/a"]["rank"] == pytest.approx([4.5 / 6, 2.5 / 6])


def test_histograms_hold_every_pair() -> None:
    keep = PROBE.count(SCHEMA, TRAIN)
    values = PROBE(keep, {"alone": model_of("separate")}, SCHEMA, HELD_OUT, against="alone").values
    for table in values["tables"].values():
        assert table["edges"].shape == (40,) and table["conflict"].shape == (2, 39)
        assert table["counts"].sum() == values["pairs"] and (table["conflict"].sum(1) == values["sizes"]).all()
        assert (table["conflict"].sum(0) <= table["counts"]).all()
    first = values["tables"]["alone/a"]
    middle = (first["edges"][1:] + first["edges"][:-1]) / 2
    means = first["conflict"] @ middle / first["conflict"].sum(1)
    assert means[0] > first["counts"] @ middle / values["pairs"] > means[1], "far for a on the right, near on the left"


def test_intervals_cover_over_users() -> None:
    """About 95 of 100 intervals of 150 drawn users hold the value of all 3,000, where the pairs of a user are alike."""
    schema = replace(SCHEMA, sizes={**SCHEMA.sizes, "user": 3002})
    alone, noisy = model_of("separate", 7, schema), model_of("per_task", 8, schema)
    for view in ("a", "b"):
        tables = (alone.tables[f"{view}/{name}/value"].weight.data for name in ("user", "item"))
        set_tables(noisy, view, *(table + 0.7 * torch.randn_like(table) for table in tables))
    models, keep = {"alone": alone, "noisy": noisy}, Frequent(np.arange(2, 3002), np.arange(2, 27))

    def measured(users: np.ndarray, seed: int) -> dict[str, Any]:
        rows = batch_of(np.repeat(users, 5), np.random.default_rng(1).integers(2, 27, 5 * len(users)))
        found = replace(PROBE, seed=seed)(keep, models, schema, [rows], against="alone")
        return found.values["models"]["noisy"]

    rng = np.random.default_rng(0)
    truth = measured(keep.users, 0)["entanglement"]
    drawn = [measured(rng.choice(keep.users, 150, replace=False), n) for n in range(60)]
    assert 0.4 < truth < 0.9
    inside = sum(of["low"] <= truth <= of["high"] for of in drawn)
    assert 51 <= inside, inside
    spread, width = np.std([of["entanglement"] for of in drawn]), np.mean([of["high"] - of["low"] for of in drawn])
    assert 0.7 < width / (2 * 1.96 * spread) < 1.4


# ---------------------------------------------------------------------------------------------------------------- mistakes
def test_mistakes() -> None:
    for change, words in (
        ({"second": "a"}, "should be two tasks. Found `a` twice"),
        ({"item": "user"}, "should be two features. Found `user` twice"),
        ({"frequent": 1.0}, r"`frequent` should be in \[0, 1\)"),
        ({"near": 0.7}, "0 < `near` <= `far` < 1"),
        ({"bins": 0}, "`bins` should be positive"),
        ({"confidence": 1.0}, "`confidence` should lie"),
    ):
        with pytest.raises(ValueError, match=words):
            Entanglement(**{"first": "a", "second": "b", **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="There is no task `z`"):
        Entanglement("a", "z").count(SCHEMA, TRAIN)
    with pytest.raises(ValueError, match="`item` should be an id feature among .*Found `price`"):
        Entanglement("a", "b", item="price").count(SCHEMA, TRAIN)
    with pytest.raises(ValueError, match="No training row has a known `user`"):
        PROBE.count(SCHEMA, [batch_of([0, 1], [3, 4])])
    keep = PROBE.count(SCHEMA, TRAIN)
    alone, shared = model_of("separate"), model_of("shared")
    with pytest.raises(
        ValueError, match=r"`against` should name a single-task model.*Found `shared`, whose tasks read \('sha"
    ):
        PROBE(keep, {"shared": shared}, SCHEMA, HELD_OUT, against="shared")
    with pytest.raises(ValueError, match="Found `alone`, whose tasks read nothing"):
        PROBE(keep, {"shared": shared}, SCHEMA, HELD_OUT, against="alone")
    with pytest.raises(ValueError, match="0 rows have a frequent user and a frequent item; 2 are needed"):
        PROBE(keep, {"alone": alone}, SCHEMA, [], against="alone")
    with pytest.raises(ValueError, match="Model `other` should be one model with tables .*Found `Linear`"):
        PROBE(keep, {"alone": alone, "other": nn.Linear(1, 1)}, SCHEMA, HELD_OUT, against="alone")
    wider = model_of("shared", schema=replace(SCHEMA, sizes={**SCHEMA.sizes, "item": 40}))
    with pytest.raises(ValueError, match="Model `wide` has 40 rows for `item`, and the schema 27"):
        PROBE(keep, {"alone": alone, "wide": wider}, SCHEMA, HELD_OUT, against="alone")


def test_the_figure(tmp_path: Path) -> None:
    models = {"alone": model_of("separate", 1), "shared": model_of("shared", 2)}
    finding = PROBE(PROBE.count(SCHEMA, TRAIN), models, SCHEMA, HELD_OUT, against="alone")
    figure = entanglement.plot(finding, tmp_path / "distances.png")
    assert (tmp_path / "distances.png").stat().st_size > 5_000
    assert [axis.get_title().split(":")[0] for axis in figure.axes] == ["alone/a", "alone/b", "shared/shared"]
    steps: Any = figure.axes[0].patches[0]
    counts = finding.values["tables"]["alone/a"]["counts"]
    assert steps.get_data().values == pytest.approx(counts / counts.sum())
    assert "`shared` 1.00 (agreement" in finding.reading


# ------------------------------------------------------------------------------------------------------------ planted data
@pytest.mark.slow
def test_opposed_tastes_stay_in_the_middle_of_a_shared_table(capsys: pytest.CaptureFixture) -> None:
    """Two unrelated tastes per user: one table has the pairs in conflict in its middle, STEM's tables at their sides.

    The single-task reference has another seed, so that no agreement is that of equal first weights.  Products of user and item
    are inputs of the network, so that distances can be tastes; what follows holds of the mean over seeds.
    """
    found: dict[str, list[Any]] = {"shared": [], "a": [], "b": [], "scalar": [], "high": []}
    for seed in range(3):
        frame = opposed_tastes(rho=0.0, seed=seed)
        data = Data(rows="log", features=(Feature("user"), Feature("item")), split=Split(kind="column", column="split"),
                    tasks=(Task("a", column="label_a"), Task("b", column="label_b")))  # fmt: skip
        models = {}
        for name, kind, tower in (
            ("alone", "separate", SingleTask((32, 16), (16,))),
            ("shared", "shared", SharedBottom((32, 16), (16,))),
            ("stem", "per_task", STEM(expert=(32, 16), tower=(16,))),
        ):
            choice = ModelChoice(tower=tower, tables=Views(kind=kind, width=8, std=0.05), interaction=InnerProduct())  # type: ignore[arg-type]
            run = Run(data=data, seed=seed + 100 * (name == "alone"), model=choice, update=Joint(lr=2e-3),
                      training=Training(batch_size=1024, steps=400, evaluate_every=400))  # fmt: skip
            models[name] = train(run, tables={"log": frame}, baseline=False).bundle.model
        encoded = Encoded(encode(data, tables={"log": frame}))
        schema, probe = encoded.schema, Entanglement("a", "b")
        keep = probe.count(schema, encoded.in_order(encoded.split("train"), 8192))
        values = probe(keep, models, schema, encoded.in_order(encoded.split("test"), 8192), against="alone").values
        for view in ("a", "b"):
            found[view].append(values["tables"][f"stem/{view}"]["rank"])
        found["shared"].append(values["tables"]["shared/shared"]["rank"])
        found["scalar"].append(values["models"]["stem"]["entanglement"])
        found["high"].append(values["models"]["stem"]["high"])
        assert values["models"]["shared"]["entanglement"] == 1
    mean = {name: np.mean(each, 0) for name, each in found.items()}
    with capsys.disabled():
        print(
            "\nMean ranks of the two sets in conflict:",
            {name: np.round(each, 3).tolist() for name, each in mean.items()},
        )
        print("of each seed:", {name: np.round(each, 2).tolist() for name, each in found.items()})
    assert (abs(mean["shared"] - 0.5) < 0.08).all(), "the shared table has both sets in the middle"
    assert mean["a"][0] > 0.54 and mean["a"][1] < 0.46 and mean["b"][0] < 0.48 and mean["b"][1] > 0.52
    assert max(found["high"]) < 0.97 and mean["scalar"] < 0.9
