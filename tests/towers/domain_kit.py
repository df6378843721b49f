"""What tests of towers with parts per domain share: the toy log's domains, batches without one, two checks of a model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid import bundle
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.job import train
from unbraid.warm_start import warm_start

TASKS = ("click", "buy")
KNOWN = (2, 3, 4)  # codes of home, mail and search
absences = pytest.mark.parametrize("how", ["no rows", "unobserved", "weightless"])


def some(encoded, start=100, n=40):
    return encoded.batch(np.arange(start, start + n))


def without(batch, code, how):
    """The batch without rows of a domain, or with unobserved or weightless ones."""
    if how == "no rows":
        return batch.select(batch.domain != code)
    if how == "weightless":
        return dataclasses.replace(batch, weight=(batch.domain != code).float())
    return dataclasses.replace(batch, observed={t: o & (batch.domain != code) for t, o in batch.observed.items()})


def rows_do_not_see_each_other(model, encoded):
    """Each row alone, of every domain, unknown and missing ones too, has the logits that it has in a batch."""
    model.eval()
    batch = some(encoded, n=12)
    batch = dataclasses.replace(batch, domain=torch.tensor([0, 1, *KNOWN] * 2 + [0, 1]))
    whole = model(batch)
    for i in range(12):
        alone = model(batch.select(torch.tensor([i])))
        for task in TASKS:
            torch.testing.assert_close(alone.logits[task][0], whole.logits[task][i], rtol=1e-5, atol=1e-6)


def trains_and_comes_back(tower, tables, folder):
    """A short training and its bundle's way over the disk; a new model starts from it, but with the same domains only."""
    run = make_run(training=dataclasses.replace(make_run().training, steps=5))
    run = dataclasses.replace(run, model=ModelChoice(tower=tower, tables=tables))
    result = train(run, tables={"log": make_log()}, baseline=False)
    assert result.metrics["test"]["click"]["auc"]["value"] > 0
    result.bundle.save(folder / "saved")
    loaded = bundle.Bundle.load(folder / "saved")
    batch = Encoded(encode(make_data(), tables={"log": make_log()})).batch(np.arange(20))
    with torch.no_grad():
        one, other = result.bundle.model.eval()(batch), loaded.model.eval()(batch)
    assert all(torch.equal(one.logits[t], other.logits[t]) for t in TASKS)
    counts = warm_start(loaded.model, loaded.fitted, result.bundle)
    assert counts["tensors new"] == counts["rows new"] == 0
    first, second, *domains = loaded.fitted.schema.domains
    schema = dataclasses.replace(loaded.fitted.schema, domains=(first, second, *domains[::-1]))
    with pytest.raises(bundle.BundleError, match="same domains in the same order"):
        warm_start(loaded.model, dataclasses.replace(loaded.fitted, schema=schema), result.bundle)
    return loaded
