"""Losses of each recipe after its first steps on the bundled log, against stored ones: a change of numerics shows here.

After a change that is meant to move them: ``python tests/golden/test_golden.py [RECIPE ...]`` writes new ones; say why in the
commit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unbraid import recipes
from unbraid.bundle import build
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.preflight import bound_terms
from unbraid.train import fit

STORED = Path(__file__).parent / "losses.json"
STEPS = 20


def losses_of(name: str) -> list[dict[str, float]]:
    """task -> loss, at each of the first steps."""
    run = recipes.get(name)
    encoded = Encoded(encode(run.data))
    model = build(run, encoded.schema)
    update = run.update.build(model, steps=STEPS, weights={})
    found: list[dict[str, float]] = []

    def note(step: int, batch: object, losses: dict) -> bool:
        found.append({k: float(v.detach()) for k, v in losses.items()})
        return False

    torch.manual_seed(0)
    batches = encoded.shuffled(encoded.split("train"), 256, seed=0)
    fit(model, batches, bound_terms(run, encoded.schema, model), update, steps=STEPS, callbacks=[note])  # type: ignore[list-item]
    batches.close()  # type: ignore[attr-defined]
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_the_first_losses_are_those_stored(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBRAID_CACHE", cache)
    stored = json.loads(STORED.read_text())
    assert set(stored) == set(recipes.RECIPES)
    found = losses_of(name)
    assert len(found) == len(stored[name]) == STEPS
    for step, (have, want) in enumerate(zip(found, stored[name], strict=True)):
        assert have.keys() == want.keys()
        np.testing.assert_allclose(
            list(have.values()), [want[k] for k in have], rtol=1e-4, err_msg=f"{name}, step {step}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    kept = json.loads(STORED.read_text()) if sys.argv[1:] else {}
    wanted = {name: losses_of(name) for name in sys.argv[1:] or recipes.RECIPES}
    both = {**kept, **wanted}
    STORED.write_text(json.dumps({name: both[name] for name in recipes.RECIPES if name in both}, indent=1))
    print(f"wrote {STORED}")
