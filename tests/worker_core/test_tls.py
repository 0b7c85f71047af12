"""Mutual TLS between workers, on the control path and on the bulk path."""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from session_client import PairRequest, RouterSession
from worker_pair import expected, make_request, running
from worker_stores import joined, store_of

from kvstore.handover.verify import PoolDescriptor
from kvstore.transports.tcp import TcpOptions, TcpTransport
from pdserve.errors import PdserveError, PeerLost
from pdserve.rpc import Tls
from pdserve.types import Role


@dataclass(frozen=True)
class Authority:
    """Issues certificates for loopback into a folder."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    name: x509.Name

    @classmethod
    def make(cls, folder: Path, name: str) -> Authority:
        folder.mkdir()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        authority = cls(folder, ec.generate_private_key(ec.SECP256R1()), subject)
        certificate = authority._certificate(subject, authority.key.public_key(), is_ca=True)
        (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return authority

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, is_ca: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .sign(self.key, hashes.SHA256())
        )

    def issue(self, name: str) -> Tls:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._certificate(subject, key.public_key(), is_ca=False)
        cert_file, key_file = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        plain = serialization.NoEncryption()
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        key_file.write_bytes(pem)
        return Tls(str(cert_file), str(key_file), str(self.folder / "ca.pem"))


def _config(tls: Tls) -> dict[str, object]:
    return {"tls": {"cert_file": tls.cert_file, "key_file": tls.key_file, "ca_file": tls.ca_file}}


async def test_workers_hand_over_under_mutual_tls_and_strangers_get_nothing(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ours", "pdserve")
    config = _config(authority.issue("worker"))
    router_tls = authority.issue("router")
    async with (
        running(Role.PREFILL, transports=["tcp"], **config) as prefill_worker,
        running(Role.DECODE, transports=["tcp"], **config) as decode_worker,
    ):
        prefill = await RouterSession.open(prefill_worker.address, tls=router_tls)
        decode = await RouterSession.open(decode_worker.address, tls=router_tls)
        request = make_request(length=300)
        assert await PairRequest(prefill, decode, request).start().result() == expected(request)
        assert decode_worker.kv_bytes_pulled
        stranger = Authority.make(tmp_path / "theirs", "mallory").issue("mallory")
        for tls in (None, stranger):
            with pytest.raises(PdserveError):
                await RouterSession.open(prefill_worker.address, tls=tls)
        descriptor = PoolDescriptor.decode(prefill_worker.port.offers["tcp"])
        plain = TcpTransport(TcpOptions(connect_timeout_s=2.0, progress_timeout_s=2.0))
        with pytest.raises(PeerLost):  # the bulk path speaks to nobody without a certificate, token or not
            plain.connect(descriptor.region)
        plain.close()
        await prefill.close()
        await decode.close()


async def test_stores_of_both_nodes_are_used_under_mutual_tls(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ours", "pdserve")
    config, router_tls = _config(authority.issue("node")), authority.issue("router")
    tcp = {"transports": ["tcp"], **config}
    async with (
        store_of(**config) as far_store,
        store_of(node_id="n2", **config) as near_store,
        joined(far_store, 1, router_tls=router_tls, **config) as far,
        joined(near_store, 1, router_tls=router_tls, **tcp) as near,
    ):
        request = make_request(length=300)
        await far.run(0, request)
        await far.stored(18)
        answer = await near.run(0, request, prefix_store=far_store.address)
        assert (answer.tokens, answer.fetched) == (expected(request), 288)


async def test_certificates_that_were_renewed_in_place_are_taken_up_on_both_paths(tmp_path: Path) -> None:
    old = Authority.make(tmp_path / "old", "pdserve")
    tls = old.issue("worker")
    async with running(Role.PREFILL, transports=["tcp"], **_config(tls)) as prefill_worker:
        renewed = Authority.make(tmp_path / "new", "pdserve 2")
        files = renewed.issue("worker")
        for source in (files.cert_file, files.key_file, files.ca_file):
            target = Path(source.replace("/new/", "/old/"))
            target.write_bytes(Path(source).read_bytes())
        async with running(Role.DECODE, transports=["tcp"], **_config(tls)) as decode_worker:
            prefill = await RouterSession.open(prefill_worker.address, tls=renewed.issue("router"))
            decode = await RouterSession.open(decode_worker.address, tls=renewed.issue("router"))
            request = make_request(length=300)
            assert await PairRequest(prefill, decode, request).start().result() == expected(request)
            await prefill.close()
            await decode.close()
