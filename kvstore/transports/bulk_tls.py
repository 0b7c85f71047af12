"""The certificates of the control path, for the bulk path of `tcp`."""

from __future__ import annotations

import ssl

from pdserve.errors import ConfigError
from pdserve.rpc import Tls


class BulkTls:
    """The control path's certificates for the bulk path: both sides prove themselves. Host names are not checked:
    the descriptor, which came over the control path, says where to connect."""

    def __init__(self, tls: Tls) -> None:
        """Raises `ConfigError` when a file can't be used."""
        self._tls = tls
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for context in (self.server, self.client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
        self._stamp: tuple[int, ...] = ()
        self.refresh()

    def refresh(self) -> None:
        """Read the files again if they have changed; connections that stand keep what they have."""
        try:
            stamp = self._tls.stamp()
            if stamp == self._stamp:
                return
            for context in (self.server, self.client):
                context.load_cert_chain(self._tls.cert_file, self._tls.key_file)
                context.load_verify_locations(self._tls.ca_file)
            self._stamp = stamp
        except OSError as error:
            raise ConfigError(f"tls files cannot be used: {error}", key="tls") from error
