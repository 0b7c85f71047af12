"""The tools (helm, kubectl, kubernetes-validate) and, where there is one, the cluster that KUBECONFIG names.

`make test-kube` and `make test-node` provide both. What is missing is a skip with its reason, or a failure where
KUBE_TESTS_MUST_RUN says that it is there.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kube_tools import Cluster, Tools


def _missing(what):
    if os.environ.get("KUBE_TESTS_MUST_RUN"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def tools():
    folder = Path(os.environ.get("KUBE_TOOLS", "")).resolve()
    if not (folder / "helm").is_file():
        _missing("no helm and kubectl in $KUBE_TOOLS: run `make test-kube`")
    return Tools(folder)


@pytest.fixture(scope="session")
def any_cluster(tools):
    if not os.environ.get("KUBECONFIG"):
        _missing("no cluster: KUBECONFIG is not set")
    cluster = Cluster(tools, os.environ["KUBECONFIG"])
    with cluster.heartbeats():
        yield cluster


@pytest.fixture
def cluster(any_cluster):
    """In a namespace of the test's own, which goes with it."""
    with any_cluster.fresh_namespace() as namespaced:
        yield namespaced


@pytest.fixture
def faults(any_cluster):
    """Stops, continues, kills and starts processes of the control plane; everything runs again afterwards."""
    if not os.environ.get("TEST_KUBE_DIR") or not os.environ.get("TEST_KUBE"):
        _missing("this cluster's control plane can't be harmed: $TEST_KUBE and $TEST_KUBE_DIR are not set")
    with any_cluster.faults(os.environ["TEST_KUBE"], os.environ["TEST_KUBE_DIR"]) as injector:
        yield injector
