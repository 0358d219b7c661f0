"""Hard prompts in MLflow's Prompt Registry: the text comes back as it was, and a version stands for one text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import PromptVersion

from softprompt_registry.errors import ConfigError, RegistryError
from softprompt_registry.portability.analysis import Portability
from softprompt_registry.portability.scoring import AnswerState, ScoredAnswer
from softprompt_registry.portability.templates import PromptTemplates
from softprompt_registry.registry.publishing import (
    PublishedPrompt,
    draft,
    prompt_name,
    prompt_template,
    publish_prompt,
    target_score_tags,
    target_scores,
)

TEXT = "Classify the given input into one of the following: joy, fear."
TEXTS = (
    TEXT,
    "Answer {{x}}",
    "{{ input }} is not the input, {input} and {hard_prompt} are no places",
    "{% if a %}b{% endif %}",
    "{% raw %}{{ '{{' }}{% endraw %} {# a comment #}",
    "{{{{ five braces and one at the end }}}}} {",
    "{{",
    r"a back\slash, \1, \g<0>, \u007b",
    "lines\r\nof {{two}}\rkinds\n",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
)
FRAMES = {
    "{hard_prompt} Input: {input}\nOutput:": ("{text} Input: ", "\nOutput:"),
    "{hard_prompt}{input}": ("{text}", ""),
    "{{hard_prompt}} {% 'kept' %} {{ input }}\n": ("{text} {% 'kept' %} ", "\n"),
}
INPUT = r"My input has {{x}}, {% y %} and \1 in it."


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_mlflow_gives_the_text_back_character_by_character(text: str, frame: str) -> None:
    before, after = FRAMES[frame]
    prompt = PromptVersion("any", 1, prompt_template(text, frame))  # type: ignore[abstract]
    assert prompt.format(input=INPUT) == before.replace("{text}", text) + INPUT + after
    assert prompt.variables == {"input"}


def test_a_text_without_double_braces_stays_readable() -> None:
    assert prompt_template(TEXT) == f"{TEXT} Input: {{{{input}}}}\nOutput:"
    assert prompt_template("as {json}: {a}", "{input} {hard_prompt} {input}") == "{{input}} as {json}: {a} {{input}}"


def test_what_is_published_is_what_portability_asks_with() -> None:
    prompt = PromptVersion("any", 1, prompt_template("Answer {{x}}"))  # type: ignore[abstract]
    assert prompt.format(input=INPUT) == PromptTemplates().fill(INPUT, hard_prompt="Answer {{x}}")


@pytest.mark.parametrize("frame", ["{hard_prompt}", "Input: {input}", "{hard_prompt} {hard_prompt} {input}", ""])
def test_a_frame_without_its_places_is_refused(frame: str) -> None:
    with pytest.raises(ConfigError, match=r"expected \{hard_prompt\} once and \{input\} at least once"):
        prompt_template(TEXT, frame)


def test_a_text_that_mlflow_cannot_store_is_refused() -> None:
    with pytest.raises(RegistryError, match="100001 characters, MLflow stores at most 100000"):
        prompt_template("a" * (100_001 - len(" Input: {{input}}\nOutput:")))


def test_names_are_such_that_mlflow_takes_them_and_no_two_tasks_share_one() -> None:
    assert prompt_name("task1391_winogrande-x.y") == "task1391_winogrande-x.y.hard"
    others = ["a/b", "a:b", "a b", "a-b", ".a-b", "à-b", "a" * 300, "a" * 301, ".."]
    names = [prompt_name(task) for task in others]
    assert len(set(names)) == len(others)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]{0,254}", name) and name.endswith(".hard") for name in names)
    assert re.fullmatch(r"a-b-[0-9a-f]{8}\.hard", names[0])


# --- In the registry ---


def publish(
    text: str = TEXT, task: str = "moods", alias: str = "champion", tags: Mapping[str, str] | None = None
) -> PublishedPrompt:
    return publish_prompt(draft(task, text, tags=tags), alias=alias)


def versions(name: str = "moods.hard") -> int:
    return len(MlflowClient().search_prompt_versions(name))


def load(uri: str = "prompts:/moods.hard@champion") -> PromptVersion:
    return mlflow.genai.load_prompt(uri)


def test_a_new_version_only_for_a_new_text(mlflow_store: str) -> None:
    first = publish()
    assert (first.name, first.version, first.is_new, first.previous_version) == ("moods.hard", 1, True, None)
    assert first.uri == "prompts:/moods.hard/1"
    again = publish()
    assert (again.version, again.is_new, again.previous_version) == (1, False, 1)
    other = publish("Name the mood: {{x}}.")
    assert (other.version, other.is_new, other.previous_version) == (2, True, 1)
    assert load().format(input="so sad") == "Name the mood: {{x}}. Input: so sad\nOutput:"
    # An older text that comes back is the older version.
    back = publish()
    assert (back.version, back.is_new, back.previous_version) == (1, False, 2)
    assert load().format(input="so sad") == f"{TEXT} Input: so sad\nOutput:"
    assert versions() == 2


def test_another_frame_is_another_text(mlflow_store: str) -> None:
    publish()
    framed = publish_prompt(draft("moods", TEXT, frame="{input}\n{hard_prompt}"), alias="short")
    assert (framed.version, framed.is_new) == (2, True)
    assert load().version == 1 and load("prompts:/moods.hard@short").version == 2


def test_the_prompt_knows_its_task_and_the_version_the_rest(mlflow_store: str) -> None:
    publish(tags={"softprompt.method": "translator", "softprompt.faithfulness": "0.5"})
    prompt = MlflowClient().get_prompt("moods.hard")
    assert prompt is not None and prompt.tags["softprompt.task"] == "moods"
    assert "softprompt.method" not in prompt.tags
    assert load().tags == {
        "softprompt.task": "moods",
        "softprompt.method": "translator",
        "softprompt.faithfulness": "0.5",
    }


def test_tags_are_those_of_the_last_time_and_scores_on_target_llms_stay_until_there_are_new_ones(
    mlflow_store: str,
) -> None:
    scores = target_score_tags({("rouge_l", "gpt-5"): 1 / 3, ("rouge_l", "Qwen/Qwen3"): 0.25})
    assert scores["softprompt.target_rouge_l.gpt-5"] == "0.333333"
    [qwen] = set(scores) - {"softprompt.target_rouge_l.gpt-5"}
    assert re.fullmatch(r"softprompt\.target_rouge_l\.Qwen-Qwen3-[0-9a-f]{8}", qwen)
    publish(tags={"softprompt.method": "translator", "softprompt.proposer": "translator", **scores})
    MlflowClient().set_prompt_version_tag("moods.hard", 1, "reviewed_by", "Ada")
    publish(tags={"softprompt.method": "inspect"})
    kept = {"softprompt.task": "moods", "softprompt.method": "inspect", "reviewed_by": "Ada"}
    assert load().tags == kept | scores
    newer = target_score_tags({("rouge_l", "gpt-5"): 0.5})
    publish(tags={"softprompt.method": "inspect", **newer})
    assert load().tags == kept | newer


def test_a_registered_model_of_the_same_name_stands_in_the_way(mlflow_store: str) -> None:
    MlflowClient().create_registered_model("moods.hard")
    with pytest.raises(RegistryError, match="a registered model has this name.*Rename the model"):
        publish()


def test_a_prompt_that_is_not_ours_is_left_alone(mlflow_store: str) -> None:
    mlflow.genai.register_prompt("moods.hard", "Mine: {{input}}")
    with pytest.raises(RegistryError, match=r"was not published for this task .*is None\)"):
        publish()
    assert versions() == 1


@pytest.mark.parametrize("alias", ["latest", "v3", "two words", "", "é"])
def test_an_alias_that_mlflow_refuses_is_refused_before_a_version_is_made(mlflow_store: str, alias: str) -> None:
    with pytest.raises(RegistryError, match="Use for instance 'champion'"):
        publish(alias=alias)
    assert MlflowClient().get_prompt("moods.hard") is None


def test_runs_and_models_list_the_prompt(mlflow_store: str) -> None:
    with mlflow.start_run() as run:
        model = mlflow.create_external_model(name="translator")
    for text in (TEXT, TEXT, "Other."):
        publish_prompt(draft("moods", text), alias="champion", runs=[run.info.run_id], models=[model.model_id])
    expected = [{"name": "moods.hard", "version": "1"}, {"name": "moods.hard", "version": "2"}]
    client = MlflowClient()
    assert json.loads(client.get_run(run.info.run_id).data.tags["mlflow.linkedPrompts"]) == expected
    assert json.loads(client.get_logged_model(model.model_id).tags["mlflow.linkedPrompts"]) == expected


def test_a_full_list_of_a_run_is_not_broken(mlflow_store: str) -> None:
    """MLflow cuts the tag at 8000 characters, and then cannot read it any more."""
    with mlflow.start_run() as run:
        pass
    client = MlflowClient()
    entries = [{"name": f"{number:040d}", "version": "1"} for number in range(400)]
    while len(json.dumps(entries)) > 7990:
        entries.pop()
    client.set_tag(run.info.run_id, "mlflow.linkedPrompts", json.dumps(entries))
    done = publish_prompt(draft("moods", TEXT), alias="champion", runs=[run.info.run_id])
    assert done.links_left_out == 1
    assert json.loads(client.get_run(run.info.run_id).data.tags["mlflow.linkedPrompts"]) == entries
    assert load().version == 1


# --- Scores on target LLMs ---


def answer(target: str, condition: str, task: str, rouge: float | None, lenient: float | None) -> ScoredAnswer:
    scores = {"rouge_l": rouge, "accuracy_lenient": lenient}
    known = {metric: score for metric, score in scores.items() if score is not None}
    state: AnswerState = "answered" if known else "missing"
    return ScoredAnswer(target, condition, task, "generation", 0, state, known, False, False, 1, 1)


def test_scores_on_target_llms_are_the_tasks_own() -> None:
    result = Portability(
        (
            answer("small", "translated", "moods", 0.25, 0.5),
            answer("large", "translated", "moods", 0.75, 1.0),
            answer("small", "translated", "tales", 0.125, None),
            answer("small", "no_prompt", "moods", 0.0, 0.0),
            answer("small", "no_prompt", "tales", None, None),
        )
    )
    assert target_scores(result, "translated") == {
        "moods": {
            ("rouge_l", "small"): 0.25,
            ("accuracy_lenient", "small"): 0.5,
            ("rouge_l", "large"): 0.75,
            ("accuracy_lenient", "large"): 1.0,
        },
        "tales": {("rouge_l", "small"): 0.125},
    }
    assert set(target_scores(result, "no_prompt")) == {"moods"}
    with pytest.raises(RegistryError, match=r"none of the condition 'inspect'; found \['no_prompt', 'translated'\]"):
        target_scores(result, "inspect")
