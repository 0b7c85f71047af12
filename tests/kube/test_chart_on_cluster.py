"""A release's life on a real API server: install, upgrade, roll back, uninstall. Pods run on fake nodes only."""

import json

import pytest
from kube_tools import CHART, ToolFailed, wait_for

pytestmark = pytest.mark.kube

PLAIN = (
    "--set", "allowPlaintext=true",
    "--set", "router.minReadySeconds=0,prefill.minReadySeconds=0,decode.minReadySeconds=0",
)  # fmt: skip
KINDS = (
    "deployments,daemonsets,services,configmaps,serviceaccounts,roles,rolebindings,poddisruptionbudgets,networkpolicies"
)


def owned(cluster):
    """What the release has in the cluster."""
    found = cluster.get(KINDS, "-l", "app.kubernetes.io/instance=pd")
    return {(each["kind"], each["metadata"]["name"]) for each in found}


def config(cluster, name):
    return cluster.one("configmap", f"pd-pdserve-{name}")["data"][f"{name}.yaml"]


def test_a_release_lives_from_install_to_uninstall(cluster):
    cluster.install("pd", *PLAIN, "--set", "prefill.gpus=4", "--set", "decode.replicaCount=2")
    assert len(cluster.pods("decode")) == 2
    (prefill,) = cluster.pods("prefill")
    assert prefill["spec"]["nodeName"].startswith("gpu-"), "it was scheduled where GPUs are"
    first = cluster.one("deployment", "pd-pdserve-decode")["spec"]["template"]

    cluster.install("pd", *PLAIN, "--set", "decode.replicaCount=3", "--set", "decode.config.max_num_seqs=8")
    assert "max_num_seqs: 8" in config(cluster, "decode")
    assert cluster.one("deployment", "pd-pdserve-decode")["spec"]["template"] != first
    wait_for(lambda: len(cluster.pods("decode")) == 3, "three decode pods")

    cluster.helm("rollback", "pd", "1", "--wait=watcher", "--timeout=2m")
    assert "max_num_seqs" not in config(cluster, "decode")
    assert cluster.one("deployment", "pd-pdserve-decode")["spec"]["template"] == first
    history = json.loads(cluster.helm("history", "pd", "-o", "json"))
    assert [entry["status"] for entry in history] == ["superseded", "superseded", "deployed"]

    assert owned(cluster)
    cluster.helm("uninstall", "pd", "--wait", "--timeout=2m")
    assert owned(cluster) == set()


def test_an_upgrade_keeps_the_replicas_that_an_autoscaler_owns(cluster):
    unset = (*PLAIN, "--set", "decode.replicaCount=null")
    cluster.install("pd", *unset)
    cluster.kubectl("scale", "deployment/pd-pdserve-decode", "--replicas=4")
    cluster.install("pd", *unset, "--set", "decode.config.max_num_seqs=8")
    assert cluster.one("deployment", "pd-pdserve-decode")["spec"]["replicas"] == 4


def test_the_whole_secure_release_is_taken_by_the_api_server(cluster):
    cluster.helm("install", "pd", CHART, "-f", CHART / "ci" / "2-secure-values.yaml", "--wait=hookOnly")
    kinds = {kind for kind, _ in owned(cluster)}
    assert kinds >= {"DaemonSet", "NetworkPolicy", "PodDisruptionBudget", "Role", "RoleBinding"}
    wait_for(lambda: cluster.pods("kvstore"), "a store on a node")


def test_routers_may_read_endpoint_slices_of_their_namespace_and_nothing_else(cluster):
    cluster.helm("install", "pd", CHART, *PLAIN, "--wait=hookOnly")

    def may(who, *what):
        account = f"system:serviceaccount:{cluster.namespace}:pd-pdserve-{who}"
        try:
            return cluster.kubectl("auth", "can-i", *what, f"--as={account}").strip() == "yes"
        except ToolFailed:  # "no" is an exit status, too
            return False

    for verb in ("get", "list", "watch"):
        assert may("router", verb, "endpointslices.discovery.k8s.io")
        assert not may("worker", verb, "endpointslices.discovery.k8s.io")
    assert not may("router", "list", "pods")
    assert not may("router", "get", "secrets")
    assert not may("router", "create", "endpointslices.discovery.k8s.io")
    assert not may("router", "list", "endpointslices.discovery.k8s.io", "--namespace=kube-system")


def test_a_release_without_a_store_runs_under_the_restricted_standard(cluster):
    label = "pod-security.kubernetes.io/enforce=restricted"
    cluster.kubectl("label", "namespace", cluster.namespace, label)
    cluster.install("pd", *PLAIN)
    assert [len(cluster.pods(name)) for name in ("router", "prefill", "decode")] == [1, 1, 1]


def test_a_config_that_no_process_would_take_is_refused_before_anything_is_there(cluster):
    with pytest.raises(ToolFailed, match="num_blcks"):
        cluster.install("pd", *PLAIN, "--set", "decode.config.num_blcks=3")
    assert owned(cluster) == set()
