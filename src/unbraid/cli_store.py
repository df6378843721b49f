"""``unbraid store``: the histories of a service, filled, looked at and cut."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from unbraid.serve.store import Store

store_app = typer.Typer(help="The history store of a service.", no_args_is_help=True, rich_markup_mode=None)
Address = Annotated[str, typer.Argument(help="A folder, or redis://HOST:PORT/N.")]
User = Annotated[str, typer.Argument(help="A user's id, as the log has it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextlib.contextmanager
def _opened(address: str, make: bool = False) -> Iterator[Store]:
    """The store of an address; what goes wrong ends the command with one message."""
    from unbraid.cli import fail
    from unbraid.serve.store import StoreError, open_store

    try:
        folder = Path(address.removeprefix("lmdb:"))
        if not make and "://" not in address and not (folder / "data.mdb").exists():
            raise ValueError(
                f"There is no history store in {folder}. `unbraid store import BUNDLE {folder}` makes one."
            )
        with contextlib.closing(open_store(address)) as store:
            yield store
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
            found = import_events(data, store, progress=watcher.stage)
        durability = store.durability
    if as_json:
        print(json.dumps(found))
        return
    print(f"{address}: {found['read']:,} events read, {found['new']:,} new, {found['no_user']:,} without a user")
    print(f"kept   {durability}")


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
def trim(
    address: Address,
    keep: Annotated[int, typer.Option(help="The newest events of a user that stay.")],
    user: Annotated[str | None, typer.Option(help="Of this user alone. [default: of all]")] = None,
) -> None:
    """Remove all but the newest events of every user."""
    with _opened(address) as store:
        if keep < 0:
            raise ValueError(f"--keep should be at least 0. Found {keep}.")
        users = store.users() if user is None else iter([_user(store, user)])
        removed = [store.trim(one, keep) for one in users]
    print(f"{address}: {sum(removed):,} events of {sum(map(bool, removed)):,} users removed")


@store_app.command()
def delete(address: Address, user: User) -> None:
    """Remove everything of a user."""
    with _opened(address) as store:
        removed = store.delete(_user(store, user))
    print(f"{address}: {removed:,} events of user {user} removed")


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
