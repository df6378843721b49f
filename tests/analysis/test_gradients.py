"""Both gradients of a shared table: hand-made ones, and the twin against a model whose tables are one parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toylog import make_data, make_log, make_run

from unbraid import recipes
from unbraid.analysis import gradients
from unbraid.analysis.gradients import GradientProbe, Gradients, pairs, plot, twin
from unbraid.bundle import build
from unbraid.config import Run
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders import searched
from unbraid.encoders.attention import TargetAttention
from unbraid.encoders.dare import DARE
from unbraid.encoders.table import Views
from unbraid.encoders.twin import TWIN
from unbraid.losses.history import HistoryLoss
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.optim.joint import Joint, JointUpdate
from unbraid.towers.single_task import SingleTask
from unbraid.towers.stem import STEM
from unbraid.types import FIRST_VALUE, Batch, Feature, Field, History, Task

HISTORIES = (History("seen", fields=("item", "shop", "clicked", "position"), length=10),)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    data = make_data(histories=HISTORIES, tasks=(Task("click"), Task("buy", weight=0.5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNBRAID_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Encoded(encode(data, tables={"log": make_log()}))


def run_of(history: Any = None, update: Any = None, losses: Any = None, **tables: Any) -> Run:
    run = make_run(update=update or Joint(lr=0.02), seed=3, losses=losses or (Supervised(),))
    views = Views(**{"width": 4, "std": 0.5, **tables})
    tower = {"per_task": STEM(), "separate": SingleTask()}.get(views.kind, run.model.tower)
    return replace(run, model=replace(run.model, tower=tower, history=history or DARE(keep=4), tables=views))


def batches_of(encoded: Encoded, seed: int = 0) -> Iterator[Batch]:
    return encoded.shuffled(encoded.split("train"), 64, seed)


def tied(run: Run, encoded: Encoded, start: Model) -> Model:
    """TWIN with the twin's first weights: the encoder `twin`, or `dare` with one parameter in two places."""
    history: Any = run.model.history
    dare = DARE(history.keep, auxiliary=history.auxiliary, attention="per_view")
    same = history if history.kind == "twin" else dare
    choice = replace(run.model, history=same, tables=replace(run.model.tables, lazy_rows=-1))
    model, state = build(replace(run, model=choice), encoded.schema), start.state_dict()
    model.load_state_dict({key: value for key, value in state.items() if same is dare or "/attention." not in key})
    for value, attention in pairs(model).values():
        attention.weight = value.weight
    return model


def loss_of(output: Any, batch: Batch) -> Tensor:
    """click + buy / 2, and the second heads' of both where there are any."""
    total = torch.zeros(())
    for task, weight in (("click", 1.0), ("buy", 0.5)):
        known = batch.observed[task]
        for logits in (output.logits[task], output.extras.get(f"history.{task}")):
            if logits is not None:
                total = total + weight * F.binary_cross_entropy_with_logits(logits[known], batch.labels[task][known])
    return total


# ------------------------------------------------------------------------------------------------------ the twin is TWIN
SECOND: dict[str, Any] = {"history": DARE(keep=4, auxiliary=(5,)), "losses": (Supervised(), HistoryLoss())}
DECAYED = {"update": Joint(lr=0.02, table_lr=0.01, weight_decay=0.1, table_weight_decay=0.2, clip_norm=0.05)}
CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "views": {"kind": "per_task"}, "separate": {"kind": "separate"},
    "several": {"kind": "several", "widths": (3, 5)}, "second": SECOND, "decay and clipping": DECAYED,
    "twin": {"history": TWIN(keep=4)}, "twin of views": {"history": TWIN(keep=4, target_aware=False), "kind": "per_task"},
    "own widths, lazy": {"history": DARE(keep=4, attention_width=2), "lazy_rows": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_are_those_of_one_shared_table(name: str, encoded: Encoded) -> None:
    run = run_of(**CASES[name])
    start = twin(run, encoded.schema)
    shared, update = tied(run, encoded, start), run.update
    tables = {id(table.weight) for table in shared.tables.values()}
    groups = [
        {"params": [p for p in shared.parameters() if (id(p) in tables) == inside], "lr": lr, "weight_decay": decay}
        for inside, lr, decay in (
            (False, update.lr, update.weight_decay), (True, update.table_lr or update.lr, update.table_weight_decay)
        )
    ]  # fmt: skip
    adam, want = torch.optim.AdamW(groups), []
    for _, batch in zip(range(50), batches_of(encoded), strict=False):
        loss = loss_of(shared.train()(batch), batch)
        adam.zero_grad()
        loss.backward()
        if update.clip_norm:
            norm = nn.utils.clip_grad_norm_(shared.parameters(), update.clip_norm)
            assert norm > update.clip_norm
        adam.step()
        want.append(loss.item())
    probe = GradientProbe(run, "shop", steps=50)
    losses, found = probe._train(start, encoded.schema, batches_of(encoded))
    np.testing.assert_allclose(losses, want, rtol=2e-5)
    assert losses[-1] < losses[0] - 0.02 and len(found) == len(pairs(start)) >= 4
    for key, (value, attention) in pairs(start).items():
        assert value.weight is not attention.weight and torch.equal(value.weight, attention.weight)
        torch.testing.assert_close(value.weight, shared.tables[f"{key}/value"].weight, rtol=1e-3, atol=2e-4)


def test_each_gradient_is_on_its_own_side(encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shared table with its weights detached has the representation's gradient; attention's is the rest."""
    run = run_of()
    batch = next(batches_of(encoded))
    start = twin(run, encoded.schema)
    shared = tied(run, encoded, start).train()
    whole, alone = {}, {}
    for into in (whole, alone):
        shared.zero_grad()
        loss_of(shared(batch), batch).backward()
        into.update({key: table.weight.grad.clone() for key, table in shared.tables.items() if key.endswith("value")})
        plain = searched.segment_softmax
        monkeypatch.setattr(
            searched, "segment_softmax", lambda scores, lists, plain=plain: plain(scores, lists).detach()
        )
    monkeypatch.undo()
    got: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self: Gradients, attention: Tensor, representation: Tensor) -> None:
        got[len(got)] = attention.clone(), representation.clone()

    monkeypatch.setattr(Gradients, "add", add)
    GradientProbe(run, "shop", steps=1)._train(start, encoded.schema, iter([batch]))
    assert len(got) == len(pairs(start)) == 4
    for key, (attention, representation) in zip(pairs(start), got.values(), strict=True):
        torch.testing.assert_close(representation, alone[f"{key}/value"], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(attention, whole[f"{key}/value"] - alone[f"{key}/value"], rtol=1e-3, atol=1e-7)
        assert key.endswith(("clicked", "position")) or attention.abs().max() > 1e-5


def test_the_finding_is_about_the_field(encoded: Encoded) -> None:
    run = run_of(kind="per_task")
    given = nn.Linear(2, 2)
    before = given.weight.clone()
    found = GradientProbe(run, "shop", steps=12)(given, encoded.schema, batches_of(encoded))
    assert torch.equal(given.weight, before)
    values = found.values
    assert values["shown"] == "shared/shop" and len(values["losses"]) == 12
    fields = ("item", "shop", "clicked", "position")
    assert set(values["tables"]) == {f"{view}/{name}" for view in ("click", "buy", "shared") for name in fields}
    shop = values["tables"]["shared/shop"]
    assert shop["norms"].shape == (12, 2) and shop["rows"].min() >= FIRST_VALUE
    assert shop["domination"] == pytest.approx(shop["norms"][:, 1].mean() / shop["norms"][:, 0].mean())
    assert f"{shop['domination']:,.1f} times" in found.reading and "12 steps" in found.reading
    assert f"{shop['conflicting']:.1%} of the steps" in found.reading
    again = GradientProbe(run, "shop", steps=12, view="buy")(None, encoded.schema, batches_of(encoded)).values
    assert again["shown"] == "buy/shop" and np.array_equal(again["losses"], values["losses"])


def test_the_learning_rate_stays(encoded: Encoded) -> None:
    falling = run_of(update=Joint(lr=0.02, learning_rate="linear"))
    one, other = (GradientProbe(run, "shop", steps=8)(None, encoded.schema, batches_of(encoded)).values["losses"]
                  for run in (falling, run_of()))  # fmt: skip
    assert np.array_equal(one, other)


def test_fewer_batches_than_steps_and_steps_without_labels(encoded: Encoded) -> None:
    first, second = (batch for _, batch in zip(range(2), batches_of(encoded), strict=False))
    none = replace(second, observed={name: torch.zeros_like(known) for name, known in second.observed.items()})
    probe = GradientProbe(run_of(), "shop")
    values = probe(None, encoded.schema, iter([first, none, second])).values
    assert np.isnan(values["losses"]).tolist() == [False, True, False]
    without = probe(None, encoded.schema, iter([first, second])).values
    np.testing.assert_array_equal(values["losses"][[0, 2]], without["losses"])  # nothing moved in between
    cosines, shop = values["tables"]["shared/shop"]["cosines"], without["tables"]["shared/shop"]
    assert np.isnan(cosines).tolist() == [False, True, False]
    np.testing.assert_array_equal(cosines[[0, 2]], shop["cosines"])
    assert values["tables"]["shared/shop"]["domination"] == shop["domination"]
    silent = probe(None, encoded.schema, iter([none]))
    assert (
        "no row of the table of `shop`" in silent.reading
        and silent.values["tables"]["shared/shop"]["domination"] is None
    )
    with pytest.raises(ValueError, match="nothing to plot"):
        plot(silent)


def test_batches_that_are_not_needed_stay(encoded: Encoded) -> None:
    rest = iter([next(batches_of(encoded))] * 3)
    GradientProbe(run_of(), "shop", steps=2)(None, encoded.schema, rest)
    assert len(list(rest)) == 1


# ------------------------------------------------------------------------------------------------------------- by hand
def rows(size: int, values: Mapping[int, tuple[float, float]]) -> Tensor:
    made = torch.zeros(size, 2)
    for row, value in values.items():
        made[row] = torch.tensor(value)
    return made


def test_by_hand() -> None:
    found = Gradients(7)
    # row 2: same direction; row 3: at 120 degrees and opposite; row 4: attention alone; row 5: orthogonal
    found.add(rows(7, {2: (3, 4), 3: (1, 0), 4: (0, 2)}), rows(7, {2: (6, 8), 3: (-1, 3**0.5), 1: (9, 9)}))
    found.add(rows(7, {3: (0, 1), 5: (1, 0), 0: (5, 5)}), rows(7, {3: (0, -4), 5: (0, 2), 0: (-5, -5)}))
    found.add(rows(7, {3: (1, 0)}), rows(7, {3: (2, 0)}))
    got = found.numbers()
    np.testing.assert_allclose(got["norms"], [[(5 + 1 + 2) / 3, (10 + 2) / 2], [1, 3], [1, 2]], rtol=1e-6)
    assert got["attention"] == pytest.approx((8 / 3 + 2) / 3) and got["representation"] == pytest.approx(11 / 3)
    assert got["domination"] == pytest.approx(11 / 3 / ((8 / 3 + 2) / 3))
    np.testing.assert_allclose(got["cosines"], [(1 - 0.5) / 2, (-1 + 0) / 2, 1], rtol=1e-6)
    assert got["conflicting"] == pytest.approx(1 / 3)
    assert got["rows"].tolist() == [2, 3] and got["steps"].tolist() == [1, 3]  # 4 and 5 never met
    np.testing.assert_allclose(got["ratio"], [0, 2 / 3])
    assert got["above_half"] == 0.5


def test_half_is_not_above_half_and_tiny_gradients_count() -> None:
    found = Gradients(4)
    found.add(rows(4, {3: (1e-25, 0)}), rows(4, {3: (1e-25, 0)}))
    found.add(rows(4, {3: (1e-25, 0)}), rows(4, {3: (-1e-25, 0)}))
    got = found.numbers()
    assert got["ratio"].tolist() == [0.5] and got["above_half"] == 0
    np.testing.assert_allclose(got["cosines"], [1, -1])


def test_a_side_without_gradient() -> None:
    found = Gradients(4)
    found.add(None, rows(4, {2: (3, 4)}))
    got = found.numbers()
    assert np.isnan(got["norms"][0, 0]) and got["norms"][0, 1] == 5
    assert got["domination"] is None and got["conflicting"] is None and got["above_half"] is None
    found.add(rows(4, {2: (0, 2)}), None)
    found.add(None, None)
    got = found.numbers()
    assert got["domination"] == pytest.approx(2.5) and got["norms"].shape == (3, 2) and got["conflicting"] is None


# ------------------------------------------------------------------------------------------------------------- errors
def test_tables_that_come_apart_are_an_error(encoded: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = JointUpdate.apply

    def uneven(self: Any, output: Any) -> None:
        plain(self, output)
        if self.step == 2:
            with torch.no_grad():
                self.both["shared/item"][1].weight[3:5] += 1e-6

    monkeypatch.setattr(JointUpdate, "apply", uneven)
    with pytest.raises(RuntimeError, match="`shared/item` .* differ in 2 rows after step 2"):
        GradientProbe(run_of(), "shop")(None, encoded.schema, batches_of(encoded))


def test_what_is_wrong_is_said(encoded: Encoded) -> None:
    schema, batches = encoded.schema, [next(batches_of(encoded))]
    with pytest.raises(ValueError, match="`dare` or `twin`. Found `target_attention`"):
        GradientProbe(run_of(TargetAttention()), "shop")(None, schema, batches)
    with pytest.raises(ValueError, match="Leave out .*: projections"):
        GradientProbe(run_of(TWIN(projections=True)), "shop")(None, schema, batches)
    four = TWIN(search="hard", category="shop", fill=True, tables="four")
    with pytest.raises(ValueError, match="Leave out .*: search, category, fill, tables"):
        GradientProbe(run_of(four), "shop")(None, schema, batches)
    with pytest.raises(ValueError, match="no event field `price`.*item, shop, clicked, position"):
        GradientProbe(run_of(), "price")(None, schema, batches)
    with pytest.raises(ValueError, match="no view `buy`. Views: shared"):
        GradientProbe(run_of(), "shop", view="buy")(None, schema, batches)
    with pytest.raises(ValueError, match="no batch"):
        GradientProbe(run_of(), "shop")(None, schema, [])
    with pytest.raises(ValueError, match="`steps` should be positive"):
        GradientProbe(run_of(), "shop", steps=0)

    @dataclass(frozen=True)
    class Other(Joint):
        kind: Any = "other"

    with pytest.raises(ValueError, match="`joint`.*Found `other`"):
        GradientProbe(run_of(update=Other()), "shop")


# ------------------------------------------------------------------------------------------------------ the bundled log
@pytest.mark.slow
def test_domination_on_the_bundled_log_depends_on_the_first_std() -> None:
    """The figures of docs/analyses.md: the data of its example, TWIN, one seed, 100 steps."""
    run, topic = recipes.shared_bottom(), "split_part(tag, ',', 1)"
    *earlier, impressions = run.data.events
    data = replace(
        run.data, features=(*run.data.features, Feature("topic", column=topic)), fields=(*run.data.fields, Field("topic")),
        events=(*earlier, replace(impressions, columns={**impressions.columns, "topic": topic})),
        histories=(History("seen", fields=("topic", "position"), where="kind = 'impression'", length=20),),
    )  # fmt: skip
    log, found = Encoded(encode(data)), {}
    for std in (0.01, 0.3):
        choice = replace(run.model, history=TWIN(keep=10), tables=replace(run.model.tables, std=std))
        probe = GradientProbe(replace(run, data=data, model=choice), "topic", steps=100)
        table = probe(None, log.schema, log.shuffled(log.split("train"), 1024, seed=0)).values["tables"]["shared/topic"]
        found[std] = table["domination"], table["conflicting"]
    print(found)
    assert 1_000 < found[0.01][0] < 10_000 and 10 < found[0.3][0] < 50
    assert found[0.01][1] > 0.3 and found[0.3][1] < 0.15


# --------------------------------------------------------------------------------------------------------------- plot
def test_the_plot_is_written(encoded: Encoded, tmp_path: Path) -> None:
    found = GradientProbe(run_of(), "shop", steps=30)(None, encoded.schema, batches_of(encoded))
    drawn = plot(found, tmp_path / "gradients.png")
    assert (tmp_path / "gradients.png").stat().st_size > 5000
    norms, cosines, ratios = drawn.axes
    shop = found.values["tables"]["shared/shop"]
    assert np.allclose(norms.lines[0].get_ydata(), shop["norms"][:, 1]) and norms.get_yscale() == "log"
    assert np.allclose(norms.lines[1].get_ydata(), shop["norms"][:, 0])
    assert sum(bar.get_height() for bar in cosines.patches) == 30
    orange = [bar for bar in cosines.patches if bar.get_facecolor()[2] == 0]
    assert sum(bar.get_height() for bar in orange) == (shop["cosines"] < 0).sum() > 0
    assert all(bar.get_x() < 0 for bar in orange)
    orange = [bar for bar in ratios.patches if bar.get_facecolor()[2] == 0]
    assert sum(bar.get_height() for bar in orange) == (shop["ratio"] > 0.5).sum()
    assert sum(bar.get_height() for bar in ratios.patches) == len(shop["ratio"])
    assert "shared/item" in plot(found, table="shared/item").get_suptitle()
    with pytest.raises(ValueError, match="no table `item`. Tables: shared/item"):
        plot(found, table="item")
    assert gradients.BINS == len(cosines.patches) == len(ratios.patches)
