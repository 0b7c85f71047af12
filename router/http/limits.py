"""The bounds of the HTTP face: what one client may cost. Values come from the router's config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Sizes in bytes, times in seconds."""

    max_body_bytes: int = 8 << 20
    """Larger bodies get 413. 8 MiB hold a prompt of about two million tokens."""
    max_header_bytes: int = 32 << 10
    """Request line and headers together; more gets 431. nginx's default is four buffers of 8 KiB."""
    max_unsent_bytes: int = 1 << 20
    """What one client may leave unread of a stream before its request is cancelled: some 5,000 chunks."""
    max_pipelined: int = 16
    """Requests of one connection that wait for their turn; then no more is read from it."""
    max_prompts: int = 128
    """Prompts in one completions request; each becomes a request of its own."""
    max_connections: int = 16_384
    """Open client connections; a further one is closed at once."""
    header_timeout_s: float = 10.0
    """From a request's first byte to the end of its headers."""
    body_timeout_s: float = 60.0
    """From the end of the headers to the end of the body."""
    keep_alive_s: float = 75.0
    """How long an idle connection stays open. Longer than the 60 s after which common balancers drop theirs."""
    write_stall_s: float = 30.0
    """How long a client may take to read a complete answer that fills its buffer."""
    linger_s: float = 2.0
    """How long input is discarded after a refusal that ends the connection, so that the client reads the refusal
    and not a reset (as nginx's `lingering_timeout`)."""

    @property
    def sweep_s(self) -> float:
        """How often deadlines are looked at: a tenth of the shortest, and at least each second."""
        shortest = min(self.header_timeout_s, self.body_timeout_s, self.keep_alive_s, self.write_stall_s, self.linger_s)
        return min(1.0, shortest / 10)
