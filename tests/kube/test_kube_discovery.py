"""Discovery against the real API server: pods come and go, watches break, the control plane stops, dies and starts.

Pods are the chart's own, on fake nodes; the workers that play them are real (see `kube_fleet`). Nothing here tells a
worker that its pod ends, so what keeps requests off it is discovery alone.
"""

import asyncio

import pytest
from kube_fleet import KubeFleet, Load, addresses_in
from kube_tools import CHART, wait_for

from pdserve.config import KubernetesConfig
from pdserve.types import Role
from router.discovery.kubernetes import KubernetesDiscovery
from router.discovery.slice_api import Expired, SliceApi

pytestmark = [pytest.mark.kube, pytest.mark.timeout(240)]


VALUES = (
    "--set", "allowPlaintext=true,decode.replicaCount=2,router.minReadySeconds=0",
    "--set", "prefill.minReadySeconds=1,decode.minReadySeconds=1",
    "--set", "decode.podAnnotations.test/ends-after=3s",
)  # fmt: skip


@pytest.fixture
async def fleet(cluster):
    """One prefill and two decode pods, whose end takes three seconds."""
    cluster.install("pd", *VALUES)
    async with KubeFleet(cluster) as fleet:
        await fleet.until_knows(3)
        await fleet.until_ready()
        yield fleet


def scale(cluster, decode):
    cluster.kubectl("scale", "deployment/pd-pdserve-decode", f"--replicas={decode}")


async def test_pods_come_and_go_and_requests_follow_them(fleet, cluster):
    scale(cluster, 4)
    await fleet.until_knows(5)
    names = {pod["metadata"]["name"] for role in ("prefill", "decode") for pod in cluster.pods(role)}
    await fleet.until(lambda: fleet.ready_links() == names)
    scale(cluster, 1)
    await fleet.until_knows(2)
    left = {pod["metadata"]["name"] for role in ("prefill", "decode") for pod in cluster.pods(role)}
    assert await fleet.ask_many(20) == left


async def test_a_terminating_pod_finishes_what_it_has_and_gets_nothing_new(fleet, cluster):
    long = asyncio.create_task(fleet.ask(max_tokens=80))  # 1.6 s and more
    await fleet.until(lambda: fleet.busy(Role.DECODE))
    (leaving,) = fleet.busy(Role.DECODE)
    cluster.kubectl("delete", "pod", leaving, "--wait=false")
    await fleet.until(lambda: leaving not in fleet.ready_links())
    pod = cluster.one("pod", leaving)
    assert pod["metadata"]["deletionTimestamp"], "it is still there, and terminating"
    assert not long.done()
    assert leaving not in await fleet.ask_many(12)
    assert (await long)[1] == leaving, "the request that it had went on to its end there"


async def test_a_pod_that_is_not_ready_gets_nothing_new_until_it_is(fleet, cluster):
    pod = cluster.pods("decode")[0]["metadata"]["name"]

    def set_ready(status):
        cluster.kubectl(
            "patch", "pod", pod, "--subresource=status", "--type=strategic",
            "-p", f'{{"status": {{"conditions": [{{"type": "Ready", "status": "{status}"}}]}}}}',
        )  # fmt: skip

    set_ready("False")
    await fleet.until(lambda: pod not in fleet.ready_links())
    assert pod not in await fleet.ask_many(12)
    set_ready("True")
    await fleet.until(lambda: pod in fleet.ready_links())
    assert pod in await fleet.ask_many(20)


async def test_a_rolling_upgrade_under_load_loses_no_request(fleet, cluster):
    load = Load(fleet, streams=6)
    before = fleet.ready_links()
    changed = ("--set", "prefill.config.chunk_tokens=256", "--set", "decode.config.max_num_seqs=8")
    await asyncio.to_thread(cluster.install, "pd", *VALUES, *changed)
    await fleet.until(lambda: len(fleet.ready_links()) == 3 and not before & fleet.ready_links())
    assert await load.some_more(24) == fleet.ready_links()
    await load.stop()  # each request was answered in full


@pytest.mark.parametrize("victim", ["kube-apiserver", "etcd"])
@pytest.mark.parametrize("how", ["hangs", "dies"])
async def test_while_the_control_plane_is_away_workers_are_kept_and_afterwards_changes_are_seen(
    fleet, cluster, faults, victim, how
):
    load = Load(fleet)
    before = fleet.ready_links()
    harm, mend = (faults.stop, faults.cont) if how == "hangs" else (faults.kill, faults.start)
    harm(victim)
    assert await load.some_more(40) <= before
    await asyncio.sleep(2 * fleet.config.watch_s)  # past the watch under way: lists and watches fail now
    assert fleet.ready_links() == before
    if victim == "kube-apiserver":  # without etcd it goes on answering watches from its memory
        assert not await fleet.answered()
    # a worker that dies meanwhile is noticed without any API server
    dead = fleet.player_named(next(name for name in sorted(before) if "decode" in name))
    await dead.drain()
    await dead.stop()
    await fleet.until(lambda: dead.info.worker_id not in fleet.ready_links())
    assert dead.info.worker_id not in await load.some_more()
    mend(victim)
    faults.wait_ready()
    scale(cluster, 3)
    new = await asyncio.to_thread(wait_for, lambda: ready_pods(cluster) - before, "a new pod is ready", 120)
    await fleet.until(lambda: new <= fleet.ready_links())
    assert await fleet.answered()
    assert dead.info.worker_id not in await load.some_more()
    cluster.kubectl("delete", "pod", *new, "--wait=false")
    await fleet.until(lambda: not new & fleet.ready_links())
    await load.stop()


def ready_pods(cluster):
    """Names of the decode pods that the API server calls ready. Fake pods that an outage made unready stay so."""
    return {
        pod["metadata"]["name"]
        for pod in cluster.pods("decode")
        if any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"]["conditions"])
    }


async def test_changes_that_happened_while_nobody_watched_are_seen(fleet, cluster, faults):
    """The router's watch is cut, pods change, and only then can it watch again."""
    faults.kill("kube-apiserver")
    faults.start("kube-apiserver")
    faults.wait_ready()
    scale(cluster, 1)
    wait_for(lambda: len(cluster.pods("decode")) == 1, "one decode pod is left")
    await fleet.until_knows(2)
    left = {pod["metadata"]["name"] for pod in cluster.pods("decode")}
    assert {name for name in await fleet.ask_many(12) if "decode" in name} == left


# ---- lists and watches by themselves ----


def config_of(cluster, **changes):
    given = {"selector": "pdserve.io/workers", "watch_s": 2.0, "timeout_s": 5.0, **changes}
    return KubernetesConfig(kubeconfig=cluster.kubeconfig, namespace=cluster.namespace, **given)


async def test_a_version_that_the_api_server_has_forgotten_is_told_apart(cluster):
    api = SliceApi(config_of(cluster))
    with pytest.raises(Expired):
        async for _ in api.watch("1"):
            pass
    await api.close()


async def test_bookmarks_come_and_a_quiet_watch_ends_by_itself(cluster):
    api = SliceApi(config_of(cluster))
    listed = await api.list()
    assert listed.items == ()
    events = [kind async for kind, _ in api.watch(listed.metadata.resourceVersion)]
    assert set(events) <= {"BOOKMARK"}
    await api.close()


async def test_a_forgotten_version_in_mid_flight_is_healed_by_a_list(cluster):
    discovery = KubernetesDiscovery(config_of(cluster), SliceApi(config_of(cluster)))
    discovery._version, discovery._list_at = "1", float("inf")
    hand_made(cluster, "a", "10.9.0.1")
    async with asyncio.timeout(60):
        assert await anext(discovery.watch()) == {"10.9.0.1:7000"}


def hand_made(cluster, name, *addresses):
    cluster.apply(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "many", "pdserve.io/workers": "true"}},
            "addressType": "IPv4",
            "ports": [{"name": "grpc", "port": 7000, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
        }
    )


async def test_a_service_of_many_pods_has_several_slices_and_all_count(cluster):
    values = ("--set", "allowPlaintext=true", "--set", "router.enabled=false", "--set", "prefill.replicaCount=0")
    cluster.helm("install", "pd", CHART, *values, "--set", "decode.replicaCount=120", "--wait=hookOnly")
    wait_for(lambda: len(cluster.get("endpointslices", "-l", "pdserve.io/workers")) > 2, "two slices of one Service")
    wait_for(lambda: len(cluster.pods("decode")) == 120, "120 pods")
    wanted = {f"{pod['status']['podIP']}:7000" for pod in cluster.pods("decode")}
    wait_for(lambda: addresses_in(cluster) == wanted, "the slices have them all")
    discovery = KubernetesDiscovery(config_of(cluster), SliceApi(config_of(cluster)))
    async with asyncio.timeout(60):
        async for addresses in discovery.watch():
            if addresses == wanted:
                break
    assert len(wanted) == 120
