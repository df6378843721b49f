"""unbraid: recommendation and transfer models whose tasks and domains share parameters without hurting each other.

``import unbraid`` loads nothing else.  Modules load when they are used (``unbraid.recipes.get("stem")``).
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """A module of the package, or its ``__version__``, when it is first asked for (PEP 562).  Raises AttributeError."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("unbraid")
        except PackageNotFoundError as error:
            raise AttributeError("unbraid is a source tree that is not installed and has no version") from error
    from importlib import import_module
    from importlib.util import find_spec

    if name.startswith("_") or find_spec(f"unbraid.{name}") is None:
        raise AttributeError(f"module 'unbraid' has no attribute {name!r}")
    return import_module(f"unbraid.{name}")
