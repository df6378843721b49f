"""Histories with encoders of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.bundle import Bundle, build
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.dare import DARE
from unbraid.encoders.din import DIN
from unbraid.encoders.eta import ETA
from unbraid.encoders.pooling import Mean, MeanHistory
from unbraid.encoders.table import Views
from unbraid.encoders.tin import TIN
from unbraid.job import train
from unbraid.losses.history import HistoryLoss
from unbraid.losses.supervised import Supervised
from unbraid.towers.stem import STEM
from unbraid.types import History

CHOICE = ModelChoice(history=DARE(keep=3, auxiliary=(8,)), history_of={"liked": Mean()})


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return Encoded(encode(make_data(cache=str(tmp_path_factory.mktemp("cache"))), tables={"log": make_log()}))


def test_each_history_has_its_encoder_and_only_the_others_read_the_main_ones_tables(encoded: Encoded) -> None:
    model = build(make_run(model=CHOICE), encoded.schema)
    assert type(model.histories["shared/liked"]) is MeanHistory
    assert model._reads["liked.item"] == ("item", ("value",))
    assert set(model._reads["seen.item"][1]) == {"value", "attention"}
    batch = encoded.batch(encoded.split("train")[-64:])
    out = model(batch)
    assert all(bool(x.isfinite().all()) for x in (*out.logits.values(), *out.extras.values()))
    assert {"history.click", "history.buy"} == set(out.extras)
    alone = build(make_run(model=ModelChoice(history_of={"seen": TIN(time="gap")})), encoded.schema)
    assert (
        type(alone.histories["shared/liked"]) is MeanHistory and type(alone.histories["shared/seen"]) is not MeanHistory
    )
    assert bool(alone(batch).logits["click"].isfinite().all())


def test_what_a_history_gives_is_what_its_encoder_gives_in_a_model_of_it_alone(encoded: Encoded) -> None:
    batch = encoded.batch(encoded.split("train")[-64:])
    mixed = build(make_run(model=replace(CHOICE, history_of={"liked": Mean()})), encoded.schema).eval()
    plain = build(make_run(model=ModelChoice(history=Mean())), encoded.schema).eval()
    for key, table in plain.tables.items():
        table.weight.data.copy_(mixed.tables[key].weight)
    fields = [
        model._fields("shared", batch, model._read(batch)[0], {}, model._vectors(batch)) for model in (mixed, plain)
    ]
    for name in plain.histories["shared/liked"].widths:
        assert torch.equal(fields[0][f"liked.{name}"], fields[1][f"liked.{name}"])


@pytest.mark.parametrize("views", [Views(width=4), Views(kind="per_task", width=4)])
def test_trains_and_comes_back(tmp_path: Path, views: Views) -> None:
    tower = {"tower": STEM()} if views.kind == "per_task" else {}
    run = make_run(model=replace(CHOICE, tables=views, **tower), losses=(Supervised(), HistoryLoss()))
    run = replace(run, data=replace(run.data, cache=str(tmp_path / "cache")))
    assert config.from_dict(config.to_dict(run)) == run
    train(run, tmp_path / "out", tables={"log": make_log()}, baseline=False)
    assert Bundle.load(tmp_path / "out").run.model.history_of == {"liked": Mean()}


def test_what_is_refused(encoded: Encoded) -> None:
    run = make_run(model=CHOICE)
    with pytest.raises(ValueError, match=r"history_of.*\['seen', 'liked'\].*\['like'\]"):
        make_run(model=ModelChoice(history_of={"like": Mean()}))
    for encoder in (DARE(), ETA(auxiliary=(4,))):
        with pytest.raises(ValueError, match=f"History `liked` has `{encoder.kind}`"):
            build(make_run(model=ModelChoice(history_of={"liked": encoder})), encoded.schema)
    with pytest.raises(ValueError, match=r"names all histories, \['seen', 'liked'\]: no history is left for `dare`"):
        make_run(model=ModelChoice(history=DARE(keep=3), history_of={"seen": Mean(), "liked": Mean()}))
    make_run(model=ModelChoice(history_of={"seen": TIN(time="gap"), "liked": Mean()}))
    changed = config.override(run, ["model.history_of.liked.kind=eta", "model.history_of.liked.keep=7"])
    assert changed.model.history_of == {"liked": ETA(keep=7)}, "another member with its own defaults"
    with pytest.raises(config.RunError, match="like"):
        config.override(run, ["model.history_of.like.kind=eta"])


def test_what_needs_a_target_has_one_among_its_own_histories(tmp_path: Path) -> None:
    histories = (History("seen", fields=("item", "gap"), length=10), History("acts", fields=("clicked",), length=5))
    data = make_data(histories=histories, cache=str(tmp_path))
    schema = Encoded(encode(data, tables={"log": make_log(rows=300)})).schema

    def made(**choice: Any) -> Any:
        return build(make_run(data=data, model=ModelChoice(**choice)), schema)

    made(history=DARE(keep=3))
    made(history=DARE(keep=3), history_of={"acts": Mean()})
    with pytest.raises(ValueError, match=r"History encoder `dare` needs .* Found histories \[\('acts', 'clicked'\)\]"):
        made(history=DARE(keep=3), history_of={"seen": DIN()})
    with pytest.raises(ValueError, match=r"History encoder `din` needs .* Found histories \[\('acts', 'clicked'\)\]"):
        made(history=DARE(keep=3), history_of={"acts": DIN()})
