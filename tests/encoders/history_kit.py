"""A small packed history for encoders that search, and what they compute written out event by event."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unbraid.types import FIRST_VALUE, Ragged, Rows

LENGTHS = [3, 0, 9, 1, 6, 0, 2, 4]
D, VALUES = 4, 8
FIELDS = ("item", "brand", "position", "action")  # a row has the first two only

Vectors = Mapping[str, Tensor]
Choose = Callable[[int, list[int], list[float]], list[int]]  # (row, its events, their scores) -> those kept


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def events_of(offsets: Tensor) -> list[list[int]]:
    ends = offsets.tolist()
    return [list(range(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]


class Case:
    """Tables of every role, a history that reads them, and the row's own vectors of every role.

    Args:
        config: the encoder's configuration; targets: the fields that the row has.
        lengths: of the rows' histories.
    """

    def __init__(
        self, config: Any, targets: Sequence[str] = ("item", "brand"), seed: int = 0, lengths: Sequence[int] = LENGTHS
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.targets, self.lengths = config, tuple(targets), list(lengths)
        self.widths = {name: role.width or D for name, role in config.roles.items()}
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        self.index = {name: torch.randint(0, VALUES, (sum(lengths),)) for name in FIELDS}
        self.index["brand"] = torch.randint(1, 5, (sum(lengths),))  # few, so that many events share one
        ranks = [n - i for n in lengths for i in range(n)]
        self.index["position"] = FIRST_VALUE - 1 + torch.tensor(ranks)
        self.history = Ragged(self.index, offsets)
        sizes = dict.fromkeys(FIELDS, VALUES) | {"position": FIRST_VALUE + max(lengths)}
        self.tables = {role: {name: leaf(sizes[name], w) for name in FIELDS} for role, w in self.widths.items()}
        self.rows = {role: {name: leaf(len(lengths), w) for name in targets} for role, w in self.widths.items()}
        self.ids = {name: torch.randint(0, VALUES, (len(lengths),)) for name in targets}
        self.ids |= {name: torch.randint(1, 5, (len(lengths),)) for name in targets if name == "brand"}
        self.module = config.build(dict.fromkeys(FIELDS, D), dict.fromkeys(targets, D), self.widths).double()
        for parameter in self.module.parameters():
            torch.nn.init.normal_(parameter)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that a gradient may reach."""
        kinds = {"table": self.tables, "row": self.rows}
        found = {
            f"{k}/{role}/{n}": x for k, roles in kinds.items() for role, of in roles.items() for n, x in of.items()
        }
        return found | dict(self.module.named_parameters())

    def inputs(
        self, index: Mapping[str, Tensor] | None = None, history: Ragged | None = None
    ) -> tuple[Any, Ragged, Any]:
        """What the module's forward takes."""
        index = index or self.index
        events = {role: {n: Rows(x, index[n]) for n, x in of.items()} for role, of in self.tables.items()}
        return events, history or Ragged(index, self.history.offsets), {**self.rows, "id": self.ids}

    def __call__(self, index: Mapping[str, Tensor] | None = None, history: Ragged | None = None) -> dict[str, Tensor]:
        return self.module(*self.inputs(index, history))

    def reference(
        self, key: str, query: str, value: str, own: str, *, choose: Choose | None = None,
        maps: Callable[[str, str, Tensor], Tensor] = lambda side, name, x: x,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Every output, from loops over rows and events.

        Args:
            key, query, value, own: roles; choose: instead of the K highest scores, the later ones of a tie.
            maps: (side, field, vectors) -> projected vectors.
        """
        config, keep = self.config, self.config.keep
        k = {n: maps("key", n, self.tables[key][n])[self.index[n]] for n in FIELDS}
        r = {n: maps("value", n, self.tables[value][n])[self.index[n]] for n in FIELDS}
        q = {n: maps("query", n, self.rows[query][n]) for n in self.targets}
        v = {n: maps("own", n, self.rows[own][n]) for n in self.targets}
        had = [n for n in FIELDS if n in self.targets]
        groups = [had, [n for n in FIELDS if n not in had]] if config.scale == "parts" else [list(FIELDS)]

        def score(row: int, event: int) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for group in (group for group in groups if group):
                asked = [q[n][row] if n in had else self.module.queries[f"field/{n}"] for n in group]
                product = sum((k[n][event] * x).sum() for n, x in zip(group, asked, strict=True))
                total = total + product / math.sqrt(sum(k[n].shape[1] for n in group))
            return total

        def highest(row: int, events: list[int], scores: list[float]) -> list[int]:
            return sorted(sorted(events, key=lambda e: (-scores[e - events[0]], -e))[:keep])

        def attend(kept: list[list[int]]) -> dict[str, Tensor]:
            out: dict[str, list[Tensor]] = {}
            for row, events in enumerate(kept):
                w = torch.stack([score(row, e) for e in events]).softmax(0) if events else None
                for n in FIELDS:
                    u = sum((w[i] * r[n][e] for i, e in enumerate(events)), torch.zeros(D).double())  # type: ignore[index]
                    out.setdefault(n, []).append(u)
                    if n in had:
                        products = (w[i] * r[n][e] * v[n][row] for i, e in enumerate(events))  # type: ignore[index]
                        out.setdefault(f"{n}.product", []).append(sum(products, torch.zeros(D).double()))
            wanted = [n for n in out if (config.target_aware if n.endswith("product") else config.pooled)]
            wanted = wanted or list(FIELDS)  # nothing to multiply with
            return {n: torch.stack(out[n]) for n in wanted}

        rows = events_of(self.history.offsets)
        scores = [[score(row, e).item() for e in events] for row, events in enumerate(rows)]
        choose = choose or highest
        found = attend([choose(row, events, scores[row]) if events else [] for row, events in enumerate(rows)])
        if config.auxiliary and self.module.training:
            found |= {f"all.{name}": x for name, x in attend(rows).items()}
            found |= {f"own.{name}": v[name] for name in had}
        return found


def agree(case: Case, want: dict[str, Tensor], roles: Sequence[str], free: frozenset[str] = frozenset()) -> None:
    """Outputs and all gradients equal the reference's, and all that is read has one.

    Args:
        roles: as of `Case.reference`; free: leaves whose gradient may be 0.
    """
    got = case()
    assert set(got) == set(want)
    assert {name: x.shape[1] for name, x in got.items()} == {
        **case.module.widths,
        **(case.module.second if case.module.training else {}),
    }
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    flow = {name: torch.randn_like(x) for name, x in want.items()}
    leaves = case.leaves
    mine, theirs = (
        torch.autograd.grad(sum((out[n] * flow[n]).sum() for n in flow), list(leaves.values()), allow_unused=True)  # type: ignore[union-attr]
        for out in (got, want)
    )
    reached = set()
    for (name, x), a, b in zip(leaves.items(), mine, theirs, strict=True):
        a, b = (torch.zeros_like(x) if grad is None else grad for grad in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        reached |= {name} if b.any() else set()
    assert reached | free == read_of(case, *roles) | free, (reached ^ read_of(case, *roles)) - free


def read_of(case: Case, key: str, query: str, value: str, own: str) -> set[str]:
    """The leaves that something reads: not the row's own without products, nor the values of other fields without sums."""
    config = case.config
    summed = FIELDS if config.pooled or not case.targets else case.targets
    read = {f"table/{key}/{n}" for n in FIELDS} | {f"row/{query}/{n}" for n in case.targets}
    read |= {f"table/{value}/{n}" for n in summed}
    alone = not (config.target_aware or (config.auxiliary and case.module.training))
    read |= set() if alone else {f"row/{own}/{n}" for n in case.targets}
    parameters = {name for name, _ in case.module.named_parameters()}
    return read | {name for name in parameters if not (alone and name.startswith("maps.own/"))}


class ValueCase:
    """A history with the fields item and brand, which the row has, too, and action, which it has not; value tables alone."""

    fields = ("action", "item", "brand")

    def __init__(
        self, config: Any, index: Mapping[str, Tensor], history: Ragged, targets: Sequence[str], seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.index, self.history, self.targets = config, dict(index), history, targets
        ids = 1 + max(int(part.max()) for part in index.values())
        self.tables = {name: leaf(ids, D) for name in self.fields}
        self.query = {name: leaf(len(history), D) for name in targets}
        self.module = config.build(dict.fromkeys(self.fields, D), dict.fromkeys(targets, D)).double()

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that a gradient may reach."""
        tables, queries = (
            {f"{kind}.{n}": x for n, x in of.items()} for kind, of in (("table", self.tables), ("query", self.query))
        )
        return {**tables, **queries, **dict(self.module.named_parameters())}

    def events(self) -> dict[str, dict[str, Rows]]:
        return {"value": {name: Rows(table, self.index[name]) for name, table in self.tables.items()}}

    def __call__(self) -> dict[str, Tensor]:
        return self.module(self.events(), self.history, {"value": self.query})
