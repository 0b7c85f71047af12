"""The KV store's disk tier: checksummed records in segment files, crash-safe without a sync a block.

`DiskTier` is all that the node's store uses; `record` and `footer` are the format, `recovery` reads it back at the
start, `writer` appends and makes room, `catalog` keeps the books.
"""

from kvstore.disk.events import DiskHealth, DiskObserver, DiskState, DiskStats, Gone
from kvstore.disk.options import DiskOptions
from kvstore.disk.tier import DiskTier, Reads

__all__ = ["DiskHealth", "DiskObserver", "DiskOptions", "DiskState", "DiskStats", "DiskTier", "Gone", "Reads"]
