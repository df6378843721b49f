"""``unbraid diagnose``: what is wrong with a trained bundle, how sure that is, and what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbraid.cli import complete
from unbraid.cli.common import AsJson, fail

if TYPE_CHECKING:
    from unbraid.diagnosis.diagnosis import Report


def diagnose(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle.")],
    html: Annotated[Path | None, typer.Option(help="Write the page here. Needs the extra `report`.")] = None,
    docs: Annotated[str, typer.Option(help="Address of the documentation, which the page then links to.")] = "",
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write JSON here.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A check, by name. Repeat it. [default: all]", autocompletion=complete.among(complete.check_names)
        ),
    ] = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="Also checks that train a whole model.")] = False,
    rows: Annotated[int, typer.Option(help="Rows of each split that a check looks at, at most.")] = 20_000,
    steps: Annotated[int, typer.Option(help="Steps of each short training.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the sample and of the short trainings.")] = 0,
    jobs: Annotated[int, typer.Option(help="Short trainings at once. [default: as the cores allow, at most 4]")] = 0,
    prove: Annotated[Path | None, typer.Option(help="Train the first remedies, too, in this folder.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of --prove.")] = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what is finished in the folder of --prove.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look into a trained bundle and its data: findings with intervals, severity and a remedy for each."""
    import rich.console

    from unbraid import report as rendered
    from unbraid import store
    from unbraid.bundle import Bundle
    from unbraid.diagnosis.diagnose import diagnose as examine
    from unbraid.diagnosis.prove import prove as try_out
    from unbraid.diagnosis.prove import remedies
    from unbraid.preflight import JobError
    from unbraid.progress import Console

    def write(report: Report) -> None:
        if html is not None:
            store.write_text(html, rendered.html(report, docs=docs))
        for path, render in ((markdown, rendered.markdown), (json_file, rendered.dump)):
            if path is not None:
                store.write_text(path, render(report))

    try:
        with Console() as watcher:
            found = examine(
                bundle, rows=rows, steps=steps, seed=seed, only=tuple(only or ()), thorough=thorough, watcher=watcher,
                jobs=jobs or min(4, os.cpu_count() or 1),
            )  # fmt: skip
            write(found)  # trainings take long: what is known already is not lost with them
            if prove is not None and not remedies(found):
                watcher.note("! nothing to prove: no finding has a remedy that can be trained")
            elif prove is not None:
                run = Bundle.load(bundle).run
                found = try_out(found, run, prove, seeds=seeds, resume=resume, watcher=watcher)
                write(found)
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted; the same command continues the trainings of --prove with --resume"))
    except (ValueError, OSError, ImportError, JobError) as error:
        fail(error)
    if as_json:
        print(rendered.dump(found))
    else:
        console = rich.console.Console()
        console.print(rendered.terminal(found, console.width))
