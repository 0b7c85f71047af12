"""Makes this folder's shared helpers importable (`disk_blocks`, `disk_writer_process`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
