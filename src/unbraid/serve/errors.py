"""One format for all that a service refuses: ``{"error": {"message": ..., "field": ..., "request": ...}}``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from unbraid.serve.store import StoreDown, StoreError, StoreFull

RETRY = {"Retry-After": "1"}


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        message: what was found, what is allowed, and the fix.
        field: where in the request, such as ``candidates.3.video_id``; empty where it is not about one.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, field: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.headers = status, message, field, dict(headers or {})

    def body(self, request: str) -> dict[str, dict[str, str]]:
        """The answer's JSON."""
        return {"error": {"field": self.field, "message": self.message, "request": request}}


def of_store(error: StoreError) -> ApiError:
    """What a client is told of a store's error: how long it may last, nothing of where the store is."""
    if isinstance(error, StoreFull):
        return ApiError(507, "The history store is full. Nothing of this request was kept. Send it again later.")
    if isinstance(error, StoreDown):
        return ApiError(503, "The history store cannot be reached now. Send the request again.", headers=RETRY)
    return ApiError(503, "The history store cannot answer; the server's log says why.", headers=RETRY)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """A ranker's `RequestError` in the block becomes the client's answer."""
    try:
        yield
    except ValueError as error:
        field = getattr(error, "field", None)  # known by it: the ranker's module would import torch here
        if not isinstance(field, str):
            raise
        raise ApiError(422, str(error), field) from error
