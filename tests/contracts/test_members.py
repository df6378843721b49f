"""What every member of a slot must do, whatever it is.  A new member is tested here without a line of its own."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from toylog import config_classes, make_data, make_log, make_run, views_for

from unbraid import config, store
from unbraid.bundle import build
from unbraid.class_head import Classes
from unbraid.config import ModelChoice, Run
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.train import Training
from unbraid.train.dense import dense
from unbraid.types import Batch, Feature, Task


def members(choice: Any) -> list[Any]:
    """The classes of a slot's union."""
    inner = typing.get_args(choice)[0] if typing.get_origin(choice) is typing.Annotated else choice
    return list(typing.get_args(inner)) or [inner]


def choices(crossed: bool = True) -> list[Any]:
    """Every tower, history encoder, head and laziness, one change at a time.

    Encoders of histories, numbers and vectors meet every kind of tables; without ``crossed`` each meets one, and one of
    them all, for what a table's kind does to one encoder as to another.
    """
    out = []
    for tower, lazy in itertools.product(members(config.TowerChoice), (0, -1)):
        views = dataclasses.replace(views_for(tower()), lazy_rows=lazy)
        out.append(
            pytest.param(
                ModelChoice(tower=tower(), tables=views), id=f"{tower.__name__}-{'lazy' if lazy == 0 else 'dense'}"
            )
        )
    layered = [t for t in members(config.TowerChoice) if "layers" in {f.name for f in dataclasses.fields(t)}]
    for tower in layered:
        deep = tower(layers=2)
        out.append(
            pytest.param(
                ModelChoice(tower=deep, tables=dataclasses.replace(views_for(deep), kind="per_task", lazy_rows=0)),
                id=f"{tower.__name__}-deep",
            )
        )
    for history in members(config.HistoryChoice):
        out.append(pytest.param(ModelChoice(history=history(), tables=Views(width=4)), id=history.__name__))
        kinds = ((config.STEM, "per_task"), (config.SingleTask, "separate"), (config.SharedBottom, "several"))
        for tower, kind in kinds if crossed or history is config.DIN else ():
            sizes = {"widths": (4, 6)} if kind == "several" else {"width": 4}
            views = Views(kind=kind, lazy_rows=0, **sizes)  # type: ignore[arg-type]
            choice = ModelChoice(history=history(), tower=tower(), tables=views)
            out.append(pytest.param(choice, id=f"{history.__name__}-{kind}"))
    for interaction in members(config.InteractionChoice):
        out.append(pytest.param(ModelChoice(interaction=interaction(), tables=Views(width=4)), id=interaction.__name__))
    for tower, kind in ((config.STEM, "per_task"), (config.STEMAL, "separate")):
        views = Views(kind=kind, by="domain", width=4, lazy_rows=0)  # type: ignore[arg-type]
        out.append(pytest.param(ModelChoice(tower=tower(), tables=views), id=f"{tower.__name__}-domains"))
    experts = (config.Expert(0), config.Expert(1, config.Cross()), config.Expert(1))
    several = Views(kind="several", widths=(4, 6), lazy_rows=0)
    out.append(pytest.param(ModelChoice(tower=config.AME(), tables=several, experts=experts), id="AME-experts"))
    apart = ModelChoice(history=config.DARE(), history_of={"liked": config.Mean()}, tables=Views(width=4))
    out.append(pytest.param(apart, id="DARE-history_of"))
    own: list[Any] = [{"numbers": number()} for number in members(config.NumberChoice)]
    for vector in members(config.VectorChoice):
        pair = {"pairs": (("text_vector", "other_vector"),)} if vector is config.Similarity else {}
        own.append({"vectors": vector(**pair)})
    for slot in own:
        (name,) = (type(member).__name__ for member in slot.values())
        kinds = ((config.SharedBottom, "shared"), (config.STEM, "per_task"), (config.SingleTask, "separate"))
        for tower, kind in kinds if crossed or name in ("Periodic", "Similarity") else kinds[:1]:
            choice = ModelChoice(**slot, tower=tower(), tables=Views(kind=kind, width=4))  # type: ignore[arg-type]
            out.append(pytest.param(choice, id=f"{name}-{kind}"))
    out.append(pytest.param(ModelChoice(heads=Heads(by="domain"), tables=Views(width=4)), id="domain-heads"))
    return out


UPDATES = members(config.UpdateChoice)


def some_choices() -> list[Any]:
    """A few models, for what does not depend on the model's members: lazy and dense, tables of tasks, heads of domains."""
    names = ("SharedBottom-lazy", "SharedBottom-dense", "PLE-dense", "STEM-lazy", "domain-heads")
    return [choice for choice in choices() if choice.id in names]


def updates_with_choices() -> list[Any]:
    """The joint update with every model, every other with a few.

    Rows' decay belongs to the row optimiser, whatever the model: its other kind with a few models, by each update that has
    row optimisers of its own (`Joint`'s are those of all but AdaTask).
    """
    out = []
    for update in UPDATES:
        few = some_choices()
        own = few if update.__name__ in ("Joint", "AdaTask") else []
        for decay, some in (("catch_up", choices() if update is Joint else few), ("touched", own)):
            out += [pytest.param(update, *c.values, decay, id=f"{update.__name__}-{c.id}-{decay}") for c in some]
    return out


LOG = make_log(rows=400)
# two vectors, for pairs of them
VECTORS = (*make_data().features, Feature("other_vector", column="text_vector", kind="vector"))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    tasks = (Task("click"), Task("buy"), Task("spend", kind="real"), Task("size", kind="multiclass"))
    data = make_data(tasks=tasks, features=VECTORS, cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": LOG}))


def model_of(choice: ModelChoice, encoded: Encoded, seed: int = 0) -> tuple[Run, Model]:
    data = make_data(features=encoded.schema.features, tasks=encoded.schema.tasks)
    run = make_run(data=data, model=choice, seed=seed)
    return run, build(run, encoded.schema)


def some(encoded: Encoded, n: int = 24, start: int = 100) -> Batch:
    return encoded.batch(np.arange(start, start + n))


def hide(batch: Batch, tasks: list[str], domain: int | None = None) -> Batch:
    """The batch without observed labels of some tasks (in one domain, if given)."""
    where = torch.ones(len(batch), dtype=torch.bool) if domain is None else batch.domain == domain
    observed = {t: o & ~where if t in tasks else o for t, o in batch.observed.items()}
    return dataclasses.replace(batch, observed=observed)


# -------------------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("choice", choices(crossed=False))
def test_every_pattern_of_missing_labels_is_finite(choice: ModelChoice, encoded: Encoded) -> None:
    run, model = model_of(choice, encoded)
    terms, tasks = bound_terms(run, encoded.schema, model), [t.name for t in encoded.schema.tasks]
    update = run.update.build(model, steps=20, weights={})
    for hidden in itertools.chain.from_iterable(itertools.combinations(tasks, n) for n in range(len(tasks) + 1)):
        batch = hide(some(encoded), list(hidden))
        output = model(batch)
        losses = {k: v for term in terms for k, v in term(output, batch, 0).items()}
        assert set(losses) == set(tasks) - set(hidden), "an objective without an observed row is absent"
        assert all(torch.isfinite(v) and v.shape == () for v in losses.values())
        update(losses, output)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("choice", choices(crossed=False))
def test_rows_do_not_see_each_other_nor_their_order(choice: ModelChoice, encoded: Encoded) -> None:
    _, model = model_of(choice, encoded)
    model.double().eval()
    batch = _double(some(encoded))
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    for grads in (torch.no_grad, torch.enable_grad):  # tables are read in two ways
        with grads():
            whole = model(batch)
            shuffled = model(batch.select(order))
            alone = [model(batch.select(torch.tensor([i]))) for i in range(5)]
        for task, logits in whole.logits.items():
            torch.testing.assert_close(shuffled.logits[task], logits[order], rtol=0, atol=1e-12)
            torch.testing.assert_close(torch.cat([a.logits[task] for a in alone]), logits[:5], rtol=0, atol=1e-12)


def _double(batch: Batch) -> Batch:
    features = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.features.items()}
    return dataclasses.replace(batch, features=features)


@pytest.mark.parametrize("choice", choices(crossed=False))
def test_the_model_never_reads_meta_labels_or_row(choice: ModelChoice, encoded: Encoded) -> None:
    _, model = model_of(choice, encoded)
    model.eval()
    batch = some(encoded)
    labels = {k: torch.zeros_like(v) for k, v in batch.labels.items()}
    stripped = dataclasses.replace(batch, labels=labels, meta={}, row=torch.zeros_like(batch.row), weight=None)
    for task, logits in model(batch).logits.items():
        assert torch.equal(model(stripped).logits[task], logits)


@pytest.mark.parametrize("choice", choices(crossed=False))
def test_bfloat16_is_near_float32_and_reaches_the_same(choice: ModelChoice, encoded: Encoded) -> None:
    """Outputs are float32 and near those of float32, gradients are float32 and reach the same parameters."""
    run, model = model_of(choice, encoded)
    (term,), names, found = bound_terms(run, encoded.schema, model), dict(model.named_parameters()), []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        with dense(model, Training(precision=precision)):  # type: ignore[arg-type]
            output = model(some(encoded))
            losses = term(output, some(encoded), 0)
            grads = torch.autograd.grad(sum(losses.values()), list(names.values()), allow_unused=True)
        found.append((output, losses, grads))
    (plain, wanted, one), (low, losses, two) = found
    for name in plain.logits:
        assert low.logits[name].dtype == low.hidden[name].dtype == torch.float32
        torch.testing.assert_close(low.logits[name], plain.logits[name], rtol=0.05, atol=0.02)
        torch.testing.assert_close(losses[name], wanted[name], rtol=0.02, atol=0.01)
    assert low.trunk.dtype == torch.float32
    assert all(value.dtype == plain.extras[name].dtype for name, value in low.extras.items())
    assert [grad is None for grad in one] == [grad is None for grad in two]
    flat = [torch.cat([g.flatten() for g in grads if g is not None]) for grads in (one, two)]
    assert flat[1].dtype == torch.float32 and torch.cosine_similarity(*flat, dim=0) > 0.98


# ---------------------------------------------------------------------------------------------------------------- absence
def own_parameters(model: Model, run: Run, batch: Batch, task: str) -> set[str]:
    """Names that only this task's loss reaches; a lazy table counts through its looked-up rows."""
    reached: dict[str, set[str]] = {}
    (term,) = bound_terms(run, model.schema, model)
    names = dict(model.named_parameters())
    for objective in [t.name for t in model.schema.tasks]:
        output = model(batch)
        leaves = dict(names) | {
            f"embeddings.tables.{x.table}.weight": x.vectors for x in output.lookups if x.vectors.is_leaf
        }
        loss = term(output, batch, 0)[objective]
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        reached[objective] = {name for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return reached[task] - set().union(*(found for name, found in reached.items() if name != task))


def snapshot(model: Model, update: Any, names: set[str]) -> dict[str, Any]:
    """Weights and every piece of optimiser state whose path names one of the parameters, cloned."""
    found: dict[str, Any] = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    short = {n.removeprefix("embeddings.tables.").removesuffix(".weight") for n in names} | names

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, (*path, str(key)))
        elif set(path) & short:
            found["/".join(path)] = value.clone() if torch.is_tensor(value) else value

    walk(update.state_dict(), ())
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


@pytest.mark.parametrize(("update", "choice", "decay"), updates_with_choices())
def test_an_absent_task_does_not_move(choice: ModelChoice, decay: str, update: Any, encoded: Encoded) -> None:
    run, model = model_of(choice, encoded)
    config = dataclasses.replace(update(), weight_decay=0.1, table_weight_decay=0.1, decay=decay)
    step = config.build(model, steps=100, weights={})
    terms = bound_terms(run, encoded.schema, model)

    def go(batch: Batch, at: int) -> None:
        output = model(batch)
        step({k: v for term in terms for k, v in term(output, batch, at).items()}, output)

    for at in range(20):  # mixed steps fill the moments
        go(some(encoded, start=10 * at), at)
    for task in ("click", "buy", "spend", "size"):
        names = own_parameters(model, run, some(encoded), task)
        assert any(f"heads.task/{task}" in n for n in names)
        before = snapshot(model, step, names)
        assert len(before) > len(names), "the optimiser state of these parameters should have been found"
        others = {n: p.detach().clone() for n, p in model.named_parameters() if n not in names}
        go(hide(some(encoded), [task]), 20)
        assert same(before, snapshot(model, step, names)), f"{task} moved without a label"
        moved = [n for n, p in model.named_parameters() if n in others and not torch.equal(p, others[n])]
        assert moved, "the other tasks should have moved"


@pytest.mark.parametrize("decay", ["touched", "catch_up"])
def test_an_absent_domain_does_not_move_its_heads(decay: str, encoded: Encoded) -> None:
    choice = ModelChoice(heads=Heads(by="domain"), tables=Views(width=4))
    run, model = model_of(choice, encoded)
    step = Joint(weight_decay=0.1, decay=decay).build(model, steps=100, weights={})  # type: ignore[arg-type]
    (term,) = bound_terms(run, encoded.schema, model)
    for at in range(20):
        batch = some(encoded, start=10 * at)
        output = model(batch)
        step(term(output, batch, at), output)
    domain = 3
    for hidden in (hide(some(encoded), ["click"], domain), some(encoded).select(some(encoded).domain != domain)):
        names = {n for n, _ in model.named_parameters() if n.startswith(f"heads.task/click.linears.{domain}.")}
        assert len(names) == 2
        before = snapshot(model, step, names)
        output = model(hidden)
        step(term(output, hidden, 20), output)
        assert same(before, snapshot(model, step, names))


def test_a_domain_that_training_did_not_know_gets_the_mean_head(encoded: Encoded) -> None:
    _, model = model_of(ModelChoice(heads=Heads(by="domain")), encoded)
    model.eval()
    batch = some(encoded)
    known = range(2, len(encoded.schema.domains))
    logits = [model(dataclasses.replace(batch, domain=torch.full_like(batch.domain, d))).logits["click"] for d in known]
    unknown = model(dataclasses.replace(batch, domain=torch.zeros_like(batch.domain))).logits["click"]
    torch.testing.assert_close(unknown, torch.stack(logits).mean(0), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- updates
def trained(
    update: Any, choice: ModelChoice, encoded: Encoded, steps: range, *, state: Any = None, backwards: bool = False
) -> tuple[Model, Any]:
    """A float64 model and its update after some steps of ten, in which tasks are absent in turn; ``state`` is where to start."""
    run, model = model_of(choice, encoded)
    model.double()
    config = dataclasses.replace(update(), weight_decay=0.1, table_weight_decay=0.1, learning_rate="cosine")
    step = config.build(model, steps=10, weights={"click": 0.5})
    if state is not None:
        model.load_state_dict(state["model"])
        step.load_state_dict(state["update"])
    terms, tasks = bound_terms(run, encoded.schema, model), [t.name for t in encoded.schema.tasks]
    for at in steps:
        batch = _double(hide(some(encoded, start=10 * at), tasks[: at % len(tasks)]))
        output = model(batch)
        losses = {k: v for term in terms for k, v in term(output, batch, at).items()}
        step(dict(reversed(losses.items())) if backwards else losses, output)
    return model, step


@pytest.mark.parametrize("choice", some_choices())
@pytest.mark.parametrize("update", UPDATES)
def test_an_update_continues_from_a_file_bit_for_bit(
    update: Any, choice: ModelChoice, encoded: Encoded, tmp_path: Path
) -> None:
    whole, straight = trained(update, choice, encoded, range(10))
    half, first = trained(update, choice, encoded, range(4))
    store.save(tmp_path / "state", {"model": half.state_dict(), "update": first.state_dict()})
    model, again = trained(update, choice, encoded, range(4, 10), state=store.load(tmp_path / "state"))
    names = {name for name, _ in model.named_parameters()}
    assert same(snapshot(model, again, names), snapshot(whole, straight, names))
    straight.settle(), again.settle()
    assert same(dict(model.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize("choice", some_choices())
@pytest.mark.parametrize("update", UPDATES)
def test_the_order_of_objectives_does_not_matter(update: Any, choice: ModelChoice, encoded: Encoded) -> None:
    models = []
    for backwards in (False, True):
        model, step = trained(update, choice, encoded, range(10), backwards=backwards)
        step.settle()
        models.append(model)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize("update", UPDATES)
def test_an_update_refuses_the_state_of_another_kind(update: Any, encoded: Encoded) -> None:
    _, model = model_of(ModelChoice(tables=Views(width=4)), encoded)
    step = update().build(model, steps=1, weights={})
    with pytest.raises(ValueError, match=f"that of update `{update().kind}`. Found `another`"):
        step.load_state_dict({**step.state_dict(), "kind": "another"})


# ------------------------------------------------------------------------------------------------------------------ terms
TERMS = members(config.TermChoice)
PARENTS = {"buy": "click"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Vectors of any classes, without a file."""

    def of(self, names: Sequence[str]) -> Classes:
        return Classes(torch.randn(len(names), 5, generator=torch.Generator().manual_seed(0)), scale=5.0)


SIZES: Any = Sizes()


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    tasks = (Task("click"), Task("buy", given="click"), Task("spend", kind="real"), Task("size", kind="multiclass"))
    data = make_data(tasks=tasks, cache=str(tmp_path_factory.mktemp("cache")))
    return Encoded(encode(data, tables={"log": LOG}))


def hide_chain(batch: Batch, tasks: list[str]) -> Batch:
    """`hide`, and a child with its parent, as an encoded table does."""
    return hide(batch, [*tasks, *(child for child, parent in PARENTS.items() if parent in tasks)])


def model_for(term: Any, encoded: Encoded) -> tuple[Run, Model]:
    """A model that gives what the term reads: a plain one, one with an extra head or vectors of classes, or whose histories
    have second heads."""
    second = [h for h in members(config.HistoryChoice) if "auxiliary" in {f.name for f in dataclasses.fields(h)}]
    parts: list[dict[str, Any]] = [{}, *({"extra_heads": (head(),)} for head in members(config.ExtraHeadChoice))]
    parts.append({"classes": {"size": SIZES}, "heads": Heads(hidden=(4,))})
    for part in (*parts, *({"history": history(auxiliary=(4,))} for history in second)):
        run, model = model_of(ModelChoice(tables=Views(width=4), **part), encoded)
        if set(term().bind(encoded.schema).needs) <= set(model.gives):
            return run, model
    raise AssertionError(f"nothing gives what {term} needs")


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_finite_on_every_pattern_of_missing_labels(term: Any, chained: Encoded) -> None:
    run, model = model_for(term, chained)
    bound, tasks = term().bind(chained.schema), [t.name for t in chained.schema.tasks]
    update = run.update.build(model, steps=20, weights={})
    for hidden in itertools.chain.from_iterable(itertools.combinations(tasks, n) for n in range(len(tasks) + 1)):
        batch = hide_chain(some(chained), list(hidden))
        output = model(batch)
        losses = bound(output, batch, 0)
        seen = {task for task in tasks if batch.observed[task].any()}
        seen &= set(getattr(bound, "objectives", tasks))
        known = {task for task in tasks if task in seen or PARENTS.get(task) in seen}
        known |= set(getattr(bound, "objectives", ())) - set(tasks)  # of its own, whatever the labels
        assert seen <= set(losses) <= known, "an objective without an observed row of its chain is absent"
        assert all(torch.isfinite(v) and v.shape == () for v in losses.values())
        update(losses, output)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("term", TERMS)
def test_a_term_moves_no_task_whose_chain_is_absent(term: Any, chained: Encoded) -> None:
    run, model = model_for(term, chained)
    bound = term().bind(chained.schema)
    trained = "second." if any(name.startswith("history.") for name in bound.needs) else "heads."
    step = Joint(weight_decay=0.1, table_weight_decay=0.1).build(model, steps=100, weights={})

    def go(batch: Batch) -> None:
        output = model(batch)
        step(bound(output, batch, 0), output)

    for at in range(20):
        go(some(chained, start=10 * at))
    speaks = getattr(bound, "objectives", ("click", "buy", "spend", "size"))  # a loss may be one of some tasks only
    if not set(speaks) & {task.name for task in chained.schema.tasks} and not getattr(bound, "unlabelled", ()):
        assert not any(name.startswith("heads.") for name in step.state_dict()["dense"]), "it reads no task's head"
    for chain in [chain for chain in (["click", "buy"], ["spend"], ["size"]) if set(chain) & set(speaks)]:
        heads = {f"{trained}task/{task}" for task in chain}
        names = {n for n, _ in model.named_parameters() if any(head in n for head in heads)}
        before, rest = snapshot(model, step, names), {n: p.detach().clone() for n, p in model.named_parameters()}
        assert len(before) > len(names) >= 2 * len(chain)
        go(hide_chain(some(chained), chain))
        assert same(before, snapshot(model, step, names)), f"{chain} moved without a label"
        others = {f"{trained}task/{task}." for task in speaks if task not in chain}
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, rest[n])}
        assert all(any(head in n for n in moved) for head in others)
        if not hasattr(bound, "objectives"):
            assert all(n in moved for n in rest if trained in n and n not in names)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_rows_without_labels_is_absent_where_all_are_known(term: Any, chained: Encoded) -> None:
    run, model = model_for(term, chained)
    bound, batch = term().bind(chained.schema), some(chained)
    if getattr(bound, "unlabelled", ()):
        known = {task: torch.ones_like(seen) for task, seen in batch.observed.items()}
        assert bound(model(batch), dataclasses.replace(batch, observed=known), 0) == {}


# ----------------------------------------------------------------------------------------------------------------- config
@pytest.mark.parametrize("cls", config_classes())
def test_a_misspelt_key_is_an_error_in_every_config_class(cls: type) -> None:
    assert len(config_classes()) >= 15
    with pytest.raises(ValidationError) as error:
        TypeAdapter(cls).validate_python({"misspelt_key": 1})
    assert any("misspelt_key" in map(str, m["loc"]) for m in error.value.errors())


@pytest.mark.parametrize("cls", config_classes())
def test_every_config_class_is_frozen(cls: type) -> None:
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
