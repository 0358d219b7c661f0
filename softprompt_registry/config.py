"""Settings: frozen dataclasses that check their values, from YAML, `key=value` overrides or Python.

A settings class lives beside the function it configures and is marked with `@settings`; limits stand in the types of its
fields (`PositiveInt`, `Share`, `Literal`), what relates two fields in its `__post_init__`, as a `ValueError`.

Keys are the dataclass fields and nothing more; an unknown key is an error that lists the known ones. YAML is read by the
core schema of YAML 1.2: `true` and `false` are the only booleans, `yes`, `no`, `on`, `off`, dates, `12:30` and `1_000` are
text, `1e-4` is a number and `010` is ten.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses
import pydantic_core
import yaml
from pydantic_core import ErrorDetails

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


_STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

T = TypeVar("T")


def _each_once(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"found {list(values)}, expected one or more, each once")
    return values


Share = Annotated[float, pydantic.Field(ge=0, le=1)]
"""A number from 0 to 1."""
PositiveShare = Annotated[float, pydantic.Field(gt=0, le=1)]
"""A number above 0, up to 1."""
InnerShare = Annotated[float, pydantic.Field(gt=0, lt=1)]
"""A number above 0 and below 1."""
Name = Annotated[str, pydantic.Field(min_length=1)]
"""A text that is not empty."""
Distinct = Annotated[tuple[T, ...], pydantic.AfterValidator(_each_once)]
"""A list of one or more values, each once."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[ConfigT]) -> type[ConfigT]:
    """Class decorator: a frozen dataclass that checks names, types and limits, and raises `ConfigError`.

    A `ValueError` from its `__post_init__` becomes a `ConfigError` as well; its text is without a full stop.
    """
    made: Any = pydantic.dataclasses.dataclass(cls, frozen=True, config=_STRICT)
    checked = made.__init__

    @functools.wraps(checked)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            checked(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            # Without its cause, which quotes every value; one may be a key.
            raise _config_error(error, made, cls.__name__) from None

    made.__init__ = init
    return cls


def build_config(
    cls: type[ConfigT], values: Mapping[str, Any], where: str = "the settings", *, quoted_characters: int = 200
) -> ConfigT:
    """A settings class from a mapping, the sections within it included.

    Args:
        cls: the class.
        values: by the name of the field.
        where: where the values are from, for errors.
        quoted_characters: how much of a wrong name or value an error quotes.

    Raises:
        ConfigError: an unknown key, or a value that its field does not take.
    """
    try:
        # As JSON, which has no tuples and no classes: lists and mappings stand for them.
        text = pydantic_core.to_json(dict(values), inf_nan_mode="constants", fallback=_plain)
    except ValueError as error:
        raise ConfigError(f"reading {where}: found what JSON cannot hold ({error}). Use text and numbers.") from None
    try:
        return pydantic.TypeAdapter(cls).validate_json(text)
    except pydantic.ValidationError as error:
        raise _config_error(error, cls, where, quoted_characters) from None


def _plain(value: Any) -> Any:
    """The number in a NumPy scalar."""
    if not hasattr(value, "item"):
        raise ValueError(f"a {type(value).__name__}")
    return value.item()


def _config_error(error: pydantic.ValidationError, cls: type[Any], where: str, quoted: int = 200) -> ConfigError:
    faults = [_fault(details, cls, quoted) for details in error.errors(include_url=False)]
    return ConfigError(f"reading {where}: {'; '.join(faults)}. Correct {'it' if len(faults) == 1 else 'them'}.")


def _fault(details: ErrorDetails, cls: type[Any], quoted: int) -> str:
    """Field, value found and what was expected, without a full stop."""
    kind, place, limits = details["type"], list(details["loc"]), details.get("ctx", {})
    if place and isinstance(place[0], int):  # an argument by position
        place[0] = dataclasses.fields(cls)[place[0]].name
    name = ".".join(map(str, place))
    if kind == "unexpected_keyword_argument":
        section = f" in {'.'.join(map(str, place[:-1]))}" if place[1:] else ""
        return f"unknown {_shown(place[-1], quoted)}{section}; known are {', '.join(_known(cls, place))}"
    if kind == "value_error":
        return f"{name}{': ' if name else ''}{limits['error']}"
    if kind in ("missing", "missing_argument"):
        return f"{name} is missing"
    expected = _EXPECTED[kind].format(**limits) if kind in _EXPECTED else details["msg"]
    return f"{name} is {_shown(details['input'], quoted)}, expected {expected}"


_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number in digits alone",
    "float_type": "a number, such as 0.5 or 1e-4",
    "finite_number": "a finite number",
    "string_type": "text; put it in quotes, on the command line in quotes of its own: 'key=\"value\"'",
    "literal_error": "{expected}",
    "greater_than": "above {gt:.10g}",
    "greater_than_equal": "{ge:.10g} or more",
    "less_than": "below {lt:.10g}",
    "less_than_equal": "{le:.10g} or less",
    "string_too_short": "text that is not empty",
    "string_too_long": "at most {max_length} characters",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "dataclass_type": "a section",
    "dataclass_exact_type": "a {class_name}",
}
"""By pydantic's kind of error."""


def _shown(value: Any, characters: int) -> str:
    shown = repr(value)
    return shown if len(shown) <= characters else f"{shown[: characters - 1]}…"


def _known(hint: Any, place: Sequence[str | int]) -> list[str]:
    """The fields of the settings class in which `place` ends."""
    if not dataclasses.is_dataclass(hint):
        return next(filter(None, (_known(option, place) for option in typing.get_args(hint))), [])
    names = [field.name for field in sorted(dataclasses.fields(hint), key=lambda field: bool(field.kw_only))]
    rest = [step for step in place if isinstance(step, str)]
    return names if len(rest) < 2 else _known(typing.get_type_hints(hint)[rest[0]], rest[1:])


def flatten(config: Any) -> dict[str, Any]:
    """A config as flat `section.key` → value, for recording."""
    flat: dict[str, Any] = {}
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat
