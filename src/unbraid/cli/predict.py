"""``unbraid evaluate``, ``predict``, ``uncertainty``: a bundle on rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from unbraid.cli.common import AsJson, Passes, Raw, fail, show


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle.")],
    rows: Annotated[
        Path | None, typer.Argument(help="Labelled rows (Parquet or CSV) instead of a split of the run's data.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    folder: Annotated[Path | None, typer.Option(help="Read the run's tables from this folder.")] = None,
    raw: Raw = False,
    mc_dropout: Passes = 0,
    as_json: AsJson = False,
) -> None:
    """Metrics of a bundle, per task and domain, with intervals."""
    from unbraid.bundle import Bundle, trained_splits
    from unbraid.data.declaration import SPLITS
    from unbraid.job import evaluate_bundle
    from unbraid.preflight import JobError

    try:
        if split not in SPLITS:
            raise ValueError(f"--split should be one of {', '.join(SPLITS)}. Found {split}.")
        loaded = Bundle.load(bundle)
        metrics = evaluate_bundle(loaded, split=split, rows=rows, folder=folder, raw=raw, mc_dropout=mc_dropout)
    except (ValueError, OSError, ImportError, JobError) as error:
        fail(error)
    if rows is None and split != "train" and split in trained_splits(loaded.run):
        note = f"! schedule {loaded.run.schedule.kind} trained on the {split} rows, too: these metrics are not of unseen rows"
        print(note, file=sys.stderr)
    if as_json:
        print(json.dumps({split if rows is None else "rows": metrics}))
        return
    show(metrics)


def predict(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle.")],
    rows: Annotated[Path, typer.Argument(help="Rows to predict (Parquet or CSV).")],
    out: Annotated[Path, typer.Option(help="Parquet file to write: the rows and one predicted_TASK column per task.")],
    folder: Annotated[Path | None, typer.Option(help="Read the run's tables (joins, events) from this folder.")] = None,
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Also predicted_TASK_sd, of the logit.")] = False,
    explore: Annotated[
        str, typer.Option(help="thompson or ucb: also predicted_TASK_explore, a score that explores.")
    ] = "",
    strength: Annotated[
        float | None, typer.Option(help="How many deviations ucb adds; factor of thompson's. [default: 2; 1]")
    ] = None,
    share: Annotated[
        str, typer.Option(help="What has one draw of thompson: request, row or call. [default: request]")
    ] = "",
    seed: Annotated[
        int | None, typer.Option(help="Of thompson's draws. [default: another every time, printed]")
    ] = None,
    others: Annotated[
        list[Path] | None, typer.Option("--with", help="Another bundle: an ensemble predicts. Repeat it.")
    ] = None,
    raw: Raw = False,
    mc_dropout: Passes = 0,
) -> None:
    """Predict rows: Parquet in, Parquet out.  Histories come from the run's event tables, strictly before each row."""
    from unbraid.job import write_predictions
    from unbraid.predictor import Predictor
    from unbraid.preflight import JobError
    from unbraid.uncertainty.ensemble import Ensemble

    try:
        if out.suffix != ".parquet":
            raise ValueError(f"--out should be a .parquet file. Found {out}.")
        policy, note = exploration(explore, strength, share, seed)
        members = [Predictor(one, folder, raw=raw, mc_dropout=mc_dropout) for one in (bundle, *(others or ()))]
        predictor = Ensemble(members) if others else members[0]
        predictions = predictor.predict(rows, explore=policy, uncertainty=uncertainty)
        write_predictions(rows, predictions, out, predictor.data)
    except (ValueError, OSError, ImportError, JobError) as error:
        fail(error)
    print(f"{out}: {len(predictions):,} rows, tasks {', '.join(t.name for t in predictor.schema.tasks)}{note}")


def exploration(name: str, strength: float | None, share: str, seed: int | None) -> tuple[Any, str]:
    """The policy of a name (none: None), and what to say about it."""
    from secrets import randbelow

    from unbraid.uncertainty.explore import UCB, Thompson

    if name not in ("", "thompson", "ucb"):
        raise ValueError(f"--explore should be thompson or ucb. Found {name}.")
    reads = {"": (), "ucb": ("strength",), "thompson": ("strength", "share", "seed")}[name]
    given = {"strength": strength is not None, "share": bool(share), "seed": seed is not None}
    if unread := [f"--{option}" for option, there in given.items() if there and option not in reads]:
        what = f"--explore {name} does not read it" if name else "it is for --explore, which is not given"
        raise ValueError(f"{', '.join(unread)}: {what}.")
    if strength is not None and not 0 <= strength < float("inf"):
        raise ValueError(f"--strength should be finite and not negative. Found {strength:g}.")
    if share and share not in (shares := ("request", "row", "call")):
        raise ValueError(f"--share should be one of {', '.join(shares)}. Found {share}.")
    if name == "ucb":
        return UCB(2.0 if strength is None else strength), ""
    seed = randbelow(2**32) if seed is None else seed
    policy = Thompson(seed, 1.0 if strength is None else strength, share or "request")  # type: ignore[arg-type]
    return (policy, f", seed {seed}") if name else (None, "")


def uncertainty(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle.")],
    prior: Annotated[float, typer.Option(help="Precision of the last layer's weights before any row.")] = 1.0,
    folder: Annotated[Path | None, typer.Option(help="Read the run's tables from this folder.")] = None,
) -> None:
    """Learn how unsure the model is from its training rows, and add it to the bundle for `predict`."""
    from unbraid import store
    from unbraid.bundle import UNCERTAINTY, Bundle
    from unbraid.predictor import with_uncertainty

    try:
        found = with_uncertainty(Bundle.load(bundle), folder, prior=prior).uncertainty
        assert found is not None
        store.save(bundle / UNCERTAINTY, found.state_dict())
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    rows = ", ".join(f"{name} {int(posterior.rows.sum()):,}" for name, posterior in found.tasks.items())
    print(f"{bundle / UNCERTAINTY}: observed rows {rows}")
