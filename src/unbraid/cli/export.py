"""``unbraid export``: a bundle as a graph for ONNX or `torch.export`, checked against the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unbraid.cli import complete
from unbraid.cli.common import Raw, fail


def export(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle.")],
    out: Annotated[Path, typer.Option(help="Folder to write: new, or empty.")],
    to: Annotated[
        str,
        typer.Option(
            help="onnx (needs the extra `onnx`), or torch: an exported PyTorch program.",
            autocompletion=complete.among(lambda: ("onnx", "torch")),
        ),
    ] = "onnx",
    folder: Annotated[Path | None, typer.Option(help="Read the run's tables from this folder, for the check.")] = None,
    raw: Raw = False,
    tolerance: Annotated[float, typer.Option(help="The largest difference to the bundle that is allowed.")] = 1e-5,
) -> None:
    """Write a bundle as a graph with its vocabularies, and compare it with the bundle on rows of the validation split."""
    from unbraid.export import export as job

    try:
        found = job(bundle, out, to, folder=folder, raw=raw, tolerance=tolerance)  # type: ignore[arg-type]
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    print(f"{out}: largest difference to the bundle {found.difference:.1e} of {found.rows:,} rows ({found.source})")
