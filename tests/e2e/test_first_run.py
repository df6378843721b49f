"""From a folder to a report with two commands and no edits, as a new user types them: three unlike data sets."""

from __future__ import annotations

import datetime as dt
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from unbraid.cli.main import app


def first_run(data: Path, here: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """The run file of ``unbraid init DATA``, and test metrics of ``unbraid train`` on it as it is."""
    made = CliRunner().invoke(app, ["init", str(data)])
    assert made.exit_code == 0, made.output
    (here / "run.toml").write_text(made.stdout)
    done = CliRunner().invoke(app, ["train", str(here / "run.toml"), "--out", str(here / "out"), *options])
    assert done.exit_code == 0, done.output
    assert (here / "out" / "report.html").stat().st_size > 100_000 and (here / "out" / "report.md").exists()
    return made.stdout, json.loads((here / "out" / "metrics.json").read_text())["test"]


def test_a_wide_csv_with_strings_and_dates(tmp_path: Path) -> None:
    rng, n = np.random.default_rng(0), 900
    seen, age = rng.integers(400, 900, n), rng.integers(10, 380, n)
    charge, plan = rng.lognormal(4, 1, n), rng.choice(["Basic", "Plus", "Premium"], n)
    gone = rng.random(n) < 1 / (1 + np.exp(3 * (plan == "Premium") - 3 * (plan == "Basic") - np.log(charge) + 4))
    day = dt.date(2021, 1, 1)
    frame = pl.DataFrame({
        "Customer ID": [f"C-{i:05}" for i in rng.permutation(n)],
        "Signup Date": [(day + dt.timedelta(int(s - a))).strftime("%m/%d/%Y") for s, a in zip(seen, age, strict=True)],
        "Snapshot Date": [str(day + dt.timedelta(int(s))) for s in seen],
        "Monthly Charges": [f"${c:,.2f}" if i % 50 else "N/A" for i, c in enumerate(charge)],
        "Plan": plan, "Paperless": rng.choice(["Yes", "No"], n), "Source": ["CRM"] * n, "Notes": [""] * n,
        "Zip": [f"{z:05}" for z in rng.integers(501, 599, n)],
        **{f"m{k:03}": rng.normal(size=n) for k in range(60)},
        "Refund": [f"${r:.2f}" if g else "$0.00" for r, g in zip(rng.lognormal(2, 1, n), gone, strict=True)],
        "Churned": ["Yes" if g else "No" for g in gone],
    })  # fmt: skip
    (tmp_path / "crm").mkdir()
    frame.write_csv(tmp_path / "crm" / "customers.csv")
    text, found = first_run(tmp_path / "crm", tmp_path)
    assert found["Churned"]["auc"]["value"] > 0.65
    assert re.search(r'# \{name = "Refund".*alone it tells `Churned`', text) and "Signup Date_age" in text
    assert "amounts as" in text and 'time = "STRPTIME' in text


def test_pictures_in_domains(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for domain in ("photo", "sketch"):
        for shape in ("disc", "box"):
            (tmp_path / "pics" / domain / shape).mkdir(parents=True)
            for k in range(30):
                image = Image.fromarray(rng.integers(180, 255, (24, 24, 3), dtype=np.uint8))
                x, y = rng.integers(4, 10, 2).tolist()
                draw = ImageDraw.Draw(image)
                kind = draw.ellipse if shape == "disc" else draw.rectangle
                kind((x, y, x + 9, y + 9), fill="black" if domain == "photo" else None, outline="black", width=2)
                image.save(tmp_path / "pics" / domain / shape / f"{k}.png")
    text, found = first_run(tmp_path / "pics", tmp_path)
    assert 'domain = "domain"' in text and set(found["label"]["domains"]) == {"photo", "sketch"}
    assert found["label"]["accuracy"]["value"] > 0.6


def test_an_event_log_with_a_rating_and_no_label(tmp_path: Path) -> None:
    rng, n, folder = np.random.default_rng(0), 6_000, tmp_path / "films"
    folder.mkdir()
    user, film = rng.integers(0, 120, n), rng.integers(0, 90, n)
    taste = 2.5 * np.where((user % 3 == film % 3), 1, -1) + rng.normal(size=n)
    pl.DataFrame({
        "userId": user, "movieId": film, "rating": np.clip(np.round(3.4 + 0.6 * taste), 1, 5).astype(int),
        "timestamp": np.sort(rng.integers(10**9, 10**9 + 10**7, n)),
    }).write_csv(folder / "ratings.csv")  # fmt: skip
    genre = [("drama", "comedy", "crime")[k % 3] for k in range(90)]
    films = pl.DataFrame({"movieId": range(90), "title": [f"Film {k}" for k in range(90)], "genre": genre})
    films.write_csv(folder / "movies.csv")
    pl.DataFrame({"id": range(120), "land": [f"l{k % 7}" for k in range(120)]}).write_csv(folder / "users.csv")
    text, found = first_run(folder, tmp_path)
    assert '{name = "liked", column = "\\"rating\\" >= 4", kind = "binary"}' in text and '# {name = "rating"' in text
    assert (
        '{table = "users.csv", on = "userId", key = "id"}' in text and '{table = "movies.csv", on = "movieId"}' in text
    )
    assert 'columns = {movieId = "movieId", positive = "\\"rating\\" >= 4"}' in text
    assert found["liked"]["auc"]["value"] > 0.75
