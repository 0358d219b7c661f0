"""The names under which this project keeps its facts in MLflow, said once.

MLflow has no edge from model to model and shows no tags of a LoggedModel, so the facts that carry the lineage are params of
the LoggedModel (which the UI shows and searches) and tags of the model version. Light: imports neither mlflow nor torch.
"""

from __future__ import annotations

from softprompt_registry.fingerprints import SHORT

# Types of LoggedModels.
BASE_MODEL = "softprompt_base_model"
"""An external LoggedModel, one per fingerprint; named by `base_model_name`."""
BANK = "softprompt_bank"
SOFT_PROMPT = "softprompt_soft_prompt"
TRANSLATOR = "softprompt_translator"
PORTABLE_PROMPT = "softprompt_portable_prompt"

MODEL_WORDS = {
    BASE_MODEL: "base model",
    BANK: "bank",
    SOFT_PROMPT: "soft prompt",
    TRANSLATOR: "translator",
    PORTABLE_PROMPT: "portable prompt",
}
"""What a person calls each type."""

# Params of LoggedModels.
PARAM_BASE_FINGERPRINT = "base_fingerprint"
PARAM_BASE_MODEL = "base_model"
PARAM_DOD_NAME = "dod_name"
PARAM_DOD_DIGEST = "dod_digest"
"""The full SHA-256; MLflow's dataset inputs hold `dataset_digest` of it."""
PARAM_BANK_DIGEST = "bank_digest"
PARAM_ARTIFACT_DIGEST = "artifact_digest"
PARAM_TASK = "task"
"""Only on what belongs to one task: soft prompts and portable prompts."""
PARAM_BANK_MODEL_ID = "bank_model_id"
PARAM_TRANSLATOR_MODEL_ID = "translator_model_id"

UPSTREAM_PARAMS = {PARAM_BANK_MODEL_ID: BANK, PARAM_TRANSLATOR_MODEL_ID: TRANSLATOR}
"""Params that hold the id of the LoggedModel that this one was made from, and that model's type."""
REQUIRED_UPSTREAM = {TRANSLATOR: BANK, PORTABLE_PROMPT: TRANSLATOR}
"""What each type is always made from."""

# Metrics of LoggedModels.
EVALUATION_PREFIX = "evaluation."

# Runs.
STAGE_TAG = "softprompt.stage"
STAGE_AUDIT_DOD = "audit-dod"
STAGE_TUNE = "tune"
STAGE_SOFT_PROMPT = "soft-prompt"
"""Child runs of tuning, one per soft prompt."""
STAGE_TRAIN_TRANSLATOR = "train-translator"
STAGE_INSPECT_GRID = "inspect-grid"
STAGE_EVALUATE = "evaluate"
STAGE_EVALUATE_METHOD = "evaluate-method"
"""Child runs of an evaluation, one per method."""
STAGE_STUDY = "study"
STAGE_STUDY_POINT = "study-point"
"""Child runs of a study, one per point."""
STAGE_PORTABILITY = "portability"
STAGE_PORTABILITY_CONDITION = "portability-condition"
"""Child runs of a portability run, one for each target and condition."""
STAGE_PUBLISH = "publish"
STAGE_REGISTER = "register"
STAGE_PROMOTE = "promote"
OUTCOME_TAG = "softprompt.outcome"
"""On a promotion's run: `promoted`, set only after the alias has moved, or `refused`."""
OUTCOME_PROMOTED = "promoted"
OUTCOME_REFUSED = "refused"

# Dataset inputs.
DOD_SOURCE_TYPE = "dod"
DATASET_DIGEST_LENGTH = 36
"""MLflow stores no longer digest of a dataset."""

# Tags of model versions.
TAG_PREFIX = "softprompt."
TAG_BASE_FINGERPRINT = "softprompt.base_fingerprint"
TAG_BASE_MODEL = "softprompt.base_model"
TAG_DOD_NAME = "softprompt.dod_name"
TAG_DOD_DIGEST = "softprompt.dod_digest"
TAG_BANK_DIGEST = "softprompt.bank_digest"
TAG_ARTIFACT_DIGEST = "softprompt.artifact_digest"
TAG_TASK = "softprompt.task"
TAG_MODEL_TYPE = "softprompt.model_type"
TAG_MODEL_ID = "softprompt.model_id"
TAG_RUN_ID = "softprompt.run_id"
METRIC_TAG_PREFIX = "softprompt.metric."

TAG_OF_PARAM = {
    PARAM_BASE_FINGERPRINT: TAG_BASE_FINGERPRINT,
    PARAM_BASE_MODEL: TAG_BASE_MODEL,
    PARAM_DOD_NAME: TAG_DOD_NAME,
    PARAM_DOD_DIGEST: TAG_DOD_DIGEST,
    PARAM_BANK_DIGEST: TAG_BANK_DIGEST,
    PARAM_ARTIFACT_DIGEST: TAG_ARTIFACT_DIGEST,
    PARAM_TASK: TAG_TASK,
}
"""A version repeats these params of its LoggedModel, so that it can be searched, and read when the LoggedModel is gone."""
LINEAGE_PARAMS = frozenset((*TAG_OF_PARAM, PARAM_BANK_MODEL_ID))
"""What a portable prompt takes over from its translator."""


def base_model_name(fingerprint: str) -> str:
    """Name of the LoggedModel that stands for a base model. A base model's own name may hold a `.` that MLflow refuses."""
    return f"base-model-{fingerprint[:SHORT]}"


def dataset_digest(dod_digest: str) -> str:
    """A DoD's digest as MLflow's dataset inputs hold it."""
    return dod_digest[:DATASET_DIGEST_LENGTH]
