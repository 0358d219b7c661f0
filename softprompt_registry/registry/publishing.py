"""Hard prompts in MLflow's Prompt Registry, where any MLflow program can load them: name, template, version, tags and links.

prompt = mlflow.genai.load_prompt("prompts:/sst2.hard@champion")
prompt.format(input="A film to forget.")
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import PromptVersion
from mlflow.exceptions import MlflowException

from softprompt_registry.errors import ConfigError, RegistryError
from softprompt_registry.fingerprints import digest_of_texts
from softprompt_registry.portability.analysis import Measure, Portability
from softprompt_registry.portability.templates import PromptTemplates
from softprompt_registry.registry.conventions import TAG_PREFIX, TAG_TASK
from softprompt_registry.registry.lookup import aliases_of, check_alias, get_or_none
from softprompt_registry.registry.store import in_one_line

SUFFIX = ".hard"
TEMPLATE = PromptTemplates().prompt
"""What portability asks with by default (paper section 4.5)."""
MAX_TEMPLATE = 100_000
"""Characters that MLflow stores of a prompt."""
TARGET_SCORE_TAG = f"{TAG_PREFIX}target_"
"""Before a metric, a dot and a target LLM's name: how good the prompt is there, on its own task."""
SCORES = ("rouge_l", "accuracy_lenient")
"""Metrics of a portability run that become tags."""
PORTABILITY_RUN_TAG = f"{TAG_PREFIX}portability_run_id"
PORTABILITY_CONDITION_TAG = f"{TAG_PREFIX}portability_condition"

_LINKS_TAG = "mlflow.linkedPrompts"
_MAX_RUN_TAG = 8000
"""MLflow cuts a run's longer tags off, and what is left of a list of links cannot be read any more."""
_MAX_NAME = 200
_PLACES = re.compile(r"\{\{\s*(hard_prompt|input)\s*\}\}|\{(hard_prompt|input)\}")
_PROBE = "an input with {{input}}, {% braces %} and \\1"


@dataclass(frozen=True)
class PromptDraft:
    """A hard prompt that can be registered: all that could be refused has been checked."""

    task: str
    name: str
    """Of the prompt in the registry, see `prompt_name`."""
    text: str
    """The hard prompt."""
    template: str
    """As MLflow stores it, see `prompt_template`."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Where the text came from and how good it is; all begin with `softprompt.`."""


@dataclass(frozen=True)
class PublishedPrompt:
    task: str
    name: str
    version: int
    is_new: bool
    """False: this version had the same template already, and only its tags and the alias were brought up to date."""
    alias: str
    previous_version: int | None
    """Holder of the alias before; None if there was none."""
    uri: str
    """`prompts:/<name>/<version>`"""
    template: str
    links_left_out: int = 0
    """Runs whose list of prompts is full."""


def prompt_name(task: str) -> str:
    """`<task>.hard`. What MLflow refuses in a name becomes `-`, with some of the name's digest, so that no two tasks meet."""
    return _clean(task) + SUFFIX


def prompt_template(hard_prompt: str, frame: str = TEMPLATE) -> str:
    """The template whose `format(input=…)` gives the frame with this hard prompt and that input, character by character.

    MLflow takes `{{name}}` for a variable wherever it stands and has no way to escape it. A text for which that matters is
    written as a Jinja template, with `{{ '{{' }}` for two braces: MLflow renders what holds `{%` and `%}` as Jinja.

    Args:
        frame: with the places `{hard_prompt}` and `{input}`; `{{input}}`, as MLflow writes it, is the same.

    Raises:
        ConfigError: the frame lacks one of its places.
        RegistryError: no template gives this text back, or it is too long.
    """
    doing = f"making a prompt of {hard_prompt[:60]!r}"
    places = [found[1] or found[2] for found in _PLACES.finditer(frame)]
    if "input" not in places or places.count("hard_prompt") != 1:
        raise ConfigError(
            f"{doing}: the template is {frame!r}; expected {{hard_prompt}} once and {{input}} at least once. The default is "
            f"{TEMPLATE!r}."
        )
    # The frame's literal pieces, and None for an input.
    pieces: list[str | None] = []
    start, literal = 0, ""
    for found in _PLACES.finditer(frame):
        literal += frame[start : found.start()]
        start = found.end()
        if (found[1] or found[2]) == "input":
            pieces += [literal, None]
            literal = ""
        else:
            literal += hard_prompt
    pieces.append(literal + frame[start:])
    expected = "".join(_PROBE if piece is None else piece for piece in pieces)
    plain = "".join("{{input}}" if piece is None else piece for piece in pieces)
    jinja = "".join("{{ input }}" if piece is None else _escaped(piece) for piece in pieces) + "{% raw %}{% endraw %}"
    # Never try what MLflow would run as Jinja with foreign text in it: it may loop for ever.
    for template in (jinja,) if "{%" in plain and "%}" in plain else (plain, jinja):
        if _gives_back(template, expected):
            if len(template) > MAX_TEMPLATE:
                raise RegistryError(
                    f"{doing}: its template has {len(template)} characters, MLflow stores at most {MAX_TEMPLATE}. Publish a "
                    "shorter text."
                )
            return template
    raise RegistryError(
        f"{doing}: MLflow {mlflow.__version__} does not give the text back as it is. Publish a text without braces."
    )


def _escaped(literal: str) -> str:
    """Text as a Jinja template that renders it: Jinja reads `{{`, `{%` and `{#`, and makes every `\\r` a `\\n`.

    A last `{` would join the variable that may follow.
    """
    return re.sub(
        r"\{[{%#]|\{\Z|\r", lambda found: "{{ '\\r' }}" if found[0] == "\r" else f"{{{{ '{found[0]}' }}}}", literal
    )


def _gives_back(template: str, expected: str) -> bool:
    prompt = PromptVersion("probe", 1, template)  # type: ignore[abstract]  # it only looks abstract
    try:
        return prompt.variables == {"input"} and prompt.format(input=_PROBE) == expected
    except MlflowException:  # a variable without a value
        return False


def draft(task: str, hard_prompt: str, *, frame: str = TEMPLATE, tags: Mapping[str, str] | None = None) -> PromptDraft:
    """Check what `publish_prompt` would refuse, before anything is written.

    Raises:
        ConfigError: the frame lacks one of its places.
        RegistryError: the text is empty or cannot be stored, or the name is taken by something else.
    """
    if not hard_prompt.strip():
        raise RegistryError(f"publishing the hard prompt of task {task!r}: the text is empty; expected an instruction.")
    name = prompt_name(task)
    client = MlflowClient()
    prompt = client.get_prompt(name)
    if prompt is None and aliases_of(name) is not None:
        raise RegistryError(
            f"publishing the hard prompt of task {task!r} as {name!r}: a registered model has this name, and MLflow keeps "
            "prompts and models in one namespace. Rename the model."
        )
    if prompt is not None and prompt.tags.get(TAG_TASK) != task:
        raise RegistryError(
            f"publishing the hard prompt of task {task!r} as {name!r}: there is a prompt of this name that was not published "
            f"for this task (its tag {TAG_TASK!r} is {prompt.tags.get(TAG_TASK)!r}). Delete that prompt, or rename the task."
        )
    return PromptDraft(task, name, hard_prompt, prompt_template(hard_prompt, frame), {**(tags or {}), TAG_TASK: task})


def publish_prompt(
    prompt: PromptDraft, *, alias: str, runs: Sequence[str] = (), models: Sequence[str] = ()
) -> PublishedPrompt:
    """Register a version if none has this template, bring its tags up to date, link it, and move the alias to it at last.

    What was stopped in the middle goes on when it is called again.

    Args:
        runs: ids of runs whose pages list the prompt then.
        models: ids of LoggedModels, likewise.

    Raises:
        RegistryError: MLflow refused.
    """
    check_alias(alias, "publishing under", ascii_only=True)
    client = MlflowClient()
    try:
        version = _version_with(client, prompt)
        is_new = version is None
        if version is None:
            # MLflow puts these tags on the prompt, too, and every version would overwrite them: only the task stays the same.
            version = mlflow.genai.register_prompt(
                prompt.name,
                prompt.template,
                commit_message=f"softprompt publish, task {prompt.task!r}",
                tags={TAG_TASK: prompt.task},
            )
        _set_tags(client, version, prompt.tags)
        links_left_out = sum(not _link_to_run(client, version, run_id) for run_id in dict.fromkeys(runs))
        for model_id in dict.fromkeys(models):
            client.link_prompt_version_to_model(prompt.name, str(version.version), model_id)
        # Not from `search_prompt_versions`: its versions know no aliases.
        holder = get_or_none(client.get_prompt_version_by_alias, prompt.name, alias)
        client.set_prompt_alias(prompt.name, alias, version.version)
    except MlflowException as error:
        raise RegistryError(
            f"publishing the hard prompt of task {prompt.task!r} as {prompt.name!r}: MLflow refused: {in_one_line(error)}"
        ) from error
    return PublishedPrompt(
        prompt.task,
        prompt.name,
        version.version,
        is_new,
        alias,
        None if holder is None else int(holder.version),
        version.uri,
        prompt.template,
        links_left_out,
    )


def _version_with(client: MlflowClient, prompt: PromptDraft) -> PromptVersion | None:
    """The newest version with the draft's template."""
    if client.get_prompt(prompt.name) is None:
        return None
    token: str | None = None
    while True:
        page = client.search_prompt_versions(prompt.name, page_token=token)
        for version in page:
            if version.template == prompt.template:
                found: PromptVersion = version
                return found
        token = page.token
        if not token:
            return None


def _set_tags(client: MlflowClient, version: PromptVersion, tags: Mapping[str, str]) -> None:
    """Of our own tags exactly these; scores on target LLMs stay if there are no new ones, since the text is the same."""
    about_targets = (TARGET_SCORE_TAG, PORTABILITY_RUN_TAG, PORTABILITY_CONDITION_TAG)
    keep = () if any(key.startswith(about_targets) for key in tags) else about_targets
    for key in version.tags:
        if key.startswith(TAG_PREFIX) and key not in tags and not (keep and key.startswith(keep)):
            client.delete_prompt_version_tag(version.name, version.version, key)
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_prompt_version_tag(version.name, version.version, key, value)


def _link_to_run(client: MlflowClient, version: PromptVersion, run_id: str) -> bool:
    linked = client.get_run(run_id).data.tags.get(_LINKS_TAG, "[]")
    if (
        len(linked) + len(version.name) + len(str(version.version)) + len('{"name": "", "version": ""}, ')
        > _MAX_RUN_TAG
    ):
        return False
    client.link_prompt_version_to_run(run_id, version)
    return True


def target_scores(result: Portability, condition: str) -> dict[str, dict[tuple[str, str], float]]:
    """Task → (metric, target LLM) → the task's score under a condition, for the metrics of `SCORES`.

    Raises:
        RegistryError: there is no score of this condition.
    """
    scores: dict[str, dict[tuple[str, str], float]] = {}
    for target, asked in result.places:
        for metric in SCORES if asked == condition else ():
            for task, score in result.task_means(target, condition, Measure(metric)).items():
                scores.setdefault(task, {})[metric, target] = score
    if not scores:
        known = sorted({asked for _, asked in result.places})
        raise RegistryError(
            f"reading the scores of a portability run: it has none of the condition {condition!r}; found {known}. Ask the "
            "target LLMs under this condition, or publish without it."
        )
    return scores


def target_score_tags(scores: Mapping[tuple[str, str], float]) -> dict[str, str]:
    """A tag for each metric and target LLM."""
    return {
        f"{TARGET_SCORE_TAG}{metric}.{_clean(target)}": f"{score:.6g}" for (metric, target), score in scores.items()
    }


def _clean(name: str) -> str:
    """A name that MLflow takes for a prompt and in the key of a tag."""
    cleaned = re.sub(r"[^a-zA-Z0-9_.-]|^\.", "-", name)[:_MAX_NAME]
    return name if cleaned == name else f"{cleaned}-{digest_of_texts(name)[:8]}"
