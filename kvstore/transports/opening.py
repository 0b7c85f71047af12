"""A process's transports, opened as its config says: all of them or none.

A region's descriptor opens it to whoever has it, so it is given only to peers whose identity was checked: a worker's
after a ticket was bound, a store's to certificates and to loopback. `mooncake` and `nixl` check nothing themselves, and
RDMA passes by network policies. So beyond loopback they need mutual TLS on the control path; `allow_plaintext` will not
do.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.transports.base import Transport
from kvstore.transports.mooncake import MooncakeOptions
from kvstore.transports.registry import check_names, make_transport
from kvstore.transports.tcp import TcpOptions
from pdserve.config import MooncakeConfig
from pdserve.errors import ConfigError
from pdserve.rpc import is_loopback

UNGUARDED = frozenset({"mooncake", "nixl"})
"""Their libraries let in whoever knows an address and a key."""


def open_transports(names: Sequence[str], tcp: TcpOptions, mooncake: MooncakeConfig) -> dict[str, Transport]:
    """By name, in the order of `names`. Raises `ConfigError`: unknown, not installed, no device, no identity, an
    address that can't be bound."""
    check_names(names)
    host = tcp.advertise_host or tcp.host
    for name in UNGUARDED.intersection(names):
        if tcp.server_tls is None and not is_loopback(host):
            raise ConfigError(
                f"{name} on {host} needs tls: its keys open memory past any network policy, so they are given only to "
                "peers that have proved who they are",
                key="tls",
            )
    engine = MooncakeOptions(host, mooncake.protocol, mooncake.device, tcp.progress_timeout_s)
    opened: dict[str, Transport] = {}
    try:
        for name in names:
            opened[name] = make_transport(name, tcp=tcp, mooncake=engine)
    except (ConfigError, OSError) as error:
        for transport in opened.values():
            transport.close()
        if isinstance(error, OSError):
            raise ConfigError(f"tcp cannot listen on {tcp.host}: {error.strerror}", key="transport_host") from error
        raise
    return opened
