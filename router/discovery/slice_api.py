"""Two calls of the Kubernetes API, list and watch of EndpointSlices, each with a bound in time.

`lightkube` connects: service account (whose token is read again when it was rotated) or kubeconfig, certificates, exec
plug-ins. Its own watch is not used: it waits for a silent server for ever and asks for no bookmarks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import msgspec
from lightkube import KubeConfig
from lightkube.config.client_adapter import AsyncClient, ConnectionParams
from lightkube.core.exceptions import ConfigError as KubeConfigError

from pdserve.config import KubernetesConfig
from pdserve.errors import ConfigError
from router.discovery.base import DiscoveryError
from router.discovery.slices import Slice, SliceList

GONE = 410
"""The API server has forgotten what came after the version that was asked for."""


class Expired(DiscoveryError):
    """A watch can't go on from that version: list anew."""

    reason = "discovery_expired"


class Event(msgspec.Struct, frozen=True):
    """ADDED, MODIFIED, DELETED, BOOKMARK (a version, no news) or ERROR."""

    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct, frozen=True):
    code: int = 0
    message: str = ""


class SliceApi:
    """Raises `ConfigError` (key "kubernetes") when there is no way to the API server in the config."""

    def __init__(self, config: KubernetesConfig) -> None:
        self._config = config
        try:
            kube = KubeConfig.from_file(config.kubeconfig) if config.kubeconfig else KubeConfig.from_service_account()
            chosen = kube.get(config.context or None)
            assert chosen is not None
            params = ConnectionParams(timeout=httpx2.Timeout(config.timeout_s), trust_env=False)
            self._client = AsyncClient(chosen, params)
        except (KubeConfigError, KeyError, OSError, ValueError, msgspec.ValidationError) as error:
            hint = "" if config.kubeconfig else " (outside of a pod give kubernetes.kubeconfig)"
            raise ConfigError(f"no way to the Kubernetes API: {error}{hint}", key="kubernetes") from error
        namespace = config.namespace or chosen.namespace
        self._path = f"apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"

    async def close(self) -> None:
        await self._client.aclose()

    async def list(self) -> SliceList:
        """All that is there now. Raises `DiscoveryError`."""
        async with self._get({}, read_s=self._config.timeout_s) as response:
            async with asyncio.timeout(self._config.timeout_s):
                body = await response.aread()
            return msgspec.json.decode(body, type=SliceList)

    async def watch(self, version: str) -> AsyncGenerator[tuple[str, Slice]]:
        """(type, slice) of each change after `version`; ends after `watch_s`. A BOOKMARK's slice has only a version.
        Raises `DiscoveryError`; `Expired` when a new list is needed."""
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(round(self._config.watch_s)),
        }
        async with self._get(params, read_s=self._config.watch_s + self._config.timeout_s) as response:
            async for line in response.aiter_lines():
                event = msgspec.json.decode(line, type=Event)
                if event.type == "ERROR":
                    status = msgspec.json.decode(event.object, type=_Status)
                    raise _failure(status.code, status.message)
                yield event.type, msgspec.json.decode(event.object, type=Slice)

    @asynccontextmanager
    async def _get(self, params: dict[str, str], read_s: float) -> AsyncIterator[Any]:
        """An answer with status 200, its body to be read. Whatever goes wrong until the end is a `DiscoveryError`."""
        timeout_s = self._config.timeout_s
        timeout = httpx2.Timeout(timeout_s, read=read_s)
        params = {"labelSelector": self._config.selector, **params}
        request = self._client.build_request("GET", self._path, params=params, timeout=timeout)
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    raise _failure(response.status_code, (await response.aread())[:500].decode(errors="replace"))
                yield response
            finally:
                await response.aclose()
        except (httpx2.HTTPError, httpx2.StreamError, KubeConfigError, OSError, msgspec.DecodeError) as error:
            raise DiscoveryError(f"the Kubernetes API: {type(error).__name__} {error}") from error


def _failure(code: int, message: str) -> DiscoveryError:
    if code == GONE:
        return Expired(f"the Kubernetes API: {message}")
    advice = "; the router's Role must allow list and watch of endpointslices" if code in (401, 403) else ""
    return DiscoveryError(f"the Kubernetes API answers {code}: {message}{advice}")
