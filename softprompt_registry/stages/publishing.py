"""Publishing the texts of an evaluation as an MLflow run: into the Prompt Registry, with what is known about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlflow
from mlflow.entities import LoggedModel, LoggedModelInput, Run

from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry.errors import RegistryError
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.portability.conditions import CONDITIONS
from softprompt_registry.portability.hard_prompts import LABEL_LIST, instruction
from softprompt_registry.registry import conventions
from softprompt_registry.registry.artifacts import find_evaluation, find_portability
from softprompt_registry.registry.lookup import check_alias, find_logged_model, run_by_id, run_id_of
from softprompt_registry.registry.publishing import (
    PORTABILITY_CONDITION_TAG,
    PORTABILITY_RUN_TAG,
    TEMPLATE,
    PromptDraft,
    PublishedPrompt,
    draft,
    publish_prompt,
    target_score_tags,
    target_scores,
)
from softprompt_registry.stages.running import stage_run
from softprompt_registry.verbalization.methods import ALL, WITH_VERIFIER
from softprompt_registry.verbalization.verbalizer import Verbalization

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
        tasks: names; None publishes all tasks whose text is there and was not withheld.
        template: with the places `{hard_prompt}` and `{input}`.
        portability: run of `portability`, in whose own template the texts are published; its scores of this method become
            tags, each task's own.
        allow_abstained: publish texts, too, that the verifier abstained on; their tags say so.

    Raises:
        ArtifactError: the run is not there, or is not one of `evaluate`.
        RegistryError: the method or a task is unknown, a text that was named is empty or was withheld, or a name or the
            alias cannot be used.
        ConfigError: the template lacks one of its places.
    """
    check_alias(alias, "publishing under", ascii_only=True)
    record = find_evaluation(evaluation)
    run = mlflow.get_run(run_id_of(evaluation))
    doing = f"publishing texts of the evaluation {run.info.run_id!r}"
    if method not in record.texts:
        raise RegistryError(
            f"{doing}: the method {method!r} is not among those evaluated, {list(record.texts)}. Name one of these with "
            "--method."
        )
    texts = {text.task: text for text in record.texts[method]}
    unknown = sorted(set(tasks or ()) - set(texts))
    if unknown:
        raise RegistryError(
            f"{doing}: it has none for {unknown}; it has texts for {sorted(texts)}. Name one of these; a task that was left "
            "out stands in the run's left_out.json."
        )
    scores = _scores_on_targets(portability, run, method, record, template) if portability else {}
    source = _Source(run, record)
    drafts: list[PromptDraft] = []
    held_back = {}
    for task in texts if tasks is None else dict.fromkeys(tasks):
        text = texts[task]
        reason = None if text.text.strip() else "the method wrote nothing"
        if text.abstained and not allow_abstained and reason is None:
            reason = f"the verifier abstained: {text.reason}"
        if reason is None:
            hard_prompt = instruction(text.text, record.tasks[task].kind)
            tags = source.facts(text, method) | scores.get(task, {})
            drafts.append(draft(task, hard_prompt, frame=template, tags=tags))
        elif tasks is None:
            held_back[task] = reason
        else:
            hint = " Publish it all the same with --allow-abstained." if text.text.strip() else ""
            raise RegistryError(
                f"publishing the text of {method!r} for task {task!r}: {reason}. The text is {text.text[:200]!r}.{hint}"
            )
    with stage_run(conventions.STAGE_PUBLISH) as run_id:
        for model in source.models:
            mlflow.log_input(model=LoggedModelInput(model.model_id))
        recorder = MlflowRecorder()
        recorder.params(
            conventions.STAGE_PUBLISH,
            {
                "evaluation_run_id": run.info.run_id,
                "method": method,
                "alias": alias,
                "template": template,
                "portability_run_id": run_id_of(portability) if portability else None,
                "allow_abstained": allow_abstained,
            },
        )
        links = [model.model_id for model in source.models if model.model_type != conventions.BASE_MODEL]
        published = []
        with recorder.progress("publish", len(drafts)) as bar:
            for item in drafts:
                published.append(publish_prompt(item, alias=alias, runs=(run.info.run_id, run_id), models=links))
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


def _scores_on_targets(
    portability: str, evaluation: Run, method: str, record: EvaluationRecord, template: str
) -> dict[str, dict[str, str]]:
    """Task → tags with its scores in a portability run, which asked with these texts in these words."""
    run_id, evaluation_id = run_id_of(portability), evaluation.info.run_id
    doing = f"publishing texts of the evaluation {evaluation_id!r} with the scores of the portability run {run_id!r}"
    condition = next(
        (
            name
            for name, asked in CONDITIONS.items()
            if not asked.num_examples and next((by for by in asked.methods if by in record.texts), None) == method
        ),
        None,
    )
    if condition is None:
        known = sorted({by for asked in CONDITIONS.values() if not asked.num_examples for by in asked.methods})
        raise RegistryError(
            f"{doing}: no condition of `softprompt portability` asks with the texts of {method!r}; those asked with are of "
            f"{known}. Leave --portability out."
        )
    params = run_by_id(run_id, doing).data.params
    measured = params.get("portability.evaluation_run_id")
    if measured != evaluation_id:
        raise RegistryError(
            f"{doing}: that run measured those of {measured!r}; expected the same evaluation, since its scores become tags. "
            "Give the run that asked with these texts."
        )
    ours = {"label_list": LABEL_LIST, "templates.prompt": template}
    for setting, expected in ours.items():
        found = params.get(f"portability.{setting}", expected)
        if found != expected:
            raise RegistryError(
                f"{doing}: that run asked with {setting} {found[:200]!r}, the prompts would be published with "
                f"{expected[:200]!r}, so its scores are those of other prompts. Give its template with --template, or leave "
                "the portability run out."
            )
    asked_with = {PORTABILITY_RUN_TAG: run_id, PORTABILITY_CONDITION_TAG: condition}
    scores = target_scores(find_portability(run_id)[0], condition)
    return {task: target_score_tags(found) | asked_with for task, found in scores.items()}


class _Source:
    """An evaluation's run, the models that it read, and how good its texts are."""

    def __init__(self, run: Run, record: EvaluationRecord) -> None:
        self.run = run
        inputs = (run.inputs.model_inputs if run.inputs else None) or []
        models = [find_logged_model(item.model_id) for item in inputs]
        self.models = [model for model in models if model is not None]
        self._by_type = {model.model_type: model for model in reversed(self.models)}
        self._reporting = {item.soft_prompt_id: item for item in record.reporting}

    def facts(self, text: Verbalization, method: str) -> dict[str, str]:
        """Where a text came from and how good it is, as tags. What is not known has no tag."""
        chosen = next((candidate for candidate in text.candidates if candidate.text == text.text), None)
        reporting = self._reporting.get(text.soft_prompt_id)
        other = next((item for item in reporting.candidates if item.text == text.text), None) if reporting else None
        base, bank, translator = map(
            self._by_type.get, (conventions.BASE_MODEL, conventions.BANK, conventions.TRANSLATOR)
        )
        dod_name, dod_digest = self._dod([model for model in (bank, translator) if model is not None])
        facts: dict[str, object | None] = {
            "softprompt.soft_prompt_id": text.soft_prompt_id,
            "softprompt.evaluation_run_id": self.run.info.run_id,
            "softprompt.method": method,
            "softprompt.proposer": chosen and chosen.proposer,
            "softprompt.verified_score": chosen and _number(chosen.verified_score),
            "softprompt.faithfulness": _number(text.faithfulness),
            "softprompt.faithfulness_interval": _interval(*(text.faithfulness_interval or (None, None))),
            "softprompt.heldout_faithfulness": other and _number(other.faithfulness),
            "softprompt.heldout_faithfulness_interval": other and _interval(other.low, other.high),
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

    def _dod(self, models: Sequence[LoggedModel]) -> tuple[str | None, str | None]:
        """Name and digest of the DoD that was evaluated on; a dataset input holds only the digest's beginning."""
        for item in self.run.inputs.dataset_inputs if self.run.inputs else []:
            if item.dataset.source_type == conventions.DOD_SOURCE_TYPE:
                whole = [model.params.get(conventions.PARAM_DOD_DIGEST, "") for model in models]
                begun = item.dataset.digest
                return item.dataset.name, next((digest for digest in whole if digest.startswith(begun)), begun)
        return None, None


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"


def _interval(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{low:.6g} to {high:.6g}"
