"""Who tells a router where its workers are, by config: a list, Kubernetes or Redis.

The client libraries of the last two are extras, so they are imported only where they are asked for.
"""

from __future__ import annotations

from pdserve.config import RouterConfig
from pdserve.errors import ConfigError
from router.discovery.base import Discovery, StaticDiscovery

__all__ = ["Discovery", "StaticDiscovery", "make_discovery"]


def make_discovery(config: RouterConfig) -> Discovery:
    """Raises `ConfigError`: a wrong address, a library that is not installed, a kubeconfig that can't be used."""
    if config.discovery == "static":
        return StaticDiscovery(config.workers)
    if config.workers:
        raise ConfigError(f"workers are for static discovery, but discovery is {config.discovery}", key="workers")
    try:
        if config.discovery == "redis":
            from router.discovery.redis_list import RedisDiscovery

            return RedisDiscovery(config.registry)
        from router.discovery.kubernetes import KubernetesDiscovery
        from router.discovery.slice_api import SliceApi
    except ImportError as error:
        message = f"discovery by {config.discovery} needs the extra: pip install 'pdserve[{config.discovery}]'"
        raise ConfigError(message, key="discovery") from error
    return KubernetesDiscovery(config.kubernetes, SliceApi(config.kubernetes))
