"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from softprompt_registry.errors import ConfigError
from softprompt_registry.fingerprints import digest_of_file, digest_of_json
from softprompt_registry.verbalization.proposers.instruction_induction import InductionConfig
from softprompt_registry.verbalization.proposing import METHODS
from softprompt_registry.verbalization.verbalizer import VerbalizationConfig
from softprompt_registry.verbalization.verifier import VerifierConfig


@dataclass(frozen=True)
class AbstentionConfig:
    """How the rule is found by which a text is held back."""

    min_faithfulness: float | None = None
    """A threshold that is given, in place of one that is chosen on training tasks: that of another evaluation's rule.json."""
    precision: float = 0.8
    """At least this share of the texts that are given shall be good, on training tasks."""
    num_tasks: int = 24
    """Training tasks that the rule is chosen on, at most; those that the translator held out come first."""
    good_label_f1: float = 0.5
    """A label list of at least this F1 is good."""
    good_cosine: float = 0.5
    """Another text of at least this cosine with its ground truth is good."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is compared, and how."""

    methods: tuple[str, ...] = (
        "translator",
        "behaviour",
        "instruction_induction",
        "nearest_tokens",
        "most_frequent_target",
    )
    """The first one is compared with each other. Of translator, inspect, behaviour, instruction_induction, label_list,
    nearest_tokens, most_frequent_target."""
    layer_grid: str | None = None
    """File that `inspect-grid` wrote; the method inspect takes the pair that is best on its training tasks."""
    layer_pair: tuple[int, ...] | None = None
    """Source and target layer for the method inspect, in place of a grid; -1 is the embedding layer."""
    prefills: tuple[str, ...] = ()
    """Beginnings for which translators write candidates of their own (paper, appendix A.12)."""
    num_beams: int | None = None
    """Width of the translators' beam search, whose texts become candidates too."""
    verbalization: VerbalizationConfig = field(default_factory=VerbalizationConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    abstention: AbstentionConfig = field(default_factory=AbstentionConfig)
    induction: InductionConfig = field(default_factory=InductionConfig)
    garbage_prompts: int = 0
    """So many soft prompts of garbage are read too, to see how many of them the rule refuses; 100 give shares to a few %."""
    categories: str | None = None
    """JSON file with a category by task name, for the breakdown. None takes a task's kind and the collection it is from."""
    seed: int = 0
    """Of the bootstraps over tasks, of the inputs that behaviour is watched on, and of the garbage."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ConfigError(
                f"reading the evaluation settings: methods is {list(self.methods)}, expected some of {list(METHODS)}, each "
                "once."
            )
        if self.garbage_prompts < 0:
            raise ConfigError(
                f"reading the evaluation settings: garbage_prompts is {self.garbage_prompts}, expected 0 or more."
            )
        if self.layer_pair is not None and len(self.layer_pair) != 2:
            raise ConfigError(
                f"reading the evaluation settings: layer_pair is {list(self.layer_pair)}, expected a source and a target "
                "layer."
            )
        if "inspect" in self.methods and not (self.layer_grid or self.layer_pair):
            raise ConfigError(
                "reading the evaluation settings: the method inspect needs the setting layer_grid or layer_pair. Give it, "
                "or leave the method out."
            )


def settings_digest(config: EvaluationConfig) -> str:
    """Digest of the settings and of the content of the files that they name.

    Raises:
        FileNotFoundError: there is no such file.
    """
    values = asdict(config)
    for name in ("layer_grid", "categories"):
        if values[name] is not None:
            values[name] = digest_of_file(Path(values[name]))
    return digest_of_json(values)
