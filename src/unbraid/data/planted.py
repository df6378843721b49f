"""Data whose truth is known: each set plants one phenomenon, so that a method that claims to mend it can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from unbraid.data.declaration import Data, Events, Split
from unbraid.types import Feature, Field, History, Task

SHARES = {"train": 60, "valid": 15, "test": 20}  # of 95


def split_column(rows: int) -> list[str]:
    """``train``, ``valid`` and ``test`` for rows in random order, 60 : 15 : 20 by count."""
    train, valid = (round(rows * SHARES[name] / sum(SHARES.values())) for name in ("train", "valid"))
    return ["train"] * train + ["valid"] * valid + ["test"] * (rows - train - valid)


def opposed_tastes(
    users: int = 400, items: int = 400, rank: int = 4, rho: float = 0.0, rows: int = 95_000, seed: int = 0
) -> pl.DataFrame:
    """Two tasks for which the same user wants different items: what one shared vector per id cannot say.

    Item factors v are common, and each task has its own user factors, correlated by ``rho``::

        v, a, n ~ Normal(0, 1)^rank      b = rho a + sqrt(1 - rho^2) n
        label_a ~ Bernoulli(sigmoid(1.2 <a, v> - 0.5))       label_b ~ Bernoulli(sigmoid(1.2 <b, v> - 1.5))

    Args:
        users, items: how many of each; rank: length of their factors.
        rho: 1 gives both tasks the same tastes, 0 unrelated, -1 opposite ones.
        rows: how many distinct (user, item) pairs are drawn.
        seed: fixes everything.

    Returns:
        ``user``, ``item``, ``label_a``, ``label_b`` (integers) and ``split``, in random order within each split.

    Raises:
        ValueError: ``rho`` is outside [-1, 1], or there are not so many pairs.
    """
    if not -1 <= rho <= 1:
        raise ValueError(f"Parameter `rho` should be in [-1, 1]. Found {rho}.")
    if not 0 < rows <= users * items:
        raise ValueError(f"Parameter `rows` should be between 1 and users * items = {users * items}. Found {rows}.")
    random = np.random.default_rng(seed)
    factors, taste_a, noise = (random.standard_normal((n, rank)) for n in (items, users, users))
    taste_b = rho * taste_a + np.sqrt(1 - rho**2) * noise
    user, item = np.divmod(random.permutation(users * items)[:rows], items)

    def label(taste: np.ndarray, bias: float) -> np.ndarray:
        logit = 1.2 * (taste[user] * factors[item]).sum(axis=1) + bias
        drawn: np.ndarray = random.random(rows) < 1 / (1 + np.exp(-logit))
        return drawn.astype(np.int64)

    labels = {"label_a": label(taste_a, -0.5), "label_b": label(taste_b, -1.5)}
    return pl.DataFrame({"user": user, "item": item, **labels, "split": split_column(rows)})


# --------------------------------------------------------------------------------------------------------- sick logs
ILLNESSES = ("collapse", "conflict", "dominance", "auxiliary", "units", "drift", "leak", "attention")
RANK, EVENTS = 3, 8  # of tastes; events that a history shows


def sick_log(seed: int, **strengths: float) -> tuple[dict[str, pl.DataFrame], Data]:
    """A log of three targets and two auxiliary tasks in which illnesses are planted, and how to read it.

    Sizes, field counts and base rates are drawn from ``seed``: 120 to 240 users, 100 to 200 items, 24 to 40 categories, 40,000 to
    60,000 rows, 2 to 4 sites, 1 to 3 further id columns of 4 to 39 values; rates of .2 to .5 (click, hint), .08 to .3 (buy), .3
    to .5 (lure).  Users and items have factors of rank 3; with a, b, c tastes of the same items::

        logit = .8 x + .3 z + effects of site and columns + taste + a match with the history (illness ``attention``)
        click: taste a     buy: .9 a + .44 b     hint: .9 a + .44 b     lure: c     stay: click's logit + noise, real

    The same seed gives the same log but for what an illness changes, each at a strength from 0 (nothing) to 1:

    Args:
        seed: fixes everything.
        strengths: by illness.

            - ``collapse``: what a user's segment, a column of two values, and the item say together: up to 4 in the logit, at
              the cost of tastes (down to a tenth).
            - ``conflict``: buy's taste turns to -.5 a + .87 b.
            - ``dominance``: stay is in units up to 10 times smaller, so that its squared error is up to 100 times as large.
            - ``auxiliary``: the loss of lure, whose taste has nothing to do with the others, is weighted .05 to 10.
            - ``units``: x is up to 100 times as large on one site.
            - ``drift``: x of the test rows is up to 3 higher than it was when the label was drawn.
            - ``leak``: a column, late, says click in up to all training and validation rows, and nothing in test rows.
            - ``attention``: whether one of the last eight events has the row's own category: up to 1.5 standard deviations in
              the logit, at the cost of tastes (down to half).

    Returns:
        Tables by name (``rows``, ``events``), and the `Data` that reads them.

    Raises:
        ValueError: an illness that is none, or a strength outside [0, 1].
    """
    if unknown := sorted(set(strengths) - set(ILLNESSES)):
        raise ValueError(f"Illnesses are {', '.join(ILLNESSES)}. Found {', '.join(unknown)}.")
    if bad := {name: value for name, value in strengths.items() if not 0 <= value <= 1}:
        raise ValueError(f"A strength should be in [0, 1]. Found {bad}.")
    ill = dict.fromkeys(ILLNESSES, 0.0) | strengths

    def draws(part: int) -> np.random.Generator:  # one stream per part: an illness moves no other draw
        return np.random.default_rng([seed, part])

    w = _world(draws(0), draws(1))
    user, item, x, rows = w["user"], w["item"], w["x"], len(w["user"])
    segment, pull = draws(2).integers(0, 2, len(w["a"])), draws(3).standard_normal(len(w["items"]))
    logits = _logits(w, ill, segment, pull)
    labels = draws(4)
    drawn = {name: _with_rate(logit, w["rates"][name], labels) for name, logit in logits.items()}
    stay = logits["click"] / logits["click"].std() + labels.standard_normal(rows)
    drawn["stay"] = stay / stay.std() * 10 ** ill["dominance"]
    part = draws(5).choice(3, rows, p=(0.6, 0.15, 0.25))
    x = np.where(w["site"] == 1, x * 100 ** ill["units"], x) + 3 * ill["drift"] * (part == 2)
    told = (draws(6).random(rows) < ill["leak"]) & (part < 2)
    noise = draws(7).standard_normal(rows)
    late = np.where(told, 1.5 * (2 * drawn["click"] - 1) + 0.5 * noise, noise)
    table = {
        "user": user, "segment": segment[user], "item": item, "category": w["category"][item], "time": w["time"],
        "site": np.array([f"site{i}" for i in range(w["sites"])])[w["site"]], "x": x, "z": w["z"], "late": late,
        **w["others"], **drawn, "split": np.array(["train", "valid", "test"])[part],
    }  # fmt: skip
    events = w["events"] | {"category": w["category"][w["events"]["item"]]}
    tables = {"rows": pl.DataFrame(table), "events": pl.DataFrame(events)}
    return tables, _read(list(w["others"]), 0.05 * 200 ** ill["auxiliary"])


RATES: Mapping[str, tuple[float, float]] = {
    "click": (0.2, 0.5), "buy": (0.08, 0.3), "hint": (0.2, 0.5), "lure": (0.3, 0.5),
}  # fmt: skip


def _world(size: np.random.Generator, random: np.random.Generator) -> dict[str, Any]:
    """What no illness changes, by name: sizes and rates from the one stream, columns, tastes and effects from the other."""
    users, items, categories = size.integers(120, 241), size.integers(100, 201), int(size.integers(24, 41))
    rows, sites, columns = int(size.integers(40_000, 60_001)), int(size.integers(2, 5)), int(size.integers(1, 4))
    rates = {name: size.uniform(*span) for name, span in RATES.items()}
    item_factors = random.standard_normal((items, RANK))
    a, b, c = (random.standard_normal((users, RANK)) for _ in range(3))
    category = random.integers(0, categories, items)
    user, item = random.integers(0, users, rows), random.integers(0, items, rows)
    time = np.sort(random.uniform(1e6, 2e6, rows)).astype(np.int64)
    site = random.choice(sites, rows, p=random.dirichlet(np.full(sites, 8.0)))
    x, z = random.standard_normal((2, rows))
    widths = random.integers(4, 40, columns)
    others = {f"f{i}": random.integers(0, width, rows) for i, width in enumerate(widths)}
    effects = [0.4 * random.standard_normal(width) for width in widths]
    of_site = 0.3 * random.standard_normal(sites)
    events = {
        "user": random.integers(0, users, 30 * users), "time": random.uniform(8e5, 2e6, 30 * users).astype(np.int64),
        "item": random.integers(0, items, 30 * users),
    }  # fmt: skip
    shared = 0.8 * x + 0.3 * z + of_site[site] + sum(e[f] for e, f in zip(effects, others.values(), strict=True))
    return {
        "a": a, "b": b, "c": c, "items": item_factors, "category": category, "user": user, "item": item, "time": time,
        "site": site, "sites": sites, "x": x, "z": z, "others": others, "events": events, "shared": shared, "rates": rates,
    }  # fmt: skip


def _logits(
    w: Mapping[str, Any], ill: Mapping[str, float], segment: np.ndarray, pull: np.ndarray
) -> dict[str, np.ndarray]:
    """Binary task -> (n,) logits; ``segment``: each user's, ``pull``: what an item means to a segment."""
    user, item = w["user"], w["item"]
    shared = w["shared"] + 4 * ill["collapse"] * (2 * segment[user] - 1) * pull[item]
    seen = _seen(w["events"], w["category"], user, w["time"], w["category"][item])
    shared = shared + 1.5 * ill["attention"] * (seen - seen.mean()) / seen.std()
    turned = 0.9 - 1.4 * ill["conflict"]
    tastes = {
        "click": w["a"], "buy": turned * w["a"] + np.sqrt(1 - turned**2) * w["b"],
        "hint": 0.9 * w["a"] + np.sqrt(0.19) * w["b"], "lure": w["c"],
    }  # fmt: skip
    strength = 1.8 / np.sqrt(RANK) * (1 - 0.5 * ill["attention"]) * (1 - 0.9 * ill["collapse"])
    return {name: shared + strength * (of[user] * w["items"][item]).sum(1) for name, of in tastes.items()}


def _seen(
    events: Mapping[str, np.ndarray], category: np.ndarray, user: np.ndarray, time: np.ndarray, own: np.ndarray
) -> np.ndarray:
    """(n,) 1.0 where one of the last `EVENTS` events before a row is of the row's own category."""
    order = np.lexsort((events["time"], events["user"]))
    owner, of = events["user"][order], category[events["item"][order]]
    keys = owner * 10**7 + events["time"][order]
    before = np.searchsorted(keys, user * 10**7 + time)
    found = np.zeros(len(user), bool)
    for back in range(1, EVENTS + 1):
        at = np.maximum(before - back, 0)
        found |= (before >= back) & (owner[at] == user) & (of[at] == own)
    return found.astype(float)


def _with_rate(logit: np.ndarray, rate: float, random: np.random.Generator) -> np.ndarray:
    """(n,) labels drawn with these logits, moved so that their mean probability is the rate."""
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if (1 / (1 + np.exp(-logit - middle))).mean() > rate else (middle, high)
    drawn: np.ndarray = random.random(len(logit)) < 1 / (1 + np.exp(-logit - low))
    return drawn.astype(np.int64)


def _read(columns: list[str], weight: float) -> Data:
    """The declaration of a sick log; ``weight``: of the task lure."""
    ids = ("user", "segment", "item", "category", "site", *columns)
    return Data(
        rows="rows", user="user", time="time", domain="site",
        features=(*map(Feature, ids), *(Feature(name, kind="number") for name in ("x", "z", "late"))),
        fields=(Field("item"), Field("category")),
        events=(Events(table="events", columns={"item": "item", "category": "category"}),),
        histories=(History("seen", fields=("item", "category"), length=EVENTS),),
        tasks=(
            Task("click"), Task("buy"), Task("stay", kind="real"), Task("hint", role="auxiliary"),
            Task("lure", role="auxiliary", weight=weight),
        ),
        split=Split(kind="column", column="split"),
    )  # fmt: skip
