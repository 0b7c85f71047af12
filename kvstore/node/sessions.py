"""Clients of a node's store: who they are, and whether one that went silent is dead."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from kvstore.transports.segment import open_segment, owner_alive
from pdserve.errors import NotSupported, TicketRefused


@dataclass(slots=True)
class Session:
    """One `Attach` call."""

    token: bytes
    client: str
    alive_fd: int | None
    """Of a segment whose lock the client holds while it lives."""
    local: bool
    """On this host: only then may it write (see ADR 8)."""
    attached: bool = True

    def gone(self) -> bool | None:
        """Whether the client is dead; None when nobody can tell. The end of its call proves nothing: a process that
        was stopped for a minute loses its connection, and goes on afterwards."""
        if self.alive_fd is not None:
            return not owner_alive(self.alive_fd)
        return False if self.attached else None


class Sessions:
    def __init__(self) -> None:
        self._by_token: dict[bytes, Session] = {}

    def __len__(self) -> int:
        """Those attached now."""
        return sum(session.attached for session in self._by_token.values())

    def open(self, client: str, alive_segment: str = "", *, local: bool = True) -> Session:
        """Raises `PeerLost` when the segment is not that of a living process of this user."""
        fd = None
        if alive_segment:
            mapping, fd = open_segment(alive_segment)
            mapping.close()
        session = Session(secrets.token_bytes(16), client, fd, local)
        self._by_token[session.token] = session
        return session

    def is_local(self, token: bytes) -> bool:
        """Whether this client is on this node; of one that is not known nobody can tell."""
        session = self._by_token.get(token)
        return session is None or session.local

    def detach(self, session: Session) -> None:
        """Its call ended: nothing more is granted to it; what it holds ends by time."""
        session.attached = False

    def name(self, token: bytes, *, to_write: bool = False, to_stop: bool = False) -> str:
        """What the pool knows the client as. Raises `TicketRefused` unless it is attached (or wants `to_stop`, which
        it may tell of afterwards, too), `NotSupported` when it wants to write from another host."""
        session = self._by_token.get(token)
        if session is None or not (session.attached or to_stop):
            raise TicketRefused("no such session here (the store restarted, or the Attach call ended): attach again")
        if to_write and not session.local:
            raise NotSupported("a store is written from its own node only: put the blocks in yours")
        return token.hex()

    def gone(self, name: str) -> bool | None:
        session = self._by_token.get(bytes.fromhex(name))
        return True if session is None else session.gone()

    def purge(self, in_use: Collection[str]) -> None:
        """Forget detached sessions that hold nothing any more; `in_use` are the names of those that do."""
        for token, session in list(self._by_token.items()):
            if not session.attached and token.hex() not in in_use:
                del self._by_token[token]
                _close(session)

    def close(self) -> None:
        for session in self._by_token.values():
            _close(session)
        self._by_token.clear()


def _close(session: Session) -> None:
    if session.alive_fd is not None:
        os.close(session.alive_fd)
