"""From the config to the models: where each one's tokenizer lies, and under which names it is served."""

from __future__ import annotations

from pdserve.config import ModelConfig, RouterConfig
from pdserve.embedded_model import EMBEDDED_NAMES
from pdserve.errors import ConfigError
from pdserve.models import resolve
from pdserve.tokens import Tokenizer
from router.models import ModelSetup
from router.served import ModelNames

EMBEDDED_TIMING = "smollm2-135m-cpu"
USUAL_TIMING = "llama-3.1-8b-h100-tp1"
"""Where predictions start for models that nothing is known of; each worker's own pace is learnt."""


def model_setups(config: RouterConfig) -> list[ModelSetup]:
    """Blocks: it reads tokenizers, and may fetch them. Raises `ConfigError` for what can't be found, and for names
    that mean nothing or two things."""
    loaded = {model.model: _load(model.model) for model in _configured(config).values()}
    setups, aliases = [], dict(config.aliases)
    for name, model in _configured(config).items():
        own_name, tokenizer = loaded[model.model]
        served = name or own_name
        names = [*model.aliases, *(alias for alias, target in aliases.items() if target == served)]
        timing = model.timing or config.timing or _timing(model.model)
        setups.append(ModelSetup(ModelNames(served, tuple(names)), tokenizer, timing))
    _check_names(setups, config)
    return setups


def _configured(config: RouterConfig) -> dict[str, ModelConfig]:
    """By name; an empty name: the model's own."""
    return config.models or {config.model_name: ModelConfig(model=config.model)}


def _load(model: str) -> tuple[str, Tokenizer]:
    resolved = resolve(model)
    return resolved.name, Tokenizer.load(resolved.path)


def _timing(model: str) -> str:
    return EMBEDDED_TIMING if model in EMBEDDED_NAMES else USUAL_TIMING


def _check_names(setups: list[ModelSetup], config: RouterConfig) -> None:
    served = {setup.names.name for setup in setups}
    for alias, target in config.aliases.items():
        if target not in served:
            known = ", ".join(sorted(served))
            raise ConfigError(f"aliases: {alias!r} means {target!r}, but {known} is served", key=f"aliases.{alias}")
    seen: set[str] = set()
    for setup in setups:
        for name in (setup.names.name, *setup.names.aliases):
            if name in seen:
                raise ConfigError(f"{name!r} names two models", key=f"models.{setup.names.name}.aliases")
            seen.add(name)
