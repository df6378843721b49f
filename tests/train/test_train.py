"""The loop, early stopping, checkpoints, resumption, warm start, bundles: end to end on a small log."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid import config, store
from unbraid.bundle import Bundle, BundleError
from unbraid.config import ModelChoice
from unbraid.data.table import Encoded, prefetch
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import JobError, evaluate_bundle, train
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.stem import STEM
from unbraid.train import Local, Training, Watcher
from unbraid.train.scoring import check_metric, selected
from unbraid.types import Feature, History, Task

TABLES = {"log": make_log()}
DROPOUT = ModelChoice(
    tower=STEM(expert=(16,), tower=(8,), dropout=0.3),
    tables=Views(kind="per_task", width=4, lazy_rows=0, unknown_rate=0.1),
)


def weights(result: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in result.bundle.model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


class Dies(Watcher):
    """A watcher that kills the run at an evaluation."""

    def __init__(self, step: int) -> None:
        self.at = step

    def evaluated(self, step: int, *rest: Any) -> None:
        if step == self.at:
            raise RuntimeError("killed")


def test_fixed_seeds_give_identical_runs_and_other_seeds_do_not() -> None:
    run = make_run(model=DROPOUT)
    first, second = train(run, tables=TABLES, baseline=False), train(run, tables=TABLES, baseline=False)
    assert equal(weights(first), weights(second))
    assert first.metrics["test"] == second.metrics["test"]
    other = train(dataclasses.replace(run, seed=1), tables=TABLES, baseline=False)
    assert not equal(weights(first), weights(other))


@pytest.mark.parametrize("decay", ["touched", "catch_up"])
@pytest.mark.parametrize("every", [3, 5])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, every: int, decay: str) -> None:
    update = Joint(
        lr=0.01, weight_decay=0.01, table_weight_decay=0.05, decay=decay, learning_rate="cosine", clip_norm=1.0
    )  # type: ignore[arg-type]
    training = Training(
        batch_size=64, steps=24, evaluate_every=8, patience=2, checkpoint_steps=every, checkpoint_seconds=0
    )
    run = make_run(model=DROPOUT, update=update, training=training)
    whole = train(run, tables=TABLES, baseline=False)
    with pytest.raises(RuntimeError, match="killed"):
        train(run, tmp_path / "out", tables=TABLES, baseline=False, watcher=Dies(16))
    assert (tmp_path / "out" / "fit-0.safetensors").exists()
    resumed = train(run, tmp_path / "out", tables=TABLES, baseline=False, resume=True)
    assert equal(weights(whole), weights(resumed))
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[:2] == [8, 16], "each evaluation is logged once"
    assert not list((tmp_path / "out").glob("fit-*"))


@dataclasses.dataclass(frozen=True)
class TwoFits:
    """A schedule of two calls, for what a session counts."""

    def __call__(self, session: Any, model: Any, steps: int) -> Any:
        for share in (8, steps - 8):
            model, _ = session.fit(model, share)
        return model


@pytest.mark.parametrize("dies", [4, 16])  # in the first call, in the second
def test_seconds_and_steps_are_those_of_all_processes(tmp_path: Path, dies: int) -> None:
    training = Training(batch_size=64, steps=24, evaluate_every=4, checkpoint_steps=1, checkpoint_seconds=0)
    run, out = dataclasses.replace(make_run(training=training), schedule=TwoFits()), tmp_path / "out"
    with pytest.raises(RuntimeError, match="killed"):
        train(run, out, tables=TABLES, baseline=False, watcher=Dies(dies))
    for path in out.glob("fit-*.safetensors"):
        store.save(path, {**store.load(path), "seconds": 100.0})  # as if each call had taken long
    calls = len(list(out.glob("fit-*.safetensors")))
    found = train(run, out, tables=TABLES, baseline=False, resume=True).metrics
    assert found["steps"] == 24
    assert 100 * calls <= found["seconds"]["train"] < 100 * calls + 50  # the rest may round to 0


def test_an_unfinished_or_finished_folder_is_not_overwritten_silently(tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "out"
    train(run, out, tables=TABLES, baseline=False)
    with pytest.raises(JobError, match="finished run.*--overwrite"):
        train(run, out, tables=TABLES, baseline=False)
    with pytest.raises(JobError, match="different run"):
        train(dataclasses.replace(run, seed=5), out, tables=TABLES, baseline=False, resume=True)
    again = train(run, out, tables=TABLES, baseline=False, resume=True)  # finished: it is loaded
    assert again.metrics["test"].keys() == {"click", "buy"}
    train(dataclasses.replace(run, seed=5), out, tables=TABLES, baseline=False, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("precious")
    with pytest.raises(JobError, match="not empty"):
        train(run, tmp_path / "other", tables=TABLES, baseline=False, overwrite=True)
    assert (tmp_path / "other" / "mine.txt").read_text() == "precious"


def test_early_stopping_keeps_the_best_weights() -> None:
    seen: list[tuple[int, float]] = []

    class Sees(Watcher):
        def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Any) -> None:
            assert value is not None
            seen.append((step, value))

    training = Training(
        batch_size=64, steps=400, evaluate_every=10, patience=3, metric="click.logloss", checkpoint_seconds=0
    )
    result = train(make_run(training=training, update=Joint(lr=0.05)), tables=TABLES, baseline=False, watcher=Sees())
    values = [v for _, v in seen]
    best = min(range(len(values)), key=values.__getitem__)
    assert len(values) < 40 and len(values) - 1 - best == 3, "it stops three evaluations after the best"
    valid = evaluate_bundle(result.bundle, split="valid", tables=TABLES)
    assert valid["click"]["logloss"]["value"] == pytest.approx(values[best], abs=1e-9)


def test_a_run_resumed_after_its_best_step_still_ends_with_those_weights(tmp_path: Path) -> None:
    training = Training(
        batch_size=64, steps=400, evaluate_every=10, patience=3, metric="click.logloss", checkpoint_steps=1,
        checkpoint_seconds=0,
    )  # fmt: skip
    run, looks = make_run(training=training, update=Joint(lr=0.05)), []

    class Looks(Watcher):
        def evaluated(self, step: int, metric: str, value: float | None, best: bool, values: Any) -> None:
            looks.append((step, best))

    whole = train(run, tables=TABLES, baseline=False, watcher=Looks())
    assert [best for _, best in looks[-3:]] == [False] * 3
    with pytest.raises(RuntimeError, match="killed"):
        train(run, tmp_path / "out", tables=TABLES, baseline=False, watcher=Dies(looks[-1][0]))
    again = train(run, tmp_path / "out", tables=TABLES, baseline=False, resume=True)
    assert equal(weights(whole), weights(again))


def test_selection_metric_must_exist() -> None:
    class Steps(Watcher):
        def step(self, *_: Any) -> None:
            raise AssertionError("a step was taken")

    for wrong in ("rmse", "acurracy", "click.rmse", "nothing.auc"):
        with pytest.raises(ValueError, match=f"`training.metric` is `{wrong}`, which no task has. Metrics: .*auc"):
            train(make_run(training=Training(batch_size=64, steps=2, metric=wrong)), tables=TABLES, watcher=Steps())
    check_metric("ndcg@5", make_schema("a"))
    assert selected({"a": {"auc": {"value": None}}}, "auc", make_schema("a")) == (None, False)


def make_schema(*names: str) -> Any:
    from unbraid.types import Schema

    return Schema((), tuple(Task(n) for n in names))


def test_all_kinds_of_tasks_train_and_predict(tmp_path: Path) -> None:
    tasks = (
        Task("click"),
        Task("buy", given="click"),
        Task("spend", kind="real"),
        Task("size", kind="multiclass", role="auxiliary"),
    )
    run = make_run(data=make_data(tasks=tasks), model=ModelChoice(heads=Heads(by="domain"), tables=Views(width=4)))
    result = train(run, tmp_path / "out", tables=TABLES)
    assert {"auc", "rmse"} <= set(result.metrics["test"]["click"]) | set(result.metrics["test"]["spend"])
    assert "accuracy" in result.metrics["test"]["size"]
    assert set(result.metrics["baseline"]["target_encoding"]) == {"click", "buy", "spend", "size"}
    predictor = Predictor(tmp_path / "out")
    rows = TABLES["log"].tail(50)
    out = predictor.predict(rows.drop("click", "buy", "spend", "size"), tables=TABLES)
    assert out.columns == ["click", "buy", "spend", "size"] and len(out) == 50
    assert out["click"].is_between(0, 1).all()
    assert out["size"].arr.sum().is_between(0.999999, 1.000001).all()


def test_predictions_of_the_test_rows_are_those_that_were_evaluated(tmp_path: Path) -> None:
    result = train(make_run(), tmp_path / "out", tables=TABLES, baseline=False)
    rows = TABLES["log"].filter(pl.col("time") >= 800 * 10**6)
    scores = Predictor(tmp_path / "out").scores(rows, tables=TABLES)
    from unbraid.evaluate import evaluate

    assert evaluate(scores, result.bundle.fitted.schema, seed=0) == result.metrics["test"]


def test_no_leak_from_later_rows_into_earlier_predictions(tmp_path: Path) -> None:
    """Every feature, label and event from a time of the test split on becomes garbage; training and earlier rows stay."""
    log = TABLES["log"]
    t = 900 * 10**6
    late = pl.col("time") >= t
    garbage = log.with_columns(
        pl.when(late).then(pl.lit("garbage")).otherwise("item").alias("item"),
        pl.when(late).then(-7).otherwise("shop").alias("shop"),
        pl.when(late).then(pl.lit(1e9)).otherwise("price").alias("price"),
        pl.when(late).then(1 - pl.col("click")).otherwise("click").alias("click"),
        pl.when(late).then(pl.lit(1)).otherwise("buy").alias("buy"),
        pl.when(late).then(pl.lit("mars")).otherwise("site").alias("site"),
    )
    clean_run = train(make_run(), tables={"log": log}, baseline=False)
    dirty_run = train(make_run(), tables={"log": garbage}, baseline=False)
    assert equal(weights(clean_run), weights(dirty_run))
    early = log.filter(~late)
    clean = Predictor(clean_run.bundle).predict(early, tables={"log": log})
    dirty = Predictor(dirty_run.bundle).predict(early, tables={"log": garbage})
    assert clean.equals(dirty)
    assert len(log.filter(late)) > 20 and not log.filter(late).equals(garbage.filter(late))


@pytest.mark.parametrize("when", [300, 500, 700])
def test_no_leak_inside_the_training_period(when: int) -> None:
    """With one trained model, garbage from t on never changes a prediction before t."""
    bundle = train(make_run(), tables=TABLES, baseline=False).bundle
    log = TABLES["log"]
    late = pl.col("time") >= when * 10**6
    garbage = log.with_columns(
        pl.when(late).then(pl.lit("i1")).otherwise("item").alias("item"),
        pl.when(late).then(1 - pl.col("click")).otherwise("click").alias("click"),
    )
    early = log.filter(~late)
    clean = Predictor(bundle).predict(early, tables={"log": log})
    assert clean.equals(Predictor(bundle).predict(early, tables={"log": garbage}))
    after = Predictor(bundle).predict(log.filter(late), tables={"log": log})
    assert not after.equals(Predictor(bundle).predict(log.filter(late), tables={"log": garbage})), "histories are used"


# ------------------------------------------------------------------------------------------------------------- warm start
def test_warm_start_moves_rows_by_value_and_counts_them(tmp_path: Path) -> None:
    first = TABLES["log"]
    shift = {"valid_from": 600 * 10**6, "test_from": 800 * 10**6}
    second = first.with_columns(pl.col("item").replace("i3", "zebra"), pl.col("site").replace("mail", "app"))
    old = train(
        make_run(model=ModelChoice(heads=Heads(by="domain"), tower=SharedBottom(bottom=(16,), tower=(8,)))),
        tmp_path / "old",
        tables={"log": first},
        baseline=False,
    )
    notes: list[str] = []

    class Notes(Watcher):
        def note(self, text: str) -> None:
            notes.append(text)

    still = dataclasses.replace(
        make_run(model=ModelChoice(heads=Heads(by="domain"), tower=SharedBottom(bottom=(16,), tower=(8,)))),
        update=Joint(lr=1e-30),
        init=str(tmp_path / "old"),
    )
    new = train(still, tables={"log": second}, baseline=False, watcher=Notes())
    (line,) = [n for n in notes if n.startswith("warm start")]
    before, after = old.bundle, new.bundle
    key = "embeddings.tables.shared/item/value.weight"
    for value in ("i1", "i3", "i7"):
        a = before.fitted.vocabularies["item"].encode(pl.Series([value]))[0]
        b = after.fitted.vocabularies["item"].encode(pl.Series([value]))[0]
        assert b >= 2, "values of the earlier model stay in the vocabulary"
        torch.testing.assert_close(
            before.model.state_dict()[key][a], after.model.state_dict()[key][b], rtol=0, atol=1e-20
        )
    zebra = after.fitted.vocabularies["item"].encode(pl.Series(["zebra"]))[0]
    assert zebra >= 2 and after.fitted.vocabularies["item"].size == before.fitted.vocabularies["item"].size + 1
    assert "1 rows new" in line
    old_code, new_code = (b.fitted.schema.domains.index("search") for b in (before, after))
    head = "heads.task/click.linears.{}.weight"
    torch.testing.assert_close(
        before.model.state_dict()[head.format(old_code)],
        after.model.state_dict()[head.format(new_code)],
        rtol=0,
        atol=1e-20,
    )
    assert shift


def test_warm_start_refuses_another_model(tmp_path: Path) -> None:
    train(make_run(), tmp_path / "old", tables=TABLES, baseline=False)
    other = make_run(model=ModelChoice(tower=SharedBottom((32,), (8,))), init=str(tmp_path / "old"))
    with pytest.raises(BundleError, match="A warm start needs the same model"):
        train(other, tables=TABLES, baseline=False)


def test_a_warm_start_resumes_bit_equal(tmp_path: Path) -> None:
    train(make_run(), tmp_path / "old", tables=TABLES, baseline=False)
    fewer = {"log": TABLES["log"].filter(pl.col("item") != "i3")}  # its row stays, though no row has it now
    training = Training(batch_size=64, steps=20, evaluate_every=10, checkpoint_steps=4, checkpoint_seconds=0)
    run = make_run(training=training, init=str(tmp_path / "old"), seed=1)
    whole = train(run, tables=fewer, baseline=False)
    with pytest.raises(RuntimeError, match="killed"):
        train(run, tmp_path / "new", tables=fewer, baseline=False, watcher=Dies(10))
    assert equal(weights(whole), weights(train(run, tmp_path / "new", tables=fewer, baseline=False, resume=True)))


# ----------------------------------------------------------------------------------------------------------------- bundle
def test_a_bundle_holds_no_pickle_and_its_parts(tmp_path: Path) -> None:
    train(make_run(), tmp_path / "out", tables=TABLES)
    names = {p.relative_to(tmp_path / "out").parts[0] for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {
        "run.toml",
        "schema.json",
        "vocabularies",
        "weights.safetensors",
        "metrics.json",
        "environment.json",
        "report.md",
        "log.jsonl",
    }
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "weights.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(Bundle.load(tmp_path / "out").model.state_dict())
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    click = metrics["test"]["click"]
    assert {"value", "low", "high"} <= set(click["auc"]) and {
        "gauc",
        "logloss",
        "calibration",
        "rows",
        "positives",
        "domains",
    } <= set(click)
    assert set(click["domains"]) == {"home", "search", "mail"}


@pytest.mark.parametrize("spoil", ["weights", "vocabulary", "run", "missing", "truncated"])
def test_loading_refuses_what_does_not_match_by_name(tmp_path: Path, spoil: str) -> None:
    out = tmp_path / "out"
    train(make_run(), out, tables=TABLES, baseline=False)
    expect = ""
    if spoil == "weights":
        state = store.load(out / "weights.safetensors")
        state["surplus"] = state.pop("heads.task/buy.linears.0.bias")
        store.save(out / "weights.safetensors", state)
        expect = "heads.task/buy.linears.0.bias is missing; surplus is not in the model"
    elif spoil == "vocabulary":
        document = json.loads((out / "schema.json").read_text())
        path = out / "vocabularies" / document["vocabularies"]["item"]["file"]
        pl.read_parquet(path).head(3).write_parquet(path)
        expect = "Vocabulary `item` should hold"
    elif spoil == "run":
        text = (out / "run.toml").read_text().replace('name = "buy"', 'name = "purchase"')
        (out / "run.toml").write_text(text)
        expect = "`tasks` of run.toml and schema.json differ"
    elif spoil == "missing":
        (out / "weights.safetensors").unlink()
        expect = "there is no weights.safetensors"
    else:
        data = (out / "weights.safetensors").read_bytes()
        (out / "weights.safetensors").write_bytes(data[: len(data) // 2])
        expect = "damaged, cut short"
    with pytest.raises(BundleError, match=expect.replace(".", r"\.")):
        Bundle.load(out)


# ---------------------------------------------------------------------------------------------------------------- session
def test_the_session_cannot_reach_the_test_split(encoded_of: Any) -> None:
    data: Encoded = encoded_of(make_data())
    session = Local(data, [], Joint(), Training(), {}, 0)
    with pytest.raises(ValueError, match="`train` and `valid` only"):
        session.rows("test")
    from unbraid.bundle import build

    test_rows = data.split("test")
    model = build(make_run(), data.schema)
    scores = session.score(model, "valid", rows=data.split("all"))
    assert not set(scores.row) & set(test_rows)


def test_a_schedule_of_several_fits_resumes_inside_each(tmp_path: Path) -> None:
    """Two calls of fit, the second with frozen layers and other weights; a death in either resumes bit-equal."""
    from unbraid.bundle import build
    from unbraid.data.encode import encode
    from unbraid.preflight import bound_terms

    data = Encoded(encode(make_data(), tables=TABLES))
    run = make_run(model=DROPOUT)
    training = Training(batch_size=64, evaluate_every=5, checkpoint_steps=4, checkpoint_seconds=0)

    def go(folder: Path | None, resume: bool, dies: tuple[int, int] | None) -> dict[str, torch.Tensor]:
        class DiesAt(Watcher):
            call = -1

            def evaluated(self, step: int, *rest: Any) -> None:
                if dies == (session.calls - 1, step):
                    raise RuntimeError("killed")

        model = build(run, data.schema)
        session = Local(
            data, bound_terms(run, data.schema, model), run.update, training, {}, 0, folder, resume, watcher=DiesAt()
        )
        model, state = session.fit(model, 10)
        model, _ = session.fit(model, 10, weights={"click": 0.0}, trainable=lambda n: n.startswith("heads"), seed=3)
        return {k: v.clone() for k, v in model.state_dict().items()}

    whole = go(None, False, None)
    for n, dies in enumerate([(0, 5), (1, 5), (1, 10)]):
        folder = tmp_path / str(n)
        folder.mkdir()
        with pytest.raises(RuntimeError, match="killed"):
            go(folder, False, dies)
        assert equal(whole, go(folder, True, None))


def test_settings_from_the_command_line_are_checked() -> None:
    run = make_run()
    assert config.override(run, ["model.tower.kind=mmoe", "model.tower.experts=3"]).model.tower.experts == 3  # type: ignore[union-attr]
    assert config.override(run, ["data.tasks.click.weight=2"]).data.tasks[0].weight == 2
    conditional = make_run(data=make_data(tasks=(Task("click"), Task("buy", given="click"))))
    esmm = config.override(conditional, ["losses.0.kind=esmm", "losses.0.orphans=negative"])
    assert config.override(esmm, ["losses.0.kind=supervised"]) == conditional, "another member has its own defaults"
    with pytest.raises(
        config.RunError, match=r"unknown key `model.tower.expertz`. Did you mean `expert`. Allowed: kind, experts"
    ):
        config.override(run, ["model.tower.kind=mmoe", "model.tower.expertz=3"])
    with pytest.raises(config.RunError, match="`model.tower` has no `kind`. Allowed: shared_bottom, mmoe, stem"):
        config.from_dict({**config.to_dict(run), "model": {"tower": {"experts": 3}}})
    with pytest.raises(config.RunError, match="should look like"):
        config.override(run, ["seed"])
    long = [f"model.tower.tower={list(range(1, 60))}", "model.history.kepe=3"]
    with pytest.raises(config.RunError) as error:
        config.override(run, ["model.history.kind=twin", *long])
    first, _, rest = str(error.value).partition("Allowed")
    assert (
        first == "unknown key `model.history.kepe`. Did you mean `keep`? "
        and "(with --set model.history.kind=twin " in rest
    )
    assert len(rest) < 400 and rest.endswith(" ...)")
    with pytest.raises(config.RunError, match=r"^unknown key `model.numbers_of.price.bin`. Did you mean `bins`"):
        config.override(run, ["model.numbers_of.price.kind=quantile", "model.numbers_of.price.bin=3"])


def test_a_mistake_of_the_whole_run_names_the_file_once() -> None:
    data = make_data(features=(Feature("user"), Feature("item")))
    plain = {**config.to_dict(make_run(data=data)), "baseline": ["shop"]}
    with pytest.raises(config.RunError) as error:
        config.from_dict(plain, "p/x.toml")
    want = "p/x.toml: `baseline` should name columns among ['user', 'domain', 'item']. Found ['shop']."
    assert str(error.value) == want


def test_requests_give_ranking_metrics() -> None:
    """Every request here holds one clicked row and others, so that recall@all is 1 and NDCG lies between."""
    log = make_log(rows=1200).with_columns((pl.int_range(pl.len()) // 6).alias("request"))
    log = log.with_columns((pl.col("request") % 40).alias("user"))  # a request is one user's
    log = log.with_columns(pl.when(pl.int_range(pl.len()) % 6 == 2).then(1).otherwise(0).alias("click"))
    run = make_run(data=make_data(request="request", tasks=(Task("click"),)))
    found = train(run, tables={"log": log}, baseline=False).metrics["test"]["click"]
    assert {"ndcg@5", "recall@5", "ndcg@10", "recall@10"} <= set(found)
    assert found["recall@10"]["value"] == 1.0
    assert 0 < found["ndcg@5"]["value"] < 1


# ------------------------------------------------------------------------------------------------- what is never deleted
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_never_deleted(tmp_path: Path, overwrite: bool) -> None:
    make_log().write_parquet(tmp_path / "log.parquet")
    run = make_run(data=make_data(folder=str(tmp_path), rows="log.parquet"))
    (tmp_path / "run.toml").write_text(config.dumps(run))
    with pytest.raises(
        JobError, match="holds log.parquet, which no run wrote; it is not deleted. Choose another --out"
    ):
        train(run, tmp_path, overwrite=overwrite)
    assert (tmp_path / "log.parquet").exists() and (tmp_path / "run.toml").read_text() == config.dumps(run)


def test_a_hand_written_run_file_is_never_deleted(tmp_path: Path) -> None:
    text = "# mine\n" + config.dumps(make_run())
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(JobError, match="holds a run.toml that no run wrote"):
        train(make_run(), tmp_path, tables={"log": make_log()}, overwrite=True)
    assert (tmp_path / "run.toml").read_text() == text


@pytest.mark.parametrize("name", ["", "../out", "a/b", "a\\b", ".hidden"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="`name` should name a folder"):
        make_run(name=name)


def test_a_table_where_a_list_should_stand() -> None:
    plain = config.to_dict(make_run()) | {"losses": {"kind": "supervised"}}
    with pytest.raises(config.RunError, match=r"`losses` should be a list; of tables it is written `\[\[losses\]\]`"):
        config.from_dict(plain)


def test_closing_the_batches_ends_their_thread() -> None:
    def alive() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name == "unbraid-prefetch"]

    batches = prefetch(iter(range(10_000)))  # type: ignore[arg-type]
    assert next(batches) == 0 and alive()
    batches.close()  # type: ignore[attr-defined]
    assert not alive()


def test_a_history_without_events_is_said() -> None:
    notes: list[str] = []

    class Listens(Watcher):
        def note(self, text: str) -> None:
            notes.append(text)

    never = History("never", ("item",), where="clicked = 7")
    run = make_run(data=make_data(histories=(*make_data().histories, never)))
    train(run, tables=TABLES, baseline=False, watcher=Listens())
    assert [n for n in notes if "has no event" in n] == [
        "! history never has no event in any row: look at its `where`, and at users and times of the events"
    ]


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_file_that_spells_a_number_otherwise_is_the_same_run(tmp_path: Path, whole: bool) -> None:
    """``epochs = 4`` from Python is read back as 4.0, and written so."""
    training = Training(batch_size=64, epochs=2, evaluate_every=2, checkpoint_steps=2, checkpoint_seconds=0)
    run, out = make_run(training=training), tmp_path / "out"
    if whole:
        train(run, out, tables=TABLES, baseline=False)
    else:
        with pytest.raises(RuntimeError, match="killed"):
            train(run, out, tables=TABLES, baseline=False, watcher=Dies(4))
    there = config.load(out / "run.toml")
    assert config.dumps(there) != (out / "run.toml").read_text(), "else this tests nothing"
    train(dataclasses.replace(there, data=run.data), out, tables=TABLES, baseline=False, resume=True)
    assert (out / "weights.safetensors").exists()


def test_a_run_that_died_before_its_first_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    training = Training(batch_size=64, steps=8, evaluate_every=4, checkpoint_steps=1000, checkpoint_seconds=0)
    run, out = make_run(training=training), tmp_path / "out"
    with pytest.raises(RuntimeError, match="killed"):
        train(run, out, tables=TABLES, baseline=False, watcher=Dies(4))
    assert not list(out.glob("*.safetensors")), "else this tests nothing"
    other = dataclasses.replace(run, seed=5)
    for given in (run, other):
        with pytest.raises(JobError, match="an unfinished run.*--resume.*--overwrite"):
            train(given, out, tables=TABLES, baseline=False)
    with pytest.raises(JobError, match="different run.*: seed: 0 / 5"):
        train(other, out, tables=TABLES, baseline=False, resume=True)
    again = train(run, out, tables=TABLES, baseline=False, resume=True)
    assert again.metrics["steps"] == 8 and equal(weights(again), weights(train(run, tables=TABLES, baseline=False)))


def test_a_mistake_leaves_the_folder_free(tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "out"
    with pytest.raises(ValueError, match="There is no table"):
        train(dataclasses.replace(run, data=dataclasses.replace(run.data, rows="lag")), out, tables=TABLES)
    assert not list(out.iterdir())
    train(run, out, tables=TABLES, baseline=False)
