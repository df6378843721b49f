"""What clusters tell about labels: separable, random and repeated vectors, scikit-learn's own scores, the plot."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_fakes import Views, batch_of, schema_of
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from unbraid.analysis.discriminability import Discriminability, plot
from unbraid.types import Batch

PROBE = Discriminability("click", clusters=(2, 5, 20), seeds=(0, 1))


def batches_of(label: Any, size: int = 128, **changes: Any) -> list[Batch]:
    """Batches of rows without events."""
    return [
        batch_of([4] * len(label[i : i + size]), label[i : i + size], [[]] * len(label[i : i + size]), row=i,
                 **{name: v[i : i + size] for name, v in changes.items()})
        for i in range(0, len(label), size)
    ]  # fmt: skip


def test_separable_vectors_tell_all_and_random_ones_what_chance_tells() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 1000)
    clear = rng.normal(size=(1000, 3)) * 0.1 + 10 * label[:, None]
    model = Views(shared=clear).train()
    found = PROBE(model, schema_of(), iter(batches_of(label)))
    assert model.training
    values = found.values
    entropy = -sum(q * math.log2(q) for q in (label.mean(), 1 - label.mean()))
    assert values["entropy"] == pytest.approx(entropy) and np.allclose(values["bits"], entropy)
    assert np.allclose(values["nmi"][0], 1) and (values["nmi"][2] < 0.5).all()
    assert values["bits"].shape == values["nmi"].shape == values["chance"].shape == (3, 2)
    assert values["clusters"].tolist() == [2, 5, 20] and (values["rows"], values["width"]) == (1000, 3)
    noise = PROBE(Views(shared=rng.normal(size=(1000, 3))), schema_of(), batches_of(label)).values
    expected = (np.array([2, 5, 20]) - 1) / (2 * 1000 * math.log(2))
    assert (noise["bits"].mean(1) < 3 * expected + 0.002).all()
    assert (np.abs(noise["chance"][2] - expected[2]) < expected[2]).all() and (noise["chance"] < 0.03).all()
    assert "2 clusters" in found.reading and "1,000 rows" in found.reading


def test_the_numbers_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, 600)
    vectors = (rng.normal(size=(600, 4)) + label[:, None]).astype(np.float32)
    probe = Discriminability("size", clusters=(5, 30), seeds=(3, 4))
    found = probe(Views(shared=vectors), schema_of(), batches_of(label)).values
    for i, k in enumerate((5, 30)):
        for j, seed in enumerate((3, 4)):
            cluster = MiniBatchKMeans(k, random_state=seed, n_init=1).fit(vectors).labels_
            assert found["bits"][i, j] == pytest.approx(mutual_info_score(label, cluster) / math.log(2))
            assert found["nmi"][i, j] == pytest.approx(normalized_mutual_info_score(label, cluster))
    assert found["entropy"] > 1.5 and (found["chance"] < found["bits"]).all()
    assert np.allclose(found["chance_nmi"] / found["chance"], found["nmi"] / found["bits"])
    again = probe(Views(shared=vectors), schema_of(), batches_of(label)).values
    assert all(np.array_equal(found[name], again[name]) for name in ("bits", "nmi", "chance", "chance_nmi"))


def test_too_many_clusters_are_skipped_with_a_reason() -> None:
    rng = np.random.default_rng(2)
    found = PROBE(Views(shared=rng.normal(size=(199, 2))), schema_of(), batches_of(rng.integers(0, 2, 199)))
    assert found.values["clusters"].tolist() == [2, 5] and found.values["bits"].shape == (2, 2)
    assert found.values["skipped"] == {20: "20 clusters of 199 rows; each needs 10"}
    whole = PROBE(Views(shared=rng.normal(size=(200, 2))), schema_of(), batches_of(rng.integers(0, 2, 200)))
    assert not whole.values["skipped"]
    for rows in (0, 3):
        none = PROBE(Views(shared=np.zeros((3, 2))), schema_of(), batches_of(np.ones(rows, int)))
        assert not len(none.values["clusters"]) and "too few" in none.reading
        with pytest.raises(ValueError, match="too few"):
            plot(none)


def test_only_plain_rows_with_a_label_count() -> None:
    rng = np.random.default_rng(3)
    label, n = rng.integers(0, 2, 400), 400
    shown, view = rng.random(n) < 0.7, (rng.random(n) < 0.2).astype(int)
    vectors = np.where((shown & (view == 0))[:, None], label[:, None], rng.integers(0, 2, (n, 1)))
    probe = replace(PROBE, clusters=(2,))
    found = probe(Views(shared=vectors), schema_of(), batches_of(label, observed=shown, view=view)).values
    assert found["rows"] == (shown & (view == 0)).sum() and np.allclose(found["nmi"], 1)


def test_views_and_scale() -> None:
    rng = np.random.default_rng(4)
    label = rng.integers(0, 2, 500)
    model = Views(click=label[:, None] + rng.normal(size=(500, 1)) * 0.01, shared=rng.normal(size=(500, 2)) * 100)
    probe, batches = replace(PROBE, clusters=(2,)), batches_of(label)
    both, click, shared = (
        replace(probe, view=v)(model, schema_of(), batches).values for v in (None, "click", "shared")
    )
    assert [v["width"] for v in (both, click, shared)] == [3, 1, 2]
    assert (click["nmi"] > 0.99).all() and (shared["nmi"] < 0.05).all() and (both["nmi"] < 0.05).all()
    scaled = replace(probe, standardise=True)(model, schema_of(), batches).values
    assert (scaled["nmi"] > 0.3).all()
    constant = Views(shared=np.column_stack([label, np.ones(500)]))
    assert (replace(probe, standardise=True)(constant, schema_of(), batches).values["nmi"] > 0.99).all()
    with pytest.raises(ValueError, match="no view `spend`. Views: click, shared"):
        replace(probe, view="spend")(model, schema_of(), batches)


def test_equal_vectors_and_one_class() -> None:
    label = np.arange(300) % 2
    same = PROBE(Views(shared=np.ones((300, 2))), schema_of(), batches_of(label)).values
    assert np.allclose(same["bits"], 0) and np.allclose(same["nmi"], 0)
    nothing = PROBE(Views(shared=np.ones((300, 2))), schema_of(), batches_of(label * 0)).values
    assert np.allclose(nothing["nmi"], 0) and np.allclose(nothing["chance_nmi"], 0)
    one = PROBE(Views(shared=np.random.default_rng(0).normal(size=(300, 2))), schema_of(), batches_of(label * 0)).values
    assert np.allclose(one["bits"], 0) and np.allclose(one["nmi"], 0) and one["entropy"] == 0


def test_settings_are_checked() -> None:
    for changes in ({"clusters": (0,)}, {"clusters": ()}, {"seeds": ()}):
        with pytest.raises(ValueError, match="clusters"):
            replace(PROBE, **changes)
    with pytest.raises(ValueError, match="Found real"):
        Discriminability("spend")(Views(), schema_of(), [])
    with pytest.raises(ValueError, match="There is no task `buy`. Tasks: click, spend, size."):
        Discriminability("buy")(Views(), schema_of(), [])


def test_the_plot_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    label = rng.integers(0, 2, 900)
    model = Views(shared=rng.normal(size=(900, 3)) + label[:, None])
    found = replace(PROBE, clusters=(2, 5, 10, 20, 30, 50, 90))(model, schema_of(), batches_of(label))
    drawn = plot(found, tmp_path / "clusters.png")
    assert (tmp_path / "clusters.png").stat().st_size > 5000
    bits, nmi = drawn.axes
    assert "bits" in bits.get_ylabel() and "NMI" in nmi.get_ylabel() and "clusters" in bits.get_xlabel()
    assert np.allclose(bits.lines[0].get_ydata(), found.values["bits"].mean(1))
    assert np.allclose(nmi.lines[0].get_ydata(), found.values["nmi"].mean(1))
