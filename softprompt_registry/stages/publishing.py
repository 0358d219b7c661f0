"""Publishing the texts of an evaluation as an MLflow run: into the Prompt Registry, with what is known about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelInput, Run

from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry.errors import ArtifactError, RegistryError
from softprompt_registry.evaluation.record import CANDIDATES, REPORTING, TASKS
from softprompt_registry.portability.answers import FEW_SHOT_TRANSLATED
from softprompt_registry.portability.hard_prompts import LABEL_LIST, METHODS, instruction
from softprompt_registry.registry import conventions
from softprompt_registry.registry.lookup import find_logged_model, find_run, parse_model_uri
from softprompt_registry.registry.publishing import (
    PORTABILITY_CONDITION_TAG,
    PORTABILITY_RUN_TAG,
    TEMPLATE,
    PromptDraft,
    PublishedPrompt,
    check_prompt_alias,
    draft,
    publish_prompt,
    target_score_tags,
    target_scores,
)
from softprompt_registry.registry.store import STORE_FAILURES, in_one_line
from softprompt_registry.stages.running import stage_run
from softprompt_registry.storage import complete_record
from softprompt_registry.verbalization.methods import ALL, WITH_VERIFIER
from softprompt_registry.verbalization.verbalizer import Verbalization
from softprompt_registry.verbalization.verification import Verification

METHOD = f"{ALL}{WITH_VERIFIER}"
"""Whose texts are published: the verifier's choice among all candidates."""


@dataclass(frozen=True)
class Publication:
    """What was published, and the run that says so."""

    run_id: str
    method: str
    published: tuple[PublishedPrompt, ...]
    held_back: dict[str, str]
    """Task → why its text was not published."""


def publish(
    evaluation: str,
    tasks: Sequence[str] | None = None,
    *,
    method: str = METHOD,
    alias: str = "champion",
    template: str = TEMPLATE,
    portability: str | None = None,
    allow_abstained: bool = False,
) -> Publication:
    """Register one method's texts in MLflow's Prompt Registry, each as `<task>.hard`, and give them the alias.

    A list of labels becomes an instruction first, as portability asks it. All is checked before anything is written.

    Args:
        evaluation: run of `evaluate`: its id, or `runs:/<id>`.
        tasks: names; None publishes all tasks whose text is there and was not held back.
        template: with the places `{hard_prompt}` and `{input}`.
        portability: run of `portability`, in whose own template the texts are published; its scores of this method become
            tags, each task's own.
        allow_abstained: publish texts, too, that the verifier abstained on; their tags say so.

    Raises:
        ArtifactError: the run is not there, or is not one of `evaluate`.
        RegistryError: the method or a task is unknown, a text that was named is empty or was held back, or a name or the
            alias cannot be used.
        ConfigError: the template lacks one of its places.
    """
    check_prompt_alias(alias)
    found = _read(_run_id(evaluation), method)
    scores: dict[str, dict[tuple[str, str], float]] = {}
    asked_with: dict[str, str] = {}
    portability_id = None
    if portability is not None:
        portability_id = _run_id(portability)
        _require_same_evaluation(portability_id, found.run.info.run_id, template)
        condition = _condition_of(method, found.methods)
        scores = target_scores(portability_id, condition)
        asked_with = {PORTABILITY_RUN_TAG: portability_id, PORTABILITY_CONDITION_TAG: condition}
    unknown = sorted(set(tasks or ()) - set(found.texts))
    if unknown:
        raise RegistryError(
            f"publishing texts of the evaluation {found.run.info.run_id!r}: it has none for {unknown}; it has texts for "
            f"{sorted(found.texts)}. Name one of these; a task that was left out stands in the run's left_out.json."
        )
    drafts: list[PromptDraft] = []
    held_back = {}
    for task in dict.fromkeys(found.texts if tasks is None else tasks):
        text = found.texts[task]
        reason = None if text.text.strip() else "the method wrote nothing"
        if text.abstained and not allow_abstained and reason is None:
            reason = f"the verifier abstained: {text.reason}"
        if reason is None:
            tags = _facts(found, text, method)
            if task in scores:
                tags |= target_score_tags(scores[task]) | asked_with
            drafts.append(draft(task, found.hard_prompt(task), frame=template, tags=tags))
        elif tasks is None:
            held_back[task] = reason
        else:
            hint = " Publish it all the same with --allow-abstained." if text.text.strip() else ""
            raise RegistryError(
                f"publishing the text of {method!r} for task {task!r}: {reason}. The text is {text.text[:200]!r}.{hint}"
            )
    with stage_run(conventions.STAGE_PUBLISH) as run_id:
        for model in found.models:
            mlflow.log_input(model=LoggedModelInput(model.model_id))
        recorder = MlflowRecorder()
        recorder.params(
            conventions.STAGE_PUBLISH,
            {
                "evaluation_run_id": found.run.info.run_id,
                "method": method,
                "alias": alias,
                "template": template,
                "portability_run_id": portability_id,
                "allow_abstained": allow_abstained,
            },
        )
        links = [model.model_id for model in found.models if model.model_type != conventions.BASE_MODEL]
        published = []
        with recorder.progress("publish", len(drafts)) as bar:
            for item in drafts:
                published.append(publish_prompt(item, alias=alias, runs=(found.run.info.run_id, run_id), models=links))
                bar.advance(1, item.task)
        result = Publication(run_id, method, tuple(published), held_back)
        _record(result, drafts, recorder)
    return result


def _record(result: Publication, drafts: Sequence[PromptDraft], recorder: MlflowRecorder) -> None:
    done = result.published
    recorder.metric("num_published", float(len(done)))
    recorder.metric("num_new_versions", float(sum(item.is_new for item in done)))
    recorder.metric("num_held_back", float(len(result.held_back)))
    recorder.table(
        "published.json",
        {
            "task": [item.task for item in done],
            "prompt": [item.uri for item in done],
            "new": [item.is_new for item in done],
            "hard_prompt": [item.text for item in drafts],
            "template": [item.template for item in done],
        },
    )
    recorder.table("held_back.json", {"task": list(result.held_back), "reason": list(result.held_back.values())})


@dataclass(frozen=True)
class _Found:
    """What an evaluation's run says about one method."""

    run: Run
    methods: tuple[str, ...]
    """All that the evaluation has."""
    texts: Mapping[str, Verbalization]
    """By task."""
    kinds: Mapping[str, Any]
    """Kind of each task."""
    reporting: Mapping[str, Verification]
    """By soft prompt: how faithful texts are on pairs that none was chosen on."""
    models: tuple[LoggedModel, ...]
    """Those that the evaluation read: base model, translator, bank."""

    def hard_prompt(self, task: str) -> str:
        return instruction(self.texts[task].text, self.kinds[task])

    def model(self, model_type: str) -> LoggedModel | None:
        return next((model for model in self.models if model.model_type == model_type), None)


def _require_same_evaluation(portability: str, evaluation: str, template: str) -> None:
    """The portability run asked with these texts, in these words."""
    run = find_run(MlflowClient(), portability)
    params = {} if run is None else run.data.params
    measured = params.get("portability.evaluation_run_id")
    if run is not None and measured != evaluation:
        raise RegistryError(
            f"publishing texts of the evaluation {evaluation!r}: the portability run {portability!r} measured those of "
            f"{measured!r}; expected the same evaluation, since its scores become tags. Give the run that asked "
            "with these texts."
        )
    if params.get("portability.label_list", LABEL_LIST) != LABEL_LIST:
        raise RegistryError(
            f"publishing texts of the evaluation {evaluation!r}: the portability run {portability!r} put lists of labels "
            f"into another instruction ({params['portability.label_list'][:100]!r}), so its scores are those of other "
            "prompts. Leave the portability run out."
        )
    asked = params.get("portability.templates.prompt", template)
    if asked != template:
        raise RegistryError(
            f"publishing texts of the evaluation {evaluation!r}: the portability run {portability!r} asked in the template "
            f"{asked[:200]!r}, the prompts would be published in {template[:200]!r}, so its scores are those of other "
            "prompts. Give its template with --template, or leave the portability run out."
        )


def _run_id(given: str) -> str:
    parts = parse_model_uri(given)
    return parts.run_id if parts is not None and parts.run_id else given


def _read(run_id: str, method: str) -> _Found:
    client = MlflowClient()
    run = find_run(client, run_id)
    stage = None if run is None else run.data.tags.get(conventions.STAGE_TAG)
    if run is None or stage != conventions.STAGE_EVALUATE:
        what = "it is not in this MLflow store" if run is None else f"its stage is {stage!r}"
        raise ArtifactError(
            f"publishing texts of run {run_id!r}: {what}; expected a run of `softprompt evaluate`. Give the run id that the "
            "command printed."
        )
    try:
        candidates = mlflow.artifacts.load_dict(f"runs:/{run_id}/{CANDIDATES}")
        reporting = mlflow.artifacts.load_dict(f"runs:/{run_id}/{REPORTING}")["tasks"]
        tasks = mlflow.artifacts.load_dict(f"runs:/{run_id}/{TASKS}")["tasks"]
    except (*STORE_FAILURES, OSError, KeyError) as error:
        raise ArtifactError(
            f"publishing texts of run {run_id!r}: {in_one_line(error)}. "
            f"Expected the files {CANDIDATES}, {REPORTING} and {TASKS} of a "
            "finished evaluation. Evaluate again."
        ) from error
    if method not in candidates:
        raise RegistryError(
            f"publishing texts of run {run_id!r}: the method {method!r} is not among those evaluated, {list(candidates)}. "
            "Name one of these with --method."
        )
    with complete_record("an evaluation"):
        kinds = {record["name"]: record["kind"] for record in tasks}
        texts = [Verbalization.from_json(item) for item in candidates[method]]
    verifications = [Verification.from_json(item) for item in reporting]
    inputs = (run.inputs.model_inputs if run.inputs else None) or []
    models = [find_logged_model(client, item.model_id) for item in inputs]
    return _Found(
        run,
        tuple(candidates),
        {text.task: text for text in texts},
        kinds,
        {item.soft_prompt_id: item for item in verifications},
        tuple(model for model in models if model is not None),
    )


def _condition_of(method: str, methods: Sequence[str]) -> str:
    """The portability condition whose hard prompt is this method's text alone."""
    for condition, by in METHODS.items():
        if condition != FEW_SHOT_TRANSLATED and next((name for name in by if name in methods), None) == method:
            return condition
    known = sorted({name for condition, by in METHODS.items() if condition != FEW_SHOT_TRANSLATED for name in by})
    raise RegistryError(
        f"publishing texts of {method!r} with scores on target LLMs: no condition of `softprompt portability` asks with this "
        f"method's texts; those asked with are of {known}. Leave --portability out."
    )


def _facts(found: _Found, text: Verbalization, method: str) -> dict[str, str]:
    """Where a text came from and how good it is, as tags. What is not known has no tag."""
    chosen = next((candidate for candidate in text.candidates if candidate.text == text.text), None)
    reporting = found.reporting.get(text.soft_prompt_id)
    other = next((item for item in reporting.candidates if item.text == text.text), None) if reporting else None
    base = found.model(conventions.BASE_MODEL)
    bank = found.model(conventions.BANK)
    translator = found.model(conventions.TRANSLATOR)
    dod_name, dod_digest = _dod_of(found.run, [bank, translator])
    other_interval = None if other is None or other.low is None or other.high is None else (other.low, other.high)
    facts: dict[str, object | None] = {
        "softprompt.soft_prompt_id": text.soft_prompt_id,
        "softprompt.evaluation_run_id": found.run.info.run_id,
        "softprompt.method": method,
        "softprompt.proposer": chosen and chosen.proposer,
        "softprompt.verified_score": None if chosen is None else _number(chosen.verified_score),
        "softprompt.faithfulness": _number(text.faithfulness),
        "softprompt.faithfulness_interval": _interval(text.faithfulness_interval),
        "softprompt.heldout_faithfulness": None if other is None else _number(other.faithfulness),
        "softprompt.heldout_faithfulness_interval": _interval(other_interval),
        "softprompt.abstained": str(text.abstained).lower(),
        "softprompt.abstention_reason": text.reason[:500] if text.abstained and text.reason else None,
        "softprompt.bank_model_id": bank and bank.model_id,
        "softprompt.translator_model_id": translator and translator.model_id,
        conventions.TAG_BANK_DIGEST: bank and bank.params.get(conventions.PARAM_BANK_DIGEST),
        conventions.TAG_BASE_FINGERPRINT: text.base_fingerprint,
        conventions.TAG_BASE_MODEL: base and base.params.get(conventions.PARAM_BASE_MODEL),
        conventions.TAG_DOD_NAME: dod_name,
        conventions.TAG_DOD_DIGEST: dod_digest,
    }
    return {key: str(value) for key, value in facts.items() if value is not None}


def _dod_of(run: Run, models: Sequence[LoggedModel | None]) -> tuple[str | None, str | None]:
    """Name and digest of the DoD that was evaluated on; a dataset input holds only the digest's beginning."""
    for item in run.inputs.dataset_inputs if run.inputs else []:
        if item.dataset.source_type == conventions.DOD_SOURCE_TYPE:
            whole = [model.params.get(conventions.PARAM_DOD_DIGEST, "") for model in models if model is not None]
            begun = item.dataset.digest
            return item.dataset.name, next((digest for digest in whole if digest.startswith(begun)), begun)
    return None, None


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"


def _interval(ends: tuple[float, float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.6g} to {ends[1]:.6g}"
