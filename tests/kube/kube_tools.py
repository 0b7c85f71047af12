"""helm, kubectl and the control plane as a test wants them: calls that return values and fail loudly."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "pdserve"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))

HEARTBEAT_S = 4.0
"""The control plane calls a node lost after 20 s."""

_numbers = itertools.count(1)


class ToolFailed(AssertionError):
    """A tool ended with an error; the message is what it said."""


def call(*command: object, env: dict[str, str] | None = None, stdin: str | None = None, timeout: float = 120) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if done.returncode:
        raise ToolFailed(f"{command[0]} {' '.join(map(str, command[1:3]))}: {done.stderr}{done.stdout}")
    return done.stdout


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 60.0) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(ToolFailed):
            if value := condition():
                return value
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Tools:
    folder: Path

    @property
    def validate(self) -> Path:
        return self.folder / "venv" / "bin" / "kubernetes-validate"

    def helm(self, *arguments: object, env: dict[str, str] | None = None) -> str:
        return call(self.folder / "helm", *arguments, env=env, timeout=300)

    def template(self, *arguments: object) -> list[dict[str, Any]]:
        """The chart's objects for these values."""
        text = self.helm("template", "pd", CHART, "--namespace", "ns", *arguments)
        return [each for each in yaml.safe_load_all(text) if each]


@dataclass(frozen=True)
class Cluster:
    tools: Tools
    kubeconfig: str
    namespace: str = "default"

    @contextlib.contextmanager
    def fresh_namespace(self) -> Iterator[Cluster]:
        name = f"test-{os.getpid()}-{next(_numbers)}"
        self.kubectl("create", "namespace", name)
        try:
            yield replace(self, namespace=name)
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")

    @contextlib.contextmanager
    def heartbeats(self) -> Iterator[None]:
        """Renews the leases of fake nodes. Nobody else does, and what keeps such nodes alive reports so seldom that on
        a busy machine they are called lost now and then; their pods turn unready then, and never ready again."""
        fake = [node["metadata"]["name"] for node in self.get("nodes", "-l", "type=kwok")]
        over = threading.Event()
        thread = threading.Thread(target=self._beat, args=(fake, over), daemon=True)
        if fake:
            thread.start()
        yield
        over.set()
        if fake:
            thread.join(30)

    def _beat(self, nodes: list[str], over: threading.Event) -> None:
        while not over.wait(HEARTBEAT_S):
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
            leases = [
                {
                    "apiVersion": "coordination.k8s.io/v1",
                    "kind": "Lease",
                    "metadata": {"name": node, "namespace": "kube-node-lease"},
                    "spec": {"holderIdentity": node, "leaseDurationSeconds": 40, "renewTime": now},
                }
                for node in nodes
            ]
            with contextlib.suppress(ToolFailed, subprocess.TimeoutExpired):  # the control plane may be away on purpose
                replace(self, namespace="kube-node-lease").apply(*leases)

    def kubectl(self, *arguments: object, stdin: str | None = None) -> str:
        return call(
            self.tools.folder / "kubectl",
            f"--kubeconfig={self.kubeconfig}",
            f"--namespace={self.namespace}",
            "--request-timeout=20s",
            *arguments,
            stdin=stdin,
        )

    def helm(self, *arguments: object) -> str:
        return self.tools.helm(*arguments, "--namespace", self.namespace, env={"KUBECONFIG": self.kubeconfig})

    def install(self, release: str, *arguments: object) -> None:
        self.helm("upgrade", "--install", release, CHART, "--wait=watcher", "--timeout=4m", *arguments)

    def get(self, kind: str, *arguments: object) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, "-o", "json", *arguments))["items"]
        return found

    def one(self, kind: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", kind, name, "-o", "json"))
        return found

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl(
            "apply",
            "--server-side",
            "-f",
            "-",
            stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}),
        )

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Those that have an address and are not going away."""
        found = self.get("pods", "-l", f"app.kubernetes.io/component={component}")
        return [p for p in found if p["status"].get("podIP") and "deletionTimestamp" not in p["metadata"]]

    @contextlib.contextmanager
    def faults(self, kube: str, folder: str) -> Iterator[Faults]:
        injector = Faults(self, kube, folder)
        try:
            yield injector
        finally:
            injector.repair()


class Faults:
    """Each process harmed is repaired at the test's end."""

    def __init__(self, cluster: Cluster, kube: str, folder: str) -> None:
        self._cluster, self._kube, self._folder = cluster, kube, folder
        self._stopped: set[str] = set()
        self._killed: set[str] = set()

    def stop(self, name: str) -> None:
        self._fault("stop", name)
        self._stopped.add(name)

    def cont(self, name: str) -> None:
        self._fault("cont", name)
        self._stopped.discard(name)

    def kill(self, name: str) -> None:
        self._fault("kill", name)
        self._killed.add(name)

    def start(self, name: str) -> None:
        wait_for(lambda: self._fault("start", name) is None, f"{name} is dead and starts anew")
        self._killed.discard(name)

    def wait_ready(self) -> None:
        """The API server serves, controllers write again."""
        wait_for(lambda: self._cluster.kubectl("get", "--raw", "/readyz") == "ok", "the API server is ready")

    def repair(self) -> None:
        for name in list(self._stopped):
            self.cont(name)
        for name in list(self._killed):
            self.start(name)
        self.wait_ready()

    def _fault(self, action: str, name: str) -> None:
        call(self._kube, "fault", action, name, "--dir", self._folder)
