"""Settings: YAML and `key=value` overrides into frozen dataclasses that live beside the functions they configure.

Keys are the dataclass fields and nothing more; an unknown key is an error that lists the known ones. YAML is read by the
core schema of YAML 1.2: `true` and `false` are the only booleans, `yes`, `no`, `on`, `off`, dates, `12:30` and `1_000` are
text, `1e-4` is a number and `010` is ten.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from softprompt_registry.errors import ConfigError

ConfigT = TypeVar("ConfigT")


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1; this one has the core schema of YAML 1.2, keys as they are written, and each key once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                key.tag = _TEXT  # a key is a name: `no`, `1.0` and `2024-10-21` stay as they are written
                if key.value in seen:
                    found = f"found the key {key.value!r} twice, expected each key once"
                    raise yaml.constructor.ConstructorError(None, None, found, key.start_mark)
                seen.add(key.value)
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0 if text.startswith(("0o", "0x")) else 10)


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in {  # https://yaml.org/spec/1.2.2/#1032-tag-resolution
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",  # of YAML 1.1, for files that share a section by an anchor
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor(_MERGE, lambda _, node: node.value)  # `<<` as a value

_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
"""A `ValueError` comes from a number that Python refuses, such as one of 5,000 digits."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        with path.open("rb") as file:  # bytes, of which PyYAML takes UTF-8 and UTF-16; and its errors name the file
            value = yaml.load(file, _Loader)
    except FileNotFoundError:
        raise ConfigError(f"reading settings: there is no file {str(path)!r}. Check the path.") from None
    except _YAML_ERRORS as error:
        raise ConfigError(
            f"reading settings from {str(path)!r}: it is not YAML ({error}). Correct the file."
        ) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"reading settings from {str(path)!r}: found a {type(value).__name__}, expected a mapping.")
    return value


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`section.key=value` strings laid over nested `values`.

    A value that begins with a quote or a bracket is YAML. Any other is one word of YAML, a number, `true`, `false`, `null`
    or text, whatever it has in it: a colon at its end makes no mapping and a `#` no comment.
    """
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
            place[key] = _value_of(text.strip())
        except _YAML_ERRORS as error:
            raise ConfigError(
                f"reading the setting {override!r}: what follows '=' is not YAML ({error}). Quote it."
            ) from error
    return result


def _value_of(text: str) -> Any:
    if text.startswith(("'", '"', "[", "{")):
        return yaml.load(text, _Loader)
    loader: Any = _Loader("")
    return loader.construct_document(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


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
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        advice = f" {_ADVICE[hint]}" if hint in _ADVICE else ""
        raise ConfigError(f"reading {where}: found {value!r}, expected {hint.__name__}.{advice}")
    return value


_ADVICE: dict[Any, str] = {
    bool: "Write true or false.",
    int: "Write a whole number in digits alone.",
    float: "Write a number, such as 0.5 or 1e-4.",
    str: "Put it in quotes; on the command line, the value in quotes of its own: 'key=\"value\"'.",
}


def flatten(config: Any) -> dict[str, Any]:
    """A config as flat `section.key` → value, for recording."""
    flat: dict[str, Any] = {}
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat
