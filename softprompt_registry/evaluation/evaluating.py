"""Evaluating: choose tasks and the abstention rule, verbalize with every method, and read control prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from softprompt_registry.config import Distinct, PositiveShare, Share, flatten, settings
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.control_prompts import ControlPrompt, ControlResult, control_prompts, control_result
from softprompt_registry.evaluation.metrics import TextEncoder
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.evaluation.text_scores import EvaluatedTask, cosines_of, label_score_of, scored_text, truth_of
from softprompt_registry.fingerprints import digest_of_file, digest_of_json
from softprompt_registry.recording import NullRecorder, Recorder
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.abstention import AbstentionRule, choose_rule, why_not_tuned
from softprompt_registry.verbalization.held_out import MIN_ITEMS, split_pairs
from softprompt_registry.verbalization.kept_parts import KeptParts, KeptProposer, KeptVerifier
from softprompt_registry.verbalization.methods import ALL, WITH_VERIFIER, MethodTexts, apply_methods
from softprompt_registry.verbalization.proposers.instruction_induction import InductionConfig
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.proposing import METHODS, NOT_AMONG_ALL, Sources, make_proposers
from softprompt_registry.verbalization.verbalizer import Proposer, Verbalization, VerbalizationConfig
from softprompt_registry.verbalization.verifier import Verifier, VerifierConfig

BEST = f"{ALL}{WITH_VERIFIER}"
"""The method whose texts the rule is chosen on: the verifier's choice among all candidates."""


@settings
class AbstentionConfig:
    """How the rule is found by which a text is withheld."""

    min_faithfulness: float | None = None
    """Fixed threshold, for instance from another evaluation's rule.json. None chooses one on training tasks."""
    precision: PositiveShare = 0.8
    """Smallest share of good texts among those that the rule gives on training tasks."""
    num_tasks: NonNegativeInt = 24
    """Training tasks that the rule is chosen on, at most; those that the translator held out come first."""
    good_label_f1: Share = 0.5
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
    """The first one is compared with each other. Known are translator, inspect, behaviour, instruction_induction, label_list,
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
    """Number of control prompts (random, noise, shuffled) that are read too, to see how many of them the rule refuses; 100
    give shares to a few %."""
    categories: str | None = None
    """JSON file with a category by task name, for the breakdown. None takes a task's kind and the collection it is from."""
    seed: int = 0
    """Seed for the bootstraps over tasks, the inputs that behaviour is watched on, and the control prompts."""

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


def evaluate(
    translator: Translator,
    bank: SoftPromptBank,
    store: DodStore,
    config: EvaluationConfig,
    encoder: TextEncoder,
    *,
    work: Path | None = None,
    recorder: Recorder | None = None,
) -> EvaluationRecord:
    """Verbalize the bank's test tasks with every method, without and with the verifier; `EvaluationRecord.score` scores them.

    The abstention rule is chosen on training tasks. A test task with too few held-out pairs is left out, and named.

    Args:
        bank: soft prompts of the DoD's tasks, of the translator's base model.
        work: folder that keeps what is done, so that a second start with the same settings resumes; the caller locks and
            removes it. None keeps nothing.

    Raises:
        DataError: the translator has seen a test task, or no test task can be evaluated.
    """
    base = translator.base_model.ref
    origin = [base.fingerprint, base.dtype, translator.id, store.digest, settings_digest(config)]
    kept = KeptParts(work, digest_of_json(origin))
    verifier = KeptVerifier(translator.base_model, config.verifier, kept)
    doing = _Work(translator, bank, store, verifier, kept, encoder, config, recorder or NullRecorder())
    tasks, left_out = doing.usable(_test_tasks(store, bank, translator))
    if not tasks:
        name, reason = next(iter(left_out.items()))
        raise DataError(
            f"evaluating a translator on DoD {store.name!r}: none of its {len(left_out)} test tasks in the bank can be "
            f"evaluated, expected at least one. The first, {name!r}: {reason}"
        )
    rule, calibration = _choose_rule(doing)
    made = doing.methods(tasks, rule)
    return EvaluationRecord(
        {name: EvaluatedTask.of(task, accuracy_of(bank.record(name)["metrics"])) for name, task in tasks.items()},
        made.texts,
        made.ranking,
        made.reporting,
        rule,
        flatten(config),
        left_out,
        made.failures,
        calibration,
        _read_controls(doing, tasks, made, rule) if config.garbage_prompts else None,
    )


def accuracy_of(metrics: Mapping[str, float]) -> float | None:
    """How well a soft prompt does its task on test pairs: label accuracy, or exact match; None if neither was measured."""
    accuracy = metrics.get("label_accuracy", metrics.get("exact_match"))
    return None if accuracy is None else float(accuracy)


@dataclass(frozen=True)
class _Work:
    """What all parts of one evaluation use."""

    translator: Translator
    bank: SoftPromptBank
    store: DodStore
    verifier: Verifier
    kept: KeptParts
    encoder: TextEncoder
    config: EvaluationConfig
    recorder: Recorder

    def usable(self, names: Sequence[str]) -> tuple[dict[str, Task], dict[str, str]]:
        """The tasks that can be verified and scored, and the reasons of the others."""
        tasks, left_out = {}, {}
        for name in names:
            task = self.store.task(name)
            reason = self._why_not(task)
            if reason is None:
                tasks[name] = task
            else:
                left_out[name] = reason
        return tasks, left_out

    def _why_not(self, task: Task) -> str | None:
        if not task.ground_truth:
            return "it has neither labels nor a hard prompt that texts could be compared with. Give it one in `hard_prompts`."
        try:
            halves = split_pairs(task, self.config.verifier.seed)
            for pairs in halves:
                self.verifier.check_pairs(self.bank.member(task.name), pairs)
        except DataError as error:
            return str(error)
        found = min(map(len, halves))
        if found < MIN_ITEMS:
            return (
                f"half of its held-out pairs are {found}, expected at least {MIN_ITEMS}: fewer say nothing for sure. Give it "
                f"at least {2 * MIN_ITEMS} test and validation pairs with different inputs."
            )
        return None

    def methods(self, tasks: Mapping[str, Task], rule: AbstentionRule, *, test_order: bool = True) -> MethodTexts:
        proposers = make_proposers(self.config.methods, Sources(self.translator, self.store, tasks, self.config))
        prompts = [self.bank.member(name) for name in tasks]
        return self.verbalized(prompts, tasks, proposers, rule, test_order=test_order)

    def verbalized(
        self,
        prompts: Sequence[SoftPrompt],
        tasks: Mapping[str, Task],
        proposers: Sequence[Proposer],
        rule: AbstentionRule,
        *,
        test_order: bool,
    ) -> MethodTexts:
        return apply_methods(
            prompts,
            tasks,
            [KeptProposer(proposer, self.kept) for proposer in proposers],
            self.config.verbalization,
            self.verifier,
            rule,
            without_verifier=NOT_AMONG_ALL,
            translator_id=self.translator.id,
            test_order=test_order,
            recorder=self.recorder,
        )

    def is_good(self, item: Verbalization, task: Task) -> bool:
        """Whether a text says what the task is: a label list by its F1, another text by its cosine with the truth."""
        limits, truth, text = self.config.abstention, truth_of(task), scored_text(item.text, item.prefill)
        labels = label_score_of(text, truth)
        if labels is not None:
            return labels.f1 >= limits.good_label_f1
        return cosines_of([text], [truth], self.encoder)[0] >= limits.good_cosine


def _test_tasks(store: DodStore, bank: SoftPromptBank, translator: Translator) -> list[str]:
    """The bank's tasks of the DoD's test split, none of which the translator may have seen."""
    members = set(bank.tasks())
    names = [name for name in store.task_names("test") if name in members]
    seen = sorted(set(names) & set(translator.record.train_tasks))
    if seen or not names:
        found = f"the translator was trained on {seen[:5]}" if seen else "the bank has no soft prompt of a test task"
        raise DataError(
            f"evaluating a translator on DoD {store.name!r}: {found}; expected test tasks that it never saw. "
            "Mark tasks with split 'test' in the DoD and tune them too."
        )
    return names


def _choose_rule(work: _Work) -> tuple[AbstentionRule, dict[str, list[Any]]]:
    """The settings' abstention rule, or the one whose given texts of training tasks are good at least at the set precision,
    with the table that it was chosen on. Training tasks that the translator held out come first."""
    limits, record = work.config.abstention, work.translator.record
    if limits.min_faithfulness is not None:
        return AbstentionRule(limits.min_faithfulness), {}
    held_out = record.training.get("validation_tasks", [])
    others = [name for name in record.train_tasks if name not in held_out]
    members = set(work.bank.tasks()) & set(work.store.task_names("train"))
    names = [name for name in (*held_out, *others) if name in members][: limits.num_tasks]
    tasks, _ = work.usable(names)
    if not tasks:
        return AbstentionRule(), {}
    # This rule withholds nothing.
    texts = work.methods(tasks, AbstentionRule(), test_order=False).texts[BEST]
    good = [work.is_good(item, tasks[item.task]) for item in texts]
    faithfulness = [item.faithfulness for item in texts]
    table: dict[str, list[Any]] = {
        "task": [item.task for item in texts],
        "truth": [tasks[item.task].ground_truth for item in texts],
        "text": [item.text for item in texts],
        "faithfulness": faithfulness,
        "good": good,
    }
    return choose_rule(faithfulness, good, limits.precision), table


def _read_controls(work: _Work, tasks: Mapping[str, Task], made: MethodTexts, rule: AbstentionRule) -> ControlResult:
    """Have the translator read control prompts, and count how many of them and of the real soft prompts pass the rule."""
    config = work.config
    real = [work.bank.member(name) for name in tasks]
    controls = control_prompts(work.translator.base_model, real, config.garbage_prompts, seed=config.seed)
    read = _refused_unread(work, tasks, controls)
    left = [number for number in range(len(controls)) if number not in read]
    if left:
        reader = TranslatorProposer(work.translator, prefills=config.prefills, num_beams=config.num_beams)
        prompts = [controls[number].soft_prompt for number in left]
        # What is left has passed the test of its order.
        written = work.verbalized(prompts, tasks, [reader], rule, test_order=False)
        read |= zip(left, _chosen(written.texts), strict=True)
    of_translator = _chosen(made.texts)
    good = {item.task: work.is_good(item, tasks[item.task]) for item in of_translator}
    not_tuned = {item.task for item in made.ranking if why_not_tuned(item) is not None}
    return control_result(controls, [read[number] for number in range(len(controls))], of_translator, good, not_tuned)


def _refused_unread(
    work: _Work, tasks: Mapping[str, Task], controls: Sequence[ControlPrompt]
) -> dict[int, Verbalization]:
    """By number, the control prompts that are refused whatever is written of them (`why_not_tuned`)."""
    refused = {}
    with work.recorder.progress("measure the gain of control prompts", len(controls)) as bar:
        for number, prompt in enumerate(item.soft_prompt for item in controls):
            pairs = split_pairs(tasks[prompt.record.task], work.config.verifier.seed).ranking
            found = work.verifier.verify(prompt, [], pairs=pairs, test_order=True)
            reason = why_not_tuned(found)
            if reason is not None:
                fingerprint = prompt.record.base_model.fingerprint
                nothing = Verbalization("", prompt.record.task, (), prompt.id, fingerprint)
                refused[number] = replace(nothing, abstained=True, evidence=found.evidence, reason=reason)
            bar.advance(1, prompt.record.task)
    return refused


def _chosen(texts: Mapping[str, list[Verbalization]]) -> list[Verbalization]:
    """The translator's texts, chosen by the verifier where there is a choice."""
    name = TranslatorProposer.name
    return texts.get(f"{name}{WITH_VERIFIER}") or texts[name]
