"""``unbraid calibrate``: a bundle's probabilities for a target, and what they were before."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbraid.cli import complete
from unbraid.cli.common import AsJson, fail

if TYPE_CHECKING:
    from unbraid.calibrate import Change

TITLES = {"calibration": "calib.", "ece": "ECE", "ece_mass": "ECE, equal mass", "logloss": "log-loss"}


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle; the calibrators are written into it.")],
    method: Annotated[
        str,
        typer.Option(
            help="temperature, vector, matrix, histogram, isotonic, cpcs or transcal.",
            autocompletion=complete.among(complete.method_names),
        ),
    ] = "transcal",
    target: Annotated[
        Path | None,
        typer.Option(help="Rows of the target, as predict takes them. [default: --split of the run's data]"),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="Without --target: the split that is the target.",
            autocompletion=complete.among(lambda: ("train", "valid", "test")),
        ),
    ] = "test",
    domain: Annotated[
        str, typer.Option(help="The target is this domain alone; the calibrator serves its rows alone.")
    ] = "",
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task. Repeat it. [default: all that can be]", autocompletion=complete.tasks),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Labelled rows that did not train the model, instead of the validation split.")
    ] = None,
    train_features: Annotated[
        bool, typer.Option("--train-features", help="Compare the target with the training rows, not the held-out ones.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of the method: `--set power=1`. Repeat it.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Read the run's tables from this folder.")] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove calibrators (of --task, --domain; else all).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fit calibrators to held-out rows and an unlabelled target, and add them to the bundle for predict and evaluate."""
    from unbraid import store
    from unbraid.bundle import CALIBRATION, Bundle
    from unbraid.calibrate import calibrate as fit
    from unbraid.calibrate import method_of, remove_from
    from unbraid.data.declaration import SPLITS

    try:
        if remove:
            left = remove_from(bundle, tuple(task or ()), domain or None)
            print(f"{bundle / CALIBRATION}: {left} calibrators left" if left else f"{bundle}: no calibrators")
            return
        if split not in SPLITS:
            raise ValueError(f"--split should be one of {', '.join(SPLITS)}. Found {split}.")
        found, changes, notes = fit(
            Bundle.load(bundle), method_of(method, settings or ()), tasks=task or (), target=target, split=split,
            domain=domain, held_out=held_out, train_features=train_features, folder=folder,
        )  # fmt: skip
        assert found.calibrators is not None
        store.save(bundle / CALIBRATION, found.calibrators.state_dict())
    except (ValueError, OSError) as error:
        fail(error)
    for text in [*notes, *(f"{change.task}: {warning}" for change in changes for warning in change.warnings)]:
        print(f"! {text}", file=sys.stderr)
    if as_json:
        print(json.dumps([dataclasses.asdict(change) for change in changes]))
        return
    show(changes)
    print(f"{bundle / CALIBRATION}: predict and evaluate use it (--raw does not)")


def show(changes: list[Change]) -> None:
    """Print before and after, what the fits found, and (where the target has labels) metrics before and after."""
    from rich.console import Console

    from unbraid.render import table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    lines = [
        [change.task, change.domain or "all", f"{change.before:.4f}", f"{change.after:.4f}",
         ", ".join(f"{name} {_number(value)}" for name, value in change.numbers.items())]
        for change in changes
    ]  # fmt: skip
    console.print(table(["task", "domain", "mean before", "mean after"], [line[:4] for line in lines], left=2))
    for line in lines:
        console.print(f"{line[0]}: {line[4]}", soft_wrap=True, markup=False)
    if evaluated := [change for change in changes if change.labels]:
        names = [name for name in TITLES if any(name in change.labels for change in evaluated)]
        titles = ["task", "domain", *(f"{TITLES[name]} {when}" for name in names for when in ("before", "after"))]
        cells = [
            [change.task, change.domain or "all",
             *(_cell(value) for name in names for value in change.labels.get(name, (None, None)))]
            for change in evaluated
        ]  # fmt: skip
        console.print("Evaluation by the target's labels, which no fit has read:", markup=False)
        console.print(table(titles, cells, left=2))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
