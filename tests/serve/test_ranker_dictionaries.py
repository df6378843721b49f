"""A run whose vocabularies are dictionaries on disk gives every number that it gives with vocabularies in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rankerkit import Memory
from toylog import make_data, make_log, make_run

from unbraid.bundle import Bundle
from unbraid.data import dictionary
from unbraid.data.declaration import Data
from unbraid.data.dictionary import Dictionary
from unbraid.export import Exported, export
from unbraid.job import evaluate_bundle, train
from unbraid.predictor import Predictor
from unbraid.serve.importer import import_events
from unbraid.serve.ranker import Ranker, Request
from unbraid.types import Feature, Field, History


def declared(cache: Path) -> Data:
    features = (Feature("item", buckets=3), Feature("shop"), Feature("tags", kind="bag"))
    fields, seen = (Field("item"), Field("shop"), Field("clicked")), History("seen", fields=("item", "shop"), length=10)
    return make_data(features=features, fields=fields, histories=(seen,), cache=str(cache))


def tensors(bundle: Bundle) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in bundle.model.state_dict().items()}


def outcome(folder: Path, log: pl.DataFrame, new: pl.DataFrame) -> dict[str, Any]:
    """All that a run gives: trained, evaluated, predicting, exported, serving, and started from."""
    tables, run = {"log": log}, make_run(data=declared(folder / "cache"))
    train(run, folder / "bundle", tables=tables)
    bundle = Bundle.load(folder / "bundle")
    found: dict[str, Any] = {"weights": tensors(bundle), "test": bundle.metrics["test"]}
    found["evaluated"] = evaluate_bundle(bundle, rows=new, tables=tables)
    found["predicted"] = Predictor(bundle).predict(new, tables).to_dict(as_series=False)
    export(bundle, folder / "graph", "torch", tables=tables)
    found["exported"] = Exported(folder / "graph").predict(new, tables).to_dict(as_series=False)
    store = Memory()
    import_events(bundle.run.data, store, tables=tables)  # type: ignore[arg-type]
    ranker = Ranker(bundle, store, tables=tables)  # type: ignore[arg-type]
    some = new.tail(40).select(list(ranker.columns)).to_dicts()
    ranked = ranker.rank(Request(log["user"][-1], some, time=int(log["time"].max()) + 1))  # type: ignore[arg-type]
    found["ranked"] = {name: value.tolist() for name, value in ranked.predictions.items()}
    again = train(replace(run, init=str(folder / "bundle")), folder / "again", tables={"log": new})
    found["again"] = tensors(again.bundle)
    kept = again.bundle.fitted.vocabularies["item"]
    found["names"] = [kept.name(code) for code in range(kept.size)]
    on_disk = [isinstance(v.values, Dictionary) for b in (bundle, again.bundle) for v in b.fitted.vocabularies.values()]
    assert any(on_disk) == (dictionary.LARGE == 2)
    return found


@pytest.mark.slow
def test_all_that_a_run_does_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(rows=400)
    other = pl.int_range(pl.len()) % 5 == 0
    new = log.with_columns(item=pl.when(other).then("new " + pl.col("item")).otherwise("item"))
    monkeypatch.setattr(dictionary, "PIECE", 3)
    found = {}
    for large in (1 << 20, 2):
        monkeypatch.setattr(dictionary, "LARGE", large)
        found[large] = outcome(tmp_path / str(large), log, new)
    one, two = found.values()
    for name, want in one.items():
        assert two[name] == want, name
    assert any(name.startswith("new i") for name in one["names"]) and one["again"] != one["weights"]
