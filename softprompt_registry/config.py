"""Settings: YAML and `key=value` overrides into frozen dataclasses that live beside the functions they configure.

Keys are the dataclass fields and nothing more; an unknown key is an error that lists the known ones.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from softprompt_registry.errors import ConfigError

ConfigT = TypeVar("ConfigT")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"reading settings: there is no file {str(path)!r}. Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"reading settings from {str(path)!r}: it is not YAML ({error}). Correct the file."
        ) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"reading settings from {str(path)!r}: found a {type(value).__name__}, expected a mapping.")
    return value


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`section.key=value` strings laid over nested `values`; each value is read as YAML."""
    result = _copied(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"reading the setting {override!r}: expected `key=value` or `section.key=value`.")
        *sections, key = path.split(".")
        place = result
        for section in sections:
            if place.get(section) is None:  # missing, or `section:` with nothing below it
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise ConfigError(f"reading the setting {override!r}: {section!r} is a value, not a section.")
        try:
            place[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"reading the setting {override!r}: what follows '=' is not YAML ({error}). Quote it."
            ) from error
    return result


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def build_config(cls: type[ConfigT], values: Mapping[str, Any], where: str = "the settings") -> ConfigT:
    """A config dataclass from a mapping, nested dataclasses included.

    Raises:
        ConfigError: an unknown key, or a value of another type than the field's.
    """
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known), key=str)
    if unknown:
        raise ConfigError(f"reading {where}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}.")
    arguments = {key: _converted(hints[key], value, f"{where}, {key!r}") for key, value in values.items()}
    return cls(**arguments)


def _converted(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"reading {where}: found {value!r}, expected a section.")
        return build_config(typing.cast(type[Any], hint), value, where)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _converted(next(option for option in options if option is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"reading {where}: found {value!r}, expected one of {list(typing.get_args(hint))}.")
        return value
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"reading {where}: found {value!r}, expected a mapping.")
        inner = typing.get_args(hint)[1]
        return {str(key): _converted(inner, item, f"{where}, {key!r}") for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"reading {where}: found {value!r}, expected a list.")
        return tuple(_converted(typing.get_args(hint)[0], item, where) for item in value)
    if hint is Any:
        return value
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads `1e-4` as text; people write learning rates that way.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"reading {where}: found {value!r}, expected {hint.__name__}.")
    return value


def flatten(config: Any) -> dict[str, Any]:
    """A config as flat `section.key` → value, for recording."""
    flat: dict[str, Any] = {}
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat
