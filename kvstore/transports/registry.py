"""Transports by name: made from config, chosen when a ticket is bound.

The optional ones load their library only when they are made; what is missing is a `ConfigError` that says what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

from kvstore.transports.base import Transport
from kvstore.transports.mooncake import MooncakeOptions, make_mooncake
from kvstore.transports.nixl import NixlOptions, make_nixl
from kvstore.transports.shm import ShmTransport
from kvstore.transports.tcp import TcpOptions, TcpTransport
from pdserve.errors import ConfigError, HandoverError

NAMES = ("shm", "tcp")
"""Those that need nothing but this package, fastest first."""
OPTIONAL = ("mooncake", "nixl", "nccl", "gloo")
"""Those that need a library, and some of them a device."""
SAME_HOST_ONLY = frozenset({"shm"})
PAIR_CONNECTIONS = 2
"""Process groups a peer: each has threads of its own, and a read uses one."""


def make_transport(name: str, *, tcp: TcpOptions | None = None, mooncake: MooncakeOptions | None = None) -> Transport:
    """`tcp` also says for the others where they listen and how long they wait.

    Raises `ConfigError` for an unknown name or a missing library or device, `OSError` when an address cannot be bound.
    """
    options = tcp or TcpOptions()
    match name:
        case "shm":
            return ShmTransport()
        case "tcp":
            return TcpTransport(options)
        case "mooncake":
            return make_mooncake(mooncake or _mooncake_options(options))
        case "nixl":
            return make_nixl(NixlOptions(progress_timeout_s=options.progress_timeout_s))
        case "gloo" | "nccl":
            return _make_group(name, options)
        case _:
            check_names([name])
            raise AssertionError(name)


def _mooncake_options(tcp: TcpOptions) -> MooncakeOptions:
    return MooncakeOptions(host=tcp.advertise_host or tcp.host, progress_timeout_s=tcp.progress_timeout_s)


def _make_group(backend: Literal["gloo", "nccl"], options: TcpOptions) -> TcpTransport:
    try:
        from kvstore.transports.process_group import PairMaker
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the transport {backend} needs torch: pip install 'pdserve[torch]'", key="transports"
        ) from error
    upgrade = PairMaker(backend, options.progress_timeout_s)
    return TcpTransport(replace(options, max_connections_per_peer=PAIR_CONNECTIONS), backend, upgrade)


def check_names(names: Sequence[str], key: str = "transports") -> None:
    """Raises `ConfigError` for a name that is no transport's."""
    known = (*NAMES, *OPTIONAL)
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no transport {name!r}: choose from {', '.join(known)}", key=key)


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
