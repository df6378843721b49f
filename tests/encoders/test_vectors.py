"""Encoders of given vectors: hashes, cosines, what is kept, values and gradients in double precision, a planted cosine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from published import seeds
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.bundle import Bundle, build
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.hash_id import Hashed
from unbraid.encoders.numeral import places
from unbraid.encoders.similarity import Similarity
from unbraid.encoders.table import Views
from unbraid.encoders.vectors import Projected, Raw
from unbraid.job import train
from unbraid.model import Model
from unbraid.predictor import Predictor
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Training
from unbraid.types import Feature, Task
from unbraid.warm_start import warm_start

pytestmark = pytest.mark.usefixtures("float64")

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
WIDTHS = {"user": 5, "item": 5, "text": 3}
PAIRS = (("user", "item"),)


@pytest.fixture
def single():
    torch.set_default_dtype(torch.float32)


def vectors(rows: int = 7) -> dict[str, torch.Tensor]:
    return {name: torch.randn(rows, d) for name, d in WIDTHS.items()}


def test_raw_and_projected():
    given = vectors()
    raw = Raw().build(WIDTHS, 4, 0.01)
    assert raw.widths == WIDTHS and all(raw(given)[k] is given[k] for k in WIDTHS)
    module = Projected().build(WIDTHS, 4, 0.01)
    out = module(given)
    assert module.widths == dict.fromkeys(WIDTHS, 4) and list(out) == list(WIDTHS)
    for (name, x), linear in zip(given.items(), module.linears.values(), strict=True):
        torch.testing.assert_close(out[name], x @ linear.weight.T + linear.bias, **CLOSE)


# ----------------------------------------------------------------------------------------------------------------- hashed
def test_hashed_value_and_gradient():
    module = Hashed(bits=6, seed=3).build(WIDTHS, 4, 1.0).double()
    given = vectors()
    given["item"][2] = 0.0
    got = module(given)
    assert module.widths == dict.fromkeys(WIDTHS, 4)
    for name, one in zip(WIDTHS, module.hashes, strict=True):
        table, rows = one.digits.weight, []
        for x in given[name]:
            bits = [int(float((x * one.planes[:, j]).sum()) >= 0) for j in range(6)]
            rows.append(sum(table[2 * j + bit] for j, bit in enumerate(bits)) if x.any() else one.missing[0])
        want, leaves, scale = torch.stack(rows), list(one.parameters()), torch.randn(7, 4)
        torch.testing.assert_close(got[name], want, **CLOSE)
        mine = torch.autograd.grad((got[name].sin() * scale).sum(), leaves, allow_unused=True)
        theirs = torch.autograd.grad((want.sin() * scale).sum(), leaves, allow_unused=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, **CLOSE)


def test_bits_agree_as_the_angle_says():
    """cos .99, 0 and -.5: the share of equal bits is 1 - angle / pi within 3 standard errors."""
    m = 40_000
    module = Hashed(bits=m).build({"x": 8}, 2, 0.01).double().hashes[0]
    a, b = torch.linalg.qr(torch.randn(8, 2))[0].T
    agree = {}
    for cosine in (0.99, 0.5, 0.0, -0.5):
        other = cosine * a + math.sqrt(1 - cosine**2) * b
        first, second = module.bits(torch.stack([a, other]))
        agree[cosine] = float((first == second).double().mean())
        p = 1 - math.acos(cosine) / math.pi
        assert abs(agree[cosine] - p) < 3 * math.sqrt(p * (1 - p) / m), cosine
    assert agree[0.99] > agree[0.0]
    assert torch.equal(module.bits(a.unsqueeze(0)), module.bits(1e-3 * a.unsqueeze(0))), "only the direction counts"


def test_planes_are_of_the_seed_alone_and_saved():
    first = Hashed(bits=5, seed=1).build(WIDTHS, 4, 0.01)
    torch.manual_seed(99)
    again, other = Hashed(bits=5, seed=1).build(WIDTHS, 8, 0.01), Hashed(bits=5, seed=2).build(WIDTHS, 4, 0.01)
    assert torch.equal(first.hashes[0].planes, again.hashes[0].planes)
    assert not torch.equal(first.hashes[0].planes, other.hashes[0].planes)
    assert not torch.equal(first.hashes[0].planes, first.hashes[1].planes), "every feature has its own"
    assert "hashes.0.planes" in first.state_dict() and "hashes.0.planes" not in dict(first.named_parameters())


# ------------------------------------------------------------------------------------------------------------- similarity
@pytest.mark.parametrize("levels", [11, 1000])
def test_similarity_value_and_gradient(levels):
    given = vectors(9)
    given["user"][1], given["item"][2] = 0.0, 0.0
    given["item"][3], given["item"][4] = 2.0 * given["user"][3], -3.0 * given["user"][4]
    module = Similarity(pairs=PAIRS, levels=levels).build(WIDTHS, 4, 1.0)
    got = module(given)["user.item"]
    encoder = module.encoders[0]
    tables, rows, buckets = [system.weight for system in encoder.numerals.systems], [], []
    for u, v in zip(given["user"].tolist(), given["item"].tolist(), strict=True):
        size = math.hypot(*u) * math.hypot(*v)
        if size == 0:
            rows.append(encoder.missing[0])
            continue
        w = max(-1.0, min(1.0, sum(a * b for a, b in zip(u, v, strict=True)) / size))
        bucket = math.floor((w + 1) / 2 * (levels - 1) + 1e-12)
        buckets.append(bucket)
        row = torch.zeros(4)
        for base, table in zip((2, 3), tables, strict=True):
            rest = bucket
            for k in range(places(base, levels - 1)):
                rest, digit = divmod(rest, base)
                row = row + table[base * k + digit]
        rows.append(row)
    want = torch.stack(rows)
    assert buckets[1] >= levels - 2 and buckets[2] == 0, "rounding may leave the cosine of a parallel pair just below 1"
    same = [i for i in range(9) if i != 3]
    torch.testing.assert_close(got[same], want[same], **CLOSE)
    scale, leaves = torch.randn(len(same), 4), list(module.parameters())
    for a, b in zip(torch.autograd.grad((got[same].sin() * scale).sum(), leaves),
                    torch.autograd.grad((want[same].sin() * scale).sum(), leaves), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, **CLOSE)


def test_buckets_by_hand():
    encoder = Similarity(pairs=PAIRS, levels=5).build(WIDTHS, 2, 1.0).encoders[0]
    a = torch.tensor([[1.0, 0.0]] * 5)
    b = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [4.0, 0.0], [3.0, 4.0], [0.0, 0.0]])  # cosines -1, 0, 1, .6, none
    bucket, empty = encoder.bucket(a, b)
    assert bucket[:4].tolist() == [0, 2, 4, 3] and empty[:, 0].tolist() == [False, False, False, False, True]
    tiny = torch.full((1, 2), 1e-30, dtype=torch.float32)
    assert encoder.bucket(tiny, tiny)[0].item() >= 3 and not encoder.bucket(tiny, tiny)[1].item()


def test_what_is_kept():
    given = vectors()
    module = Similarity(pairs=PAIRS).build(WIDTHS, 4, 0.01)
    assert module.widths == {"text": 3, "user.item": 4} and list(module(given)) == ["text", "user.item"]
    kept = Similarity(pairs=PAIRS, keep=True).build(WIDTHS, 4, 0.01)
    assert kept.widths == {**WIDTHS, "user.item": 4} and kept(given)["user"] is given["user"]


@pytest.mark.parametrize("pairs", [(), (("user", "text"),), (("user", "nobody"),)])
def test_bad_pairs(pairs):
    with pytest.raises(ValueError, match="pairs"):
        Similarity(pairs=pairs).build(WIDTHS, 4, 0.01)


@pytest.mark.parametrize(
    ("make", "word"),
    [(lambda: Hashed(bits=0), "bits"), (lambda: Hashed(seed=-1), "seed"), (lambda: Similarity(levels=1), "levels"),
     (lambda: Similarity(bases=(2, 1)), "bases")],
)  # fmt: skip
def test_bad_parameters(make, word):
    with pytest.raises(ValueError, match=word):
        make()


# -------------------------------------------------------------------------------------------------------------- the model
@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    return Encoded(encode(two_vectors(cache=str(tmp_path_factory.mktemp("cache"))), tables={"log": make_log(300)}))


def two_vectors(**changes):
    """The toy log's vector, also under another name."""
    data = make_data(**changes)
    return replace(data, features=(*data.features, Feature("other_vector", column="text_vector", kind="vector")))


PAIR = (("text_vector", "other_vector"),)
MEMBERS = [Projected(), Hashed(bits=7), Similarity(pairs=PAIR)]


def test_a_pair_must_name_vectors_in_a_run_too(single):
    with pytest.raises(ValueError, match=r"model.vectors.pairs.*\['text_vector'\].*\['price'\]"):
        make_run(model=config.ModelChoice(vectors=Similarity(pairs=(("price", "text_vector"),))))


@pytest.mark.parametrize("member", [Raw(), *MEMBERS], ids=lambda m: m.kind)
def test_fields_of_a_view(single, encoded, member):
    model = Model(encoded.schema, SharedBottom(), Views(kind="several", widths=(4, 6)), vectors=member)
    batch = encoded.batch(np.arange(20))
    fields = model._fields("view1", batch, model._read(batch)[0], {}, model._vectors(batch))
    name = "text_vector.other_vector" if member.kind == "similarity" else "text_vector"
    assert ("text_vector" in fields) == (member.kind != "similarity")
    assert fields[name].shape == (20, 3 if member.kind == "raw" else 6)
    assert model.interactions["view/view1"].width == sum(x.shape[1] for x in fields.values())


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.kind)
def test_every_view_has_its_own(single, encoded, member):
    model = Model(encoded.schema, SharedBottom(), Views(kind="several", widths=(4, 6)), vectors=member)
    mine, other = (list(model.vectors[f"view/view{i}"].parameters()) for i in (0, 1))
    hidden = model.views(encoded.batch(np.arange(40)))
    grads = torch.autograd.grad(hidden["view0"].sum(), [*mine, *other], allow_unused=True)
    assert all(g is not None for g in grads[: len(mine)]) and all(g is None for g in grads[len(mine) :])


def test_raw_is_what_there_was(single, encoded):
    batch = encoded.batch(np.arange(40))
    plain = build(make_run(data=two_vectors()), encoded.schema)
    fields = plain.interactions["view/shared"].fields
    assert fields.index("text_vector") == 4 and not plain.vectors.state_dict()
    assert torch.equal(
        plain._fields("shared", batch, plain._read(batch)[0], {}, plain._vectors(batch))["text_vector"],
        batch.features["text_vector"],
    )


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.kind)
def test_a_bundle_serves_rows_as_training_read_them(single, member, tmp_path):
    log = make_log()
    run = make_run(
        data=two_vectors(), model=replace(make_run().model, vectors=member), training=Training(batch_size=64, steps=5)
    )
    result = train(run, tmp_path / "out", tables={"log": log}, baseline=False)
    table = Encoded(encode(run.data, tables={"log": log}))
    test = table.split("test")
    rows = log.with_row_index("__row").filter(pl.col("__row").is_in(test.tolist())).drop("__row", "click", "buy")
    served = Predictor(Bundle.load(tmp_path / "out")).scores(rows, {"log": log}).logits["click"]
    with torch.no_grad():
        here = result.bundle.model(table.batch(test)).logits["click"]
    np.testing.assert_allclose(served, here.numpy(), atol=1e-6)


@pytest.mark.parametrize("domain", ["", "site"])
@pytest.mark.parametrize("member", [Raw(), Projected(), Hashed(bits=7), Similarity(pairs=(("v0", "v5"),))],
                         ids=lambda m: m.kind)  # fmt: skip
def test_a_warm_start_of_every_member(single, tmp_path, member, domain):
    """Six vectors and three domains, which have other codes in the new model."""
    given = tuple(Feature(name, column="text_vector", kind="vector") for name in ("v0", "v1", "v2", "v3", "type", "v5"))
    data = make_data(cache=str(tmp_path), domain=domain, features=(Feature("item"), *given))
    table = Encoded(encode(data, tables={"log": make_log(300)}))
    run = make_run(data=data, model=config.ModelChoice(vectors=member))
    old, new = build(run, table.schema), build(replace(run, seed=5), table.schema)
    domains = table.schema.domains
    turned = replace(table.schema, domains=(*domains[:2], *domains[:1:-1]))
    counts = warm_start(new, replace(table.fitted, schema=turned), Bundle(run, table.fitted, old, {}, None))
    assert counts["tensors new"] == counts["rows new"] == 0
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))


def test_a_missing_vector_reads_the_missing_row(single, tmp_path):
    log = make_log().with_columns(text_vector=pl.when(pl.col("user") == 3).then(None).otherwise(pl.col("text_vector")))
    table = Encoded(encode(make_data(cache=str(tmp_path)), tables={"log": log}))
    model = Model(table.schema, SharedBottom(), Views(width=4), vectors=Hashed(bits=5))
    batch = table.batch(np.flatnonzero((log["user"] == 3).to_numpy()))
    out = model._fields("shared", batch, model._read(batch)[0], {}, model._vectors(batch))["text_vector"]
    assert torch.equal(out, model.vectors["view/shared"].hashes[0].missing.expand_as(out)) and len(out) > 3


# ---------------------------------------------------------------------------------------------------------------- planted
def planted(rows: int = 24_000, width: int = 16, seed: int = 0) -> pl.DataFrame:
    """Vectors of 400 users and 400 items around 8 common directions, and a label of their cosine, steep in it."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, width))
    users, items = (centres[rng.integers(0, 8, 400)] + 0.7 * rng.normal(size=(400, width)) for _ in range(2))
    u, v = rng.integers(0, 400, rows), rng.integers(0, 400, rows)
    cosine = (users[u] * items[v]).sum(1) / np.linalg.norm(users[u], axis=1) / np.linalg.norm(items[v], axis=1)
    logit = 6 * np.tanh(3 * (cosine - 0.3)) * 0.5
    y = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)
    parts = rng.choice(["train", "valid", "test"], rows, p=[0.6, 0.15, 0.25])
    return pl.DataFrame(
        {"user_vector": users[u].tolist(), "item_vector": items[v].tolist(), "y": y, "part": parts, "truth": logit}
    )


@pytest.mark.slow
def test_planted_cosine(single):
    from sklearn.metrics import roc_auc_score

    log = planted()
    test = log.filter(pl.col("part") == "test")
    print(f"\nof the truth: {roc_auc_score(test['y'], test['truth']):.4f}")
    data = Data(rows="log", features=(Feature("user_vector", kind="vector"), Feature("item_vector", kind="vector")),
                tasks=(Task("y"),), split=Split(kind="column", column="part"))  # fmt: skip
    pairs = (("user_vector", "item_vector"),)
    contenders: dict[str, Any] = {
        "raw": Raw(), "projected": Projected(), "hashed": Hashed(), "similarity": Similarity(pairs=pairs),
        "similarity, keep": Similarity(pairs=pairs, keep=True),
    }  # fmt: skip
    found = {}
    for name, member in contenders.items():
        aucs = []
        for seed in seeds(2, 3):
            model = config.ModelChoice(vectors=member, tower=SharedBottom(bottom=(64,), tower=(32,)))
            run = config.Run(data=data, seed=seed, model=model, training=Training(batch_size=256, epochs=12, patience=3),
                             update=config.Joint(lr=0.003))  # fmt: skip
            aucs.append(
                train(run, tables={"log": log.drop("truth")}, baseline=False).metrics["test"]["y"]["auc"]["value"]
            )
        found[name] = float(np.mean(aucs))
        print(f"{name}: {found[name]:.4f}  {[round(a, 4) for a in aucs]}")
    assert found["similarity"] > found["raw"] + 0.01 and found["similarity"] > found["hashed"] + 0.02
    assert found["raw"] > 0.8 and found["projected"] > 0.8 and found["hashed"] > 0.8, "of .843, .838 and .819 measured"
