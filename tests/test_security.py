"""What `docs/security.md` says: bundles, caches, checkpoints are data; run files run nothing; nothing is downloaded."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import tomllib
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors import SafetensorError
from toylog import make_log, make_run

from unbraid import config, store
from unbraid.backbones.frozen import read_weights
from unbraid.backbones.timm_models import Timm
from unbraid.bundle import Bundle, BundleError
from unbraid.data.encode import encode
from unbraid.data.source import DataError, expression
from unbraid.data.table import Encoded
from unbraid.job import train
from unbraid.predictor import Predictor

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "unbraid"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; nothing may change it."""
    folder = tmp_path_factory.mktemp("trained") / "b"
    train(make_run(training=replace(make_run().training, steps=2)), folder, tables={"log": make_log()}, baseline=False)
    return folder


class Bomb:
    """Its unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_a_bundle_is_never_loaded(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "b")
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


# ------------------------------------------------------------------------------------------------------------ damaged bundles
def edited(part: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """What changes a part of JSON."""

    def apply(folder: Path) -> None:
        document = json.loads((folder / part).read_text())
        change(document)
        (folder / part).write_text(json.dumps(document))

    return apply


def sized(size: Any) -> Callable[[Path], None]:
    return edited("schema.json", lambda d: d["schema"]["sizes"].update(item=size))


def vocabulary(file: Any) -> Callable[[Path], None]:
    return edited("schema.json", lambda d: d["vocabularies"]["item"].update(file=file))


def crafted(skeleton: str, tensors: dict[str, Any] | None = None) -> bytes:
    """A file of weights whose checksum is right, whatever it says."""
    entries = {**(tensors or {}), "__metadata__": {"format": "pt", "unbraid": skeleton, "crc32": "0" * 8}}
    text = json.dumps(entries, separators=(",", ":")).encode()
    whole = struct.pack("<Q", len(text)) + text + b"\0" * 8
    return whole.replace(b"0" * 8, f"{zlib.crc32(whole):08x}".encode(), 1)


def weights(content: bytes | Callable[[bytes], bytes], name: str = "weights.safetensors") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))

    return apply


def text(part: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / part).write_text(content) and None


ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
DEEP = '{"list":[' * 20_000 + "]}" * 20_000
DAMAGES: dict[str, Callable[[Path], None]] = {
    "a vocabulary elsewhere": vocabulary("../../outside.parquet"),
    "a vocabulary at a root": vocabulary("/outside.parquet"),
    "a vocabulary by a pattern": vocabulary("*.parquet"),
    "no vocabulary": vocabulary(None),
    "a size that no memory has": sized(10**13),
    "a size below 0": sized(-5),
    "a size in words": sized("32"),
    "schema: nested": text("schema.json", "[" * 100_000),
    "schema: a list": text("schema.json", "[]"),
    "metrics: cut": text("metrics.json", "{"),
    "metrics: nested": text("metrics.json", "[" * 100_000),
    "run file: nested": text("run.toml", "a=" + "[" * 5_000 + "]" * 5_000),
    **{f"weights: {n} bytes": weights(lambda raw, n=n: raw[:n]) for n in (0, 7, 8, 100, -1)},  # type: ignore[misc]
    "weights: a header of exabytes": weights(lambda raw: struct.pack("<Q", 2**63) + raw[8:]),
    "weights: a header as long as the file": weights(lambda raw: struct.pack("<Q", len(raw)) + raw[8:]),
    "weights: nested": weights(crafted(DEEP)),
    "weights: a list": weights(crafted('{"list":[1]}')),
    "weights: words": weights(crafted('{"dict":[["a","x"]]}')),
    "weights: an unknown tag": weights(crafted('{"exec":"a"}', ONE)),
    "weights: a list as a name": weights(crafted('{"dict":[[{"list":[]},1]]}')),
    "weights: two of one place": weights(crafted('{"dict":[["a",{"tensor":"a"}]]}', {**ONE, "b": ONE["a"]})),
    "weights: a shape beyond": weights(crafted('{"dict":[]}', {"a": {**ONE["a"], "shape": [2**62, 2**62]}})),
    "calibration: a text": weights(crafted('"x"'), "calibration.safetensors"),
    "uncertainty: nested": weights(crafted(DEEP), "uncertainty.safetensors"),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_bundle_that_was_made_to_do_harm_is_refused(name: str, trained: Path, tmp_path: Path) -> None:
    """With its own error, before memory is asked for or a file elsewhere is read."""
    shutil.copytree(trained, tmp_path / "b")
    shutil.copy(next((trained / "vocabularies").iterdir()), tmp_path / "outside.parquet")
    Bundle.load(tmp_path / "b")
    DAMAGES[name](tmp_path / "b")
    with pytest.raises(BundleError, match=re.escape(str(tmp_path / "b"))):
        Bundle.load(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [{"file": "../000.bin"}, {"file": "/etc/hostname"}, {"dtype": "O"}, {"dtype": "x"}, {"shape": [-1]}, {"shape": 5}],
)
def test_an_encoded_folder_names_its_own_columns(change: dict[str, Any], tmp_path: Path) -> None:
    run = make_run()
    folder = encode(replace(run.data, cache=str(tmp_path)), tables={"log": make_log()})
    Encoded(folder)
    edited("columns.json", lambda d: next(iter(d["columns"].values())).update(change))(folder)
    with pytest.raises(DataError, match=re.escape(str(folder))):
        Encoded(folder)


def test_a_checkpoint_that_was_made_to_do_harm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(crafted(DEEP))
    with pytest.raises(ValueError, match="not written by unbraid"):
        store.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_weights_of_a_backbone_run_nothing(name: str, tmp_path: Path) -> None:
    for content in (pickle.dumps(Bomb(tmp_path / "mark")), zipped(Bomb(tmp_path / "mark"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, SafetensorError)):
            read_weights(str(tmp_path / name), "timm")
    assert not (tmp_path / "mark").exists()


def zipped(value: Any) -> bytes:
    """As ``torch.save`` writes now."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_pickles_are_read_where_the_page_says_alone() -> None:
    calls = re.compile(
        r"\bpickle\.loads?\(|\btorch\.load\(|(?<![\w.`])(?:eval|exec)\(|allow_pickle=True|weights_only=False"
    )
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if calls.search(path.read_text())}
    assert found <= {"workers.py", "tune/trial.py", "backbones/frozen.py"}
    readers = {str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*.py") if "pickle.Unpickler" in p.read_text()}
    assert readers == {"data/arrays.py", "sharded_files.py"}, "which know what may stand in theirs"
    text = (SOURCE / "backbones" / "frozen.py").read_text()
    assert text.count("torch.load(") == text.count("weights_only=True") == 1


@pytest.mark.parametrize("sql", ["read_csv('/etc/passwd')", "(select * from read_parquet('x'))", "__import__('os')"])
def test_sql_of_a_run_file_opens_nothing(sql: str) -> None:
    import polars as pl

    with pytest.raises((DataError, pl.exceptions.PolarsError)):
        pl.DataFrame({"a": [1]}).select(expression(sql, {"a": pl.Int64}, "x"))


# --------------------------------------------------------------------------------------------------------------- run files
@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"images": {"kind": "module", "module": "os.system"}}},
        {"data": {"keep": "__import__('os').mkdir('MARK') > 0"}},
        {"data": {"keep": "price > 0; import os"}},
        {"update": {"kind": "os.system", "command": "mkdir MARK"}},
        {"schedule": {"kind": "!!python/object/apply:os.mkdir", "args": ["MARK"]}},
    ],
)
def test_a_run_file_names_no_code(changed: dict[str, Any], tmp_path: Path) -> None:
    """What it names is one of the members that it may name, or an expression of Polars: neither is looked up in Python."""
    mark, document = tmp_path / "mark", tomllib.loads(config.dumps(make_run()))
    for section, values in changed.items():
        document[section] = {**(document.get(section, {}) if section == "data" else {}), **values}
    (tmp_path / "run.toml").write_text(tomli_w.dumps(document).replace("MARK", str(mark)))
    with pytest.raises((ValueError, DataError)):
        train(config.load(tmp_path / "run.toml"), tmp_path / "b", tables={"log": make_log()})
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------------------------- downloads
def test_training_predicting_and_looking_ask_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"the network is asked: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    train(make_run(training=replace(make_run().training, steps=2)), tmp_path / "b", tables={"log": make_log()})
    bundle = Bundle.load(tmp_path / "b")
    Predictor(bundle).predict(make_log(), tables={"log": make_log()})
    from unbraid.diagnosis.diagnose import diagnose

    assert not diagnose(bundle, tables={"log": make_log()}, rows=200, steps=2, only=("leak", "drift")).failed


def test_nothing_that_asks_a_server_is_imported() -> None:
    """But for the history store on Redis, whose address the user gives."""
    asks = re.compile(
        r"^\s*(?:import|from)\s+(?:urllib\.request|http\.client|requests|httpx|aiohttp|ftplib|boto3|fsspec|huggingface_hub)\b"
        r"|\bload_state_dict_from_url\b|\burlopen\b|\bhub\.load\b",
        re.M,
    )
    assert not [path for path in SOURCE.rglob("*.py") if asks.search(path.read_text())]


@pytest.mark.parametrize(
    "name", ["hf-hub:somebody/model", "hf_hub:somebody/model", "local-dir:/anywhere", "https://x/y"]
)
def test_a_network_of_timm_is_not_looked_for_elsewhere(name: str) -> None:
    """Whether it is trained or read from a bundle (``load=False``): timm would ask a server how the network is made."""
    for load in (True, False):
        with pytest.raises(ValueError, match="read from elsewhere"):
            Timm(name=name, weights="none").build(load=load)


# ------------------------------------------------------------------------------------------------------------- the page
def test_every_claim_names_the_tests_that_hold_it() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)`(?:: `(test_\w+)`)?", page)
    assert len(named) > 12
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text() if test else (ROOT / file).exists(), (file, test)
    claims = [line for line in page.splitlines() if line.startswith("| ") and "|---" not in line][1:]
    assert all("tests/" in line or "not by us" in line or "**" in line for line in claims), "each line has its test"
