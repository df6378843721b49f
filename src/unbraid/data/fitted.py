"""What training data taught, in memory and on disk: ``schema.json``, and a Parquet file or a dictionary per vocabulary."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from unbraid.data import dictionary
from unbraid.data.dictionary import Dictionary, pieces
from unbraid.data.source import DataError
from unbraid.data.spill import os_errors
from unbraid.data.vocabulary import Vocabulary, stable_hash
from unbraid.store import within
from unbraid.types import Feature, Field, History, Schema, Task


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What the training split taught: enough to encode new rows exactly as training rows were."""

    schema: Schema
    vocabularies: Mapping[str, Vocabulary]

    def digest(self) -> str:
        """A hash of everything that encoding depends on."""
        return self._digest(dataclasses.asdict(self.schema))

    def codes_digest(self) -> str:
        """A hash of what codes depend on: not the scales of numbers, which are stored as they are."""
        return self._digest([self.schema.classes, self.schema.widths, self.schema.domains])

    def _digest(self, said: Any) -> str:
        state = hashlib.sha256(json.dumps(said, sort_keys=True, default=list).encode())
        for name in sorted(self.vocabularies):
            values = self.vocabularies[name].values
            state.update(name.encode() + f"{self.vocabularies[name].buckets} {values.dtype}".encode())
            if isinstance(values, Dictionary):
                state.update(values.digest.encode())
                continue
            for piece in pieces(values):
                state.update(stable_hash(piece).tobytes())
        return state.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the schema and the vocabularies into a folder, which then stands alone."""
        (folder / "vocabularies").mkdir(exist_ok=True)
        about = {}
        for i, (name, vocabulary) in enumerate(sorted(self.vocabularies.items())):
            # names may hold any character
            said = _save(vocabulary.values, folder / "vocabularies" / f"{i:03d}")
            about[name] = said | {"buckets": vocabulary.buckets, "values": len(vocabulary.values)}
        document = {"schema": dataclasses.asdict(self.schema), "vocabularies": about}
        (folder / "schema.json").write_text(json.dumps(document, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Fitted:
        """Read them back.  Raises DataError, naming what is missing or does not match."""
        try:
            document = json.loads((folder / "schema.json").read_text())
            vocabularies = {}
            for name, about in document["vocabularies"].items():
                values = _load(within(folder / "vocabularies", about["file"]), about)
                if len(values) != about["values"]:
                    should = f"{about['values']:,}"
                    raise DataError(f"Vocabulary `{name}` should hold {should} values. Found {len(values):,}.")
                vocabularies[name] = Vocabulary(values, about["buckets"])
            schema = _schema(document["schema"])
            _check_sizes(schema.sizes, vocabularies)
            return cls(schema, vocabularies)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{folder} does not hold a readable schema and vocabularies: {error}") from error


def _check_sizes(sizes: Mapping[str, Any], vocabularies: Mapping[str, Vocabulary]) -> None:
    """Raises DataError for sizes that are not those of the vocabularies: tables are made as large as they say."""
    for name, size in sizes.items():
        want = vocabularies[name].size if name in vocabularies else size
        if not isinstance(size, int) or size != want or size < 1:
            raise DataError(f"schema.json: the size of `{name}` should be {want}. Found {size!r}.")


def _save(values: pl.Series | Dictionary, place: Path) -> dict[str, Any]:
    """Write values as ``PLACE.parquet`` or, when they are many, as a dictionary; what `_load` needs."""
    if isinstance(values, pl.Series) and len(values) <= dictionary.LARGE:
        path = place.with_suffix(".parquet")
        with os_errors():
            pl.DataFrame({"value": values}).write_parquet(path)
        return {"file": path.name}
    path = place.with_suffix(".bin")
    if isinstance(values, Dictionary):
        dictionary.copy(values, path)
    else:
        dictionary.write(path, values.dtype, [values])
    return {"file": path.name, "type": str(values.dtype)}


def _load(path: Path, about: Mapping[str, Any]) -> pl.Series | Dictionary:
    if path.suffix == ".parquet":
        return pl.read_parquet(path, glob=False)["value"]
    return Dictionary(path, {str(kind): kind for kind in (pl.Int64, pl.Float64, pl.String)}[about["type"]])


def _schema(plain: dict) -> Schema:
    """A schema from its JSON form (lists for tuples, dicts for dataclasses)."""
    return Schema(
        features=tuple(Feature(**f) for f in plain["features"]),
        tasks=tuple(Task(**t) for t in plain["tasks"]),
        histories=tuple(History(**{**h, "fields": tuple(h["fields"])}) for h in plain["histories"]),
        fields=tuple(Field(**f) for f in plain["fields"]),
        domains=tuple(plain["domains"]),
        sizes=plain["sizes"],
        widths=plain["widths"],
        numbers={name: (mean, std) for name, (mean, std) in plain["numbers"].items()},
        classes={name: tuple(values) for name, values in plain["classes"].items()},
        quantiles={name: tuple(values) for name, values in plain.get("quantiles", {}).items()},  # older ones have none
        whole=plain.get("whole", {}),
    )
