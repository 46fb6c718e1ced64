"""Load a configuration: schema defaults, then a YAML file, then ``key=value`` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError
from configs.schema import Config

SHIPPED = Path(__file__).parent
FREE = "workload.options"
"""The one section whose keys the schema does not know: those of the user's own workload."""
DEFAULT_ORIGIN = "schema default"
COMMAND_LINE = "command line"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A checked configuration and where each of its values came from."""

    config: Config
    """The values."""
    origins: dict[str, str]
    """Dotted key to ``schema default``, the file's path, or ``command line``."""


def load_config(name: str, overrides: tuple[str, ...] = ()) -> Resolved:
    """Load the configuration ``name`` (one that ships, or a path) with ``key=value`` overrides.

    Raises :class:`ConfigError` naming the key, its file, what was got and what is allowed; for an
    unknown key, also the nearest known one.
    """
    path = _find(name)
    layers = [(_read_yaml(path), str(path)), (_parse_overrides(overrides), COMMAND_LINE)]
    if not layers[0][0].get("name"):
        layers[0][0]["name"] = path.stem
    merged = OmegaConf.structured(Config)
    origins = dict.fromkeys(known_keys(), DEFAULT_ORIGIN)
    for values, origin in layers:
        for key, value in _leaves(values):
            _require_known(key, value, origin)
            _require_literal(key, value, origin)
            origins[key] = origin
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(values))
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(error, origin)) from error
    return Resolved(config=_to_config(merged), origins=origins)


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a configuration from :func:`config_to_dict`'s output, with every check applied."""
    try:
        return _to_config(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(values)))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, "stored configuration")) from error


def override(config: Config, overrides: tuple[str, ...]) -> Config:
    """``config`` with ``key=value`` overrides, checked as :func:`load_config` checks them."""
    values = _parse_overrides(overrides)
    for key, value in _leaves(values):
        _require_known(key, value, COMMAND_LINE)
        _require_literal(key, value, COMMAND_LINE)
    try:
        stored = OmegaConf.merge(OmegaConf.structured(Config), config_to_dict(config))
        return _to_config(OmegaConf.merge(stored, OmegaConf.create(values)))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, COMMAND_LINE)) from error


def override_execution(config: Config, overrides: tuple[str, ...]) -> Config:
    """A run's stored configuration with ``key=value`` overrides of how it is carried out.

    Raises :class:`ConfigError` for a key that decides the run's bytes: that would be another run.
    """
    changed = override(config, overrides)
    old, new = identity_of(config), identity_of(changed)
    if fixed := [key for key in {**old, **new} if new.get(key) != old.get(key)]:
        raise ConfigError(
            f"{fixed[0]}={new.get(fixed[0])!r} differs from the run's {old.get(fixed[0])!r}: it decides what the run is; "
            "here only keys that say how it is carried out can be given, such as merge.schedule, retention.keep_last "
            "or tracking.uri"
        )
    return changed


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of every field, for JSON and YAML."""
    values = dataclasses.asdict(config)
    return {key: _plain(value) for key, value in values.items()}


def identity_of(config: Config) -> dict[str, Any]:
    """The fields that decide a run's bytes, as dotted keys; execution fields are left out."""
    return dict(_identity_leaves(config, ""))


def config_names() -> list[str]:
    """Names of the configurations that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


@functools.cache
def known_keys() -> list[str]:
    """Every dotted key of the schema."""
    return [key for key, _ in _leaves(config_to_dict(Config(name="x")))]


def _find(name: str) -> Path:
    shipped = SHIPPED / f"{name}.yaml"
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, config_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(f"no configuration {name!r}{hint} Shipped: {', '.join(config_names())}; or give a .yaml path")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    except OSError as error:  # OmegaConf's answer to a file that is a single value
        raise ConfigError(f"{path}: expected keys and values at top level: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values at top level, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _parse_overrides(overrides: tuple[str, ...]) -> dict[str, Any]:
    for text in overrides:
        if "=" not in text or text.startswith("="):
            raise ConfigError(f"override {text!r}: expected key=value, for example training.total_tokens=2048000")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"overrides {' '.join(overrides)!r}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"overrides {' '.join(overrides)!r}: expected key=value pairs")
    return {str(key): value for key, value in values.items()}


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{dotted}.")
        else:
            yield dotted, value


def _require_known(key: str, value: Any, origin: str) -> None:
    known = known_keys()
    if key in known or key == FREE or key.startswith(f"{FREE}."):
        return
    if any(name.startswith(f"{key}.") for name in known):
        raise ConfigError(f"{key}={value!r} ({origin}): {key} is a section; set a key inside it")
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown key {key!r} ({origin}){hint}")


def _require_literal(key: str, value: Any, origin: str) -> None:
    """Refuse ``${...}``: what it stands for, a secret from the environment perhaps, would be saved with the run."""
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, str) and "${" in item for item in items):
        raise ConfigError(f"{key} ({origin}): interpolation (${{...}}) is not supported; write the value itself")


def _explain(error: OmegaConfBaseException, origin: str) -> str:
    reason = (error.msg or str(error)).splitlines()[0]
    return f"{error.full_key} ({origin}): {reason}"


def _to_config(merged: Any) -> Config:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, "resolved configuration")) from error
    assert isinstance(config, Config)
    return config


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _identity_leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        part = item.metadata.get("identity", True)
        if not part or (part == "unless default" and inner == _default_of(item)):
            continue
        if dataclasses.is_dataclass(inner):
            yield from _identity_leaves(inner, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", _plain(inner)


def _default_of(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
