"""What EndpointSlices say, and which workers follow from them: pure values, no I/O.

Several slices of one Service, and the Services of several models, add up to one set. While the slice controller moves
an endpoint both its old and its new slice may show it; a pod that terminates never comes back, so that word counts.

"Not ready" counts as long as it is said of few. Where most workers of a Service have turned unready, whoever says so
is in doubt: after an outage of the control plane every pod is called unready, since its node could not report, and
becomes ready again one by one. Then workers stay that were known and do not terminate: one that is gone, or drains,
says so by its stream. (Envoy draws the line at half, too, and calls it panic.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec


class Conditions(msgspec.Struct, frozen=True):
    """Each may be missing: then it is unknown, to be read as below."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class PodReference(msgspec.Struct, frozen=True):
    uid: str = ""


class Endpoint(msgspec.Struct, frozen=True):
    """`serving` is not looked at: it tells ready endpoints from those that drain, and no new request goes to either of
    those that terminate, while a worker finishes what it has on its stream whatever the slice says."""

    addresses: tuple[str, ...] = ()
    conditions: Conditions = Conditions()
    targetRef: PodReference | None = None

    @property
    def identity(self) -> str:
        """The pod, which an address outlives; hand-made slices name none."""
        return self.targetRef.uid if self.targetRef and self.targetRef.uid else ",".join(self.addresses)

    @property
    def ready(self) -> bool:
        return self.conditions.ready is not False


class Port(msgspec.Struct, frozen=True):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class Metadata(msgspec.Struct, frozen=True):
    name: str = ""
    labels: dict[str, str] = {}
    resourceVersion: str = ""


class Slice(msgspec.Struct, frozen=True):
    metadata: Metadata = Metadata()
    addressType: str = "IPv4"
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[Port, ...] | None = None

    @property
    def service(self) -> str:
        return self.metadata.labels.get("kubernetes.io/service-name", self.metadata.name)

    def port(self, name: str) -> int | None:
        """The number of the TCP port of that name."""
        found = (port.port for port in self.ports or () if port.name == name and port.protocol in (None, "TCP"))
        return next(found, None)


class SliceList(msgspec.Struct, frozen=True):
    metadata: Metadata
    items: tuple[Slice, ...] = ()


def worker_addresses(slices: Iterable[Slice], port_name: str, known: frozenset[str] = frozenset()) -> frozenset[str]:
    """host:port of every endpoint that takes new requests; `known` is what was said last. Slices of names, or without
    that port, have none."""
    slices = list(slices)
    endpoints = [endpoint for each in slices for endpoint in each.endpoints or ()]
    leaving = {endpoint.identity for endpoint in endpoints if endpoint.conditions.terminating}
    services: dict[str, list[Slice]] = {}
    for each in slices:
        services.setdefault(each.service, []).append(each)
    taken = (_of_service(each, port_name, leaving, known) for each in services.values())
    return frozenset(address for addresses in taken for address in addresses)


def _of_service(slices: list[Slice], port_name: str, leaving: set[str], known: frozenset[str]) -> set[str]:
    staying = [
        (address, endpoint.ready)
        for each in slices
        for address, endpoint in _addresses(each, port_name)
        if endpoint.identity not in leaving
    ]
    ready = {address for address, is_ready in staying if is_ready}
    doubted = {address for address, _ in staying} & known - ready
    return ready | doubted if len(doubted) > len(ready) else ready


def _addresses(each: Slice, port_name: str) -> Iterator[tuple[str, Endpoint]]:
    port = each.port(port_name)
    if port is None or each.addressType not in ("IPv4", "IPv6"):
        return
    for endpoint in each.endpoints or ():
        if endpoint.addresses:
            host = endpoint.addresses[0]  # by definition of the API all others mean the same endpoint
            yield (f"[{host}]:{port}" if each.addressType == "IPv6" else f"{host}:{port}"), endpoint
