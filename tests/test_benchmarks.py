"""A benchmark is honest only if both of its sides compute the same thing."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from unbraid.types import Ragged

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their annotations up here
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load("train_speed")


@pytest.fixture(scope="module")
def long_history(bench: ModuleType) -> ModuleType:
    return load("long_history")  # it imports the other one


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", ["mmoe", "din"])
def test_plain_loop_and_ours_have_the_same_losses_and_gradients(
    bench: ModuleType, tmp_path: Path, name: str, lazy: bool
) -> None:
    if name == "din":
        pytest.importorskip("unbraid.encoders.din")
    data = bench.encoded(1_000, tmp_path, history=name == "din")
    rows = data.split("train")
    plain = {"mmoe": bench.PlainMMoE, "din": bench.PlainDIN}[name](data.schema).double()
    ours = {"mmoe": bench.our_mmoe, "din": bench.our_din}[name](data.schema, lazy).double()
    pairs = list(zip(plain.parameters(), ours.parameters(), strict=True))
    for theirs, mine in pairs:
        assert theirs.shape == mine.shape
        theirs.data.normal_(0.0, 0.3)
        mine.data.copy_(theirs.data)
    chosen = np.random.default_rng(0).permutation(len(rows))[:64]
    batch = data.batch(rows[chosen])
    theirs_ = bench.plain_losses(plain, bench.PlainData(data, rows), torch.from_numpy(chosen))
    output = ours(batch)
    mine_ = torch.stack(list(bench.Supervised().bind(data.schema)(output, batch, 0).values()))
    torch.testing.assert_close(mine_, theirs_, **EXACT)

    theirs_.sum().backward()
    mine_.sum().backward()
    looked_up = {x.table: (x.ids, x.vectors.grad) for x in output.lookups if x.vectors.is_leaf}
    assert bool(looked_up) == lazy
    names = {id(table.weight): name for name, table in ours.tables.items()}
    for theirs, mine in pairs:
        grad = mine.grad
        if (table := names.get(id(mine))) in looked_up:
            ids, found = looked_up[table]
            grad = torch.zeros_like(mine).index_copy_(0, ids, found)
        torch.testing.assert_close(grad, theirs.grad, **EXACT)


def test_the_log_has_the_histories_it_claims(bench: ModuleType, tmp_path: Path) -> None:
    data = bench.encoded(3_000, tmp_path, history=True)
    plain = bench.PlainData(data, data.split("train"))
    assert int(plain.lengths.max()) == bench.LENGTH
    assert abs(float(plain.lengths.float().mean()) - bench.MEAN) < 8
    index = torch.tensor([5, 0, 77])
    items, mask = plain.padded(index)
    history = data.batch(data.split("train")[index.numpy()]).features["past"]
    assert isinstance(history, Ragged)
    assert torch.equal(mask.sum(1).long(), history.lengths)
    assert torch.equal(items[mask.bool()], history.values["items"])


@pytest.mark.parametrize("ids", ["uniform", "zipf", "repeats"])
def test_all_forms_of_the_search_give_the_same(long_history: ModuleType, ids: str) -> None:
    with torch.no_grad():
        case = long_history.Searched(16, 2_000, ids, quick=True)
        mine = long_history.ours(case)
        for form in long_history.FORMS:
            long_history.same(case, mine, long_history.plain(case, form, 7))
        long_history.same(case, mine, long_history.two_pass(case, 24))
        other = case.ids.view(case.rows, -1)[:, :20].argsort(1)
        with pytest.raises(AssertionError):
            long_history.same(case, mine, (other, mine[1]))
        with pytest.raises(AssertionError):
            long_history.same(case, mine, (mine[0], mine[1] + 1e-4))


def test_a_row_that_keeps_another_event_of_equal_score_is_compared_too(long_history: ModuleType) -> None:
    with torch.no_grad():
        case = long_history.Searched(16, 200_000, "uniform", quick=True)
        kept = long_history.ours(case)[0]
        last, own = case.exact(kept)[0].argmin(), case.ids.view(case.rows, -1)[0]
        other = next(place for place in range(len(own)) if place not in kept[0])
        case.keys[own[other]] = case.keys[own[kept[0, last]]]  # the two tie at the K-th place
        mine = long_history.ours(case)
        theirs = mine[0].clone()
        pair = {other, int(kept[0, last])}
        (place,) = (n for n, event in enumerate(theirs[0].tolist()) if event in pair)
        (theirs[0, place],) = pair - {int(theirs[0, place])}
        long_history.same(case, mine, (theirs, case.attended(theirs).float()))
        with pytest.raises(AssertionError):
            long_history.same(case, mine, (theirs, mine[1]))


def test_plain_and_our_dare_have_the_same_losses_and_gradients(long_history: ModuleType, tmp_path: Path) -> None:
    data = long_history.encoded(204, 64, 60, 15, tmp_path)
    theirs, mine = long_history.PlainDARE(data.schema).double(), long_history.our_dare(data.schema).double()
    names = [name for name, _ in theirs.named_parameters()]
    tables = {f"{role}.{name}.weight": mine.tables[f"{view}/{name}/{role}"].weight
              for view, role in (("shared", "value"), ("every", "attention"))
              for name in ("item", "category", "position")}  # fmt: skip
    (history,) = mine.histories.values()
    rest = [*mine.tower.parameters(), *mine.heads.parameters(), *mine.second.parameters()]
    others = [name for name in names if name not in tables and name != "rank_query"]
    matched = {**tables, "rank_query": history.queries["field/position"], **dict(zip(others, rest, strict=True))}
    assert set(matched) == set(names) and len(matched) == len(list(mine.parameters()))
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        assert parameter.shape == matched[name].shape, name
        parameter.data.normal_(0.0, 0.3)
        matched[name].data.copy_(parameter.data)

    rows = data.split("train")
    side = long_history.PlainSide(theirs, data, 64)
    lengths = side.end - side.start
    assert 0 in lengths and int(lengths.max()) > 20  # K
    chosen = torch.randperm(len(rows))[:64]
    batch = data.batch(rows[chosen.numpy()])
    output = mine(batch)
    terms = long_history.Supervised().bind(data.schema), long_history.HistoryLoss().bind(data.schema)
    mine_ = torch.stack([term(output, batch, 0)["click"] for term in terms])
    theirs_ = side.losses(chosen)
    torch.testing.assert_close(mine_, theirs_, **EXACT)
    theirs_.sum().backward()
    mine_.sum().backward()
    for name, parameter in theirs.named_parameters():
        grad = matched[name].grad
        assert grad is not None and grad.any(), name
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


class Here:
    """Instead of a pool of processes, which was tried before and takes seconds to start."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)

    @staticmethod
    def submit(work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


def run_twice(name: str, *options: str) -> str:
    """The output of a benchmark, a process of its own, which is the same when it is called again: nothing is trained twice."""
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / f"{name}.py"), *options]
    first = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    module, second = load(name), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(second):
        patch.setattr(sys, "argv", command[1:])
        patch.setattr(module, "ProcessPoolExecutor", Here)
        module.main()
    assert first == second.getvalue(), "nothing is trained twice"
    return first


@pytest.mark.slow
def test_the_comparison_of_long_history_encoders_runs_and_continues(tmp_path: Path) -> None:
    options = ("kuairand", "--out", str(tmp_path), "--quick", "--dims", "8", "--seeds", "2", "--jobs", "1")
    shown = run_twice("paper_dare", *options, "--only", "twin", "dare", "mean")
    assert json.loads(shown.splitlines()[-1])["rates"]["8"].keys() == {"twin", "dare", "mean"}


@pytest.mark.slow
def test_the_ablation_of_the_assembled_system_runs_and_says_what_it_cost(tmp_path: Path) -> None:
    shown = run_twice("paper_tencent", "ablation", "--out", str(tmp_path), "--quick", "--seeds", "1", "--jobs", "1")
    assert json.loads(shown.splitlines()[-1]) == {"benchmark": "paper_tencent", "part": "ablation", "seeds": 1}
    cost = json.loads((tmp_path / "ablation.json").read_text())["ablation"]["cost"]
    runs = load("paper_tencent").ablation()
    assert [run.name for run in runs] == [name for name, found in cost.items() if found]
    for run in runs:
        found = cost[run.name]
        assert found["steps"] == 2 and found["seconds"] > 0
        line = next(line for line in shown.splitlines() if line.startswith(f"| {run.name} | 1 x 1 seed"))
        assert f"| {found['parameters']['tables']:,} | {found['parameters']['dense']:,} |" in line
    assert "Seconds of training hold for an idle machine only" in shown


@pytest.mark.slow
def test_the_widths_of_the_assembled_system_keep_their_spectra(tmp_path: Path) -> None:
    shown = run_twice(
        "paper_tencent", "widths", "--out", str(tmp_path), "--quick", "--seeds", "1", "--jobs", "1", "--plot"
    )
    found = json.loads((tmp_path / "widths.json").read_text())["abundance"]
    widths = {"1x8": 8, "1x16": 16, "1x32": 32, "1x64": 64, "2x8": 16, "4x8": 32, "8x8": 64}
    assert {name: [seed["video_id"]["width"] for seed in seeds] for name, seeds in found.items()} == {
        name: [width] for name, width in widths.items()
    }
    for name, seeds in found.items():
        for vocabulary, values in ((v, seed[v]) for seed in seeds for v in seed):
            spectrum = np.array(values["spectrum"])
            assert vocabulary == "tag" or len(spectrum) == values["width"]  # there are 46 known tags
            assert spectrum[0] == 1 and (np.diff(spectrum) <= 0).all() and (spectrum >= 0).all()
            assert abs(spectrum.sum() - values["ia"]) < 1e-4
        assert f"IA {name:<6} video_id {np.mean([s['video_id']['ia'] for s in seeds]):.1f} of {widths[name]} (" in shown
    assert (tmp_path / "spectra.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_ranking_losses_of_the_assembled_system_run(tmp_path: Path) -> None:
    run_twice("paper_tencent", "ranking", "--out", str(tmp_path), "--quick", "--seeds", "1", "--jobs", "1")
    found = json.loads((tmp_path / "ranking.json").read_text())
    assert found.keys() == {"3/auc", "3/logloss"}
    rows = json.loads((tmp_path / "ranking-3" / "cross_entropy" / "seed-0" / "metrics.json").read_text())["test"][
        "click"
    ]
    assert 0 < rows["positives"] < 0.05 * rows["rows"], "positives are thinned in the test split, too"


@pytest.mark.slow
def test_the_stream_of_days_runs() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "online.py"
    command = [sys.executable, str(script), "--quick"]
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(shown.splitlines()[-1])
    assert found["quick"] and found["seeds"] == 1
    for name, periods in load("online").FIRST.items():
        table = shown.partition(f"## Frozen after the {name}, 1 seeds")[2].partition("Mean over days")[0]
        days = [line.split(" | ") for line in table.splitlines() if line.startswith("| 2022-")]
        assert len(days) == 15 - periods and [day[0] for day in days] == sorted({day[0] for day in days})
        for metric, live, frozen in (("auc", 3, 4), ("pcoc", 6, 7)):
            means = [np.mean([float(day[at].strip(" |")) for day in days]) for at in (live, frozen)]
            assert np.allclose(means, [found[name][metric][side] for side in ("live", "frozen")], atol=2e-4)


@pytest.mark.slow
def test_a_tab_without_labels_is_adapted_to_and_calibrated(tmp_path: Path) -> None:
    options = ("kuairand", "--out", str(tmp_path), "--quick", "--seeds", "1", "--jobs", "1", "--cases", "to_tab_4")
    shown = run_twice("paper_transfer", *options, "--only", "mcc")
    found = json.loads(shown.splitlines()[-1])
    assert found["auc"]["to_tab_4"].keys() == {"labels_only", "mcc"} and found["quick"]
    table = json.loads((tmp_path / "quick" / "kuairand" / "tables.json").read_text())["to_tab_4"]
    names = {"vanilla", "temperature", "histogram", "isotonic", "cpcs", "transcal", "transcal_intercept"}
    for each in table["calibrators"].values():
        assert each.keys() == names and all(each[name]["calibration"][0] > 0 for name in names)
    vanilla = table["calibrators"]["mcc"]["vanilla"]["calibration"][0]
    assert vanilla == pytest.approx(table["calibration_ratio"]["mcc"][0], rel=1e-6), "as the run itself measured it"


@pytest.mark.slow
def test_the_cost_of_a_gradient_per_task_is_measured(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "interference_cost.py"
    command = [sys.executable, str(script), "--quick", "--cache", str(tmp_path), "--only", "adatask_2tasks_cost"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    assert found["benchmark"] == "interference_cost" and found["ratios"]["adatask_2tasks_cost"] > 1


def test_both_forms_of_class_confusion_are_one() -> None:
    bench = load("transfer_speed")
    logits = 2 * torch.randn(9, 7, dtype=torch.float64).requires_grad_()
    matrix, closed = bench.matrix_confusion(logits), bench.class_confusion(logits, bench.TEMPERATURE)
    torch.testing.assert_close(matrix, closed, **EXACT)
    of = torch.autograd.grad(matrix, logits, retain_graph=True), torch.autograd.grad(closed, logits)
    torch.testing.assert_close(*of, **EXACT)


@pytest.mark.parametrize(("candidates", "events"), [(9, 500), (3, 4)])
def test_ranking_and_its_plain_forms_give_the_same(candidates: int, events: int) -> None:
    serve = load("serve")
    case = serve.Case(candidates, events, 8)
    with torch.no_grad():
        mine = case.ours()
        for form in (*serve.forms_of(case).values(), lambda: case.copied(2)):
            serve.same(mine, form())
        with pytest.raises(AssertionError):
            serve.same({**mine, "item": mine["item"] + 1e-3}, case.product())


def test_the_serving_benchmark_ranks_with_the_real_ranker(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    ranker, request = load("serve").ranker_of(tmp_path, 60)
    found = ranker.rank(request)
    assert found.events == 60 and len(found.order) == len(request.candidates) and not found.degraded
    ranker.store.close()
