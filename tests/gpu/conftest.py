"""Makes the torch engine's test helpers importable here (`torch_engine_tools`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "pdserve" / "engine" / "torch"))
