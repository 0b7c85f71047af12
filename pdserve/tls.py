"""Mutual TLS between our processes, as files; gRPC servers and channels, sessions and bulk transports share it."""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Tls:
    """Mutual TLS: our certificate and key, and the authority that peers' certificates must come from. PEM files;
    they are read again when they change (cert-manager renews in place)."""

    cert_file: str
    key_file: str
    ca_file: str
    server_name: str = ""
    """Name that a server's certificate must carry; empty: the host that was dialled."""

    def read(self) -> tuple[bytes, bytes, bytes]:
        """(key, certificate chain, authority). Raises `ConfigError` for a file that can't be read."""
        contents = []
        for key, path in (("key_file", self.key_file), ("cert_file", self.cert_file), ("ca_file", self.ca_file)):
            try:
                with open(path, "rb") as file:
                    contents.append(file.read())
            except OSError as error:
                raise ConfigError(f"tls.{key} {path} cannot be read: {error.strerror}", key=f"tls.{key}") from error
        return contents[0], contents[1], contents[2]

    def client_context(self, protocols: Sequence[str]) -> ssl.SSLContext:
        """For a client that proves itself, and offers these protocols (ALPN). Raises `ConfigError` for files that
        can't be read or used."""
        _, _, authority = self.read()
        try:
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=authority.decode())
            context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"tls certificates cannot be used: {error}", key="tls") from error
        context.set_alpn_protocols(list(protocols))
        return context

    def stamp(self) -> tuple[int, ...]:
        """Changes when any of the files does."""
        return tuple(os.stat(path).st_mtime_ns for path in (self.key_file, self.cert_file, self.ca_file))
