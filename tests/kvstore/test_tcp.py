"""What is special about tcp: strangers, stalls, closes, encryption."""

import datetime
import ipaddress
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvstore.transports.base import Range, Region
from kvstore.transports.tcp import TcpOptions, TcpTransport
from kvstore.transports.tcp_stream import HELLO, MAGIC, MAX_RANGES, READ, REQUEST, STATUS, VERSION, WRITE
from pdserve.errors import PeerLost, TransferTimeout

SIZE = 100_000


@pytest.fixture
def transport() -> Iterator[TcpTransport]:
    made = TcpTransport()
    yield made
    made.close()


@pytest.fixture
def memory() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture
def region(transport: TcpTransport, memory: np.ndarray) -> Region:
    return transport.register(memory)


def fields(region: Region) -> list:
    return msgspec.msgpack.decode(region.descriptor)


def changed(region: Region, index: int, value: object) -> bytes:
    descriptor = fields(region)
    descriptor[index] = value
    return msgspec.msgpack.encode(descriptor)


def stranger(region: Region, greet: bool = True) -> socket.socket:
    """A raw connection, let in if `greet`."""
    host, port, region_id, token, _ = fields(region)
    sock = socket.create_connection((host, port), timeout=20)
    if greet:
        sock.sendall(HELLO.pack(MAGIC, VERSION, 0, region_id, token))
        assert STATUS.unpack(sock.recv(STATUS.size, socket.MSG_WAITALL))[1] == 0
    return sock


def test_a_wrong_token_is_refused(transport: TcpTransport, region: Region) -> None:
    for token in (bytes(32), bytes([fields(region)[3][0] ^ 1]) + fields(region)[3][1:]):
        with pytest.raises(PeerLost, match="did not let us in"):
            transport.connect(changed(region, 3, token))
    with pytest.raises(PeerLost, match="no valid token"):
        transport.connect(changed(region, 3, b"short"))


def test_one_regions_token_does_not_open_another(transport: TcpTransport, region: Region, memory: np.ndarray) -> None:
    other = transport.register(memory.copy())
    with pytest.raises(PeerLost):
        transport.connect(changed(region, 2, other.region_id))


def test_an_unknown_region_with_a_zero_token_is_refused(transport: TcpTransport, region: Region) -> None:
    with socket.create_connection(("127.0.0.1", transport.port), timeout=20) as sock:
        sock.sendall(HELLO.pack(MAGIC, VERSION, 0, 999, bytes(32)))
        assert STATUS.unpack(sock.recv(STATUS.size, socket.MSG_WAITALL))[1] == 1
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\xff" * REQUEST.size,
        REQUEST.pack(b"HTTP", READ, 0, 0, 0, 0),
        REQUEST.pack(MAGIC, 3, 0, 0, 0, 0),
        REQUEST.pack(MAGIC, READ, 0, MAX_RANGES + 1, 0, 0),
        REQUEST.pack(MAGIC, READ, 0, 1, 0, 8) + struct.pack("<QQ", SIZE - 7, 8),
        REQUEST.pack(MAGIC, READ, 0, 1, 0, 8) + struct.pack("<QQ", 2**64 - 4, 8),
        REQUEST.pack(MAGIC, READ, 0, 1, 0, 8) + struct.pack("<QQ", 8, 2**64 - 4),
        REQUEST.pack(MAGIC, READ, 0, 1, 0, 9) + struct.pack("<QQ", 0, 8),
        REQUEST.pack(MAGIC, WRITE, 0, 1, 0, 8) + struct.pack("<QQ", SIZE - 7, 8) + b"x" * 8,
    ],
)
def test_a_malformed_request_ends_the_connection_and_touches_nothing(
    transport: TcpTransport, region: Region, memory: np.ndarray, request_bytes: bytes
) -> None:
    before = memory.copy()
    with stranger(region) as sock:
        sock.sendall(request_bytes)
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            pass  # closed with our bytes unread
    assert (memory == before).all()
    peer = transport.connect(region.descriptor)
    peer.read([Range(0, 0, 8)], np.zeros(8, dtype=np.uint8))


def test_read_only_memory_can_be_read_and_not_written(transport: TcpTransport, memory: np.ndarray) -> None:
    memory.flags.writeable = False
    region = transport.register(memory)
    peer = transport.connect(region.descriptor)
    local = np.zeros(8, dtype=np.uint8)
    peer.read([Range(0, 0, 8)], local)
    assert (local == memory[:8]).all()
    with pytest.raises(PeerLost):
        peer.write([Range(0, 0, 8)], local)


def test_a_peer_that_speaks_another_protocol_is_lost(region: Region, transport: TcpTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            sock, _ = server.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                sock.recv(1 << 16)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(PeerLost, match="protocol"):
            transport.connect(changed(region, 1, server.getsockname()[1]))
        thread.join()


def test_nobody_listening_is_a_lost_peer(region: Region, transport: TcpTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PeerLost, match="cannot connect"):
        transport.connect(changed(region, 1, port))


def half_a_server(size: int, stop: threading.Event) -> tuple[int, threading.Thread]:
    """Lets anyone in, answers a read with half its bytes, then is silent."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server, server.accept()[0] as sock:
            sock.recv(HELLO.size, socket.MSG_WAITALL)
            sock.sendall(STATUS.pack(MAGIC, 0, SIZE))
            sock.recv(REQUEST.size + 16, socket.MSG_WAITALL)
            sock.sendall(STATUS.pack(MAGIC, 0, size) + bytes(size // 2))
            stop.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    return server.getsockname()[1], thread


def test_a_transfer_without_progress_times_out(region: Region) -> None:
    stop = threading.Event()
    port, thread = half_a_server(1000, stop)
    quick = TcpTransport(TcpOptions(progress_timeout_s=0.2))
    try:
        peer = quick.connect(changed(region, 1, port))
        with pytest.raises(TransferTimeout, match="moved no byte"):
            peer.read([Range(0, 0, 1000)], np.zeros(1000, dtype=np.uint8))
    finally:
        stop.set()
        thread.join()
        quick.close()


@pytest.mark.parametrize("who", ["peer", "transport"])
def test_close_ends_a_transfer_under_way(region: Region, who: str) -> None:
    stop = threading.Event()
    port, server = half_a_server(1000, stop)
    transport = TcpTransport()
    peer = transport.connect(changed(region, 1, port))
    local = np.full(1000, 1, dtype=np.uint8)
    ended: list[PeerLost] = []

    def pull() -> None:
        try:
            peer.read([Range(0, 0, 1000)], local)
        except PeerLost as error:
            ended.append(error)

    thread = threading.Thread(target=pull)
    thread.start()
    while local[0]:  # the first half has not arrived
        threading.Event().wait(0.001)
    (peer if who == "peer" else transport).close()
    thread.join(60)
    assert len(ended) == 1
    stop.set()
    server.join()
    transport.close()


def test_a_slow_reader_blocks_only_itself(transport: TcpTransport) -> None:
    """Back-pressure: it asks for more than the socket buffers hold and does not read; others go on."""
    memory = np.zeros(64 << 20, dtype=np.uint8)
    memory[-1] = 9
    region = transport.register(memory)
    with stranger(region) as sock:
        sock.sendall(REQUEST.pack(MAGIC, READ, 0, 1, 0, memory.size) + struct.pack("<QQ", 0, memory.size))
        assert sock.recv(STATUS.size, socket.MSG_WAITALL)[:4] == MAGIC
        local = np.zeros(8, dtype=np.uint8)
        transport.connect(region.descriptor).read([Range(memory.size - 8, 0, 8)], local)
        assert local[7] == 9
        transport.deregister(region)  # aborts the stalled stream; returns only when its thread is gone
    assert not [t for t in threading.enumerate() if t.name == f"kv-tcp-{transport.port}"]


def test_close_leaves_no_thread(region: Region, transport: TcpTransport) -> None:
    peer = transport.connect(region.descriptor)
    silent = stranger(region, greet=False)
    peer.read([Range(0, 0, 8)], np.zeros(8, dtype=np.uint8))
    transport.close()
    for thread in threading.enumerate():
        if thread.name.startswith("kv-tcp") and str(transport.port) in thread.name:
            thread.join(60)
            assert not thread.is_alive()
    silent.close()


def certificate(folder: Path) -> tuple[Path, Path]:
    """Self-signed, for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pdserve test")])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[TcpTransport]:
    cert, key = certificate(tmp_path)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(cert, key)
    client = ssl.create_default_context(cafile=str(cert))
    made = TcpTransport(TcpOptions(server_tls=server, client_tls=client))
    yield made
    made.close()


def test_tls_moves_bytes_both_ways(tls: TcpTransport, memory: np.ndarray) -> None:
    region = tls.register(memory)
    peer = tls.connect(region.descriptor)
    local = np.zeros(SIZE, dtype=np.uint8)
    peer.read([Range(0, 0, 60_000), Range(60_000, 60_000, 40_000)], local)
    assert (local == memory).all()
    peer.write([Range(0, 10, 20)], local)
    assert (memory[:20] == local[10:30]).all()


def test_tls_refuses_plain_clients_and_close_ends_it(
    tls: TcpTransport, memory: np.ndarray, transport: TcpTransport
) -> None:
    region = tls.register(memory)
    with pytest.raises(PeerLost):
        transport.connect(region.descriptor)
    peer = tls.connect(region.descriptor)
    tls.close()
    with pytest.raises(PeerLost):
        peer.read([Range(0, 0, 8)], np.zeros(8, dtype=np.uint8))


def test_a_client_that_expects_tls_does_not_talk_to_a_plain_server(tls: TcpTransport, region: Region) -> None:
    with pytest.raises(PeerLost):
        tls.connect(region.descriptor)
