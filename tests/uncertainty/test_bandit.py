"""A bandit whose arms are rows: what a policy loses when it learns only from what it showed.

At each of T steps one of 10 arms is shown and clicked with a probability of its own.  The model is a logistic regression
with a normal prior on all that was seen (its mode by Newton steps), its uncertainty a `Logistic` that gets each shown row
as ``update(hidden, p)``.  The regret of a step is the best arm's probability minus the shown one's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from published import seeds

from unbraid.uncertainty.explore import UCB, Belief, Thompson, sigmoid
from unbraid.uncertainty.last_layer import Logistic

ARMS, PRIOR = 10, 1.0
Policy = Callable[[Belief], int]


def best(logits: np.ndarray) -> int:
    return int(np.argmax(logits))


def policies(seed: int) -> dict[str, Policy]:
    """Name -> which arm."""
    draw, dice, request = Thompson(seed), np.random.default_rng(seed), np.zeros(ARMS, np.int64)
    bound = UCB(2.0)

    def epsilon(belief: Belief) -> int:
        return int(dice.integers(ARMS)) if dice.random() < 0.1 else best(belief.mean)

    return {
        "greedy": lambda belief: best(belief.mean),
        "epsilon-greedy .1": epsilon,
        "UCB": lambda belief: best(bound(belief, request)),
        "Thompson": lambda belief: best(draw(belief, request)),
    }


def one_hot(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(arms' hidden vectors, their probabilities): nothing about one arm tells of another, but for the bias."""
    return np.eye(ARMS), np.random.default_rng([seed, 1]).uniform(0.05, 0.5, ARMS)


def features(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Arms of four features that decide their logits: one arm tells of all others."""
    rng = np.random.default_rng([seed, 2])
    x = rng.normal(size=(ARMS, 4))
    return x, sigmoid(x @ rng.normal(size=4) - 1)


def mode(x: np.ndarray, w: np.ndarray, shown: np.ndarray, clicked: np.ndarray, steps: int = 1) -> np.ndarray:
    """Newton steps from w towards the mode of the posterior after so many shows and clicks of each arm."""
    for _ in range(steps):
        p = sigmoid(x @ w)
        gradient = x.T @ (clicked - shown * p) - PRIOR * w
        w = w + np.linalg.solve(x.T @ (x * (shown * p * (1 - p))[:, None]) + PRIOR * np.eye(len(w)), gradient)
    return w


def regret(policy: Policy, x: np.ndarray, truth: np.ndarray, seed: int, horizon: int) -> np.ndarray:
    """(horizon,) regret of each step."""
    clicks = np.random.default_rng([seed, 3]).random((horizon, ARMS)) < truth  # the same luck for every policy
    bias, head = np.concatenate([x, np.ones((ARMS, 1))], 1), np.zeros(ARMS, np.int64)
    w, shown, clicked = np.zeros(bias.shape[1]), np.zeros(ARMS), np.zeros(ARMS)
    posterior, lost = Logistic(w[None], PRIOR), np.empty(horizon)
    for t in range(horizon):
        arm = policy(Belief(bias @ w, posterior.roots(x), head))
        posterior.update(x[[arm]], sigmoid(bias[[arm]] @ w))
        shown[arm] += 1
        clicked[arm] += clicks[t, arm]
        w = mode(bias, w, shown, clicked)
        lost[t] = truth.max() - truth[arm]
    return lost


def play(world: Callable, seeds: int, horizon: int) -> dict[str, np.ndarray]:
    """Policy -> (seeds, 4): regret in each quarter."""
    found: dict[str, list] = {}
    for seed in range(seeds):
        x, truth = world(seed)
        for name, policy in policies(seed).items():
            found.setdefault(name, []).append(regret(policy, x, truth, seed, horizon).reshape(4, -1).sum(1))
    return {name: np.array(parts) for name, parts in found.items()}


def table(found: dict[str, np.ndarray]) -> str:
    lines = [f"{'policy':18} regret  +-      by quarter"]
    for name, parts in found.items():
        total = parts.sum(1)
        error = total.std(ddof=1) / np.sqrt(len(total))
        lines.append(f"{name:18} {total.mean():6.1f} {error:5.1f}  " + "".join(f"{q:8.1f}" for q in parts.mean(0)))
    return "\n".join(lines)


def check(found: dict[str, np.ndarray]) -> None:
    """Both policies lose little at the end, and in all less than those that do not know what they do not know."""
    mean = {name: parts.mean(0) for name, parts in found.items()}
    for name in ("UCB", "Thompson"):
        assert mean[name][-1] < mean[name][0] / 3, name
        assert mean[name].sum() < min(mean["greedy"].sum(), mean["epsilon-greedy .1"].sum()) / 1.5, name


def test_exploration_pays_at_the_end_of_a_short_game() -> None:
    found = play(one_hot, 3, 1200)
    print(table(found))
    last = {name: parts.mean(0)[-1] for name, parts in found.items()}
    assert max(last["UCB"], last["Thompson"]) < min(last["greedy"], last["epsilon-greedy .1"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [one_hot, features])
def test_exploration_pays(world: Callable) -> None:
    found = play(world, len(seeds(5, 10)), 5000)
    print(world.__name__, table(found), sep="\n")
    check(found)


@pytest.mark.slow
def test_exploration_costs_first() -> None:
    """Until 2,000 steps what Thompson sampling has paid is not yet more than regained."""
    found = play(one_hot, 3, 2000)
    print(table(found))
    total = {name: parts.sum(1).mean() for name, parts in found.items()}
    assert 0.8 < total["Thompson"] / total["epsilon-greedy .1"] < 1.4
    first, last = (found["Thompson"].mean(0)[quarter] for quarter in (0, -1))
    assert first > found["epsilon-greedy .1"].mean(0)[0] and last < found["epsilon-greedy .1"].mean(0)[-1]


@pytest.mark.slow
def test_a_narrow_bound_stays_with_a_wrong_arm() -> None:
    """Beta 1 is often better and sometimes never finds the best arm: hence the default."""
    lost: dict[float, np.ndarray] = {}
    for beta in (1.0, 2.0):
        bound, head = UCB(beta), np.zeros(ARMS, np.int64)
        games = [regret(lambda b: best(bound(b, head)), *one_hot(seed), seed, 4000) for seed in range(10)]  # noqa: B023
        lost[beta] = np.stack([game.sum() for game in games])
    print({beta: (each.mean().round(1), each.round(1).tolist()) for beta, each in lost.items()})
    assert lost[1.0].mean() > 1.2 * lost[2.0].mean() and lost[1.0].max() > 2 * lost[2.0].max()
    assert (lost[1.0] < lost[2.0]).sum() >= 5
