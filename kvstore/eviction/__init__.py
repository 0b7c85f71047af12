"""Eviction policies by name, and the pool that runs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from kvstore.eviction.base import Allowed, EvictionPolicy, IntegrityError, Key
from kvstore.eviction.cache import Admission, KeyCache
from kvstore.eviction.hazard import HazardPolicy
from kvstore.eviction.lru import LruPolicy
from kvstore.eviction.s3fifo import S3FifoPolicy

DEFAULT = "hazard"
POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType(
    {"hazard": HazardPolicy, "lru": LruPolicy, "s3fifo": S3FifoPolicy}
)

__all__ = [
    "DEFAULT",
    "POLICIES",
    "Admission",
    "Allowed",
    "EvictionPolicy",
    "HazardPolicy",
    "IntegrityError",
    "Key",
    "KeyCache",
    "LruPolicy",
    "S3FifoPolicy",
]
