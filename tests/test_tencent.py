"""`docs/tencent.md` draws the recipe as it is, and each of its parts can be taken out by the line that the page names."""

from __future__ import annotations

import re
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unbraid import bundle, config, recipes
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.preflight import bound_terms

PAGE = (Path(__file__).parent.parent / "docs" / "tencent.md").read_text()
DRAWN = " ".join(re.findall(r"^```text\n(.*?)^```", PAGE, re.M | re.S)[0].split())
REMOVED = re.findall(r"`--set '?([^`']+)'?`", PAGE.partition("| part | what")[2].partition("\n\n")[0])
OTHERS = re.findall(r"`--set '?([^`']+)'?`", PAGE.partition("and the same slots give:")[2].partition("\n## ")[0])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    data = replace(recipes.tencent().data, cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data))


@pytest.fixture(scope="module")
def whole(table: Encoded) -> Any:
    return bundle.build(recipes.tencent(), table.schema)


def test_the_inputs(table: Encoded) -> None:
    kinds = [f.kind for f in table.schema.features]
    count = {kind: kinds.count(kind) for kind in ("id", "bag", "number", "vector")}
    assert count == {"id": 32, "bag": 1, "number": 5, "vector": 0}
    first, *rest = table.schema.histories
    assert f"{count['id']} ids 1 bag of tags {count['number']} numbers" in DRAWN
    assert f"history `{first.name}`: N events {len(rest)} more histories" in DRAWN
    assert first.fields == ("video_id", "author_id", "position") and "(video, author, rank)" in DRAWN
    assert [f.transform for f in table.schema.features if f.kind == "number"] == ["log1p"] * 5


def test_the_shapes(table: Encoded, whole: Any) -> None:
    names = list(whole.embeddings.widths)
    assert list(whole.embeddings.widths.values()) == [8, 16, 32] and names == ["view0", "view1", "view2"]
    for view, width in whole.embeddings.widths.items():
        assert f"{view}, width {width}" in DRAWN
    parts = dict(zip(whole.experts, whole.interactions.values(), strict=True))
    assert [name.split(".")[1] for name in parts] == ["flat", "gwpfm", "cross"]
    widths = [part.width for part in parts.values()]
    assert widths == [404, 808, 1604] and all(f"(B, {width})" in DRAWN for width in widths)
    assert len(parts["view0.flat"].fields) == 54
    assert "54 fields per view" in DRAWN
    attention = {tuple(t.weight.shape) for name, t in whole.tables.items() if name == "every/video_id/attention"}
    assert attention == {(6947, 32)} and "attention tables (6947, 32)" in DRAWN
    (searched,) = {module.config.keep for name, module in whole.histories.items() if name.endswith("/seen")}
    assert f"keep the {searched} best" in DRAWN


def test_the_gates_and_the_heads(table: Encoded, whole: Any) -> None:
    batch = table.batch(np.arange(7))
    with torch.no_grad():
        out = whole.eval()(batch)
    tasks = [task.name for task in table.schema.tasks]
    assert tasks == ["click", "long_view", "like", "profile_enter"] and " ".join(tasks) in DRAWN
    for task in tasks:
        gate = out.extras[f"ame.gate.{task}"]
        assert gate.shape == (7, 3) and torch.allclose(gate.sum(1), torch.ones(7))
        assert out.hidden[task].shape == (7, 16) and out.logits[task].shape == (7,)
    assert "per task a softmax gate (B, 3)" in DRAWN and DRAWN.count("tower 16, head") == 4
    assert out.trunk.shape == (7, 32) and DRAWN.count("MLP 64-32") == DRAWN.count("(B, 32)") == 3
    weights = [term.weight for term in recipes.tencent().losses]
    assert weights == [0.9, 0.1] and "loss: 0.9 cross-entropy + 0.1 pairs" in DRAWN


def test_every_part_has_its_line() -> None:
    assert len(REMOVED) == 5 and {line.split("=")[0] for line in REMOVED} == {
        "model.numbers.kind", "model.history.kind", "model.experts", "model.tables.widths", "losses",
    }  # fmt: skip
    assert "model.tables.by=domain" in OTHERS


@pytest.mark.parametrize("line", [*REMOVED, *OTHERS])
def test_a_part_is_taken_out_by_one_line(line: str, table: Encoded, whole: Any) -> None:
    run = config.override(recipes.tencent(), [line])
    assert config.to_dict(run) != config.to_dict(recipes.tencent())
    model = bundle.build(run, table.schema)
    batch = table.batch(table.split("train")[:64])
    output = model(batch)
    losses = [loss for term in bound_terms(run, table.schema, model) for loss in term(output, batch, 0).values()]
    assert all(output.logits[task.name].isfinite().all() for task in table.schema.tasks)
    total = torch.stack(losses).sum()
    assert total.isfinite()
    total.backward()
    if not line.startswith("losses"):
        shapes = sorted(tuple(p.shape) for p in model.parameters())
        assert shapes != sorted(tuple(p.shape) for p in whole.parameters()), "it is another model"


def test_the_parameters_beside_the_ablation(table: Encoded) -> None:
    lines = [[cell.strip() for cell in line.split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
    title, *rows = [line for line in lines if len(line) == 13]
    assert title[-3] == "parameters, millions"
    path = Path(__file__).parent.parent / "benchmarks" / "paper_tencent.py"
    module = types.ModuleType("paper_tencent")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    checked = 0
    for run, row in zip(module.ablation(), rows, strict=True):
        if run.data == recipes.tencent().data:
            found = sum(p.numel() for p in bundle.build(run, table.schema).parameters())
            assert row[-3] == f"{found / 1e6:.2f}", run.name
            checked += 1
    assert checked == 7
