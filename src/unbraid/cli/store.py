"""``unbraid store``: the histories of a service, filled, looked at and cut."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbraid.cli import complete
from unbraid.cli.common import AsJson, fail
from unbraid.serve.store import public

if TYPE_CHECKING:
    from unbraid.serve.store import Store

store_app = typer.Typer(help="The history store of a service.", no_args_is_help=True, rich_markup_mode=None)
Address = Annotated[str, typer.Argument(help="A folder, or redis://HOST:PORT/N.")]
User = Annotated[str, typer.Argument(help="A user's id, as the log has it.")]


@contextlib.contextmanager
def _opened(address: str, make: bool = False) -> Iterator[Store]:
    """The store of an address."""
    from unbraid.serve.store import open_store

    with _failing(address, make), contextlib.closing(open_store(address)) as store:
        yield store


@contextlib.contextmanager
def _failing(address: str, make: bool = False) -> Iterator[None]:
    """What goes wrong with a store ends the command with one message; so does a folder without one."""
    from unbraid.serve.store import StoreError, folder_of

    try:
        folder = folder_of(address)
        if folder is not None and not make and not (folder / "data.mdb").exists():
            raise ValueError(
                f"There is no history store in {folder}. `unbraid store import BUNDLE {folder}` makes one."
            )
        yield
    except (StoreError, ValueError, OSError, ImportError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted; what was acknowledged is kept, and the same command goes on"))


def _user(store: Store, user: str) -> int:
    from unbraid.serve.store import USER_TYPE, user_hash

    kind = store.get(USER_TYPE)
    if kind is None:
        raise ValueError("The store does not say what its user ids are: nothing was imported or served from it yet.")
    return user_hash(user, kind)


@store_app.command("import")
def import_(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle: the events are those of its run.")],
    address: Address,
    folder: Annotated[Path | None, typer.Option(help="Read the run's tables from this folder.")] = None,
    keep: Annotated[
        str,
        typer.Option(
            help="events: what histories read; rows: all that training reads. [default: events, or as before]",
            autocompletion=complete.among(lambda: ("events", "rows")),
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Append all events of a run's tables.  Repeat it as often as you like: events that are there stay as they are."""
    import dataclasses

    from unbraid import config
    from unbraid.progress import Console
    from unbraid.serve.importer import import_events

    with _opened(address, make=True) as store:
        if not (bundle / "run.toml").exists():
            raise ValueError(f"{bundle} is not a bundle: there is no run.toml.")
        data = config.load(bundle / "run.toml").data
        if folder is not None:
            data = dataclasses.replace(data, folder=str(folder.resolve()))
        with Console(quiet=as_json) as watcher:
            found = import_events(data, store, keep=keep, progress=watcher.stage)
        durability = store.durability
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{public(address)}: {found['read']:,} events read, {found['new']:,} new, {found['no_user']:,} without a user"
    )
    print(f"kept   {durability}")


@store_app.command()
def export(
    address: Address,
    folder: Annotated[Path, typer.Argument(help="A new folder: a run reads it as `data.folder`.")],
    since: Annotated[str, typer.Option(help="From this time on: a date, or a number in the run's unit.")] = "",
    until: Annotated[str, typer.Option(help="Before this time.")] = "",
    table: Annotated[
        list[str] | None, typer.Option(help="An event table of the run; `rows`: its rows. Repeat it. [default: all]")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write what a store holds as the tables of its run, in order of time.  Of a store that keeps rows (`import --keep rows`)."""
    from unbraid.data.source import instant
    from unbraid.progress import Console
    from unbraid.serve.exporter import export_events
    from unbraid.serve.importer import PER_SECOND

    with _opened(address) as store:
        unit = float(store.get(PER_SECOND) or 1)
        first, end = (
            instant(int(at) if at.lstrip("-").isdigit() else at, unit) if at else None for at in (since, until)
        )
        with Console(quiet=as_json) as watcher:
            found = export_events(
                store, folder, since=first, until=end, tables=table or (), overwrite=overwrite, progress=watcher.stage
            )
    if as_json:
        print(json.dumps(found))
        return
    print(f"{folder}: {', '.join(f'{rows:,} of {name}' for name, rows in found.items())}")


@store_app.command()
def stats(address: Address, as_json: AsJson = False) -> None:
    """How much a store holds, and what of it survives a crash."""
    with _opened(address) as store:
        found, durability = dict(store.stats()), store.durability
    if as_json:
        print(json.dumps({**found, "durability": durability}))
        return
    print(f"users  {found['users']:,}\nevents {found['events']:,}\nbytes  {found['bytes']:,}\nkept   {durability}")


@store_app.command()
def check(address: Address, as_json: AsJson = False) -> None:
    """Look at a whole store: its pages, records and counters.  Exit code 1 where something is wrong."""
    import dataclasses

    from unbraid.serve import check as look

    with _failing(address):
        found = look.check(address)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print(f"{public(address)}: {found.users:,} users, {found.events:,} events looked at")
        print("\n".join(f"wrong  {problem}" for problem in found.problems) or "nothing is wrong")
        print(f"and {found.more:,} more" * bool(found.more), end="\n" * bool(found.more))
    raise typer.Exit(int(bool(found.problems)))


@store_app.command()
def trim(
    address: Address,
    newest: Annotated[int, typer.Option(help="So many events of a user stay, the newest.")],
    user: Annotated[str | None, typer.Option(help="Of this user alone. [default: of all]")] = None,
) -> None:
    """Remove all but the newest events of every user."""
    with _opened(address) as store:
        if newest < 0:
            raise ValueError(f"--newest should be at least 0. Found {newest}.")
        users = store.users() if user is None else iter([_user(store, user)])
        removed = [store.trim(one, newest) for one in users]
    print(f"{public(address)}: {sum(removed):,} events of {sum(map(bool, removed)):,} users removed")


@store_app.command()
def delete(address: Address, user: User) -> None:
    """Remove everything of a user."""
    with _opened(address) as store:
        removed = store.delete(_user(store, user))
    print(f"{public(address)}: {removed:,} events of user {user} removed")


@store_app.command()
def show(
    address: Address, user: User, last: Annotated[int, typer.Option(help="The newest events, so many.")] = 20
) -> None:  # fmt: skip
    """Print a user's newest events, a line of JSON each, oldest first."""
    with _opened(address) as store:
        if last < 0:
            raise ValueError(f"--last should be at least 0. Found {last}.")
        for record in store.last(_user(store, user), last):
            print(json.dumps(record._asdict(), ensure_ascii=False))
