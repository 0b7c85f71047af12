"""Transports by name: made from config, chosen when a ticket is bound."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvstore.transports.base import Transport
from kvstore.transports.shm import ShmTransport
from kvstore.transports.tcp import TcpOptions, TcpTransport
from pdserve.errors import ConfigError, HandoverError

NAMES = ("shm", "tcp")
"""Every transport, fastest first."""
SAME_HOST_ONLY = frozenset({"shm"})


def make_transport(name: str, *, tcp: TcpOptions | None = None) -> Transport:
    """Raises `ConfigError` for an unknown name, `OSError` when tcp cannot bind its address."""
    if name == "shm":
        return ShmTransport()
    if name == "tcp":
        return TcpTransport(tcp)
    raise ConfigError(f"there is no transport {name!r}: choose from {', '.join(NAMES)}", key="kv.transports")


def select(offered: Sequence[str], supported: Collection[str], same_host: bool) -> str:
    """The first transport that the decode worker offers and this one has. Raises `HandoverError` if there is none."""
    for name in offered:
        if name in supported and (same_host or name not in SAME_HOST_ONLY):
            return name
    where = "the same host" if same_host else "different hosts"
    raise HandoverError(
        f"no common transport between workers on {where}: decode offers {', '.join(offered) or 'none'}; "
        f"prefill has {', '.join(sorted(supported)) or 'none'}"
    )
