"""The settings of a study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from pydantic import PositiveInt

from softprompt_registry.config import Distinct, PositiveShare, build_config, settings
from softprompt_registry.evaluation.evaluating import EvaluationConfig
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig
from softprompt_registry.translators.training import TranslatorConfig
from softprompt_registry.verbalization.methods import ALL, WITH_VERIFIER

DEFAULT_METHODS = ("translator", "most_frequent_target")
"""What a study evaluates at each point: the translator, and a control that looks at no soft prompt."""


@settings
class StudyConfig:
    """What a study compares. Each study reads its own points; all read the last three sections."""

    method: str = "translator"
    """Method that the study reports: one of evaluation.methods, also with `+verifier` behind it, or `all+verifier`."""
    shares: Distinct[PositiveShare] = (0.12, 0.25, 0.5, 1.0)
    """dod-size: shares of the training tasks (paper, Table 6: these)."""
    factors: Distinct[PositiveInt] = (1, 10, 100)
    """paraphrase-factor: hard prompts of each training task, the first ones of the DoD; 1 is the task's own (paper, Table 8:
    1, 10 and 100 paraphrases)."""
    scale_epochs: bool = False
    """paraphrase-factor: train `factor` times as many epochs, so that each hard prompt is seen as often. Paper: yes, its
    training set had a row for each of them. Without it all trainings take equally long."""
    prefills: Distinct[str] = ("Classify the given input into one of the following:",)
    """prefill: beginnings of the text, each beside none (paper, appendix A.12: this one)."""
    varied: Literal["max_train_pairs", "epochs"] = "max_train_pairs"
    """accuracy: the tuning setting that makes soft prompts better or worse."""
    amounts: Distinct[PositiveInt] = (8, 32, 128)
    """accuracy: its values."""
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    """How translators are trained, where a study trains any."""
    tuning: TuningConfig | None = None
    """accuracy: how the test tasks are tuned, but for what is varied. None takes the settings of the bank's own tuning."""
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(methods=DEFAULT_METHODS))
    """How each point is evaluated. `methods` is translator and most_frequent_target where it is not set."""

    def __post_init__(self) -> None:
        if any(not prefill.strip() for prefill in self.prefills):
            raise ValueError(
                f"prefills is {list(self.prefills)}, expected none that is blank: the point without a prefill is always there"
            )
        name = self.method.removesuffix(WITH_VERIFIER)
        if name not in self.evaluation.methods and self.method != f"{ALL}{WITH_VERIFIER}":
            raise ValueError(
                f"method is {self.method!r}, but evaluation.methods is {list(self.evaluation.methods)}; expected one of "
                f"these, also with {WITH_VERIFIER!r} behind it, or '{ALL}{WITH_VERIFIER}'"
            )


def read_study_config(values: Mapping[str, Any]) -> StudyConfig:
    """The settings of a study from a mapping. Where it does not name the methods, they are a study's, not an evaluation's."""
    evaluation = values.get("evaluation") or {}
    if isinstance(evaluation, Mapping):
        values = {**values, "evaluation": {"methods": list(DEFAULT_METHODS), **evaluation}}
    return build_config(StudyConfig, values, "the study settings")
