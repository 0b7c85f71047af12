"""What follows from EndpointSlices, and how list and watch go on through failures. The API is a script here; the real
one is in tests/kube."""

import asyncio
from contextlib import aclosing

import msgspec
import pytest

from pdserve.config import KubernetesConfig, RouterConfig
from pdserve.errors import ConfigError
from pdserve.types import Role
from router.discovery import StaticDiscovery, make_discovery
from router.discovery.base import Backoff, DiscoveryError
from router.discovery.kubernetes import KubernetesDiscovery
from router.discovery.slice_api import Expired
from router.discovery.slices import Slice, SliceList, worker_addresses


def endpoint(ip, ready=True, terminating=False, serving=None, uid=None):
    conditions = {"ready": ready, "serving": serving, "terminating": terminating}
    return {"addresses": [ip], "conditions": conditions, "targetRef": {"kind": "Pod", "uid": uid or ip}}


def make_slice(name, *endpoints, version="1", ports=(("grpc", 7000), ("http", 7100)), kind="IPv4"):
    tree = {
        "metadata": {"name": name, "resourceVersion": version, "labels": {}},
        "addressType": kind,
        "endpoints": list(endpoints) or None,
        "ports": [{"name": each, "port": number, "protocol": "TCP"} for each, number in ports],
    }
    return msgspec.json.decode(msgspec.json.encode(tree), type=Slice)


def test_slices_of_several_services_add_up():
    slices = [
        make_slice("prefill-a", endpoint("10.0.0.1"), endpoint("10.0.0.2")),
        make_slice("prefill-b", endpoint("10.0.0.3")),
        make_slice("decode-a", endpoint("10.0.1.1"), ports=(("grpc", 9000),)),
    ]
    assert worker_addresses(slices, "grpc") == {"10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000", "10.0.1.1:9000"}


@pytest.mark.parametrize(
    ("conditions", "taken"),
    [
        ({"ready": True}, True),
        ({"ready": None}, True),
        ({"ready": False}, False),
        ({"ready": True, "terminating": True}, False),
        ({"ready": False, "serving": True, "terminating": True}, False),
        ({"ready": False, "serving": False, "terminating": True}, False),
    ],
)
def test_only_ready_endpoints_that_stay_take_new_requests(conditions, taken):
    slices = [make_slice("a", endpoint("10.0.0.1", **conditions))]
    assert bool(worker_addresses(slices, "grpc")) is taken


def test_an_endpoint_that_moves_between_slices_is_one_and_terminating_in_any_counts():
    twice = [make_slice("a", endpoint("10.0.0.1")), make_slice("b", endpoint("10.0.0.1"))]
    assert worker_addresses(twice, "grpc") == {"10.0.0.1:7000"}
    leaving = [make_slice("a", endpoint("10.0.0.1")), make_slice("b", endpoint("10.0.0.1", False, True))]
    assert worker_addresses(leaving, "grpc") == frozenset()


def test_a_new_pod_on_the_address_of_one_that_terminates_is_taken():
    slices = [
        make_slice("a", endpoint("10.0.0.1", False, True, uid="old")),
        make_slice("b", endpoint("10.0.0.1", uid="new")),
    ]
    assert worker_addresses(slices, "grpc") == {"10.0.0.1:7000"}


def test_a_service_most_of_which_turns_unready_keeps_the_workers_that_were_ready():
    """As after an outage of the control plane: nodes could not report, so every pod is called unready."""
    unready = make_slice("a", endpoint("10.0.0.1", ready=False), endpoint("10.0.0.2", ready=False))
    known = frozenset({"10.0.0.1:7000", "10.0.0.9:7000"})
    assert worker_addresses([unready], "grpc", known) == {"10.0.0.1:7000"}, "not 2, which was never ready"
    assert worker_addresses([unready], "grpc") == frozenset()
    other = make_slice("b", endpoint("10.0.1.1"))
    assert worker_addresses([unready, other], "grpc", known) == {"10.0.0.1:7000", "10.0.1.1:7000"}, "by Service"
    mixed = make_slice("a", endpoint("10.0.0.1", ready=False), endpoint("10.0.0.2"))
    assert worker_addresses([mixed], "grpc", known) == {"10.0.0.2:7000"}
    recovering = make_slice(
        "a", endpoint("10.0.0.1", ready=False), endpoint("10.0.0.9", ready=False), endpoint("10.0.0.2")
    )
    assert len(worker_addresses([recovering], "grpc", known)) == 3, "the first that is ready again is not left alone"
    leaving = make_slice("a", endpoint("10.0.0.1", ready=False, terminating=True))
    assert worker_addresses([leaving], "grpc", known) == frozenset()


def test_slices_without_the_port_or_of_names_have_no_workers():
    slices = [
        make_slice("a", endpoint("10.0.0.1"), ports=(("http", 80),)),
        make_slice("b", endpoint("db.example"), kind="FQDN"),
        make_slice("c"),
    ]
    assert worker_addresses(slices, "grpc") == frozenset()
    assert worker_addresses([make_slice("d", endpoint("fd00::1"), kind="IPv6")], "grpc") == {"[fd00::1]:7000"}


class Script:
    """An API whose answers are written down: lists, and for each watch its events, the last of which may be raised."""

    def __init__(self, lists, watches):
        self.lists, self.watches = list(lists), list(watches)
        self.asked = []
        self.closed = False

    async def list(self):
        self.asked.append("list")
        answer = self.lists.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def watch(self, version):
        self.asked.append(version)
        if not self.watches:
            await asyncio.Event().wait()
        for event in self.watches.pop(0):
            if isinstance(event, Exception):
                raise event
            yield event

    async def close(self):
        self.closed = True


def listed(version, *slices):
    return msgspec.json.decode(
        msgspec.json.encode(
            {"metadata": {"resourceVersion": version}, "items": [msgspec.to_builtins(s) for s in slices]}
        ),
        type=SliceList,
    )


def bookmark(version):
    return "BOOKMARK", make_slice("", version=version)


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch):
    monkeypatch.setattr(Backoff, "FIRST_S", 0.001)
    monkeypatch.setattr(Backoff, "MAX_S", 0.002)


async def follow(script, number, *, config=None, clock=None):
    """The first `number` sets, then what was asked until nothing more comes."""
    given = {} if clock is None else {"clock": clock}
    discovery = KubernetesDiscovery(config or KubernetesConfig(), script, **given)
    sets = []
    async with asyncio.timeout(60), aclosing(discovery.watch()) as changes:
        async for addresses in changes:
            sets.append({address.split(":")[0] for address in addresses})
            if len(sets) == number:
                break
    assert script.closed
    return sets


ONE, TWO = make_slice("a", endpoint("10.0.0.1")), make_slice("b", endpoint("10.0.0.2"), version="7")


async def test_a_list_then_changes_as_they_come():
    gone = make_slice("a", version="8")
    script = Script([listed("5", ONE)], [[("ADDED", TWO), bookmark("7"), ("DELETED", gone)]])
    assert await follow(script, 3) == [{"10.0.0.1"}, {"10.0.0.1", "10.0.0.2"}, {"10.0.0.2"}]


async def test_an_event_that_changes_no_address_is_no_change():
    same = make_slice("a", endpoint("10.0.0.1"), version="6")
    script = Script([listed("5", ONE)], [[("MODIFIED", same), ("ADDED", TWO)]])
    assert await follow(script, 2) == [{"10.0.0.1"}, {"10.0.0.1", "10.0.0.2"}]


async def test_a_watch_that_ended_or_broke_goes_on_from_the_last_version():
    script = Script([listed("5", ONE)], [[bookmark("6")], [DiscoveryError("broken")], [("ADDED", TWO)]])
    await follow(script, 2)
    assert script.asked == ["list", "5", "6", "6"]


async def test_a_version_that_was_forgotten_means_a_new_list():
    script = Script([listed("5", ONE), listed("9", TWO)], [[Expired("gone")]])
    assert await follow(script, 2) == [{"10.0.0.1"}, {"10.0.0.2"}]
    assert script.asked == ["list", "5", "list"]


async def test_no_answer_at_the_start_is_tried_again_and_never_an_empty_set():
    script = Script([DiscoveryError("refused"), DiscoveryError("refused"), listed("5", ONE)], [])
    assert await follow(script, 1) == [{"10.0.0.1"}]


async def test_everything_is_listed_anew_when_it_is_time():
    now = iter([0.0, 10.0, 400.0, 400.0])
    script = Script([listed("5", ONE), listed("9", TWO)], [[], []])
    assert await follow(script, 2, clock=lambda: next(now)) == [{"10.0.0.1"}, {"10.0.0.2"}]
    assert script.asked == ["list", "5", "5", "list"]


async def test_it_tells_whether_it_is_answered():
    script = Script([listed("5", ONE)], [[DiscoveryError("broken")]])
    discovery = KubernetesDiscovery(KubernetesConfig(), script)
    assert not discovery.answering
    async with asyncio.timeout(60), aclosing(discovery.watch()) as changes:
        await anext(changes)
        assert discovery.answering
        waiting = asyncio.ensure_future(anext(changes))
        while discovery.answering:  # noqa: ASYNC110
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_failures_are_waited_out_longer_and_longer_and_a_success_resets_that():
    backoff = Backoff()
    assert not backoff.failing
    waits = [backoff.take() for _ in range(3)]
    assert backoff.failing
    assert 0.0005 <= waits[0] <= 0.001
    assert 0.001 <= waits[2] <= 0.002
    backoff.reset()
    assert not backoff.failing


# ---- what a fleet makes of it ----


class Told:
    """A discovery that says what the test tells it."""

    answering = True

    def __init__(self, *addresses):
        self.news = asyncio.Queue()
        self.tell(*addresses)

    def tell(self, *addresses):
        self.news.put_nowait(frozenset(addresses))

    async def watch(self):
        while True:
            addresses = await self.news.get()
            if None in addresses:
                raise RuntimeError("a bug in discovery")
            yield addresses


@pytest.fixture
async def fleet_of():
    from pdserve.wire.session import RouterHello
    from router.fleet import Fleet

    made = []

    def make(discovery):
        fleet = Fleet(discovery, RouterHello("router", 1), tls=None, max_backoff_s=0.1)
        fleet.start()
        made.append(fleet)
        return fleet

    yield make
    for fleet in made:
        await fleet.close()


def test_discovery_is_chosen_by_config(tmp_path):
    assert isinstance(make_discovery(RouterConfig(workers=("127.0.0.1:1",))), StaticDiscovery)
    with pytest.raises(ConfigError, match="no way to the Kubernetes API") as refused:
        make_discovery(
            RouterConfig(discovery="kubernetes", kubernetes=KubernetesConfig(kubeconfig=str(tmp_path / "no")))
        )
    assert refused.value.key == "kubernetes"
    with pytest.raises(ConfigError, match=r"registry\.url"):
        make_discovery(RouterConfig(discovery="redis"))
    with pytest.raises(ConfigError, match="static"):
        make_discovery(RouterConfig(discovery="redis", workers=("127.0.0.1:1",)))


async def test_a_worker_that_discovery_drops_finishes_what_it_has_and_a_recalled_one_keeps_its_stream(
    house, fleet_of, wait_until
):
    worker = await house.worker(Role.DECODE, "d0")
    discovery = Told(worker.address)
    fleet = fleet_of(discovery)
    await wait_until(lambda: len(fleet.links) == 1)
    link = fleet.links[0]
    link._legs[1] = held = type("Leg", (), {"num_choices": 0, "events": None})()  # a request under way
    discovery.tell()
    await wait_until(lambda: link.draining)
    assert fleet.links == [link]
    assert fleet.of_model("tiny", Role.DECODE) == []
    discovery.tell(worker.address)
    await wait_until(lambda: not link.draining)
    assert fleet.links == [link]
    assert fleet.of_model("tiny", Role.DECODE) == [link]
    discovery.tell()
    await wait_until(lambda: link.draining)
    assert link.forget(1), held
    await wait_until(lambda: fleet.links == [])


async def test_discovery_that_breaks_begins_anew_and_loses_no_worker(house, fleet_of, wait_until, monkeypatch):
    monkeypatch.setattr("router.fleet.DISCOVERY_RETRY_S", 0.001)
    first = await house.worker(Role.DECODE, "d0")
    second = await house.worker(Role.DECODE, "d1")
    discovery = Told(first.address)
    fleet = fleet_of(discovery)
    await wait_until(lambda: len(fleet.links) == 1)
    discovery.tell(None)
    discovery.tell(first.address, second.address)
    await wait_until(lambda: len(fleet.links) == 2)
