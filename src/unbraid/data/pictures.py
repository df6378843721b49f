"""Data sets of pictures as people have them, as a table of rows: a tree of folders, or lists of files.

- A *tree*: a folder per class; or a folder per domain with a folder per class in it; pictures that lie in a domain's own
  folder have no label.  A level called train, valid or test (in one of their usual spellings) is a split.  A level that says
  nothing, such as Office-31's ``amazon/images/mug/``, is passed over.
- *Lists*: text files of lines ``path label``, or ``path`` alone where there is no label.  Domain and split are read from the
  lists' names (``clipart_train.txt``, ``photo/test.txt``); a class is called as the folder of its pictures where the two
  agree.

Arrays, pickles and sparse text are in `unbraid.data.arrays`.  Pictures stay where they are: rows hold their paths.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from unbraid.data.declaration import SPLITS, Data, Split
from unbraid.data.event_log import Prepared
from unbraid.data.images import looked_at
from unbraid.data.source import DataError, stable_uniform
from unbraid.types import Feature, Task

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
WORDS = {"train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid",
         "crossval": "valid", "test": "test", "testing": "test", "eval": "test"}  # fmt: skip
EMPTY_WORDS = {
    "image",
    "images",
    "list",
    "lists",
    "labeled",
    "labelled",
    "unlabeled",
    "unlabelled",
    "kfold",
    "set",
    "split",
}
SCHEMA: Any = {"picture": pl.String, "label": pl.String, "domain": pl.String, "split": pl.String}
SHARE = 0.1  # of a class in a domain that validates, and that tests, where nothing says which
SMALL = 64  # up to this side a network from scratch is taken
SHOWN = 5  # folders without a picture that are named
NARROW = 9  # classes that a table shows one by one


def is_tree(path: Path) -> bool:
    """Does a folder hold a picture anywhere?"""
    return path.is_dir() and next(_pictures_in(path), None) is not None


def _pictures_in(root: Path) -> Iterator[Path]:
    found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    return (path for path in found if not _hidden(path, root) and path.is_file())


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)


# --------------------------------------------------------------------------------------------------------------- a tree
def tree(root: Path, domains: bool = False) -> pl.DataFrame:
    """Rows of `SCHEMA` for the pictures below a folder, in the order of their paths, which are relative to it.

    Args:
        domains: the first level is domains, even if its names are those of splits.

    Raises:
        DataError: there is no picture, no folder that could be a class, or more levels than domain and class.
    """
    found = sorted(path.relative_to(root).as_posix() for path in _pictures_in(root))
    if not found:
        raise DataError(f"{root} holds no picture ({', '.join(sorted(SUFFIXES))}).")
    levels = [tuple(path.split("/")[:-1]) for path in found]
    splits: list[str | None] = [None] * len(levels)
    for place in () if domains else (0, 1):
        if levels and all(len(each) > place and each[place].lower() in WORDS for each in levels):
            splits = [WORDS[each[place].lower()] for each in levels]
            levels = [each[:place] + each[place + 1 :] for each in levels]
            break
    levels = _without_wrappers(levels)
    depth = max(map(len, levels))
    if depth == 2 or (domains and depth == 1):
        pairs = [(each[0] if each else None, each[1] if len(each) == 2 else None) for each in levels]
    elif depth == 1:
        pairs = [(None, each[0] if each else None) for each in levels]
    else:
        raise DataError(_strange(root, found, levels, depth))
    if depth == 2 and (loose := sum(domain is None for domain, _ in pairs)):
        raise DataError(f"{loose:,} pictures lie in {root} itself, beside folders of domains. Move them into one.")
    rows = [(path, label, domain, split) for path, (domain, label), split in zip(found, pairs, splits, strict=True)]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _without_wrappers(levels: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The levels without a second one that all pictures of a domain share, above their classes."""
    inner: dict[str, set[tuple[str, ...]]] = {}
    for each in levels:
        inner.setdefault(each[0] if each else "", set()).add(each)
    drop = {
        name
        for name, mine in inner.items()
        if all(len(each) > 2 for each in mine) and len({each[1] for each in mine}) == 1
    }
    if not drop:
        return list(levels)
    return _without_wrappers([each[:1] + each[2:] if each and each[0] in drop else each for each in levels])


def _strange(root: Path, found: Sequence[str], levels: Sequence[tuple[str, ...]], depth: int) -> str:
    """What to say of a tree that is no folder per class, nor one per domain and class."""
    example = next(path for path, each in zip(found, levels, strict=True) if len(each) == depth)
    what = "lie in no folder" if depth == 0 else f"lie {depth} folders deep"
    return (
        f"Pictures of {root} {what} (such as {example}). They should lie in a folder per class, or in a folder per domain with a "
        "folder per class, pictures without a label in the domain's own folder."
    )


# ---------------------------------------------------------------------------------------------------------------- lists
def lists(files: Sequence[Path], root: Path | None = None) -> tuple[pl.DataFrame, list[str]]:
    """Rows of `SCHEMA` for the pictures that lists name, with absolute paths, and notes.

    Args:
        files: the lists; root: the folder that their paths are relative to; None: a list's own folder or the one above.

    Raises:
        DataError: a line names a file that is no picture, or the first file is nowhere.
    """
    parts = []
    for file in sorted(files, key=lambda file: (SPLITS.index(_named(file)[1] or "train"), file.as_posix())):
        domain, split = _named(file)
        pairs = list(_lines(file))
        home = _home(file, pairs[0][0], root) if pairs else file.parent
        rows = [((home / path).as_posix(), label, domain, split) for path, label in pairs]
        parts.append(pl.DataFrame(rows, schema=SCHEMA, orient="row"))
    frame = pl.concat(parts)
    notes = []
    if double := len(frame) - frame["picture"].n_unique():
        frame = frame.unique("picture", keep="first", maintain_order=True)
        notes.append(f"{double:,} lines name a picture again; what train says of it counts, then valid, then test.")
    if frame["domain"].n_unique() == 1:
        frame = frame.with_columns(domain=pl.lit(None, pl.String))
    return _called(frame), notes


def _named(file: Path) -> tuple[str, str | None]:
    """Domain and split that a list's name says, its folder where the name says no domain."""
    words = re.split(r"[_\-.\s]+", file.stem)
    split = next((WORDS[word.lower()] for word in words if word.lower() in WORDS), None)
    rest = [
        word for word in words if word.lower() not in WORDS and word.lower() not in EMPTY_WORDS and not word.isdigit()
    ]
    return "_".join(rest) or file.resolve().parent.name, split


def _lines(file: Path) -> Iterable[tuple[str, str | None]]:
    """(path, label) of each line; a path may hold spaces."""
    for number, line in enumerate(file.read_text().splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        path, _, label = line.rpartition(" ") if not _is_picture(line) else (line, "", "")
        path, label = (path.rstrip(" ,;\t"), label) if path else line.partition("\t")[::2]
        if not _is_picture(path):
            raise DataError(f"{file}, line {number:,}: `{line[:80]}` should be the path of a picture and its label.")
        yield path, label or None


def _is_picture(path: str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES


def _home(file: Path, first: str, root: Path | None) -> Path:
    """The folder that a list's paths are relative to."""
    places = [root] if root is not None else [file.parent, file.parent.parent]
    for place in places:
        if (place / first).is_file():
            return place.resolve()
    tried = " and ".join(str(place) for place in places)
    raise DataError(f"{file} names {first}, which is not in {tried}. Say where its paths begin, with --root.")


def _called(frame: pl.DataFrame) -> pl.DataFrame:
    """Labels called as the folders of their pictures, where each label has one folder and each folder one label."""
    folder = pl.col("picture").str.extract(r"([^/]+)/[^/]+$")
    pairs = frame.filter(pl.col("label").is_not_null()).select("label", folder=folder).unique()
    numbers = bool(len(pairs)) and pairs["label"].str.contains(r"^\d+$").all()
    agree = len(pairs) == pairs["label"].n_unique() == pairs["folder"].n_unique() and not pairs["folder"].null_count()
    if not (numbers and agree):
        return frame
    return frame.with_columns(pl.col("label").replace_strict(dict(pairs.rows()), default=None, return_dtype=pl.String))


# ------------------------------------------------------------------------------------------------------ from rows to a run
def prepared(frame: pl.DataFrame, root: Path | None = None, notes: Sequence[str] = ()) -> Prepared:
    """Rows with a split, and how a run reads them.

    Args:
        frame: columns of `SCHEMA`, ``picture`` holding paths or bytes, or ``vector`` in its place; root: of relative paths.

    Raises:
        DataError: fewer than two classes have a label.
    """
    if frame["label"].n_unique() - bool(frame["label"].null_count()) < 2:
        raise DataError(f"Two classes are needed. Found {frame['label'].drop_nulls().unique().to_list()}.")
    rows = with_splits(frame)
    rows = rows.drop("domain") if rows["domain"].null_count() == len(rows) else rows
    kind: Any = "image" if "picture" in rows.columns else "vector"
    data = Data(
        rows="rows.parquet",
        domain="domain" if "domain" in rows.columns else "",
        features=(Feature("picture" if kind == "image" else "vector", kind=kind),),
        tasks=(Task("label", kind="multiclass"),),
        split=Split(kind="column", column="split"),
    )
    from unbraid.config import ModelChoice
    from unbraid.train import Training

    model = ModelChoice(images=backbone_for(rows["picture"], root)) if kind == "image" else None
    training = Training(batch_size=32, epochs=20.0, metric="accuracy")
    return Prepared(data, {"rows.parquet": rows}, None, tuple(notes), training, model)


def with_splits(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows with a split for each: what is given stays, but no split ends up empty.

    Without any, a tenth of every class in every domain validates and a tenth tests, one row at least where there are three.
    Where only test or only valid is given, that tests, and a tenth of the training rows validates.  Rows without a label
    are split like one more class: selection and calibration without labels read those that validate and test.
    """
    given = set(frame["split"].drop_nulls().unique())
    split = pl.col("split")
    if given and "test" not in given:
        split = split.replace({"valid": "test"})
    frame = frame.with_columns(split=split.fill_null("train"))
    need = [name for name in ("test", "valid") if name not in set(frame["split"].unique())]
    name = frame.columns[0]
    key = frame[name] if frame[name].dtype == pl.String else pl.Series("key", [str(n) for n in range(len(frame))])
    free = pl.col("split") == "train"
    place = pl.col("__draw").rank("ordinal").over("domain", "label", "__free") - 1
    count = pl.len().over("domain", "label", "__free")
    each = pl.when(count >= len(need) + 1).then((count * SHARE).round().clip(1)).otherwise(0)
    chosen: Any = pl.when(~pl.col("__free")).then(pl.col("split"))
    for n, part in enumerate(need):
        chosen = chosen.when(place < (n + 1) * each).then(pl.lit(part))
    frame = frame.with_columns(stable_uniform(key.alias("__draw"), 0)).with_columns(free.alias("__free"))
    return frame.with_columns(split=chosen.otherwise(pl.col("split"))).drop("__draw", "__free")


def backbone_for(pictures: pl.Series, root: Path | None) -> Any:
    """A network from scratch for small pictures; EfficientNet-Lite0 for others, where its weights are installed."""
    from unbraid.backbones.efficientnet_lite0 import PACKAGE, EfficientNetLite0
    from unbraid.backbones.small_conv import SmallConv

    found = looked_at(pictures.to_list(), root or Path())
    side, colour = found["side"], any(mode not in ("1", "L") and mode[0] not in "IF" for mode in found["modes"])
    if side > SMALL and importlib.util.find_spec(PACKAGE) is not None:
        return EfficientNetLite0()
    return SmallConv(size=min(side, SMALL), channels=(32, 64) if side <= 32 else (32, 64, 128), colour=colour)


def counted(rows: pl.DataFrame) -> list[str]:
    """What there is: domains x classes x counts, as lines of text."""
    domain = pl.col("domain").fill_null("?") if "domain" in rows.columns else pl.lit("all")
    cells = rows.group_by(domain.alias("domain"), "label").len("n")
    classes = sorted(cells["label"].drop_nulls().unique().to_list())
    domains = sorted(cells["domain"].unique().to_list())
    n = {(where, label): count for where, label, count in cells.rows()}
    loose = any(label is None for _, label in n)
    heads = ["domain", *classes] if len(classes) <= NARROW else ["domain", "classes", "per class", "labelled"]
    table = [[*heads, *(["no label"] if loose else [])]]
    for where in domains:
        mine = [n.get((where, label), 0) for label in classes]
        some = [count for count in mine if count]
        each = f"{min(some):,} to {max(some):,}" if some else "-"
        shown = [f"{c:,}" for c in mine] if len(classes) <= NARROW else [f"{len(some):,}", each, f"{sum(mine):,}"]
        table.append([where, *shown, *([f"{n.get((where, None), 0):,}"] if loose else [])])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
    splits = ", ".join(f"{name} {count:,}" for name in SPLITS if (count := (rows["split"] == name).sum()))
    return [f"{len(rows):,} rows, {len(domains)} domain(s), {len(classes)} classes; {splits}", *lines]


# -------------------------------------------------------------------------------------------------------------- commands
def prepare(source: Path, root: Path | None = None, domains: bool = False) -> Prepared:
    """Rows and a run from any of the layouts, told apart by what is there; paths are absolute.

    Args:
        source: a folder or a file; root: of lists' paths; domains: as of `tree`.

    Raises:
        DataError: none of the layouts, or what the reader of one says.
    """
    from unbraid.data import arrays

    if not source.exists():
        raise DataError(f"There is no file or folder {source}.")
    inside = sorted(path for path in source.iterdir() if not path.name.startswith(".")) if source.is_dir() else [source]
    if source.is_dir() and arrays.is_cifar(source):
        return prepared(arrays.cifar(source))
    if npz := [path for path in inside if path.suffix == ".npz"]:
        return prepared(arrays.npz(npz))
    if sparse := [path for path in inside if path.suffix in arrays.SPARSE]:
        return prepared(arrays.svmlight(sparse))
    if is_tree(source) and root is None:
        frame = tree(source, domains)
        home = source.resolve().as_posix()
        return prepared(frame.with_columns(picture=pl.lit(home + "/") + pl.col("picture")))
    if texts := [path for path in inside if path.suffix in (".txt", ".lst")]:
        frame, notes = lists(texts, root)
        return prepared(frame, notes=notes)
    raise DataError(
        f"{source} should hold pictures in folders, lists of them (.txt, with --root), arrays (.npz), CIFAR's pickles, or sparse "
        f"text (.svmlight). Found {', '.join(path.name for path in inside[:8]) or 'nothing'}."
    )


def empty_folders(root: Path) -> list[str]:
    """A warning where folders hold no picture, not even deeper: a class that is missing, perhaps."""
    full = {parent for path in _pictures_in(root) for parent in path.relative_to(root).parents}
    below = (path.relative_to(root) for path in root.rglob("*") if path.is_dir() and not _hidden(path, root))
    bare = sorted(path.as_posix() for path in below if path not in full)
    more = ", ..." if len(bare) > SHOWN else ""
    return [f"! {len(bare):,} folder(s) without a picture: {', '.join(bare[:SHOWN])}{more}"] if bare else []
