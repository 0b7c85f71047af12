"""Protobuf at the wire only: this package converts between messages and `pdserve.types`, in both directions.

Nothing outside it (and `pdserve.rpc`, which registers services) touches generated code. A `Method` names an RPC and
carries its four converters, so that servers and clients deal in our own values from end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pdserve.errors import ProtocolMismatch

PROTOCOL_MIN = 1
"""Oldest version of the session, ticket and manifest messages that this release understands."""
PROTOCOL_MAX = 1
"""Newest one. A release may raise MAX by one and must then keep MIN for one release."""

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


@dataclass(frozen=True, slots=True)
class Method(Generic[RequestT, ResponseT]):
    """An RPC: its path, its shape, and how its messages become values."""

    path: str
    """`/package.Service/Name`."""
    client_streams: bool
    server_streams: bool
    encode_request: Callable[[RequestT], bytes]
    decode_request: Callable[[bytes], RequestT]
    encode_response: Callable[[ResponseT], bytes]
    decode_response: Callable[[bytes], ResponseT]

    @property
    def service(self) -> str:
        return self.path.split("/")[1]

    @property
    def name(self) -> str:
        return self.path.split("/")[2]


AnyMethod = Method[Any, Any]


def common_version(peer_min: int, peer_max: int) -> int:
    """The newest protocol version that both sides speak. Raises `ProtocolMismatch`."""
    version = min(PROTOCOL_MAX, peer_max)
    if version < max(PROTOCOL_MIN, peer_min):
        raise ProtocolMismatch(
            f"the peer speaks protocol {peer_min} to {peer_max}, this process {PROTOCOL_MIN} to {PROTOCOL_MAX}: "
            "upgrade the older one (one release apart is supported)"
        )
    return version
