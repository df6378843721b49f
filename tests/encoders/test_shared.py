"""A list that all rows share gives what the same list in every row gives, whatever the encoder."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from torch import Tensor

from unbraid import config
from unbraid.encoders.dare import DARE
from unbraid.encoders.eta import ETA
from unbraid.encoders.pooling import Mean
from unbraid.encoders.search import FEW, GROUP, highest_shared
from unbraid.encoders.searched import SearchedHistory
from unbraid.encoders.sim import SIM
from unbraid.encoders.table import Views
from unbraid.encoders.twin import TWIN
from unbraid.encoders.twin_v2 import TWINV2
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.stem import STEM
from unbraid.types import FIRST_VALUE, Batch, Feature, Field, History, Ragged, Schema, Shared, Task

ITEMS, SHOPS, KINDS = 60, 9, 7
SCHEMA = Schema(
    features=(Feature("item"), Feature("shop")),
    tasks=(Task("click"),),
    fields=(Field("item"), Field("shop"), Field("kind")),
    histories=(
        History("seen", fields=("item", "shop", "kind", "gap", "position"), length=200),
        History("liked", fields=("item", "gap"), length=50),
        History("did", fields=("kind", "position"), length=50),
    ),
    domains=("(unknown)", "(missing)", "all"),
    sizes={"item": ITEMS, "shop": SHOPS, "kind": KINDS, "gap": 34, "position": FIRST_VALUE + 200},
)
MEMBERS = typing.get_args(typing.get_args(config.HistoryChoice)[0])
OTHERS = {
    "dare-whole": DARE(scale="whole", keep=5, pooled=False),
    "dare-narrow": DARE(attention_width=3, keep=5),
    "twin-projections": TWIN(projections=True, keep=5),
    "twin-four": TWIN(tables="four", keep=5),
    "twin-hard": TWIN(search="hard", category="item", keep=3, fill=True),
    "sim-hard": SIM(search="hard", category="item", keep=3),
    "sim-second": SIM(auxiliary=(4,), keep=3),
    "dare-second": DARE(auxiliary=(4,), keep=3),
}
PLAIN = {"DARE", "TWIN"}  # members that read a shared list as it is, beside means


def values_of(name: str, count: int, seed: int = 0) -> dict[str, Tensor]:
    """(n,) ids of a history's events."""
    draw = torch.Generator().manual_seed(seed)
    fields = next(h.fields for h in SCHEMA.histories if h.name == name)
    found = {f: torch.randint(0, SCHEMA.sizes[f], (count,), generator=draw) for f in fields}
    return found | ({"position": torch.arange(count, 0, -1) + FIRST_VALUE - 1} if "position" in fields else {})


def batch_of(rows: int, lengths: typing.Mapping[str, int]) -> Batch:
    draw = torch.Generator().manual_seed(1)
    features: dict[str, typing.Any] = {
        f.name: torch.randint(0, SCHEMA.sizes[f.name], (rows,), generator=draw) for f in SCHEMA.features
    }
    features |= {name: Shared(values_of(name, count), rows) for name, count in lengths.items()}
    zeros = torch.zeros(rows)
    return Batch(features=features, labels={"click": zeros}, observed={"click": zeros > 0}, domain=zeros.long() + FIRST_VALUE,
                 weight=None, row=torch.arange(rows), view=zeros.to(torch.int8), pair=zeros.long() - 1)  # fmt: skip


def repeated(batch: Batch) -> Batch:
    features = {n: v.repeated() if isinstance(v, Shared) else v for n, v in batch.features.items()}
    return dataclasses.replace(batch, features=features)


def model_of(history: typing.Any, views: Views | None = None, **more: typing.Any) -> Model:
    torch.manual_seed(0)
    views = views or Views(width=4, std=1.0)
    tower = STEM() if views.kind == "per_task" else SharedBottom(bottom=(8,), tower=())
    model = Model(SCHEMA, tower, views, history=history, **more)
    return model.double().eval()


@pytest.mark.parametrize("lengths", [(120, 40, 30), (4, 0, 1), (0, 0, 0), (20, 21, 19)], ids=str)
@pytest.mark.parametrize("history", [*(m() for m in MEMBERS), *OTHERS.values()],
                         ids=[*(m.__name__ for m in MEMBERS), *OTHERS])  # fmt: skip
def test_every_encoder_gives_the_same(history: typing.Any, lengths: tuple[int, ...]) -> None:
    hard = getattr(history, "search", "") == "hard"  # wants its category in every history
    model = model_of(history, history_of={"did": Mean()} if hard else {})
    batch = batch_of(11, dict(zip(("seen", "liked", "did"), lengths, strict=True)))
    with torch.no_grad():
        got, want = model(batch), model(repeated(batch))
    assert want.hidden["click"].abs().sum() > 0
    torch.testing.assert_close(got.hidden["click"], want.hidden["click"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        model.views(batch)["shared"], model.views(repeated(batch))["shared"], rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.__name__)
def test_only_a_plain_search_and_a_mean_read_it_as_it_is(member: type, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(Shared, "repeated", lambda self: counted.append(1) or REPEATED(self))
    model_of(member())(batch_of(3, {"seen": 30, "liked": 30, "did": 30}))
    assert len(counted) == (0 if member.__name__ in PLAIN | {"Mean"} else 3)


REPEATED = Shared.repeated


@pytest.mark.parametrize(
    "views", [Views(kind="several", widths=(4, 6)), Views(kind="per_task", width=4)], ids=lambda v: v.kind
)
def test_views_and_encoders_of_single_histories(views: Views) -> None:
    for history, apart in (
        (DARE(keep=5), {"liked": Mean()}),
        (DARE(keep=5, attention="per_view"), {}),
        (Mean(), {"liked": ETA(keep=3)}),
    ):
        model = model_of(history, views, history_of=apart)
        batch = batch_of(7, {"seen": 150, "liked": 9, "did": 30})
        with torch.no_grad():
            torch.testing.assert_close(
                model(batch).logits["click"], model(repeated(batch)).logits["click"], rtol=1e-10, atol=1e-10
            )


def test_single_precision_on_long_histories_and_many_rows() -> None:
    model = model_of(DARE(keep=20)).float()
    schema = dataclasses.replace(SCHEMA, sizes={**SCHEMA.sizes, "position": 5_000})
    model = Model(schema, SharedBottom(bottom=(8,), tower=()), Views(width=4, std=1.0), history=DARE(keep=20)).eval()
    batch = batch_of(100, {"seen": 3_000, "liked": 4_001, "did": 10})
    with torch.no_grad():
        got, want = model(batch).logits["click"], model(repeated(batch)).logits["click"]
    # at most a tie at the K-th place falls the other way
    assert (got - want).abs().median() < 1e-6
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ the K best
def plain_best(scores: Tensor, k: int) -> list[list[int]]:
    """Sorted places of each row's k highest, ties to the later."""
    return [sorted(sorted(range(len(row)), key=lambda i: (-row[i], -i))[:k]) for row in scores.tolist()]


@pytest.mark.parametrize(
    ("rows", "count", "k"), [(3, 50, 7), (60, 5_000, 20), (1, 300_000, 3), (90, 3_001, 5), (40, 7_000, 1)]
)
def test_the_k_best_are_those_of_a_sort(rows: int, count: int, k: int) -> None:
    """Of small integers, so that nearly all scores are tied with others, and of random numbers."""
    draw = torch.Generator().manual_seed(0)
    if rows * count > FEW:
        assert count >= 2 * k * GROUP  # groups are what is tested
    for query, keys, own in (
        (torch.randint(-2, 3, (rows, 3), generator=draw).double(), torch.randint(-2, 3, (count, 3), generator=draw).double(),
         torch.randint(0, 3, (count,), generator=draw).double()),
        (torch.randn(rows, 4, generator=draw).double(), torch.randn(count, 4, generator=draw).double(), None),
        (torch.zeros(rows, 0).double(), torch.zeros(count, 0).double(), torch.arange(count).remainder(900).double()),
    ):  # fmt: skip
        scores = query @ keys.T + (0 if own is None else own)
        assert highest_shared(query, keys, own, k).tolist() == plain_best(scores, k)


def test_equal_scores_keep_the_newest() -> None:
    found = highest_shared(torch.zeros(100, 2), torch.ones(5_000, 2), None, 4)
    assert found.tolist() == [[4_996, 4_997, 4_998, 4_999]] * 100


def test_scores_that_are_no_numbers() -> None:
    keys = torch.ones(5_000, 2)
    keys[17] = torch.nan
    assert highest_shared(torch.ones(100, 2), keys, None, 3).shape == (100, 3)
    assert highest_shared(torch.full((100, 2), torch.nan), keys, None, 3).max() < 5_000


# ---------------------------------------------------------------------------------------------- what is computed once
def test_keys_are_made_once_and_only_of_what_time_does_not_change() -> None:
    model = model_of(DARE(keep=5))
    batch = batch_of(6, {"seen": 90, "liked": 30, "did": 30})
    with torch.no_grad():
        first = model(batch).logits["click"]
        memo = batch.features["seen"].memo  # type: ignore[union-attr]
        ((side, alike),) = memo.values()
        assert side.shape == (90, 8) and alike.shape == (90,)
        torch.testing.assert_close(model(batch).logits["click"], first, rtol=0, atol=0)
        # an hour later only gaps have changed: the same memo, and yet what new lists give
        later = {**batch.features["seen"].values, "gap": (batch.features["seen"].values["gap"] + 3).clamp(max=33)}  # type: ignore[union-attr]
        moved = dataclasses.replace(batch, features={**batch.features, "seen": Shared(later, 6, memo)})
        got, want = model(moved).logits["click"], model(repeated(moved)).logits["click"]
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert (got - first).abs().max() > 1e-6
        side *= -1  # they are read, indeed
        assert (model(batch).logits["click"] - first).abs().max() > 1e-6


@torch.no_grad()
def test_bfloat16_rounds_the_search_alone() -> None:
    exact, rounded = (model_of(DARE(keep=10, precision=p), Views(width=16, std=1.0)) for p in ("exact", "bfloat16"))
    batch = batch_of(200, {"seen": 200, "liked": 0, "did": 0})
    modules = [m.histories["shared/seen"] for m in (exact, rounded)]
    kept = []
    for model, module in zip((exact, rounded), modules, strict=True):
        reads, _ = model._read(batch)
        events, target = model._of_history("shared", SCHEMA.histories[0], reads, batch.features)
        keys, alike = module._ready(events, batch.features["seen"])  # type: ignore[union-attr, operator]
        query = torch.cat([module.asked(target)[n] * module.scales[n] for n in module.targets], 1)  # type: ignore[union-attr, operator, index]
        kept.append(module._kept_of_shared(query, keys, alike).index.view(200, 10))  # type: ignore[union-attr, operator]
    same = torch.stack([torch.isin(b, a).double().mean() for a, b in zip(*kept, strict=True)])
    assert 0.9 < same.mean() < 1  # 8 bits of significand: some near ties fall the other way
    agree = same == 1
    got, want = (model(batch).logits["click"] for model in (rounded, exact))
    torch.testing.assert_close(got[agree], want[agree], rtol=1e-10, atol=1e-10)  # weights and sums are exact


# ------------------------------------------------------------------------------------------------------------- the type
def test_training_is_refused() -> None:
    model = model_of(DARE(keep=5)).train()
    with pytest.raises(ValueError, match=r"serving.*eval\(\)"):
        model(batch_of(4, {"seen": 9, "liked": 9, "did": 9}))


def test_shared_lists_of_batches() -> None:
    batch = batch_of(5, {"seen": 9, "liked": 0, "did": 3})
    some = batch.select(torch.tensor([3, 1]))
    assert isinstance(some.features["seen"], Shared) and len(some.features["seen"]) == 2
    assert len(batch.select(torch.arange(5) < 3).features["seen"]) == 3
    joined = Batch.join([some, repeated(batch)]).features["seen"]
    assert isinstance(joined, Ragged) and joined.lengths.tolist() == [9] * 7
    moved = batch.to("cpu").features["seen"]
    assert isinstance(moved, Shared) and moved.memo is batch.features["seen"].memo  # type: ignore[union-attr]
    assert batch.features["liked"].repeated().lengths.tolist() == [0] * 5  # type: ignore[union-attr]
    assert not isinstance(batch.features["seen"], Ragged)


def test_which_members_have_their_own_way() -> None:
    widths, roles = {"item": 4}, {"value": 4, "attention": 4}
    assert isinstance(DARE().build(widths, widths, roles), SearchedHistory)
    assert DARE().build(widths, widths, roles).shared and TWIN().build(widths, widths, roles).shared
    hard = TWIN(search="hard", category="item").build(widths, widths, roles)
    assert not any(module.shared for module in (hard, ETA().build(widths, widths), TWINV2().build(widths, widths)))
