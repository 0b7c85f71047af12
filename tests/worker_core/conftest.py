import sys
from pathlib import Path

import pytest

from worker_core import fetcher

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _a_busy_engine_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is about its being waited for in vain says so."""
    monkeypatch.setattr(fetcher, "OPEN_S", 60.0)
