"""What a service allows: limits, waits, the token."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Settings:
    """Limits of a service.

    Args:
        token: what ``Authorization: Bearer`` must say to reload or to delete a user; empty: nobody may.
        max_candidates: of a ``/rank``, rows of a ``/predict``, events of an ``/events``.
        max_body: bytes of a request.
        timeout: seconds that a request may take, its body included; then 503 (408 while its body still arrives).
        concurrency: requests that are worked on or wait for it; one more is 503.
        batch_wait_ms: that a small request waits for others to be computed with.
        batch_rows: that one computation joins; a ``/rank`` of more than a quarter of it, or that explores, is computed alone.
        threads: that compute, and as many batches at once.
        max_skew: seconds that an event's time may be ahead of the server's clock.
        arrow: whether rows may come as Arrow, which native code reads.

    Raises:
        ValueError: one of them is out of its range.
    """

    token: str = ""
    max_candidates: int = 5_000
    max_body: int = 4 << 20
    timeout: float = 10.0
    concurrency: int = 256
    batch_wait_ms: float = 2.0
    batch_rows: int = 512
    threads: int = 2
    max_skew: float = 300.0
    arrow: bool = False

    def __post_init__(self) -> None:
        least = {"timeout": 1e-3, "batch_wait_ms": 0, "max_skew": 0}
        for name in (f.name for f in fields(self) if f.name not in ("token", "arrow")):
            value, low = getattr(self, name), least.get(name, 1)
            if not low <= value < float("inf"):
                raise ValueError(f"`{name}` should be finite and at least {low:g}. Found {value}.")
        if not self.token.isascii() or self.token != self.token.strip():
            raise ValueError("`token` should be ASCII without spaces around it: it travels in a header.")

    @property
    def joined(self) -> int:
        """The most candidates of a ``/rank`` that is computed with others."""
        return self.batch_rows // 4
