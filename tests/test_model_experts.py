"""Several interactions per view: names, order, who reads which tables, what is refused."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.bundle import build
from unbraid.config import Expert, ModelChoice, RunError
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.interactions.cross import Cross
from unbraid.interactions.flat import Flat
from unbraid.job import train
from unbraid.towers.ame import AME
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.multi_embedding import MultiEmbedding

SEVERAL = Views(kind="several", widths=(4, 6), lazy_rows=-1)
EXPERTS = (Expert(1, Cross()), Expert(0, Flat()), Expert(1, Cross(layers=1)), Expert(1, Flat()))
NAMES = ["view1.cross", "view0.flat", "view1.cross.2", "view1.flat"]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    data = make_data(cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": make_log(rows=300)}))


def model_of(encoded, **choice):
    return build(make_run(model=ModelChoice(**{"tables": SEVERAL, "experts": EXPERTS, **choice})), encoded.schema)


def test_the_tower_reads_one_vector_per_expert_in_the_order_of_the_list(encoded):
    model = model_of(encoded, tower=MultiEmbedding())
    batch = encoded.batch(np.arange(20))
    hidden = model.views(batch)
    assert list(hidden) == list(model.experts) == NAMES
    widths = [x.shape[1] for x in hidden.values()]
    assert widths == [e[0].in_features for e in model.tower.experts] == [widths[0], widths[1], widths[0], widths[0]]
    assert widths[1] < widths[0]
    crosses = [m for name, m in model.interactions.items() if "cross" in name]
    assert sorted(len(m.layers) for m in crosses) == [1, 2]
    flat = hidden["view1.flat"]
    for name, key in (("view1.cross", "view/view1_cross"), ("view1.cross.2", "view/view1_cross_2")):
        x = flat
        for layer in model.interactions[key].layers:
            x = flat * layer(x) + x
        torch.testing.assert_close(hidden[name], x)


@pytest.mark.parametrize("tower", [MultiEmbedding(), AME()])
def test_an_expert_reads_the_tables_of_its_own_view_only(encoded, tower):
    model = model_of(encoded, tower=tower)
    batch = encoded.batch(np.arange(20))
    for name in NAMES:
        model.zero_grad()
        model.views(batch)[name].sum().backward()
        reached = {
            n.split(".")[2].split("/")[0]
            for n, p in model.named_parameters()
            if n.startswith("emb") and p.grad is not None
        }
        assert reached == {name.split(".")[0]}


def test_one_flat_expert_per_view_is_the_model_without_experts(encoded):
    plain = model_of(encoded, tower=SharedBottom(), experts=())
    same = model_of(encoded, tower=SharedBottom(), experts=(Expert(0, Flat()), Expert(1, Flat())))
    batch = encoded.batch(np.arange(20))
    assert list(plain.experts) == ["view0", "view1"] and list(plain.interactions) == ["view/view0", "view/view1"]
    assert all(torch.equal(plain(batch).logits[t], same(batch).logits[t]) for t in ("click", "buy"))


def test_several_experts_read_the_shared_view(encoded):
    model = model_of(encoded, tables=Views(width=4), experts=(Expert(0, Flat()), Expert(0, Cross())))
    assert list(model.experts) == ["shared.flat", "shared.cross"]
    assert model(encoded.batch(np.arange(20))).logits["click"].shape == (20,)


def test_trains_and_comes_back_from_a_run_file(tmp_path):
    run = make_run(
        model=ModelChoice(tower=AME(), tables=SEVERAL, experts=EXPERTS), training=replace(make_run().training, steps=5)
    )
    assert config.from_dict(tomllib.loads(config.dumps(run))) == run
    result = train(run, tables={"log": make_log()}, baseline=False)
    assert result.metrics["test"]["click"]["auc"]["value"] > 0
    other = config.override(run, ["model.experts.0.interaction.kind=flat"])
    assert other.model.experts[0] == Expert(1, Flat())
    text = "[[model.experts]]\nview = 0\ninteraction = { kind = 'cross', rank = 2 }\n"
    read = config.from_dict({"data": config.to_dict(run)["data"], **tomllib.loads(text)})
    assert read.model.experts == (Expert(0, Cross(rank=2)),)


# ---------------------------------------------------------------------------------------------------------------- errors
def test_experts_and_an_interaction_are_refused():
    with pytest.raises(ValueError) as error:
        ModelChoice(interaction=Cross(), experts=(Expert(),))
    assert str(error.value) == "`experts` bring interactions of their own. Set `experts` or `interaction`, not both."
    plain = config.to_dict(make_run())
    plain["model"] |= {"experts": [{"view": 0, "interacton": {}}]}
    with pytest.raises(
        RunError,
        match="unknown key `model.experts.0.interacton`. Did you mean `interaction`. Allowed: view, interaction",
    ):
        config.from_dict(plain)


@pytest.mark.parametrize("views", [(0,), (0, 2, 1), (1, 1), (0, 1, -1)])
def test_every_view_and_no_other_needs_an_expert(encoded, views):
    with pytest.raises(ValueError) as error:
        model_of(encoded, experts=tuple(Expert(view) for view in views))
    assert str(error.value) == (
        f"`experts` should read each view from 0 to 1 and no other. Found experts of views {list(views)}."
    )


@pytest.mark.parametrize("kind", ["per_task", "separate"])
def test_views_of_tasks_are_refused(encoded, kind):
    with pytest.raises(ValueError) as error:
        model_of(encoded, tables=Views(kind=kind), experts=(Expert(),))
    assert str(error.value) == (
        f"`experts` read views that belong to no task. Found model.tables.kind `{kind}`. "
        "Set it to `shared` or `several`, or set `model.experts` to []."
    )
