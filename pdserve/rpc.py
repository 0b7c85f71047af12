"""gRPC, bootstrapped once: server with health, reflection, mutual TLS and drain; client channels with typed errors.

Messages cross this module as bytes: a `pdserve.wire.Method` turns them into values inside the handler, so that a
message that can't be read becomes a typed status like any other error. Keepalive finds a dead peer in seconds.
"""

from __future__ import annotations

import ipaddress
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pdserve.errors import ConfigError, EngineFailed, InvalidRequest, PayloadTooLarge, PdserveError
from pdserve.http2 import Heartbeat
from pdserve.rpc_errors import DETAILS_KEY, error_from_call, error_status
from pdserve.rpc_stream import ClientStream
from pdserve.tls import Tls
from pdserve.wire import AnyMethod, Method

__all__ = ["Channel", "ClientStream", "Heartbeat", "RpcServer", "ServerStream", "Tls", "guard", "is_loopback"]

ReqT = TypeVar("ReqT")
RespT = TypeVar("RespT")

_SLACK_BYTES = 4 << 20
"""gRPC itself refuses only beyond limit + slack, so that between the two the refusal is ours, and typed."""
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_MIN_PING_MS = 100
"""Half of the shortest `heartbeat_s`: a server takes pings that come more often for an attack, and hangs up."""
_CONNECT_TIMEOUT_MS = 5_000
"""For one attempt to connect, TLS included. gRPC calls it the minimal reconnect back-off, and gives up on an attempt
after it: a busy peer may well need more than the 100 ms that a back-off should start with."""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


async def _abort(context: Any, error: PdserveError) -> NoReturn:
    status = error_status(error)
    await context.abort(
        grpc.StatusCode[error.grpc_code],
        error.message,
        ((DETAILS_KEY, status.SerializeToString()),),
    )
    raise AssertionError("abort returns by raising")


class ServerStream(Generic[ReqT, RespT]):
    """A bidirectional call as its handler sees it. Cancellation by the client cancels the handler's task."""

    def __init__(self, context: Any, method: Method[ReqT, RespT], limit: int) -> None:
        self._context = context
        self._method = method
        self._limit = limit
        self.peer: str = context.peer()

    async def read(self) -> ReqT | None:
        """The next message; None when the client has closed its side."""
        data = await self._context.read()
        return None if data is grpc.aio.EOF else _decode(self._method, data, self._limit)

    async def write(self, response: RespT) -> None:
        await self._context.write(self._method.encode_response(response))


def _decode(method: AnyMethod, data: bytes, limit: int) -> Any:
    if len(data) > limit:
        raise PayloadTooLarge(f"the message has {len(data)} bytes; the limit is {limit}", param=method.name)
    try:
        return method.decode_request(data)
    except DecodeError as error:
        raise InvalidRequest("the message cannot be parsed", param=method.name) from error


class RpcServer:
    """A gRPC server of ours. Plain text is for loopback, or where `allow_plaintext` says so."""

    def __init__(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        allow_plaintext: bool = False,
        max_message_bytes: int = 4 << 20,
    ) -> None:
        self._address = address
        self._tls = tls
        self._limit = max_message_bytes
        host = address.rpartition(":")[0]
        if tls is None and not allow_plaintext and not is_loopback(host):
            raise ConfigError(
                f"{address} is no loopback address and there is no tls: give certificates, or set allow_plaintext",
                key="tls",
            )
        self._handlers: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=[
                *_KEEPALIVE,
                ("grpc.max_receive_message_length", max_message_bytes + _SLACK_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_MS),
                ("grpc.so_reuseport", 0),
            ]
        )

    def add(self, method: AnyMethod, handler: Callable[..., Any]) -> None:
        """Serve a method. The handler's shape follows the method's: `async h(request) -> response`;
        `h(request, context) -> AsyncIterator[response]` when the server streams; `async h(stream: ServerStream)`
        when both do. A `PdserveError` that it raises becomes a status with `ErrorInfo`."""
        if method.client_streams:
            served = grpc.stream_stream_rpc_method_handler(self._bidi(method, handler))
        elif method.server_streams:
            served = grpc.unary_stream_rpc_method_handler(self._server_stream(method, handler))
        else:
            served = grpc.unary_unary_rpc_method_handler(self._unary(method, handler))
        self._handlers.setdefault(method.service, {})[method.name] = served

    def _unary(self, method: AnyMethod, handler: Callable[[Any], Awaitable[Any]]) -> Callable[..., Any]:
        async def serve(data: bytes, context: Any) -> bytes:
            try:
                return method.encode_response(await handler(_decode(method, data, self._limit)))
            except PdserveError as error:
                await _abort(context, error)

        return serve

    def _server_stream(
        self, method: AnyMethod, handler: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[..., Any]:
        async def serve(data: bytes, context: Any) -> None:
            try:
                async for response in handler(_decode(method, data, self._limit), context):
                    await context.write(method.encode_response(response))
            except PdserveError as error:
                await _abort(context, error)

        return serve

    def _bidi(
        self, method: AnyMethod, handler: Callable[[ServerStream[Any, Any]], Awaitable[None]]
    ) -> Callable[..., Any]:
        async def serve(_: Any, context: Any) -> None:
            try:
                await handler(ServerStream(context, method, self._limit))
            except PdserveError as error:
                await _abort(context, error)

        return serve

    def _credentials(self, tls: Tls) -> grpc.ServerCredentials:
        stamp = tls.stamp()

        def configuration() -> Any:
            key, certificate, authority = tls.read()
            return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)

        def fetch() -> Any:
            nonlocal stamp
            latest = tls.stamp()
            if latest == stamp:
                return None
            stamp = latest
            return configuration()

        return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=True)

    async def start(self) -> int:
        """Bind and serve; health says NOT_SERVING until `set_serving(True)`. Returns the port.
        Raises `ConfigError` when the address can't be bound."""
        for service, handlers in self._handlers.items():
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*self._handlers, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self.set_serving(False)
        try:
            if self._tls is None:
                port: int = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, self._credentials(self._tls))
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {self._address}: {error}", key="listen") from error
        if port == 0:
            raise ConfigError(f"cannot listen on {self._address}", key="listen")
        await self._server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        """What `grpc.health.v1` answers, for the server and for each of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._handlers):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let those under way run for `grace_s`, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


class Channel:
    """A connection to one address. Lazy: it connects at the first call, and again whenever it must."""

    def __init__(self, address: str, *, tls: Tls | None = None) -> None:
        self.address = address
        self._tls = tls
        self._stamp: tuple[int, ...] = ()
        self._retired: list[grpc.aio.Channel] = []
        self._streams: weakref.WeakSet[ClientStream[Any, Any]] = weakref.WeakSet()
        self._channel = self._connect()

    def _connect(self) -> grpc.aio.Channel:
        options = [
            *_KEEPALIVE,
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", _CONNECT_TIMEOUT_MS),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        if self._tls is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        self._stamp = self._tls.stamp()
        key, certificate, authority = self._tls.read()
        if self._tls.server_name:
            options.append(("grpc.ssl_target_name_override", self._tls.server_name))  # type: ignore[arg-type]
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        return grpc.aio.secure_channel(self.address, credentials, options=options)

    def _current(self) -> grpc.aio.Channel:
        """The channel, made anew when the certificate files have changed; calls under way keep the old one."""
        if self._tls is not None and self._tls.stamp() != self._stamp:
            self._retired.append(self._channel)
            self._channel = self._connect()
        return self._channel

    async def call(self, method: Method[ReqT, RespT], request: ReqT, *, timeout_s: float) -> RespT:
        """A unary call. Raises the peer's `PdserveError`, `WorkerLost` when it can't be reached, or
        `DeadlineExceeded`."""
        invoke = self._current().unary_unary(method.path)
        try:
            data: bytes = await invoke(method.encode_request(request), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from error
        return method.decode_response(data)

    async def stream(
        self, method: Method[ReqT, RespT], request: ReqT, *, timeout_s: float | None = None
    ) -> AsyncIterator[RespT]:
        """A call whose responses stream; leaving the iteration cancels it."""
        call = self._current().unary_stream(method.path)(method.encode_request(request), timeout=timeout_s)
        try:
            async for data in call:
                yield method.decode_response(data)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from error
        finally:
            call.cancel()

    def open(self, method: Method[ReqT, RespT], heartbeat: Heartbeat | None = None) -> ClientStream[ReqT, RespT]:
        """A bidirectional call, over a connection of its own."""
        stream = ClientStream(self.address, method, self._tls, heartbeat)
        self._streams.add(stream)
        return stream

    async def close(self, grace_s: float | None = None) -> None:
        """Cancels every call under way; with a grace, those unary ones that outlast it."""
        for stream in self._streams:
            stream.cancel()
        for channel in (*self._retired, self._channel):
            await channel.close(grace_s)


def guard(error: BaseException) -> PdserveError:
    """Any exception as an error that may leave the process: ours as it is, others as `EngineFailed`."""
    if isinstance(error, PdserveError):
        return error
    return EngineFailed(f"{type(error).__name__}: {error}")
