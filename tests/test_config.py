"""Settings: what is written in YAML or as key=value becomes a frozen dataclass, or an error that helps."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import PositiveInt

from softprompt_registry.config import Share, apply_overrides, build_config, flatten, read_yaml, settings
from softprompt_registry.dod.audit import AuditConfig
from softprompt_registry.dod.classification import ClassificationConfig
from softprompt_registry.dod.files import FilesConfig
from softprompt_registry.dod.general import GeneralConfig
from softprompt_registry.dod.labelled_sets import InspectConfig, OodConfig
from softprompt_registry.errors import ConfigError
from softprompt_registry.language_models.on_vllm import VllmConfig
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.portability.budget import Budget
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig
from softprompt_registry.translators.training import TranslatorConfig
from softprompt_registry.verbalization.verbalizer import VerbalizationConfig


@settings
class Inner:
    rate: Share = 0.5
    names: tuple[str, ...] = ("a", "b")

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ValueError("names are not different")


@settings
class Outer:
    count: PositiveInt = 1
    word: str = ""
    flag: bool = False
    limit: PositiveInt | None = None
    kind: Literal["one", "two"] = "one"
    table: dict[str, float] = field(default_factory=dict)
    anything: Any = None
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()


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
        "inner": {"rate": 1, "names": ["c"]},
    }
    config = build_config(Outer, values)
    assert config == Outer(3, "w", True, 7, "two", {"x": 1.0, "y": 0.5}, [1, "2"], Inner(1.0, ("c",)))
    assert isinstance(config.inner.rate, float)
    assert build_config(Outer, {"limit": None}).limit is None


def test_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(Outer, {"cuont": 1, "count": 2, "inner": {"rte": 1}, "many": [{"rtes": 1}]}, "demo.yaml")
    assert str(caught.value) == (
        "reading demo.yaml: unknown 'rte' in inner; known are rate, names; unknown 'rtes' in many.0; known are rate, names; "
        "unknown 'cuont'; known are count, word, flag, limit, kind, table, anything, inner, many. Correct them."
    )
    with pytest.raises(ConfigError, match="reading Inner: unknown 'rte'; known are rate, names. Correct it."):
        Inner(rte=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.5}, "count is 1.5, expected a whole number in digits alone. Correct it."),
        ({"count": "3"}, "count is '3', expected a whole number"),
        ({"count": True}, "count is True, expected a whole number"),
        ({"count": None}, "count is None, expected a whole number"),
        ({"count": 0}, "count is 0, expected above 0"),
        ({"limit": 0}, "limit is 0, expected above 0"),
        ({"limit": "7"}, "limit is '7', expected a whole number"),
        ({"word": 3}, "word is 3, expected text; put it in quotes, on the command line"),
        ({"word": "\ud800"}, "found what JSON cannot hold"),
        ({"flag": 1}, "flag is 1, expected true or false"),
        ({"flag": "yes"}, "flag is 'yes', expected true or false"),
        ({"kind": "three"}, "kind is 'three', expected 'one' or 'two'"),
        ({"table": [1]}, "table is [1], expected a mapping"),
        ({"table": {"x": "much"}}, "table.x is 'much', expected a number, such as 0.5 or 1e-4"),
        ({"inner": 3}, "inner is 3, expected a section"),
        ({"inner": {"rate": True}}, "inner.rate is True, expected a number"),
        ({"inner": {"rate": float("nan")}}, "inner.rate is nan, expected a finite number"),
        ({"inner": {"rate": 1.5}}, "inner.rate is 1.5, expected 1 or less"),
        ({"inner": {"names": "ab"}}, "inner.names is 'ab', expected a list"),
        ({"inner": {"names": ["a", 1]}}, "inner.names.1 is 1, expected text"),
        ({"inner": {"names": ["a", "a"]}}, "inner: names are not different. Correct it."),
        ({"many": [{}, {"rate": "fast"}]}, "many.1.rate is 'fast', expected a number"),
        ({"count": 0, "word": 3}, "count is 0, expected above 0; word is 3, expected text"),
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


def test_settings_made_in_python_are_checked_like_those_of_a_file() -> None:
    made = Outer(count=2, inner=Inner(rate=1))
    assert isinstance(made.inner.rate, float) and dataclasses.replace(made, count=3).count == 3
    with pytest.raises(ConfigError, match="reading Outer: count is 0, expected above 0. Correct it."):
        dataclasses.replace(made, count=0)
    with pytest.raises(ConfigError, match="reading Outer: count is '2', expected a whole number"):
        Outer("2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reading Inner: names are not different. Correct it."):
        Inner(names=("a", "a"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.count = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (TuningConfig, {"batch_size": 0}, "batch_size is 0, expected above 0"),
        (TuningConfig, {"max_sequence_tokens": 20}, "max_sequence_tokens=20 leaves no room for text"),
        (TuningConfig, {"init": "zeros"}, "expected 'shared_vocabulary' or 'own_vocabulary'"),
        (TranslatorConfig, {"schedule": "linear"}, "schedule is 'linear', expected 'constant' or 'cosine'"),
        (TranslatorConfig, {"validation_share": 1.0}, "validation_share is 1.0, expected below 1"),
        (TranslatorConfig, {"train_share": 0.0}, "train_share is 0.0, expected above 0"),
        (AuditConfig, {"min_label_balance": 1.5}, "min_label_balance is 1.5, expected 1 or less"),
        (AuditConfig, {"max_examples": -1}, "max_examples is -1, expected 0 or more"),
        (FilesConfig, {"input_column": "split"}, "input_column is 'split' and output_column is 'output', expected two"),
        (GeneralConfig, {"pair_shares": [0.5, 0.2, 0.2]}, "pair_shares: [0.5, 0.2, 0.2] add up to 0.9, expected 1"),
        (GeneralConfig, {"pair_shares": [0.8, 0.3, -0.1]}, "pair_shares.2 is -0.1, expected 0 or more"),
        (ClassificationConfig, {"pair_shares": [0.8, 0.2]}, "pair_shares.2 is missing"),
        (ClassificationConfig, {"labels_per_task": 1}, "labels_per_task is 1, expected 2 or more"),
        (ClassificationConfig, {"min_words": 9, "max_words": 8}, "min_words is 9 and max_words 8, expected no more"),
        (
            ClassificationConfig,
            {"min_sentences_per_label": 101},
            "min_sentences_per_label is 101 and sentences_per_label 100",
        ),
        (InspectConfig, {"sets": []}, "sets: found [], expected one or more, each once"),
        (InspectConfig, {"sets": ["sst2", "sst2"]}, "sets: found ['sst2', 'sst2'], expected one or more, each once"),
        (InspectConfig, {"sets": ["imdb"]}, "sets has ['imdb'], expected some of ['sst2'"),
        (InspectConfig, {"hub": {"sst-2": "a/b"}}, "hub has ['sst-2'], expected some of ['sst2'"),
        (OodConfig, {"reviews_test_fold": 4}, "reviews_validation_fold and reviews_test_fold are both 4"),
        (OodConfig, {"reviews_test_fold": 6}, "reviews_test_fold is 6, expected 5 or less"),
        (OodConfig, {"essays_labels": {"x": "AI"}}, "essays_labels maps labels to ['AI'], expected only ['human'"),
        (VerbalizationConfig, {"temperature": 0.0}, "temperature is 0.0, expected above 0"),
        (
            VllmConfig,
            {"model": "", "max_in_flight": 0},
            "model is '', expected text that is not empty; max_in_flight is 0",
        ),
        (
            OpenAICompatibleConfig,
            {"model": "m", "timeout_s": float("inf")},
            "timeout_s is inf, expected a finite number",
        ),
        (Budget, {"max_cost": -1.0}, "max_cost is -1.0, expected above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(cls: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(cls, values)
    assert message in str(caught.value)
