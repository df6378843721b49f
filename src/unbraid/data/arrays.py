"""Data sets that come as arrays: NumPy's ``.npz``, the pickles of CIFAR, sparse vectors in svmlight's text.

Pictures in arrays become PNG, which loses nothing, in a binary column of the rows.  Each file of a folder is a domain.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid.data.images import pillow
from unbraid.data.source import DataError

DATA, LABELS = ("x", "images", "data", "features"), ("y", "labels", "label", "targets", "target")
WIDEST = 20_000  # elements of a vector from sparse text: rows are stored dense
SPARSE = {".svm", ".svmlight", ".libsvm"}
ROWS: Any = {"label": pl.String, "domain": pl.String, "split": pl.String}


# ------------------------------------------------------------------------------------------------------------------ npz
def npz(files: Sequence[Path]) -> pl.DataFrame:
    """Rows of the arrays in ``.npz`` files.

    A file holds ``x`` and ``y`` (or ``images``, ``data``, ``features`` and ``labels``, ``targets``), or ``x_train``, ``y_train``,
    ``x_test``, ``y_test``; without labels its rows have none.  ``x`` is (n, H, W), (n, H, W, C) or (n, C, H, W), or (n, D)
    for vectors.

    Raises:
        DataError: no such arrays, or as many labels as rows are not there.
    """
    parts = []
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            held = {name.lower(): arrays[name] for name in arrays.files}
        for split, x, y in _parts(file, held):
            parts.append(rows_of(x, y, file.stem if len(files) > 1 else None, split, str(file)))
    return pl.concat(parts)


def _parts(file: Path, held: Mapping[str, np.ndarray]) -> Iterable[tuple[str | None, np.ndarray, np.ndarray | None]]:
    """(split, data, labels) of a file's arrays."""
    endings: dict[str, str | None] = {"": None, "_train": "train", "_val": "valid", "_valid": "valid", "_test": "test",
               "train_": "train", "val_": "valid", "test_": "test"}  # fmt: skip
    found = False
    for ending, split in endings.items():
        named = (lambda name, end=ending: end + name) if ending.endswith("_") else (lambda name, end=ending: name + end)
        x = next((held[named(name)] for name in DATA if named(name) in held), None)
        if x is not None:
            found = True
            yield split, x, next((held[named(name)] for name in LABELS if named(name) in held), None)
    if not found:
        raise DataError(f"{file} should hold arrays x and y, or x_train, y_train and so on. Found {', '.join(held)}.")


def rows_of(x: np.ndarray, y: np.ndarray | None, domain: str | None, split: str | None, where: str) -> pl.DataFrame:
    """Rows with ``picture`` or ``vector``, ``label``, ``domain``, ``split``.  Raises DataError for other shapes."""
    labels = None if y is None else [str(label) for label in np.asarray(y).reshape(-1)]
    if labels is not None and len(labels) != len(x):
        raise DataError(f"{where}: there should be a label per row. Found {len(x):,} rows and {len(labels):,} labels.")
    if x.ndim == 2:
        columns: dict[str, Any] = {"vector": pl.Series(x.astype(np.float32)).arr.to_list()}
    else:
        columns = {"picture": pl.Series([png(one) for one in _pictures(x, where)], dtype=pl.Binary)}
    rest: dict[str, Any] = {"label": labels or [None] * len(x), "domain": [domain] * len(x), "split": [split] * len(x)}
    return pl.DataFrame({**columns, **rest}, schema_overrides=ROWS)


def _pictures(x: np.ndarray, where: str) -> np.ndarray:
    """(n, H, W) or (n, H, W, 3) bytes."""
    if x.ndim == 4 and x.shape[-1] not in (1, 3) and x.shape[1] in (1, 3):
        x = x.transpose(0, 2, 3, 1)
    if x.ndim == 4 and x.shape[-1] == 1:
        x = x[..., 0]
    if not (x.ndim == 3 or (x.ndim == 4 and x.shape[-1] == 3)):
        raise DataError(
            f"{where}: data should be pictures (n, H, W), (n, H, W, C) or (n, C, H, W), or vectors (n, D). Found {x.shape}."
        )
    if x.dtype.kind == "f" and len(x):
        low, high = float(x.min()), float(x.max())
        if low < 0 or high > 1:
            raise DataError(f"{where}: pictures should be bytes, or numbers in [0, 1]. Found {low:g} to {high:g}.")
        x = np.rint(x * 255)
    return x.astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """A picture (H, W) or (H, W, 3) of bytes, without loss."""
    out = io.BytesIO()
    pillow().fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------- CIFAR
class _Plain(pickle.Unpickler):
    """Reads arrays, numbers, texts and their containers, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises DataError for anything but what arrays are made of."""
        allowed = {"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"}
        if module.partition(".")[0] == "numpy" and name in allowed:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) in (("_codecs", "encode"), ("collections", "OrderedDict")):
            return super().find_class(module, name)
        raise DataError(
            f"The pickle holds {module}.{name}, which CIFAR's files do not. It is not read: it could run anything."
        )


def cifar(folder: Path) -> pl.DataFrame:
    """Rows of CIFAR-10's or CIFAR-100's Python files: pictures of 32 pixels, labels by name.

    Raises:
        DataError: files are missing, or hold something else.
    """
    ten = (folder / "data_batch_1").exists()
    files = {"train": sorted(folder.glob("data_batch_*")) if ten else [folder / "train"],
             "test": [folder / ("test_batch" if ten else "test")]}  # fmt: skip
    about = _read(folder / ("batches.meta" if ten else "meta"))
    names = _text(about["label_names" if ten else "fine_label_names"])
    parts = []
    for split, mine in files.items():
        for file in mine:
            held = _read(file)
            labels = [names[label] for label in held["labels" if ten else "fine_labels"]]
            pictures = np.asarray(held["data"]).reshape(-1, 3, 32, 32)
            parts.append(rows_of(pictures, np.array(labels), None, split, str(file)))
    return pl.concat(parts)


def is_cifar(folder: Path) -> bool:
    """Does a folder hold CIFAR's files?"""
    ten = (folder / "data_batch_1").exists() and (folder / "batches.meta").exists()
    return ten or all((folder / name).is_file() for name in ("train", "test", "meta"))


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            found = _Plain(stream, encoding="bytes").load()
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}


def _text(names: Sequence[Any]) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


# ------------------------------------------------------------------------------------------------------------- svmlight
def svmlight(files: Sequence[Path]) -> pl.DataFrame:
    """Rows of sparse text, ``label index:value ...``: vectors of one width, each file a domain.

    Raises:
        DataError: a file cannot be read, or vectors are too wide to be stored dense.
    """
    from sklearn.datasets import load_svmlight_files

    try:
        read = load_svmlight_files([str(file) for file in files])
    except ValueError as error:
        raise DataError(f"{', '.join(file.name for file in files)} cannot be read as svmlight: {error}.") from error
    width = read[0].shape[1]
    if width > WIDEST:
        raise DataError(
            f"Vectors of {width:,} elements are too wide to be stored dense (at most {WIDEST:,}). Reduce them first."
        )
    parts = []
    for file, x, y in zip(files, read[::2], read[1::2], strict=True):
        labels = np.array([f"{label:g}" for label in y])
        parts.append(rows_of(x.toarray(), labels, file.stem if len(files) > 1 else None, None, str(file)))
    return pl.concat(parts)
