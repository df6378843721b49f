"""Folders, lists, arrays, pickles and sparse text as people have them, and the runs that are made of them."""

from __future__ import annotations

import pickle
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from picturekit import array, write

from unbraid import config
from unbraid.backbones.small_conv import SmallConv
from unbraid.data import arrays, pictures
from unbraid.data.arrays import cifar, npz, rows_of, svmlight
from unbraid.data.encode import encode
from unbraid.data.images import opened
from unbraid.data.pictures import counted, is_tree, lists, prepare, tree, with_splits
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.guess.pictures import first_run

pytest.importorskip("PIL", reason="Pillow is not installed")


def make(root: Path, *paths: str) -> Path:
    for n, path in enumerate(paths):
        write(root / path, array(n, n % 3))
    return root


def cells(frame: pl.DataFrame) -> dict[tuple[Any, Any], int]:
    return dict(Counter(zip(frame["domain"], frame["label"], strict=True)))


# ---------------------------------------------------------------------------------------------------------------- trees
def test_a_folder_per_class(tmp_path: Path) -> None:
    frame = tree(make(tmp_path, "cat/1.png", "cat/2.JPG", "dog/1.png", ".hidden/x/3.png", "notes.txt.png/4.png"))
    assert cells(frame) == {(None, "cat"): 2, (None, "dog"): 1, (None, "notes.txt.png"): 1}
    assert frame["picture"].to_list() == ["cat/1.png", "cat/2.JPG", "dog/1.png", "notes.txt.png/4.png"]
    assert frame["split"].null_count() == 4


def test_a_folder_per_domain_with_a_folder_per_class_as_pacs_office_home_and_domainnet_have(tmp_path: Path) -> None:
    names = [
        "photo/dog/056_0001.jpg",
        "photo/elephant/1.jpg",
        "Real World/Alarm_Clock/00001.jpg",
        "clipart/aircraft_carrier/1.png",
    ]
    frame = tree(make(tmp_path, *names))
    want = {
        ("photo", "dog"): 1,
        ("photo", "elephant"): 1,
        ("Real World", "Alarm_Clock"): 1,
        ("clipart", "aircraft_carrier"): 1,
    }
    assert cells(frame) == want


def test_office_31_has_a_level_that_says_nothing(tmp_path: Path) -> None:
    names = [f"{site}/images/{kind}/frame_0001.jpg" for site in ("amazon", "dslr", "webcam") for kind in ("mug", "pen")]
    frame = tree(make(tmp_path, *names))
    assert cells(frame) == {(site, kind): 1 for site in ("amazon", "dslr", "webcam") for kind in ("mug", "pen")}


def test_a_domain_without_class_folders_has_no_labels(tmp_path: Path) -> None:
    frame = tree(make(tmp_path, "photo/cat/1.png", "photo/dog/1.png", "photo/2.png", "sketch/1.png", "sketch/2.png"))
    assert cells(frame) == {("photo", "cat"): 1, ("photo", "dog"): 1, ("photo", None): 1, ("sketch", None): 2}


@pytest.mark.parametrize("where", ["{split}/{kind}", "{split}/{site}/{kind}", "{site}/{split}/{kind}"])
def test_a_level_of_splits_is_found_above_or_below_domains(tmp_path: Path, where: str) -> None:
    words = {"Train": "train", "val": "valid", "testing": "test"}
    names = [where.format(split=s, site=d, kind=k) + "/1.png" for s in words for d in "ab" for k in ("x", "y")]
    frame = tree(make(tmp_path, *dict.fromkeys(names)))
    assert set(frame["split"]) == {"train", "valid", "test"}
    assert set(frame["domain"]) == ({None} if "{site}" not in where else {"a", "b"}) and set(frame["label"]) == {
        "x",
        "y",
    }


def test_visda_calls_its_domains_as_splits(tmp_path: Path) -> None:
    make(tmp_path, "train/plane/1.png", "train/car/1.png", "validation/plane/1.jpg", "validation/car/1.jpg")
    assert set(tree(tmp_path)["split"]) == {"train", "valid"} and tree(tmp_path)["domain"].null_count() == 4
    frame = tree(tmp_path, domains=True)
    assert (
        cells(frame) == {(d, k): 1 for d in ("train", "validation") for k in ("car", "plane")}
        and frame["split"].null_count() == 4
    )


def test_pictures_above_the_classes_have_no_label(tmp_path: Path) -> None:
    assert cells(tree(make(tmp_path, "cat/1.png", "dog/1.png", "3.png"))) == {
        (None, "cat"): 1,
        (None, "dog"): 1,
        (None, None): 1,
    }


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ((), "holds no picture .*.png"),
        (("1.png", "2.png"), r"lie in no folder \(such as 1.png\)"),
        (("a/b/c/1.png", "a/d/c/2.png"), r"lie 3 folders deep \(such as a/b/c/1.png\)"),
        (("a/b/1.png", "c/d/1.png", "2.png"), "1 pictures lie in .* itself, beside folders of domains"),
    ],
)
def test_other_trees_are_errors_with_an_example(tmp_path: Path, paths: tuple[str, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        tree(make(tmp_path, *paths))


# ---------------------------------------------------------------------------------------------------------------- lists
def test_lists_as_pacs_and_domainnet_have_them(tmp_path: Path) -> None:
    names = [f"{d}/{k}/{n}.jpg" for d in ("art_painting", "photo") for k in ("dog", "fox") for n in range(3)]
    make(tmp_path, *names)
    for domain in ("art_painting", "photo"):
        mine = [name for name in names if name.startswith(domain)]
        lines = [f"{name} {1 + ('fox' in name)}" for name in mine]
        for part, chosen in {"train": lines[::3] + lines[1::3], "crossval": lines[2::3], "test": lines}.items():
            (tmp_path / f"{domain}_{part}_kfold.txt").write_text("\n".join(chosen) + "\n")
    frame, notes = lists(sorted(tmp_path.glob("*.txt")))
    assert cells(frame) == {(d, k): 3 for d in ("art_painting", "photo") for k in ("dog", "fox")}, (
        "numbers have their folders' names"
    )
    assert (
        dict(Counter(frame["split"])) == {"train": 8, "valid": 4}
        and len(notes) == 1
        and "12 lines name a picture again" in notes[0]
    )
    assert all(Path(path).is_file() for path in frame["picture"])


def test_lists_named_by_their_folder_paths_with_spaces_and_lines_without_labels(tmp_path: Path) -> None:
    make(tmp_path, "Real World/cat/a 1.jpg", "Real World/dog/1.jpg", "train/img/1.png", "train/img/2.png")
    (tmp_path / "Real World/image_list.txt").write_text("cat/a 1.jpg 0\n\ndog/1.jpg\t1\n")
    (tmp_path / "train/list.txt").write_text("train/img/1.png\ntrain/img/2.png\n")
    frame, _ = lists([tmp_path / "Real World/image_list.txt", tmp_path / "train/list.txt"])
    assert cells(frame) == {("Real World", "cat"): 1, ("Real World", "dog"): 1, ("train", None): 2}


def test_labels_stay_as_they_are_where_folders_disagree(tmp_path: Path) -> None:
    make(tmp_path, "x/1.png", "x/2.png", "y/3.png")
    (tmp_path / "all.txt").write_text("x/1.png 0\nx/2.png 1\ny/3.png 1\n")
    frame, _ = lists([tmp_path / "all.txt"])
    assert frame["label"].to_list() == ["0", "1", "1"] and frame["domain"].null_count() == 3


def test_errors_of_lists_name_the_line_and_the_places(tmp_path: Path) -> None:
    make(tmp_path, "pics/1.png")
    (tmp_path / "l").mkdir()
    (tmp_path / "l/one.txt").write_text("1.png 0\n")
    with pytest.raises(
        DataError, match="names 1.png, which is not in .*/l and .*Say where its paths begin, with --root"
    ):
        lists([tmp_path / "l/one.txt"])
    assert len(lists([tmp_path / "l/one.txt"], tmp_path / "pics")[0]) == 1
    (tmp_path / "l/one.txt").write_text("1.png 0\nhello there\n")
    with pytest.raises(DataError, match="line 2: `hello there` should be the path of a picture"):
        lists([tmp_path / "l/one.txt"], tmp_path / "pics")


# --------------------------------------------------------------------------------------------------------------- arrays
def pixels_of(frame: pl.DataFrame, row: int) -> np.ndarray:
    image = opened(frame["picture"][row], "", "RGB")
    return np.asarray(image)


@pytest.mark.parametrize("layout", ["last", "first", "grey", "grey1", "float"])
def test_npz_pictures_lose_nothing(tmp_path: Path, layout: str) -> None:
    x = np.stack([array(n) for n in range(4)])
    want = x if "grey" not in layout else np.repeat(x[..., :1], 3, 3)
    stored = {"last": x, "first": x.transpose(0, 3, 1, 2), "grey": x[..., 0], "grey1": x[..., :1], "float": x / 255}[
        layout
    ]
    np.savez(tmp_path / "d.npz", x=stored, y=np.array([[3], [5], [3], [5]]))
    frame = npz([tmp_path / "d.npz"])
    assert frame["label"].to_list() == ["3", "5", "3", "5"] and frame["domain"].null_count() == 4
    for row in range(4):
        assert np.array_equal(pixels_of(frame, row), want[row])


def test_npz_with_splits_vectors_and_a_domain_per_file(tmp_path: Path) -> None:
    keras = {"x_train": np.zeros((3, 4)), "y_train": np.arange(3), "x_test": np.ones((2, 4)), "y_test": np.arange(2)}
    np.savez(tmp_path / "a.npz", **keras)
    np.savez(tmp_path / "b.npz", features=np.full((2, 4), 2.0))
    frame = npz([tmp_path / "a.npz", tmp_path / "b.npz"])
    assert (
        frame["domain"].to_list() == ["a"] * 5 + ["b"] * 2
        and frame["split"].to_list() == ["train"] * 3 + ["test"] * 2 + [None] * 2
    )
    assert frame["vector"].to_list()[-1] == [2.0] * 4 and frame["label"].to_list()[-2:] == [None, None]


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"z": np.zeros(3)}, "should hold arrays x and y.* Found z"),
        ({"x": np.zeros((3, 4)), "y": np.zeros(2)}, "Found 3 rows and 2 labels"),
        ({"x": np.zeros((3, 4, 5, 7))}, r"Found \(3, 4, 5, 7\)"),
        ({"x": np.full((3, 4, 5), 9.0)}, r"numbers in \[0, 1\]. Found 9 to 9"),
        ({"x": np.array([{}], dtype=object)}, "Object arrays"),
    ],
)
def test_other_arrays_are_errors(tmp_path: Path, held: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "d.npz", **held)
    with pytest.raises(ValueError, match=words):
        npz([tmp_path / "d.npz"])


def cifar_files(folder: Path, ten: bool) -> None:
    def batch(file: str, n: int) -> None:
        data = np.stack([array(n * 4 + i, size=(32, 32)).transpose(2, 0, 1).reshape(-1) for i in range(4)])
        labels = {b"labels" if ten else b"fine_labels": [0, 1, 1, 0], b"data": data, b"batch_label": b"a batch"}
        (folder / file).write_bytes(pickle.dumps(labels, protocol=2))

    names = {b"label_names" if ten else b"fine_label_names": [b"cat", b"dog"]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(names, protocol=2))
    for n, file in enumerate(["data_batch_1", "data_batch_2", "test_batch"] if ten else ["train", "test"]):
        batch(file, n)


@pytest.mark.parametrize("ten", [True, False])
def test_cifars_pickles(tmp_path: Path, ten: bool) -> None:
    cifar_files(tmp_path, ten)
    assert arrays.is_cifar(tmp_path)
    frame = cifar(tmp_path)
    assert dict(Counter(frame["split"])) == {"train": 8 if ten else 4, "test": 4}
    assert frame["label"][:4].to_list() == ["cat", "dog", "dog", "cat"]
    assert np.array_equal(pixels_of(frame, 5), array(5, size=(32, 32)))


def test_a_pickle_that_could_run_something_is_refused(tmp_path: Path) -> None:
    cifar_files(tmp_path, True)

    class Bad:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(DataError, match="which CIFAR's files do not. It is not read"):
        cifar(tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "data_batch_1").write_bytes(b"")
    with pytest.raises(DataError, match="data_batch_1 cannot be read"):
        cifar(tmp_path)


def test_svmlight_files_are_domains_of_one_width(tmp_path: Path) -> None:
    (tmp_path / "books.svmlight").write_text("1 1:0.5 3:2\n-1 2:1\n")
    (tmp_path / "dvd.svmlight").write_text("1 5:1 # a comment\n")
    frame = svmlight(sorted(tmp_path.glob("*.svmlight")))
    assert frame["vector"].to_list() == [[0.5, 0, 2, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert frame["label"].to_list() == ["1", "-1", "1"] and frame["domain"].to_list() == ["books", "books", "dvd"]
    (tmp_path / "dvd.svmlight").write_text("1 200000:1\n")
    with pytest.raises(DataError, match="Vectors of 200,000 elements are too wide"):
        svmlight(sorted(tmp_path.glob("*.svmlight")))
    (tmp_path / "dvd.svmlight").write_text("one two\n")
    with pytest.raises(DataError, match="cannot be read as svmlight"):
        svmlight(sorted(tmp_path.glob("*.svmlight")))


# --------------------------------------------------------------------------------------------------------------- splits
def frame_of(labels: list[Any], splits: list[Any] | None = None, domains: list[Any] | None = None) -> pl.DataFrame:
    n = len(labels)
    columns = {
        "picture": [f"{i}.png" for i in range(n)],
        "label": labels,
        "domain": domains or [None] * n,
        "split": splits or [None] * n,
    }
    return pl.DataFrame(columns, schema=pictures.SCHEMA)


def test_a_tenth_of_every_class_in_every_domain_validates_and_tests() -> None:
    frame = with_splits(frame_of(["a", "b"] * 100 + [None] * 50, domains=["x"] * 100 + ["y"] * 150))
    for _, part in frame.group_by("domain", "label"):
        want = {
            "train": 40,
            "valid": 5,
            "test": 5,
        }  # also of rows without a label: what is chosen or calibrated without labels reads them
        assert dict(Counter(part["split"])) == want
    again = with_splits(frame_of(["a", "b"] * 100 + [None] * 50, domains=["x"] * 100 + ["y"] * 150))
    assert frame.equals(again) and frame.columns == ["picture", "label", "domain", "split"]


def test_small_classes_keep_a_row_to_train_on() -> None:
    frame = with_splits(frame_of(["a"] * 3 + ["b"] * 2 + ["c"]))
    found = {label: dict(Counter(part["split"])) for (label,), part in frame.group_by("label")}
    assert found == {"a": {"train": 1, "valid": 1, "test": 1}, "b": {"train": 2}, "c": {"train": 1}}


@pytest.mark.parametrize(("given", "want"), [
    (["train"] * 20 + ["test"] * 5, {"train": 18, "valid": 2, "test": 5}),
    (["train"] * 20 + ["valid"] * 5, {"train": 18, "valid": 2, "test": 5}),
    (["train"] * 20 + ["valid"] * 3 + ["test"] * 2, {"train": 20, "valid": 3, "test": 2}),
])  # fmt: skip
def test_given_splits_stay_and_none_is_empty(given: list[str], want: dict[str, int]) -> None:
    frame = with_splits(frame_of((["a", "b"] * 20)[: len(given)], given))
    assert dict(Counter(frame["split"])) == want
    assert set(frame["split"][20:]) <= {"valid", "test"}


# ----------------------------------------------------------------------------------------------------------------- runs
def two_domains(root: Path, side: int = 12) -> Path:
    for n in range(36):
        write(root / f"photo/{'cat dog fox'.split()[n % 3]}/{n}.png", array(n, n % 3, (side, side)))
        write(root / f"sketch/{n}.png", array(n + 50, n % 3, (side, side)))
    return root


def test_init_of_two_domains_one_without_labels(tmp_path: Path) -> None:
    root = two_domains(tmp_path / "pets")
    assert is_tree(root)
    text, found = first_run(root)
    assert len(text.splitlines()) < 15
    (tmp_path / "run.toml").write_text(text)
    run = config.load(tmp_path / "run.toml")
    assert run.model.images == SmallConv(size=12) and run.data.domain == "domain" and run.training.metric == "accuracy"
    encoded = Encoded(encode(run.data))
    assert encoded.rows == 72 and encoded.schema.classes["label"] == ("cat", "dog", "fox")
    assert found[0] == "72 rows, 2 domain(s), 3 classes; train 58, valid 7, test 7"
    assert [line.split() for line in found[1:4]] == [
        ["domain", "cat", "dog", "fox", "no", "label"], ["photo", "12", "12", "12", "0"], ["sketch", "0", "0", "0", "36"],
    ]  # fmt: skip
    assert first_run(root)[0] == text, "again, over its own table"
    (root / "photo/wolf").mkdir()
    (root / "photo/.cache").mkdir()
    assert first_run(root)[1][-2] == "! 1 folder(s) without a picture: photo/wolf"
    pl.DataFrame({"mine": [1]}).write_parquet(root / "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet is there, and is no table of pictures"):
        first_run(root)


def test_many_classes_are_summarised(tmp_path: Path) -> None:
    rows = with_splits(frame_of([f"c{n % 40}" for n in range(100)], domains=["x"] * 60 + ["y"] * 40))
    lines = [line.split() for line in counted(rows)[1:]]
    assert lines[0] == ["domain", "classes", "per", "class", "labelled"]
    assert lines[1] == ["x", "40", "1", "to", "2", "60"] and lines[2] == ["y", "40", "1", "to", "1", "40"]


def test_the_backbone_follows_the_size_of_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unbraid.backbones import efficientnet_lite0

    grey = write(tmp_path / "g.png", array(size=(28, 28))[..., 0])
    large = write(tmp_path / "l.png", array(size=(120, 160)))
    assert pictures.backbone_for(pl.Series([str(grey)]), None) == SmallConv(size=28, colour=False)
    monkeypatch.setattr(efficientnet_lite0, "PACKAGE", "unbraid")
    assert pictures.backbone_for(pl.Series([str(large)]), None).kind == "efficientnet_lite0"
    monkeypatch.setattr(efficientnet_lite0, "PACKAGE", "no_such_package")
    assert pictures.backbone_for(pl.Series([large.read_bytes()]), None) == SmallConv(size=64, channels=(32, 64, 128))


@pytest.mark.parametrize("layout", ["tree", "lists", "npz", "cifar", "svmlight"])
def test_prepare_tells_layouts_apart(tmp_path: Path, layout: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if layout in ("tree", "lists"):
        two_domains(source)
    if layout == "lists":
        (tmp_path / "lists").mkdir()
        lines = [f"{path.relative_to(source)} {path.parent.name}" for path in sorted(source.glob("photo/*/*.png"))]
        (tmp_path / "lists/photo.txt").write_text("\n".join(lines))
    elif layout == "npz":
        np.savez(source / "d.npz", x=np.zeros((9, 5, 5), np.uint8), y=np.arange(9) % 2)
    elif layout == "cifar":
        cifar_files(source, True)
    elif layout == "svmlight":
        (source / "d.svm").write_text("".join(f"{n % 2} 1:{n}\n" for n in range(9)))
    made = prepare(tmp_path / "lists" if layout == "lists" else source, source if layout == "lists" else None)
    rows = made.tables["rows.parquet"]
    assert set(rows["split"]) == {"train", "valid", "test"} and (made.model is None) == (layout == "svmlight")
    assert len(rows) == {"tree": 72, "lists": 36, "npz": 9, "cifar": 12, "svmlight": 9}[layout]
    if layout in ("tree", "lists"):
        assert all(Path(path).is_absolute() and Path(path).is_file() for path in rows["picture"])


def test_prepare_says_what_it_reads(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match="should hold pictures in folders, .* Found x.csv"):
        prepare(tmp_path)
    with pytest.raises(DataError, match="There is no file or folder"):
        prepare(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"Two classes are needed. Found \['cat'\]"):
        prepare(make(tmp_path / "one", "cat/1.png", "cat/2.png"))


def test_rows_of_nothing() -> None:
    assert rows_of(np.zeros((0, 4, 4), np.uint8), np.zeros(0), None, None, "").shape == (0, 4)


def test_the_run_file_is_what_toml_reads(tmp_path: Path) -> None:
    text, _ = first_run(two_domains(tmp_path / 'odd "name"', 80))
    plain = tomllib.loads(text)
    assert plain["data"]["folder"] == str(tmp_path / 'odd "name"') and plain["name"] == "odd_name"
