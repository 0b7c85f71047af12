"""Config is strict: what is unknown or wrong is named by its key, and what is written is read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.config import (
    Config,
    RouterConfig,
    TlsConfig,
    WorkerConfig,
    fields,
    from_mapping,
    load,
    markdown,
    parse_override,
    to_mapping,
)
from pdserve.errors import ConfigError


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"foo": 1}, "foo"),
        ({"sim": {"bar": 1}}, "sim.bar"),
        ({"threads": "many"}, "threads"),
        ({"threads": 0}, "threads"),
        ({"engine": "magic"}, "engine"),
        ({"tls": {"cert": "x"}}, "tls.cert"),
        ({"transports": [1]}, "transports[0]"),
    ],
)
def test_a_wrong_key_or_value_is_named(tree: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(WorkerConfig, tree)
    assert caught.value.key == key
    assert key.split("[")[0].split(".")[0] in caught.value.message


def test_overrides_lie_over_the_file_and_reach_into_sections(tmp_path: Path) -> None:
    path = tmp_path / "worker.yaml"
    path.write_text("engine: sim\nsim:\n  speedup: 2\n")
    config = load(WorkerConfig, str(path), dict([parse_override("sim.speedup=8"), parse_override("transports=[tcp]")]))
    assert (config.engine, config.sim.speedup, config.transports) == ("sim", 8.0, ("tcp",))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(WorkerConfig, str(path))
    assert caught.value.key == "config"


def test_a_missing_file_and_a_malformed_override_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load(WorkerConfig, str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError):
        parse_override("no-equals-sign")
    with pytest.raises(ConfigError):
        load(WorkerConfig, None, {"engine": "sim", "engine.name": 1})


@pytest.mark.parametrize("cls", [WorkerConfig, RouterConfig])
def test_a_config_survives_the_way_to_plain_data_and_back(cls: type[Config]) -> None:
    assert from_mapping(cls, to_mapping(cls())) == cls()


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        WorkerConfig().engine = "sim"  # type: ignore[misc]


def test_tls_is_all_or_nothing() -> None:
    assert TlsConfig().rpc() is None
    with pytest.raises(ConfigError):
        TlsConfig(cert_file="a").rpc()
    tls = TlsConfig(cert_file="a", key_file="b", ca_file="c").rpc()
    assert tls is not None
    assert tls.cert_file == "a"


@pytest.mark.parametrize("cls", [WorkerConfig, RouterConfig])
def test_every_field_tells_its_meaning(cls: type[Config]) -> None:
    assert all(meaning for _, _, _, _, meaning in fields(cls))


def test_the_published_table_is_the_code_s() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == markdown(), "run `make docs`"


def test_an_override_can_be_the_content_of_a_file(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("007\n")
    assert parse_override(f"server_secret=@{secret}") == ("server_secret", "007")
    with pytest.raises(ConfigError, match="cannot be read") as refused:
        parse_override(f"server_secret=@{tmp_path}/none")
    assert refused.value.key == "server_secret"
