"""What `docs/security.md` says of bundles: they are data, and what is not theirs in the folder is left alone."""

from __future__ import annotations

import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
from toylog import make_log, make_run

from unbraid.bundle import Bundle
from unbraid.data.source import DataError, expression
from unbraid.job import train

SOURCE = Path(__file__).parents[1] / "src" / "unbraid"


class Bomb:
    """Its unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_a_bundle_is_never_loaded(tmp_path: Path) -> None:
    run = make_run(training=replace(make_run().training, steps=2))
    train(run, tmp_path / "b", tables={"log": make_log()}, baseline=False)
    mark, bomb = tmp_path / "mark", pickle.dumps(Bomb(tmp_path / "mark"))
    for name in ("model.pkl", "weights.pt", "data.pkl", "vocabularies/more.pkl"):
        (tmp_path / "b" / name).write_bytes(bomb)
    Bundle.load(tmp_path / "b")
    for name in ("weights.safetensors", "schema.json", "run.toml"):  # in a part's own place it is no such part
        whole = (tmp_path / "b" / name).read_bytes()
        (tmp_path / "b" / name).write_bytes(bomb)
        with pytest.raises(ValueError):
            Bundle.load(tmp_path / "b")
        (tmp_path / "b" / name).write_bytes(whole)
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the bomb is live"


def test_pickles_are_read_where_the_page_says_alone() -> None:
    calls = re.compile(
        r"\bpickle\.loads?\(|\btorch\.load\(|(?<![\w.`])(?:eval|exec)\(|allow_pickle=True|weights_only=False"
    )
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if calls.search(path.read_text())}
    assert found <= {"workers.py", "tune/trial.py", "backbones/frozen.py"}
    text = (SOURCE / "backbones" / "frozen.py").read_text()
    assert text.count("torch.load(") == text.count("weights_only=True") == 1


@pytest.mark.parametrize("sql", ["read_csv('/etc/passwd')", "(select * from read_parquet('x'))", "__import__('os')"])
def test_sql_of_a_run_file_opens_nothing(sql: str) -> None:
    import polars as pl

    with pytest.raises((DataError, pl.exceptions.PolarsError)):
        pl.DataFrame({"a": [1]}).select(expression(sql, {"a": pl.Int64}, "x"))
