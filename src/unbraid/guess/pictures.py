"""A first run file for a folder of pictures: what the folders say is written into a table beside them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import polars as pl

from unbraid import config
from unbraid.data.pictures import SCHEMA, counted, empty_folders, prepared, tree
from unbraid.data.source import DataError
from unbraid.guess.infer import inline


def first_run(folder: Path, domains: bool = False) -> tuple[str, list[str]]:
    """Write ``rows.parquet`` into a folder of pictures.

    Returns:
        A run file that trains on it, and lines that say what was found.

    Raises:
        DataError: what `tree` says, or a ``rows.parquet`` of somebody else is there; OSError: the folder cannot be written to.
    """
    made = prepared(tree(folder, domains), folder)
    rows, out = made.tables["rows.parquet"], folder / "rows.parquet"
    if out.exists() and not set(pl.read_parquet_schema(out)) <= {*SCHEMA}:
        raise DataError(
            f"{out} is there, and is no table of pictures. Move it, or use `unbraid data prepare pictures`."
        )
    rows.write_parquet(out)
    name = re.sub(r"\W+", "_", folder.resolve().name).strip("_") or "pictures"
    data = replace(made.data, folder=str(folder.resolve()))
    plain = config.to_dict(config.Run(data, name, model=made.model, training=made.training), defaults=False)
    lines = [f"name = {inline(name)}  # {len(rows):,} pictures in {folder.name}, by `unbraid init`"]
    for section in ("data", "model", "training"):
        lines += [f"[{section}]", *(f"{key} = {inline(value)}" for key, value in plain[section].items())]
    return "\n".join(lines) + "\n", [*counted(rows), *empty_folders(folder), f"wrote {out}"]
