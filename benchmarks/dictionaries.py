"""What vocabularies on disk cost and save: looking ids up, and encoding a log of ids that are nearly all different.

    python benchmarks/dictionaries.py                  # 1M, 10M, 100M numbers, 1M and 10M texts; a log of 100M ids, 6 GB of disk
    python benchmarks/dictionaries.py --quick          # 200,000 numbers and texts; 2M ids
    python benchmarks/dictionaries.py --look-up 1e7 --texts 1e6 --ids 2e7 --memory 512 --folder /mnt/scratch

*Look-up* asks for the codes of 200,000 ids and of one, drawn evenly and by a power law, a hundredth of them unknown, of a
dictionary on disk and of the same values in memory: median of 5, the two in turn.  *Encode* writes rows of five ids each and
encodes them on one thread, each way in a process of its own: seconds, peak MiB resident and own (without the pages of mapped
files), and what a process owns that has opened the table and looked ids up, as one that trains or serves.

Prints a line per measurement and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).parent))
from scale import measured, size_of

from unbraid.data import dictionary
from unbraid.data.vocabulary import Vocabulary

ROWS, IDS = 200_000, 5  # asked at once, as a chunk of rows is; ids of a row
RUN = """
name = "dictionaries"
[data]
folder = "log"
rows = "rows"
cache = "cache"
time = "time"
features = [{ name = "items", kind = "bag", vocabulary = "item" }]
tasks = [{ name = "click" }]
[data.split]
kind = "time"
"""
ENCODE = """
import sys
from unbraid import config
from unbraid.data import dictionary
from unbraid.data.encode import encode
dictionary.LARGE = int(sys.argv[1])
encode(config.load("run.toml").data)
"""
OPEN = """
import sys
from pathlib import Path
import polars as pl
from unbraid.data.table import Encoded
(folder,) = Path("cache").iterdir()
known = Encoded(folder).fitted.vocabularies["item"]
assert (known.encode(pl.Series(range(0, 2_000_000, 10))) > 1).any()
"""
ONLY = "import polars; from unbraid import config; from unbraid.data.encode import encode; from unbraid.data.table import Encoded"


def look_up(kind: str, count: int, folder: Path) -> dict[str, Any]:
    """Milliseconds to find ids of a vocabulary of so many values.  Raises AssertionError if codes differ."""
    rng = np.random.default_rng(0)
    values = pl.Series("value", np.cumsum(rng.integers(1, 1_000, count)))
    if kind == "text":
        values = ("user_" + values.cast(pl.String)).sort()
    known = {
        "memory": Vocabulary(values),
        "disk": Vocabulary(dictionary.write(folder / "x.bin", values.dtype, [values])),
    }
    found: dict[str, Any] = {"kind": kind, "values": count, "disk_mib": size_of(folder)}
    even, power = rng.integers(0, count, ROWS), (rng.random(ROWS) ** 4 * count).astype(np.int64)
    for name, places in (("even", even), ("power", power), ("one", even[:1])):
        asked = values.gather(places)
        if name != "one":
            few = ROWS // 100
            asked = pl.concat([asked[:few] + (1 if kind == "number" else "?"), asked[few:]])
        seconds: dict[str, list[float]] = {"memory": [], "disk": []}
        for _ in range(5):
            codes = []
            for where, one in known.items():
                start = time.perf_counter()
                codes.append(one.encode(asked))
                seconds[where].append(time.perf_counter() - start)
            assert np.array_equal(*codes)
        found[name] = {where: round(1e3 * median(each), 3) for where, each in seconds.items()}
        found[name]["ratio"] = round(found[name]["disk"] / found[name]["memory"], 2)
    for path in folder.iterdir():
        path.unlink()
    return found


def generate(folder: Path, ids: int) -> None:
    """Rows of five ids, numbers spread over 2^40, each of which occurs once or, by chance, twice."""
    (folder / "log" / "rows").mkdir(parents=True)
    part = 1_000_000
    for number, start in enumerate(range(0, ids // IDS, part)):
        n = min(part, ids // IDS - start)
        rng = np.random.default_rng(number)
        items = np.arange(start * IDS, (start + n) * IDS) * 1_048_573 % (1 << 40)
        pl.DataFrame({
            "time": np.arange(start, start + n), "items": rng.permutation(items).reshape(n, IDS),
            "click": rng.integers(0, 2, n).astype(np.int8),
        }).write_parquet(folder / "log" / "rows" / f"{number:04d}.parquet")  # fmt: skip
    rows = ids // IDS
    (folder / "run.toml").write_text(RUN + f"valid_from = {rows - rows // 50}\ntest_from = {rows - rows // 100}\n")


def encoding(ids: int, memory: int, place: Path | None) -> dict[str, Any]:
    """Encode a log of so many ids with its vocabulary on disk and in memory."""
    one = {f"{what}_NUM_THREADS": "1" for what in ("OMP", "MKL", "OPENBLAS")}
    environment = {**os.environ, **one, "POLARS_MAX_THREADS": "1", "UNBRAID_MEMORY_MB": str(memory)}
    found: dict[str, Any] = {"ids": ids, "memory_mb": memory}
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        folder = Path(temporary)
        generate(folder, ids)
        found["log_mib"] = size_of(folder / "log")
        found["program"] = measured([sys.executable, "-c", ONLY], folder, environment)
        for where, large in (("disk", dictionary.LARGE), ("memory", 1 << 40)):
            found[where] = measured([sys.executable, "-c", ENCODE, str(large)], folder, environment)
            found[where]["encoded_mib"] = size_of(folder / "cache")
            found[where]["opened"] = measured([sys.executable, "-c", OPEN], folder, environment)
            shutil.rmtree(folder / "cache")
    return found


def main() -> None:
    """Measure, print lines, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200,000 values, a log of 2M ids")
    parser.add_argument("--look-up", type=float, nargs="*", help="values of vocabularies of numbers")
    parser.add_argument("--texts", type=float, nargs="*", help="values of vocabularies of texts")
    parser.add_argument("--ids", type=float, help="ids of the log; 0: none is encoded")
    parser.add_argument("--memory", type=int, default=512, help="MB that encoding may use ($UNBRAID_MEMORY_MB)")
    parser.add_argument("--folder", type=Path, help="where files are written; a temporary folder")
    options = parser.parse_args()
    numbers = [2e5] if options.quick else [1e6, 1e7, 1e8] if options.look_up is None else options.look_up
    texts = [2e5] if options.quick else [1e6, 1e7] if options.texts is None else options.texts
    ids = int((2e6 if options.quick else 1e8) if options.ids is None else options.ids)
    figures: dict[str, Any] = {"look_up": []}
    for kind, count in (*(("number", n) for n in numbers), *(("text", n) for n in texts)):
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            found = look_up(kind, int(count), Path(temporary))
        figures["look_up"].append(found)
        each = {name: one for name, one in found.items() if isinstance(one, dict)}
        said = [f"{name} {x['disk']} ms, in memory {x['memory']} ({x['ratio']})" for name, x in each.items()]
        print(f"{found['values']:,} {kind}s, {found['disk_mib']:,} MiB: " + "; ".join(said), flush=True)
    if ids:
        figures["encode"] = found = encoding(ids, options.memory, options.folder)
        print(f"{ids:,} ids, the program alone owns {found['program']['own_mib']} MiB")
        for where in ("disk", "memory"):
            x, opened = found[where], found[where]["opened"]
            print(
                f"vocabulary on {where}: encode {x['seconds']:.0f} s, {x['peak_mib']:,} MiB ({x['own_mib']:,} own); opened "
                f"{opened['seconds']:.1f} s, {opened['peak_mib']:,} MiB ({opened['own_mib']:,} own)"
            )
    print(json.dumps({"benchmark": "dictionaries", "figures": figures}))


if __name__ == "__main__":
    main()
