"""The methods that an evaluation can name, and the proposers behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path

from pydantic import NonNegativeInt

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.config import Distinct, settings
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.evaluation.layer_grid import LayerGrid
from softprompt_registry.fingerprints import digest_of_file, digest_of_json
from softprompt_registry.translators.training import target_text
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.patching import LayerPair
from softprompt_registry.verbalization.proposers.behaviour import BehaviourProposer, training_inputs
from softprompt_registry.verbalization.proposers.inspect import InspectProposer
from softprompt_registry.verbalization.proposers.instruction_induction import (
    InductionConfig,
    InstructionInductionProposer,
)
from softprompt_registry.verbalization.proposers.label_list import LabelListProposer
from softprompt_registry.verbalization.proposers.most_frequent import MostFrequentTargetProposer
from softprompt_registry.verbalization.proposers.nearest_tokens import NearestTokensProposer
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import Proposer, VerbalizationConfig
from softprompt_registry.verbalization.verifier import VerifierConfig

METHODS = (
    "translator",
    "inspect",
    "behaviour",
    "instruction_induction",
    "label_list",
    "nearest_tokens",
    "most_frequent_target",
)
NOT_AMONG_ALL = ("label_list", "nearest_tokens", "most_frequent_target")
"""Methods whose texts are left out of `all+verifier`: one that is told the labels, and negative controls."""


@settings
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


@settings
class EvaluationConfig:
    """What is compared, and how."""

    methods: Distinct[str] = (
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
    layer_pair: tuple[int, int] | None = None
    """Source and target layer for the method inspect, in place of a grid; -1 is the embedding layer."""
    prefills: tuple[str, ...] = ()
    """Beginnings for which translators write candidates of their own (paper, appendix A.12)."""
    num_beams: int | None = None
    """Width of the translators' beam search, whose texts become candidates too."""
    verbalization: VerbalizationConfig = field(default_factory=VerbalizationConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    abstention: AbstentionConfig = field(default_factory=AbstentionConfig)
    induction: InductionConfig = field(default_factory=InductionConfig)
    garbage_prompts: NonNegativeInt = 0
    """So many soft prompts of garbage are read too, to see how many of them the rule refuses; 100 give shares to a few %."""
    categories: str | None = None
    """JSON file with a category by task name, for the breakdown. None takes a task's kind and the collection it is from."""
    seed: int = 0
    """Of the bootstraps over tasks, of the inputs that behaviour is watched on, and of the garbage."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"methods has {unknown}, expected some of {list(METHODS)}")
        if "inspect" in self.methods and not (self.layer_grid or self.layer_pair):
            raise ValueError("the method inspect needs layer_grid or layer_pair, found neither")


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


def make_proposers(
    base_model: BaseModel, translator: Translator, store: DodStore, tasks: Mapping[str, Task], config: EvaluationConfig
) -> list[Proposer]:
    """One proposer per method, in order.

    Args:
        tasks: those to be verbalized, by name.
    """
    made: list[Proposer] = []
    for method in config.methods:
        if method == "translator":
            made.append(TranslatorProposer(translator, prefills=config.prefills, num_beams=config.num_beams))
        elif method == "inspect":
            made.append(_inspect(base_model, tasks, config))
        elif method == "behaviour":
            inputs = {name: training_inputs(task, seed=config.seed) for name, task in tasks.items()}
            made.append(BehaviourProposer(base_model, inputs))
        elif method == "instruction_induction":
            made.append(InstructionInductionProposer(base_model, tasks, config.induction))
        elif method == "label_list":
            made.append(LabelListProposer(translator, tasks))
        elif method == "nearest_tokens":
            made.append(NearestTokensProposer(base_model))
        else:
            made.append(MostFrequentTargetProposer(_targets(store, translator.record.train_tasks)))
    return made


def _targets(store: DodStore, names: Sequence[str]) -> list[str]:
    unknown = sorted(set(names) - set(store.task_names()))
    if unknown:
        raise ConfigError(
            f"counting training targets for the method most_frequent_target: {len(unknown)} of the translator's {len(names)} "
            f"training tasks are not in DoD {store.name!r} (for instance {unknown[0]!r}), expected all; it was trained on "
            "another DoD. Leave the method out."
        )
    return [target_text(store.task(name), None) for name in names]


def _inspect(base_model: BaseModel, tasks: Mapping[str, Task], config: EvaluationConfig) -> InspectProposer:
    """With the given pair, or for each kind of task the grid's best on training tasks of that kind, on all if it has none."""
    if config.layer_pair is not None:
        return InspectProposer(base_model, LayerPair(*config.layer_pair))
    grid = LayerGrid.load(Path(str(config.layer_grid)))
    require_same_base("reading soft prompts", "the layer grid", grid.base_model, "the loaded model", base_model.ref)
    _require_unseen("the layer pair", [item.task for item in grid.tasks if item.split == "train"], tasks)
    seen = {item.kind for item in grid.tasks if item.split == "train"}
    kinds: list[str] = sorted({task.kind for task in tasks.values()})
    pairs = {kind: grid.best_pair(kind if kind in seen else None).pair for kind in kinds}
    return InspectProposer(base_model, pairs, examples=grid.settings["examples"])


def _require_unseen(what: str, chosen_on: Sequence[str], tasks: Mapping[str, Task]) -> None:
    seen = sorted(name for name in chosen_on if name in tasks and tasks[name].split == "test")
    if seen:
        raise DataError(
            f"verbalizing test tasks: {what} was chosen on {seen[:5]}; expected test tasks that it never saw. Make it anew "
            "on training tasks of this DoD."
        )
