"""Settings: what is written in YAML or as key=value becomes a frozen dataclass, or an error that helps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from softprompt_registry.config import apply_overrides, build_config, flatten, read_yaml
from softprompt_registry.errors import ConfigError
from softprompt_registry.soft_prompts.tuning import TuningConfig
from softprompt_registry.translators.training import TranslatorConfig
from softprompt_registry.verbalization.verbalizer import VerbalizationConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Outer:
    count: int = 1
    word: str = ""
    flag: bool = False
    limit: int | None = None
    kind: Literal["one", "two"] = "one"
    table: dict[str, float] = field(default_factory=dict)
    anything: Any = None
    inner: Inner = Inner()


def test_without_values_the_defaults_stand() -> None:
    assert build_config(Outer, {}) == Outer()


def test_every_type_is_read() -> None:
    values = {
        "count": 3,
        "word": "w",
        "flag": True,
        "limit": 7,
        "kind": "two",
        "table": {"x": 1, "y": 0.5},
        "anything": [1, "2"],
        "inner": {"rate": 2, "names": ["c"]},
    }
    config = build_config(Outer, values)
    assert config == Outer(3, "w", True, 7, "two", {"x": 1.0, "y": 0.5}, [1, "2"], Inner(2.0, ("c",)))
    assert isinstance(config.inner.rate, float)
    assert build_config(Outer, {"limit": None}).limit is None


def test_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(Outer, {"cuont": 1, "count": 2}, "demo.yaml")
    assert str(caught.value) == (
        "reading demo.yaml: unknown 'cuont'; known are count, word, flag, limit, kind, table, anything, inner."
    )
    with pytest.raises(ConfigError, match="reading demo.yaml, 'inner': unknown 'rte'; known are rate, names."):
        build_config(Outer, {"inner": {"rte": 1}}, "demo.yaml")
    with pytest.raises(ConfigError, match="unknown 1, 'b'"):
        build_config(Outer, {"b": 0, 1: 0})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.5}, "'count': found 1.5, expected int"),
        ({"count": "3"}, "'count': found '3', expected int"),
        ({"count": True}, "'count': found True, expected int"),
        ({"count": None}, "'count': found None, expected int"),
        ({"word": 3}, "'word': found 3, expected str. Put it in quotes; on the command line"),
        ({"flag": 1}, "'flag': found 1, expected bool"),
        ({"flag": "yes"}, "'flag': found 'yes', expected bool. Write true or false."),
        ({"count": "1_000"}, "'count': found '1_000', expected int. Write a whole number in digits alone."),
        ({"limit": "7"}, "'limit': found '7', expected int"),
        ({"kind": "three"}, "'kind': found 'three', expected one of ['one', 'two']"),
        ({"table": [1]}, "'table': found [1], expected a mapping"),
        ({"table": {"x": "much"}}, "'table', 'x': found 'much', expected float"),
        ({"inner": 3}, "'inner': found 3, expected a section"),
        ({"inner": {"rate": "fast"}}, "'inner', 'rate': found 'fast', expected float"),
        ({"inner": {"rate": True}}, "'inner', 'rate': found True, expected float"),
        ({"inner": {"names": "ab"}}, "'inner', 'names': found 'ab', expected a list"),
        ({"inner": {"names": ["a", 1]}}, "'inner', 'names': found 1, expected str"),
    ],
)
def test_a_value_of_another_type_says_where_and_what_was_expected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(Outer, values)
    assert message in str(caught.value)


# What is written → what is read by the core schema of YAML 1.2 (section 10.3): in a file, in brackets and with `-s`.
AS_WRITTEN: dict[str, Any] = {
    **{word: word for word in ("yes", "No", "on", "OFF", "y", "N")},
    **{
        word: word
        for word in ("2024-10-21", "2001-12-14t21:59:43Z", "12:30", "1_000", "0b11", "=", "<<", "1e", "0x", ".")
    },
    **{"true": True, "False": False, "null": None, "~": None},
    **{"010": 10, "+7": 7, "-0": 0, "0o17": 15, "0x1F": 31},
    **{"1e-4": 1e-4, "2E+3": 2000.0, ".5": 0.5, "1.": 1.0, "-.inf": -float("inf"), "1e4": 10000.0},
}


@pytest.mark.supports("files", "settings in YAML 1.2 (`no`, `2024-10-21` and `12:30` are text)", "read as written")
@pytest.mark.parametrize(("text", "value"), AS_WRITTEN.items())
def test_a_value_is_what_the_user_wrote(text: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"block: {text}\nflow: [{text}]\n")
    read = read_yaml(tmp_path / "a.yaml")
    for found in (read["block"], read["flow"][0], apply_overrides({}, [f"x={text}"])["x"]):
        assert (found, type(found)) == (value, type(value))
    quoted = apply_overrides({}, [f"x='{text}'", f'y="{text}"', f"z=['{text}']"])
    assert quoted == {"x": text, "y": text, "z": [text]}


def test_a_key_is_what_the_user_wrote(tmp_path: Path) -> None:
    words = ("yes", "no", "true", "1", "1.0", "010", "null", "2024-10-21", "12:30")
    table = "".join(f"  {word}: {number}\n" for number, word in enumerate(words))
    (tmp_path / "a.yaml").write_text(f"table:\n{table}")
    expected = {word: float(number) for number, word in enumerate(words)}
    assert build_config(Outer, read_yaml(tmp_path / "a.yaml")).table == expected
    flow = ", ".join(f"{word}: {number}" for number, word in enumerate(words))
    assert build_config(Outer, apply_overrides({}, [f"table={{{flow}}}"])).table == expected


@pytest.mark.parametrize(
    "text", ["Which of these:", "a: b", "# 1", "C #1, C #2", "- a", "&a", "*", "!", "%", "@", "one\ntwo", "|"]
)
def test_an_override_without_quotes_or_brackets_is_the_text_itself(text: str) -> None:
    assert apply_overrides({}, [f"word={text}"]) == {"word": text}


def test_a_key_may_stand_twice_only_where_one_is_shared_by_an_anchor(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("inner: &a {rate: 1, word: a}\nouter: {deep: &b {<<: *a, rate: 2}}\nmore: {<<: *b, word: b}\n")
    values = read_yaml(path)
    assert (values["outer"], values["more"]) == ({"deep": {"rate": 2, "word": "a"}}, {"rate": 2, "word": "b"})
    for text in ("a: 1\nb: 2\na: 3\n", "x: {a: 1, 'a': 2}", "x: {<<: {a: 1}, a: 2, a: 3}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="found the key 'a' twice, expected each key once") as caught:
            read_yaml(path)
        assert f'in "{path}", line {3 if text.startswith("a") else 1}, column' in str(caught.value)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 1000, "!!int x"])
def test_what_python_refuses_is_an_error_of_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"a: {text}\n")
    with pytest.raises(ConfigError, match="it is not YAML"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="is not YAML"):
        apply_overrides({}, [f"a=[{text}]"])


def test_a_file_in_utf_16_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("word: café\n", encoding="utf-16")
    assert read_yaml(tmp_path / "a.yaml") == {"word": "café"}


def test_overrides_are_laid_over_what_is_there() -> None:
    values = {"count": 1, "inner": {"rate": 0.5}}
    overrides = ["count=2", "inner.names=[x, y]", "word='a=b'", "limit=null", "flag=true", "inner.rate=0.25"]
    assert apply_overrides(values, overrides) == {
        "count": 2,
        "inner": {"rate": 0.25, "names": ["x", "y"]},
        "word": "a=b",
        "limit": None,
        "flag": True,
    }
    assert values == {"count": 1, "inner": {"rate": 0.5}}, "the values handed in were changed"


def test_an_override_opens_a_section_that_yaml_left_out_or_empty() -> None:
    assert apply_overrides({}, ["inner.rate=1"]) == {"inner": {"rate": 1}}
    assert apply_overrides({"inner": None}, ["inner.rate=1"]) == {"inner": {"rate": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("count", "expected `key=value` or `section.key=value`"),
        ("=3", "expected `key=value` or `section.key=value`"),
        ("count.more=3", "'count' is a value, not a section"),
        ("word=[1", "is not YAML"),
    ],
)
def test_an_override_that_is_none_is_quoted(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"count": 1}, [override])
    assert message in str(caught.value) and repr(override) in str(caught.value)


def test_a_yaml_file_is_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(ConfigError, match=f"there is no file '{path}'"):
        read_yaml(path)
    path.write_text("# nothing yet\n")
    assert read_yaml(path) == {}
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="found a list, expected a mapping"):
        read_yaml(path)
    path.write_text("a: [1\n")
    with pytest.raises(ConfigError, match="it is not YAML"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not YAML"):
        read_yaml(path)


def test_a_flat_config_repeats_the_config() -> None:
    config = Outer(count=4, table={"x": 0.5}, inner=Inner(names=("c",)))
    flat = flatten(config)
    assert flat["count"] == 4 and flat["inner.rate"] == 0.5 and flat["table.x"] == 0.5
    assert flatten(TranslatorConfig(target_modules=("q_proj",)))["target_modules"] == ["q_proj"]


@pytest.mark.parametrize("config", [TuningConfig(), TranslatorConfig(), VerbalizationConfig()])
def test_the_record_of_a_config_builds_it_again(config: Any) -> None:
    assert build_config(type(config), dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (TuningConfig, {"batch_size": 0}, "batch_size is 0, expected at least 1"),
        (TuningConfig, {"max_train_pairs": 0}, "max_train_pairs is 0, expected at least 1"),
        (TuningConfig, {"max_sequence_tokens": 20}, "max_sequence_tokens=20 leaves no room for text"),
        (TuningConfig, {"init": "zeros"}, "expected one of ['shared_vocabulary', 'own_vocabulary']"),
        (TranslatorConfig, {"lora_rank": 0}, "lora_rank is 0, expected >= 1"),
        (TranslatorConfig, {"schedule": "linear"}, "schedule is 'linear'; constant or cosine"),
        (TranslatorConfig, {"validation_share": 1.0}, "validation_share 1.0 is not in [0, 1)"),
        (VerbalizationConfig, {"temperature": 0.0}, "expected all above zero"),
    ],
)
def test_settings_that_cannot_work_are_refused(cls: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(cls, values)
    assert message in str(caught.value)
