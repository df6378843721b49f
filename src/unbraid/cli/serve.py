"""``unbraid serve``: a bundle behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unbraid.cli.common import fail


def serve(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle.")],
    store: Annotated[
        str, typer.Option(envvar="UNBRAID_STORE", help="Where histories are: a folder (LMDB), or redis://HOST:PORT/N.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    token: Annotated[
        str, typer.Option(envvar="UNBRAID_TOKEN", help="For /reload and DELETE /users. [default: none, nobody may]")
    ] = "",
    max_candidates: Annotated[int, typer.Option(help="Candidates, rows or events of one request.")] = 5_000,
    max_body: Annotated[int, typer.Option(help="Bytes of one request.")] = 4 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 10.0,
    concurrency: Annotated[int, typer.Option(help="Requests that are worked on or wait; one more is refused.")] = 256,
    batch_wait_ms: Annotated[
        float, typer.Option(help="Milliseconds that a small request waits to be computed with others.")
    ] = 2.0,
    threads: Annotated[int, typer.Option(help="Threads that compute. [default: 0, one per processor]")] = 0,
    max_skew: Annotated[float, typer.Option(help="Seconds that an event may be ahead of the clock here.")] = 300.0,
    arrow: Annotated[bool, typer.Option("--arrow", help="Take the rows of /predict as Arrow, too.")] = False,
    cache_mb: Annotated[int, typer.Option(min=0, help="Megabytes for histories of users that came lately.")] = 512,
    watch: Annotated[
        Path | None, typer.Option(help="Folder of bundles: serve the newest, and each that is written into it.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Read the run's tables (joins) from this folder.")] = None,
) -> None:
    """Serve a bundle over HTTP: rank candidates, predict rows, keep events as histories."""
    import logging
    import os

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        from unbraid.serve import server
        from unbraid.serve.settings import Settings
    except ImportError as error:
        fail(ImportError(f'Serving needs more packages: pip install "unbraid[serve]" ({error}).'))
    try:
        settings = Settings(
            token=token, max_candidates=max_candidates, max_body=max_body, timeout=timeout, concurrency=concurrency,
            batch_wait_ms=batch_wait_ms, threads=threads or os.cpu_count() or 1, max_skew=max_skew,
            arrow=arrow,
        )  # fmt: skip
        if watch is not None and not watch.is_dir():
            raise ValueError(f"--watch should be a folder. Found {watch}.")
        bound = server.bind(host, port)
        try:
            app, engine = server.build(bundle, store, settings, folder=folder, cache_bytes=cache_mb << 20)
        except BaseException:
            bound.close()
            raise
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: a store's
        fail(error)
    server.end(server.run(app, engine, bound, watch=watch))
