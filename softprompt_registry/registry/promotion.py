"""Promotion: a policy decides whether an alias may move to a version, and an MLflow run keeps the decision.

The run is written before the alias moves, so no move goes unrecorded; its tag `softprompt.outcome` is set to `promoted`
only afterwards, so a record that says so is true.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput
from mlflow.entities.model_registry import ModelVersion

from softprompt_registry.config import build_config, read_yaml, settings
from softprompt_registry.errors import PromotionRefused, RegistryError
from softprompt_registry.registry.conventions import (
    EVALUATION_PREFIX,
    OUTCOME_PROMOTED,
    OUTCOME_REFUSED,
    OUTCOME_TAG,
    STAGE_PROMOTE,
    STAGE_TAG,
    TAG_BASE_FINGERPRINT,
    TAG_MODEL_ID,
)
from softprompt_registry.registry.lookup import (
    aliases_of,
    check_alias,
    evaluation_metrics,
    find_logged_model,
    find_version,
    metrics_of_tags,
    quoted,
    search_versions,
)
from softprompt_registry.registry.store import open_run


@settings
class Policy:
    minimum: Mapping[str, float] = field(default_factory=dict)
    """Evaluation metric → the least value that may be promoted, for instance `label_recall: 0.5`."""
    require_same_base: bool = True
    """Refuse a version of another base model than the version that holds the alias now."""

    def __post_init__(self) -> None:
        minimum = {metric.removeprefix(EVALUATION_PREFIX): value for metric, value in self.minimum.items()}
        object.__setattr__(self, "minimum", minimum)


def read_policy(path: Path) -> Policy:
    """The policy in a YAML file whose keys are the fields of `Policy`."""
    values = read_yaml(path)
    if values.get("minimum") is None:  # `minimum:` with nothing below it
        values.pop("minimum", None)
    return build_config(Policy, values, f"the promotion policy {str(path)!r}")


@dataclass(frozen=True)
class RuleResult:
    rule: str
    required: float | str
    found: float | str | None
    """`None` where there is nothing to compare, which fails the rule."""
    passed: bool

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "failed"
        return f"{self.rule}: {verdict}, required {self.required}, found {'none' if self.found is None else self.found}"


@dataclass(frozen=True)
class Decision:
    name: str
    version: int
    alias: str
    promoted: bool
    previous_version: int | None
    """Holder of the alias before; the version itself when it held the alias already."""
    rules: tuple[RuleResult, ...]
    forced: bool
    """A failed rule was overridden."""
    reason: str | None
    run_id: str


def promote(
    name: str,
    version: int | None = None,
    *,
    alias: str = "champion",
    policy: Policy,
    allow_base_change: bool = False,
    force: bool = False,
    reason: str | None = None,
) -> Decision:
    """Move `alias` to a version (default: the latest) if the policy allows it; the decision either way is an MLflow run.

    The run goes to the active experiment, below the active run if there is one. Its `decision.json` holds everything.

    Args:
        force: promote though rules fail; needs a `reason`, which is recorded.

    Raises:
        PromotionRefused: a rule failed; names each with what was required and found.
        RegistryError: the version does not exist or was not registered with its lineage, the alias cannot be used, or
            another promotion moved the alias meanwhile.
    """
    reason = (reason or "").strip() or None
    if force and reason is None:
        raise RegistryError(f"promoting {name!r} by force: no reason was given. Say why with --reason; it is recorded.")
    check_alias(alias, f"promoting {name!r} to")
    client = MlflowClient()
    aliases = aliases_of(name)
    if aliases is None:
        raise RegistryError(
            f"promoting {name!r}: there is no registered model of this name. `softprompt list` shows those there are."
        )
    candidate = _candidate(name, version)
    previous_version = aliases.get(alias)
    previous = None if previous_version is None else find_version(name, previous_version)
    metrics = _metrics_of(candidate)
    rules = _apply(policy, candidate, previous, metrics, allow_base_change)
    passed = all(rule.passed for rule in rules)
    number = int(candidate.version)

    tags = {STAGE_TAG: STAGE_PROMOTE, TAG_MODEL_ID: candidate.tags[TAG_MODEL_ID]}
    with open_run(f"promote {name} {number}", tags) as run_id:
        decision = Decision(
            name=name,
            version=number,
            alias=alias,
            promoted=passed or force,
            previous_version=previous_version,
            rules=rules,
            forced=force and not passed,
            reason=reason,
            run_id=run_id,
        )
        _record(client, decision, policy, metrics, candidate, allow_base_change)
        if decision.promoted:
            # Narrows the gap in which a second promotion could be lost; MLflow has no compare-and-set for aliases.
            holder = (aliases_of(name) or {}).get(alias)
            if holder != previous_version:
                raise RegistryError(
                    f"promoting {name!r} version {number} to {alias!r}: another promotion moved the alias from "
                    f"{_or_nobody(previous_version)} to {_or_nobody(holder)} meanwhile. Promote again."
                )
            client.set_registered_model_alias(name, alias, str(number))
        client.set_tag(run_id, OUTCOME_TAG, OUTCOME_PROMOTED if decision.promoted else OUTCOME_REFUSED)

    if not decision.promoted:
        failed = [rule for rule in rules if not rule.passed]
        raise PromotionRefused(
            f"promoting {name!r} version {number} to {alias!r}: {len(failed)} of {len(rules)} rules failed.\n"
            + "\n".join(f"  - {rule}" for rule in failed)
            + f"\nThe record is run {decision.run_id}. Promote a better version, or use --force with --reason."
        )
    return decision


def _candidate(name: str, version: int | None) -> ModelVersion:
    versions = search_versions(f"name = {quoted(name)}")
    candidate = next((item for item in reversed(versions) if version in (None, int(item.version))), None)
    if candidate is None:
        known = ", ".join(str(item.version) for item in versions) or "none"
        wanted = "the latest version" if version is None else f"version {version}"
        raise RegistryError(f"promoting {wanted} of {name!r}: there is no such version; there are: {known}.")
    if not candidate.tags.get(TAG_MODEL_ID):
        raise RegistryError(
            f"promoting {name!r} version {candidate.version}: it has no tag {TAG_MODEL_ID!r}, so its lineage and metrics are "
            "unknown. Register it with `softprompt register` and promote that version."
        )
    return candidate


def _metrics_of(version: ModelVersion) -> dict[str, float]:
    """From the LoggedModel, where evaluations after the registration arrive too; the tags are a copy for when it is gone."""
    model = find_logged_model(version.tags[TAG_MODEL_ID])
    return metrics_of_tags(version.tags) if model is None else evaluation_metrics(model)


def _apply(
    policy: Policy,
    candidate: ModelVersion,
    previous: ModelVersion | None,
    metrics: Mapping[str, float],
    allow_base_change: bool,
) -> tuple[RuleResult, ...]:
    rules = []
    for metric, least in policy.minimum.items():
        found = metrics.get(metric)
        rules.append(RuleResult(f"minimum {metric}", least, found, found is not None and found >= least))
    if policy.require_same_base and not allow_base_change and previous is not None:
        required = previous.tags.get(TAG_BASE_FINGERPRINT, "(unknown)")
        base = candidate.tags.get(TAG_BASE_FINGERPRINT)
        rules.append(RuleResult("same base model", required, base, base == required))
    return tuple(rules)


def _record(
    client: MlflowClient,
    decision: Decision,
    policy: Policy,
    metrics: Mapping[str, float],
    candidate: ModelVersion,
    allow_base_change: bool,
) -> None:
    # With a prefix: an MLproject has logged params named `name` and `alias` already, and a param cannot change.
    params: dict[str, Any] = {
        "promote.name": decision.name,
        "promote.version": decision.version,
        "promote.alias": decision.alias,
        "promote.previous_version": _or_nobody(decision.previous_version),
        "promote.promoted": decision.promoted,
        "promote.forced": decision.forced,
        "promote.reason": decision.reason or "none",
        "promote.allow_base_change": allow_base_change,
        "promote.require_same_base": policy.require_same_base,
    }
    params.update({f"promote.minimum.{metric}": least for metric, least in policy.minimum.items()})
    mlflow.log_params(params)
    for metric, value in metrics.items():
        # Not mlflow.log_metric, which would log the value onto the active LoggedModel a second time.
        client.log_metric(decision.run_id, EVALUATION_PREFIX + metric, value)
    model_id = candidate.tags[TAG_MODEL_ID]
    if find_logged_model(model_id) is not None:
        mlflow.log_input(model=LoggedModelInput(model_id))
    mlflow.log_dict(
        {
            **dataclasses.asdict(decision),
            "policy": dataclasses.asdict(policy),
            "allow_base_change": allow_base_change,
            "metrics": dict(metrics),
            "model_id": model_id,
            "base_fingerprint": candidate.tags.get(TAG_BASE_FINGERPRINT),
        },
        "decision.json",
    )


def _or_nobody(version: int | None) -> str:
    return "none" if version is None else str(version)
