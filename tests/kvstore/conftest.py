"""Makes this folder's shared helpers importable (`handover_model`, `peer_process`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
