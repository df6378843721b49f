"""Multi-embedding and AME: which expert reads which table, the non-linearity, gates, batch statistics."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from tower_kit import EXACT, biased, force, gate_of, gradients, relu_layers

from unbraid.encoders.table import Views
from unbraid.interactions.cross import Cross
from unbraid.layers import initialise, task_key
from unbraid.model import Model
from unbraid.towers.ame import AME
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.multi_embedding import ManyTablesTower, MultiEmbedding
from unbraid.types import Batch, Feature, Schema, Task

SMALL = {"expert": (9, 6), "tower": (5,)}
TASKS = ("a", "b", "c")
SEVERAL = Views(kind="several", widths=(2, 3, 4), std=1.0, lazy_rows=-1)


pytestmark = pytest.mark.usefixtures("float64")
KINDS = [
    pytest.param(MultiEmbedding(**SMALL, norm=norm, combine=combine), id=f"{norm}-{combine}")
    for norm in ("batch", "layer", "none")
    for combine in ("mean", "gate", "scalar")
] + [pytest.param(AME(**SMALL, gate=(4,)), id="ame")]


# ------------------------------------------------------------------------------------------------------------- structure
@pytest.mark.parametrize("config", KINDS)
def test_an_expert_reads_its_own_tables_only(net, sizes, ids, config):
    model = biased(net(config, SEVERAL, TASKS, sizes))
    for m, expert in enumerate(model.tower.experts):
        grads = gradients(model, expert(model.hidden(ids)[m]).sin().sum())
        for view in SEVERAL.names(TASKS):
            for field in sizes:
                grad = grads[model.table(view, field)]
                assert (grad is not None and bool(grad.any())) == (view == f"view{m}")


@pytest.mark.parametrize("config", KINDS)
def test_every_task_reaches_every_table_and_no_other_tasks_parts(net, sizes, ids, config):
    model = biased(net(config, SEVERAL, TASKS, sizes))
    for task in TASKS:
        grads = gradients(model, model.losses(ids)[task])
        assert all(grads[model.table(view, field)].any() for view in SEVERAL.names(TASKS) for field in sizes)
        for other in TASKS:
            own = [p for name, p in model.named_parameters() if task_key(other) in name]
            assert len(own) >= 4
            assert all((grads[p] is not None) == (other == task) for p in own)
    grads = gradients(model, sum(model.losses(ids).values()))
    assert all(grad is not None and grad.any() for p, grad in grads.items() if not is_bias_below_norm(model, p))


def is_bias_below_norm(model, parameter):
    """Batch normalisation takes the bias below it away."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    biases = [m.bias for e in model.tower.experts for m in e if isinstance(m, nn.Linear)]
    return bool(norms) and any(parameter is bias for bias in biases)


def test_embedding_parameters(net, sizes):
    one = net(MultiEmbedding(), Views(kind="several", widths=(5,) * 4), TASKS, sizes)
    assert sum(p.numel() for p in one.tables.parameters()) == (9 + 7) * 5 * 4
    ame = net(AME(), Views(kind="several", widths=(2, 4, 8)), TASKS, sizes)
    assert [tuple(ame.table(f"view{i}", "user").shape) for i in range(3)] == [(9, 2), (9, 4), (9, 8)]
    assert ame.tower.widths == dict.fromkeys(TASKS, 64)


# ---------------------------------------------------------------------------------------------------------------- parity
def normed(norm, x, layer):
    """The norm of a training batch in plain arithmetic."""
    if norm == "none":
        return x
    dims = 0 if norm == "batch" else 1
    mean = x.sum(dims, keepdim=True) / x.shape[dims]
    spread = ((x - mean) ** 2).sum(dims, keepdim=True) / x.shape[dims]
    return (x - mean) / (spread + 1e-5) ** 0.5 * layer.weight + layer.bias


def reference_expert(expert, x, norm):
    linears = [m for m in expert if isinstance(m, nn.Linear)]
    norms = [m for m in expert if isinstance(m, nn.BatchNorm1d | nn.LayerNorm)] or [None] * len(linears)
    for linear, layer in zip(linears, norms, strict=True):
        x = normed(norm, torch.einsum("bi,oi->bo", x, linear.weight) + linear.bias, layer)
        x = x * (x > 0)
    return x


@pytest.mark.parametrize("config", KINDS)
def test_value_and_gradient(config):
    tower = biased(config.build(TASKS, ("view0", "view1"), (7, 4)))
    for part in tower.modules():
        if isinstance(part, nn.BatchNorm1d | nn.LayerNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.2, 0.4)
    for weight in tower.scalars.values():
        nn.init.uniform_(weight, -1.0, 1.0)
    views, scale = [torch.randn(13, width, requires_grad=True) for width in (7, 4)], torch.randn(13, 1)
    leaves = [*views, *tower.parameters()]

    def gradient(states, trunk):
        loss = sum((states[t].sin() * scale * (k + 1)).sum() for k, t in enumerate(TASKS)) + trunk.cos().sum()
        return torch.autograd.grad(loss, leaves)

    out = tower(views)
    pool = [reference_expert(e, x, config.norm) for e, x in zip(tower.experts, views, strict=True)]
    both, states, combine = torch.cat(views, 1), {}, getattr(config, "combine", "gate")
    for task in TASKS:
        key = task_key(task)
        weights = torch.full((13, 2), 0.5)
        if combine == "gate":
            weights = gate_of(tower.gates[key], both)
            torch.testing.assert_close(out.extras[f"{config.kind}.gate.{task}"], weights, **EXACT)
        elif combine == "scalar":
            weights = tower.scalars[key].expand(13, 2)
        states[task] = relu_layers(tower.towers[key], weights[:, :1] * pool[0] + weights[:, 1:] * pool[1])
    torch.testing.assert_close(out.tasks, states, **EXACT)
    torch.testing.assert_close(out.trunk, (pool[0] + pool[1]) / 2, **EXACT)
    assert len(out.extras) == len(tower.gives) == (3 if combine == "gate" else 0)
    for mine, theirs in zip(gradient(out.tasks, out.trunk), gradient(states, (pool[0] + pool[1]) / 2), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


# ---------------------------------------------------------------------------------------------------------------- limits
@pytest.mark.parametrize("combine", ["mean", "gate", "scalar"])
def test_one_set_of_tables_is_the_single_model_with_the_same_head(net, sizes, ids, combine):
    one = Views(kind="several", widths=(4,), std=1.0, lazy_rows=-1)
    model = biased(net(MultiEmbedding(**SMALL, norm="none", combine=combine), one, TASKS, sizes))
    single = net(SharedBottom(bottom=SMALL["expert"], tower=SMALL["tower"]), one, TASKS, sizes)
    state = {n.replace("tower.experts.0.", "tower.bottom."): v for n, v in model.state_dict().items()}
    single.load_state_dict({n: state[n] for n in single.state_dict()})
    got, want = model(ids), single(ids)
    for task in TASKS:
        assert torch.equal(got[task], want[task])
    sum(z.sin().sum() for z in got.values()).backward()
    sum(z.sin().sum() for z in want.values()).backward()
    torch.testing.assert_close(model.table("view0", "item").grad, single.table("view0", "item").grad, **EXACT)


def test_scalars_start_as_the_mean():
    mean, scalar = (
        MultiEmbedding(**SMALL, combine=c).build(TASKS, ("x", "y", "z"), (4, 4, 4)) for c in ("mean", "scalar")
    )
    mean.load_state_dict({n: v for n, v in scalar.state_dict().items() if not n.startswith("scalars.")})
    views = [torch.randn(13, 4) for _ in range(3)]
    torch.testing.assert_close(mean(views).tasks, scalar(views).tasks, **EXACT)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_one_hot_gate_leaves_one_expert(column):
    tower = biased(AME(**SMALL).build(TASKS, ("x", "y", "z"), (3, 4, 5)))
    force(tower.gates[task_key("b")], column)
    views = [torch.randn(13, width) for width in (3, 4, 5)]
    want = tower.towers[task_key("b")](tower.experts[column](views[column]))
    torch.testing.assert_close(tower(views).tasks["b"], want, **EXACT)


def categorical(widths, interaction, std=1.0, tower=None):
    """A model on three id features with tables of these widths."""
    features = tuple(Feature(f"f{i}") for i in range(3))
    schema = Schema(features, (Task("click"),), sizes={f"f{i}": 11 for i in range(3)})
    views = Views(kind="several", widths=widths, std=std, lazy_rows=-1)
    tower = tower or MultiEmbedding(expert=(6,), norm="none", tower=())
    return Model(schema, tower, views, interaction)


def test_without_the_non_linearity_it_is_one_wide_model_with_a_block_diagonal_interaction():
    """phi = identity: fields of the wide model are the tables side by side, its cross matrix has the experts' on its diagonal."""
    model = biased(categorical((2, 3), Cross(layers=1)))
    for expert in model.tower.experts:
        del expert[1]  # the ReLU
    ids = {f"f{i}": torch.randint(11, (20,)) for i in range(3)}
    ones = torch.ones(20)
    batch = Batch(
        ids, {"click": ones}, {"click": ones.bool()}, ones.long(), None, ones.long(), ones.char(), -ones.long()
    )
    got = model(batch).logits["click"]

    tables = [[model.tables[f"view{m}/f{i}/value"].weight[ids[f"f{i}"]] for i in range(3)] for m in range(2)]
    wide = torch.cat([torch.cat(fields, 1) for fields in tables], 1)  # (20, 6 + 9)
    layers = [model.interactions[f"view/view{m}"].layers[0] for m in range(2)]
    matrix, bias = torch.block_diag(*[layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    assert matrix.shape == (15, 15) and not matrix[:6, 6:].any()
    crossed = wide * (wide @ matrix.T + bias) + wide
    maps = [expert[0] for expert in model.tower.experts]
    z = (crossed @ torch.cat([m.weight for m in maps], 1).T + maps[0].bias + maps[1].bias) / 2
    head = model.heads["task/click"].linears[0]
    torch.testing.assert_close(got, (z @ head.weight.T + head.bias).squeeze(1), **EXACT)
    with_relu = biased(categorical((2, 3), Cross(layers=1)))
    with_relu.load_state_dict(model.state_dict())
    assert not torch.allclose(with_relu(batch).logits["click"], got)


# ------------------------------------------------------------------------------------------------------ batch statistics
def test_batch_norm_reads_running_statistics_in_evaluation_and_on_one_row():
    tower = MultiEmbedding(**SMALL).build(TASKS, ("x",), (4,))
    for _ in range(200):
        tower([3.0 + 2.0 * torch.randn(64, 4)])
    before = copy.deepcopy(tower.state_dict())
    row = torch.randn(1, 4)
    alone = tower([row]).tasks["a"]
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items()), "one row moves nothing"
    tower.eval()
    with_others = tower([torch.cat([row, torch.randn(7, 4)])]).tasks["a"][:1]
    torch.testing.assert_close(alone, with_others, **EXACT)
    found = tower.experts[0][1]
    first = tower.experts[0][0](3.0 + 2.0 * torch.randn(20_000, 4))
    torch.testing.assert_close(found.running_mean, first.mean(0), rtol=0.2, atol=0.3)
    torch.testing.assert_close(found.running_var, first.var(0), rtol=0.2, atol=0.3)


def test_dropout_and_norm_stand_where_they_should():
    kinds = [type(m).__name__ for m in MultiEmbedding(expert=(9, 6), dropout=0.5).build(TASKS, ("x",), (4,)).experts[0]]
    assert kinds == ["Linear", "BatchNorm", "ReLU", "Dropout"] * 2
    assert [type(m).__name__ for m in AME().build(TASKS, ("x",), (4,)).experts[0]] == ["Linear", "ReLU"] * 2


# ---------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("tower", [MultiEmbedding, AME])
@pytest.mark.parametrize("views", [("a", "b", "shared"), ("a", "b")])
def test_refuses_views_of_tasks(tower, views):
    with pytest.raises(ValueError, match="belong to no task"):
        tower().build(("a", "b"), views, (4,) * len(views))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": ()}, "Parameter `expert` should have at least one layer, which maps all experts to one width."),
        ({"expert": (0,)}, "Parameter `expert` should be positive. Found (0,)."),
        ({"norm": "group"}, "Parameter `norm` should be `batch`, `layer` or `none`. Found `group`."),
        ({"combine": "sum"}, "Parameter `combine` should be `mean`, `gate` or `scalar`. Found `sum`."),
        ({"gate": (3,)}, "Parameter `gate` belongs to combine `gate`. Found (3,) with `mean`."),
        ({"dropout": 1.0}, "Parameter `dropout` should be in [0, 1). Found 1.0."),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError) as error:
        MultiEmbedding(**change)
    assert str(error.value) == message


# ---------------------------------------------------------------------------------------------------------- planted data
COUNTS = (500, 500, 300, 100, 20, 5, 3, 2)


def pairwise_products(seed, rows=(80_000, 20_000, 20_000)):
    """split -> (ids (n, 8), labels (n,)): ids uniform in 8 fields, logit = products of random vectors over all pairs."""
    random = np.random.default_rng(seed)
    vectors = [random.normal(size=(count, 20)) / 20**0.5 for count in COUNTS]
    ids = np.stack([random.integers(count, size=sum(rows)) for count in COUNTS], 1)
    total = [v[i] for v, i in zip(vectors, ids.T, strict=True)]
    summed = np.sum(total, 0)
    logit = 0.5 * ((summed**2).sum(1) - sum((v**2).sum(1) for v in total))
    logit = 2.0 * (logit - logit.mean()) / logit.std()
    labels = random.random(len(ids)) < 1 / (1 + np.exp(-logit))
    cuts = np.cumsum(rows)[:-1]
    parts = zip(("train", "valid", "test"), np.split(ids, cuts), np.split(labels, cuts), strict=True)
    return {name: (torch.from_numpy(i), torch.from_numpy(y).float()) for name, i, y in parts}


class Fields(nn.Module):
    """Tables, two cross layers per set of tables, multi-embedding with a head of 64-64: no more than the comparison needs."""

    def __init__(self, widths):
        super().__init__()
        std = 0.05
        self.tables = nn.ModuleList(nn.ModuleList(nn.Embedding(n, d) for n in COUNTS) for d in widths)
        self.crosses = nn.ModuleList(Cross(layers=2).build({f"f{i}": d for i in range(len(COUNTS))}) for d in widths)
        tower = MultiEmbedding(expert=(64,), tower=(64,), norm="batch")
        self.tower: ManyTablesTower = tower.build(
            ("y",), [f"view{i}" for i in range(len(widths))], [c.width for c in self.crosses]
        )
        self.head = nn.Linear(64, 1)
        initialise(self)
        for table in self.tables.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, 0.0, std)

    def forward(self, ids):
        hidden = []
        for tables, cross in zip(self.tables, self.crosses, strict=True):
            hidden.append(cross({f"f{i}": table(ids[:, i]) for i, table in enumerate(tables)}))
        return self.head(self.tower(hidden).tasks["y"]).squeeze(1)


def best_auc(widths, seed):
    """Test AUC of the epoch of 5 whose validation AUC is best."""
    data = pairwise_products(seed)
    torch.manual_seed(seed)
    model = Fields(widths)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    ids, labels = data["train"]
    found = SimpleNamespace(valid=0.0, test=0.0)
    for _ in range(5):
        model.train()
        for rows in torch.randperm(len(ids)).split(512):
            loss = nn.functional.binary_cross_entropy_with_logits(model(ids[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        model.eval()
        with torch.no_grad():
            auc = {s: roc_auc_score(data[s][1], model(data[s][0])) for s in ("valid", "test")}
        if auc["valid"] > found.valid:
            found = SimpleNamespace(**auc)
    return found.test


@pytest.mark.slow
def test_width_helps(capsys):
    """One table of width 20 is above one of width 5; 4 tables of width 5 are printed beside them, and nothing is claimed."""
    torch.set_default_dtype(torch.float32)
    sizes = {"1 x 5": (5,), "1 x 20": (20,), "4 x 5": (5,) * 4}
    found = {name: [best_auc(widths, seed) for seed in range(3)] for name, widths in sizes.items()}
    with capsys.disabled():
        print("\nTables x width: test AUC by seed")
        for name, values in found.items():
            print(f"{name:8}", *(f"{value:.4f}" for value in values), f"mean {np.mean(values):.4f}")
    assert np.mean(found["1 x 20"]) >= np.mean(found["1 x 5"]) + 0.005
