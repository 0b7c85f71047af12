"""RPC bootstrap against real servers on loopback: typed errors, health, reflection, TLS with reload, limits."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdserve.errors import (
    ConfigError,
    DeadlineExceeded,
    DigestMismatch,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    WorkerLost,
)
from pdserve.rpc import Channel, RpcServer, ServerStream, Tls, is_loopback
from pdserve.wire.handover import RELEASE, RENEW, Release, Released, Renew, Renewed
from pdserve.wire.session import SESSION, RouterHello, RouterUpdate, WorkerUpdate


async def renewed(request: Renew) -> Renewed:
    return Renewed(lease_ms=len(request.nonce))


async def serve(server: RpcServer) -> str:
    return f"127.0.0.1:{await server.start()}"


async def test_a_unary_call_carries_values_both_ways() -> None:
    server = RpcServer("127.0.0.1:0")
    server.add(RENEW, renewed)
    channel = Channel(await serve(server))
    assert await channel.call(RENEW, Renew(b"12345"), timeout_s=60) == Renewed(5)
    await channel.close()
    await server.stop(0)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("top_p is off", param="top_p"),
        Overloaded("full", retry_after_s=1.5),
        DigestMismatch("block 3 differs", leg="transfer", work_done=True),
    ],
)
async def test_a_typed_error_arrives_as_it_left(error: Exception) -> None:
    async def fail(request: Renew) -> Renewed:
        raise error

    server = RpcServer("127.0.0.1:0")
    server.add(RENEW, fail)
    channel = Channel(await serve(server))
    with pytest.raises(type(error)) as caught:
        await channel.call(RENEW, Renew(b""), timeout_s=60)
    assert caught.value.to_fields() == error.to_fields()
    await channel.close()
    await server.stop(0)


async def test_a_bidirectional_stream_ends_on_both_sides() -> None:
    async def echo(stream: ServerStream[RouterUpdate, WorkerUpdate]) -> None:
        while (update := await stream.read()) is not None:
            await stream.write(WorkerUpdate(draining=bool(update.cancels)))

    server = RpcServer("127.0.0.1:0")
    server.add(SESSION, echo)
    channel = Channel(await serve(server))
    stream = channel.open(SESSION)
    await stream.write(RouterUpdate(hello=RouterHello("r", 1)))
    assert await stream.read() == WorkerUpdate(draining=False)
    await stream.write(RouterUpdate(cancels=[1]))
    assert await stream.read() == WorkerUpdate(draining=True)
    await stream.done_writing()
    assert await stream.read() is None
    await channel.close()
    await server.stop(0)


async def test_a_stream_handler_is_cancelled_when_the_client_goes() -> None:
    gone = asyncio.Event()

    async def wait(stream: ServerStream[RouterUpdate, WorkerUpdate]) -> None:
        try:
            await stream.read()
            await asyncio.Event().wait()
        finally:
            gone.set()

    server = RpcServer("127.0.0.1:0")
    server.add(SESSION, wait)
    channel = Channel(await serve(server))
    stream = channel.open(SESSION)
    await stream.write(RouterUpdate(cancels=[1]))
    stream.cancel()
    await asyncio.wait_for(gone.wait(), 60)
    await channel.close()
    await server.stop(0)


async def test_a_server_that_is_not_there_is_a_lost_worker_and_a_slow_one_a_deadline() -> None:
    channel = Channel("127.0.0.1:1")
    with pytest.raises(WorkerLost):
        await channel.call(RENEW, Renew(b""), timeout_s=60)
    await channel.close()

    async def slow(request: Renew) -> Renewed:
        await asyncio.Event().wait()
        return Renewed(0)

    server = RpcServer("127.0.0.1:0")
    server.add(RENEW, slow)
    channel = Channel(await serve(server))
    with pytest.raises(DeadlineExceeded):
        await channel.call(RENEW, Renew(b""), timeout_s=0.05)
    await channel.close()
    await server.stop(0)


async def test_unreadable_and_oversized_messages_get_a_typed_status() -> None:
    server = RpcServer("127.0.0.1:0", max_message_bytes=1000)
    server.add(RENEW, renewed)
    address = await serve(server)
    async with grpc.aio.insecure_channel(address) as raw:
        for payload, status in (
            (b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            (bytes(2000), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw.unary_unary(RENEW.path)(payload)
            assert caught.value.code() is status
    channel = Channel(address)
    with pytest.raises(PayloadTooLarge):
        await channel.call(RENEW, Renew(bytes(2000)), timeout_s=60)
    assert await channel.call(RENEW, Renew(b"ab"), timeout_s=60) == Renewed(2)
    await channel.close()
    await server.stop(0)


async def test_health_follows_set_serving_and_reflection_lists_the_services() -> None:
    server = RpcServer("127.0.0.1:0")
    server.add(RENEW, renewed)
    server.add(RELEASE, lambda request: released(request))
    address = await serve(server)
    async with grpc.aio.insecure_channel(address) as raw:
        stub = health_pb2_grpc.HealthStub(raw)
        request = health_pb2.HealthCheckRequest(service=RENEW.service)
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.set_serving(True)
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")

        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield ask

        async for answer in reflection_pb2_grpc.ServerReflectionStub(raw).ServerReflectionInfo(requests()):
            assert RENEW.service in {s.name for s in answer.list_services_response.service}
    await server.stop(0)


async def released(request: Release) -> Released:
    return Released()


async def test_plain_text_beyond_loopback_must_be_allowed_by_config() -> None:
    with pytest.raises(ConfigError) as caught:
        RpcServer("0.0.0.0:0")
    assert caught.value.key == "tls"
    RpcServer("0.0.0.0:0", allow_plaintext=True)
    assert is_loopback("127.0.0.9")
    assert is_loopback("[::1]")
    assert not is_loopback("10.0.0.1")


class Authority:
    """A certificate authority for tests, with as many leaves as asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._sign(self.subject, self.key.public_key(), ca=True)
        self.ca_file = folder / f"{name}-ca.pem"
        self.ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _sign(self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, ca: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .sign(self.key, hashes.SHA256())
        )

    def issue(self, name: str, ca_file: Path | None = None) -> Tls:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key(), ca=False)
        cert_file, key_file = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Tls(str(cert_file), str(key_file), str(ca_file or self.ca_file))


async def test_mutual_tls_lets_in_only_certificates_of_its_authority(tmp_path: Path) -> None:
    ours, foreign = Authority(tmp_path, "ours"), Authority(tmp_path, "foreign")
    server = RpcServer("127.0.0.1:0", tls=ours.issue("server"))
    server.add(RENEW, renewed)
    address = await serve(server)
    good = Channel(address, tls=ours.issue("client"))
    assert await good.call(RENEW, Renew(b"abc"), timeout_s=60) == Renewed(3)
    for channel in (Channel(address), Channel(address, tls=foreign.issue("stranger", ours.ca_file))):
        with pytest.raises((WorkerLost, DeadlineExceeded)):
            await channel.call(RENEW, Renew(b"abc"), timeout_s=3)
        await channel.close()
    await good.close()
    await server.stop(0)


async def test_renewed_certificates_are_taken_up_without_a_restart(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    tls = old.issue("server")
    server = RpcServer("127.0.0.1:0", tls=tls)
    server.add(RENEW, renewed)
    address = await serve(server)
    client = old.issue("client")
    channel = Channel(address, tls=client)
    assert await channel.call(RENEW, Renew(b"a"), timeout_s=60) == Renewed(1)
    for name, holder in (("server", tls), ("client", client)):
        new.issue(name)
        Path(holder.ca_file).write_bytes(new.ca_file.read_bytes())
    assert await channel.call(RENEW, Renew(b"abc"), timeout_s=60) == Renewed(3)
    fresh = Channel(address, tls=Tls(client.cert_file, client.key_file, str(new.ca_file)))
    assert await fresh.call(RENEW, Renew(b"ab"), timeout_s=60) == Renewed(2)
    await channel.close()
    await fresh.close()
    await server.stop(0)


def test_a_missing_certificate_file_is_a_config_error_that_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Tls(str(tmp_path / "none.pem"), str(tmp_path / "none.key"), str(tmp_path / "ca.pem")).read()
    assert caught.value.key == "tls.key_file"
