"""What each study varies: its points, and what must be true before the first of them is worth starting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from softprompt_registry.base_models.reference import BaseModelRef, require_same_base
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import ArtifactError, ConfigError, DataError
from softprompt_registry.evaluation.evaluating import EvaluationConfig, settings_digest
from softprompt_registry.fingerprints import digest_of_directory, digest_of_json
from softprompt_registry.registry.artifacts import find_artifact
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig
from softprompt_registry.stages.running import require_same_dod
from softprompt_registry.stages.study_settings import StudyConfig
from softprompt_registry.translators.training import TranslatorConfig
from softprompt_registry.translators.translator import TranslatorRecord, read_record

CONTROL = "most_frequent_target"
"""The method that counts the texts of the translator's training tasks."""


@dataclass(frozen=True)
class StudySource:
    """A DoD with its bank."""

    dod: Path
    bank: str
    """Folder, models:/… or runs:/…."""
    dod_name: str
    dod_digest: str
    dod_tasks: tuple[str, ...]
    bank_digest: str
    base_model: BaseModelRef
    num_virtual_tokens: int
    train_tasks: tuple[str, ...]
    """The bank's tasks on the DoD's training side."""
    test_tasks: tuple[str, ...]

    @classmethod
    def read(cls, dod: Path, bank: str) -> StudySource:
        found = SoftPromptBank(find_artifact(bank, "bank").folder)
        members = set(found.tasks())
        with DodStore.open(dod) as store:
            require_same_dod(found, store)
            train, test = (
                tuple(name for name in store.task_names(split) if name in members) for split in ("train", "test")
            )
            return cls(
                dod,
                bank,
                store.name,
                store.digest,
                tuple(store.task_names()),
                found.digest,
                found.base_model,
                int(found.header["K"]),
                train,
                test,
            )


@dataclass(frozen=True)
class PlannedPoint:
    """One point of a study: which translator reads which soft prompts, and how."""

    name: str
    evaluated_on: StudySource
    evaluation: EvaluationConfig
    trained_on: StudySource | None = None
    """What the translator learns from; None for one that is given."""
    translator: TranslatorConfig | None = None
    own_translator: bool = False
    """Whether it is trained for this point alone."""
    tuning: TuningConfig | None = None
    """The test tasks are tuned anew with these; None reads the bank."""
    value: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyPlan:
    """A study that can be started."""

    study: str
    config: StudyConfig
    points: tuple[PlannedPoint, ...]
    given_translator: str | None = None
    given_digest: str | None = None
    notes: tuple[str, ...] = ()
    """What a reader of the results should know."""

    @property
    def sources(self) -> list[StudySource]:
        """Every DoD and bank that is used, once."""
        used = [source for point in self.points for source in (point.trained_on, point.evaluated_on) if source]
        return list({(source.dod_digest, source.bank_digest): source for source in used}.values())

    def origin(self, point: PlannedPoint, base_model: BaseModelRef) -> str:
        """Digest of all that makes a point's result; what only changes speed does not count."""
        translator: Any = self.given_digest
        if point.trained_on is not None and point.translator is not None:
            translator = [point.trained_on.dod_digest, point.trained_on.bank_digest, point.translator.identity]
        tuning = None if point.tuning is None else point.tuning.identity
        read = [point.evaluated_on.dod_digest, point.evaluated_on.bank_digest, tuning]
        return digest_of_json(
            [self.study, base_model.fingerprint, base_model.dtype, translator, read, settings_digest(point.evaluation)]
        )


def plan_study(
    study: str,
    config: StudyConfig,
    dod: Path,
    bank: str,
    *,
    translator: str | None = None,
    others: Sequence[tuple[Path, str]] = (),
) -> StudyPlan:
    """The points of a study, checked as far as that is possible without a base model.

    Args:
        study: one of `STUDIES`.
        translator: a trained one for the studies that need only one; None trains it on `dod` and `bank`.
        others: further DoDs with their banks, for `labels` and `out-of-domain`.

    Raises:
        ConfigError: the study cannot be made of these settings and inputs.
        DataError: a DoD lacks tasks that the study needs.
        ArtifactError: the banks do not belong together.
    """
    if study not in STUDIES:
        raise ConfigError(f"planning a study: there is no study {study!r}; there are {', '.join(STUDIES)}.")
    make, takes_translator, takes_others = _STUDIES[study]
    if translator is not None and not takes_translator:
        raise ConfigError(
            f"planning study {study!r}: a translator is given, but the study trains one for each of its points. Leave "
            "--translator out."
        )
    if bool(others) != takes_others:
        found, expected = (f"{len(others)} other DoDs", "none") if others else ("no other DoD", "at least one")
        raise ConfigError(
            f"planning study {study!r}: found {found} with a bank (--other), expected {expected}. "
            + ("Leave them out." if others else "Give the DoD and the bank to compare with.")
        )
    source = StudySource.read(dod, bank)
    given = _Given(study, config, source, [StudySource.read(*other) for other in others])
    for other in given.others:
        require_same_base(
            f"planning study {study!r}", f"bank {bank!r}", source.base_model, f"bank {other.bank!r}", other.base_model
        )
        if other.num_virtual_tokens != source.num_virtual_tokens:
            raise ArtifactError(
                f"planning study {study!r}: the soft prompts of bank {bank!r} have K={source.num_virtual_tokens}, those of "
                f"{other.bank!r} K={other.num_virtual_tokens}; expected the same, or the points differ in that too. Tune "
                "both with one num_virtual_tokens."
            )
    record = given_digest = None
    if translator is not None:
        folder = find_artifact(translator, "translator").folder
        record, given_digest = read_record(folder), digest_of_directory(folder)
        require_same_base(
            f"planning study {study!r}", f"bank {bank!r}", source.base_model, "the translator", record.base_model
        )
    points = make(given)
    if translator is not None:
        points = [replace(point, translator=None, trained_on=None) for point in points]
    _require_tasks(study, points)
    points = [_with_possible_methods(point, record, given.notes) for point in points]
    return StudyPlan(study, config, tuple(points), translator, given_digest, tuple(given.notes))


@dataclass
class _Given:
    """What points are made of; `notes` grows on the way."""

    study: str
    config: StudyConfig
    source: StudySource
    others: list[StudySource]
    notes: list[str] = field(default_factory=list)

    def point(self, name: str, **changes: Any) -> PlannedPoint:
        """The point that changes nothing, but for `changes`."""
        usual = PlannedPoint(name, self.source, self.config.evaluation, self.source, self.config.translator)
        return replace(usual, **changes)

    def require_default(self, section: str, settings: Any, name: str, default: Any) -> None:
        """What a study varies cannot be set for all of its points too."""
        if getattr(settings, name) != default:
            raise ConfigError(
                f"planning study {self.study!r}: {section}.{name} is {getattr(settings, name)!r}, but that is what the study "
                "varies. Leave the setting out."
            )

    def named(self) -> list[tuple[str, StudySource]]:
        """Every source with a name of its own: that of its DoD, with a number behind it where that is taken."""
        found: dict[str, StudySource] = {}
        for source in (self.source, *self.others):
            name, number = source.dod_name, 1
            while name in found:
                number += 1
                name = f"{source.dod_name}-{number}"
            found[name] = source
        return list(found.items())


def _dod_size(given: _Given) -> list[PlannedPoint]:
    translator = given.config.translator
    given.require_default("translator", translator, "train_share", 1.0)
    return [
        given.point(
            f"share-{share:g}", value=share, translator=replace(translator, train_share=share), own_translator=True
        )
        for share in given.config.shares
    ]


def _paraphrase_factor(given: _Given) -> list[PlannedPoint]:
    config, translator = given.config, given.config.translator
    given.require_default("translator", translator, "max_hard_prompts", None)
    if not translator.shuffle_labels:
        raise ConfigError(
            f"planning study {given.study!r}: translator.shuffle_labels is false, with which a training learns each task's "
            "first hard prompt only; expected true. Leave the setting out."
        )
    with DodStore.open(given.source.dod) as store:
        tasks = (store.task(name) for name in given.source.train_tasks)
        counts = [len(task.hard_prompts) for task in tasks if task.kind != "classification"]
    if not counts:
        raise DataError(
            f"planning study {given.study!r}: DoD {given.source.dod_name!r} has no training task with hard prompts in the "
            "bank; expected some. The order of label lists is shuffled instead: there is nothing to paraphrase."
        )
    beyond = [factor for factor in config.factors if factor > max(counts)]
    if beyond:
        possible = [factor for factor in config.factors if factor not in beyond] or [max(counts)]
        raise ConfigError(
            f"planning study {given.study!r}: the factors {beyond} ask for more hard prompts than any training task of DoD "
            f"{given.source.dod_name!r} has; the most is {max(counts)}. Write more with `softprompt paraphrase-dod`, or "
            f"leave them out: -s factors={possible}."
        )
    points = []
    for factor in config.factors:
        fewer = sum(count < factor for count in counts)
        if fewer:
            given.notes.append(f"factor {factor}: {fewer} of {len(counts)} training tasks have fewer hard prompts.")
        epochs = translator.epochs * factor if config.scale_epochs else translator.epochs
        if epochs < factor:
            given.notes.append(
                f"factor {factor}: each of the {epochs} epochs shows one hard prompt of a task, so a training sees at most "
                f"{epochs} of the {factor}. Set scale_epochs, or more epochs, to see all."
            )
        points.append(
            given.point(
                f"factor-{factor}",
                value=float(factor),
                translator=replace(translator, max_hard_prompts=factor, epochs=epochs),
                own_translator=True,
                facts={"epochs": epochs, "tasks_with_fewer": fewer},
            )
        )
    return points


def _prefill(given: _Given) -> list[PlannedPoint]:
    evaluation = given.config.evaluation
    given.require_default("evaluation.verbalization", evaluation.verbalization, "prefill", "")
    given.require_default("evaluation", evaluation, "prefills", ())
    return [given.point("no-prefill", facts={"prefill": ""})] + [
        given.point(
            f"prefill-{number}",
            evaluation=replace(evaluation, verbalization=replace(evaluation.verbalization, prefill=prefill)),
            facts={"prefill": prefill},
        )
        for number, prefill in enumerate(given.config.prefills, start=1)
    ]


def _labels(given: _Given) -> list[PlannedPoint]:
    return [given.point(f"trained-on-{name}", trained_on=source, own_translator=True) for name, source in given.named()]


def _accuracy(given: _Given) -> list[PlannedPoint]:
    config, source = given.config, given.source
    tuning = config.tuning or _tuning_of(given)
    if tuning.num_virtual_tokens != source.num_virtual_tokens:
        raise ConfigError(
            f"planning study {given.study!r}: tuning.num_virtual_tokens is {tuning.num_virtual_tokens}, but the soft prompts "
            f"of bank {source.bank!r}, which the translator learns from, have {source.num_virtual_tokens}; expected the "
            "same. Leave the tuning settings out to take those of the bank."
        )
    word = "train-pairs" if config.varied == "max_train_pairs" else "epochs"
    settings: dict[int, Any] = {amount: {config.varied: amount} for amount in config.amounts}
    return [
        given.point(
            f"{word}-{amount}",
            value=float(amount),
            tuning=replace(tuning, **settings[amount]),
            facts={f"tuning.{config.varied}": amount},
        )
        for amount in config.amounts
    ]


def _tuning_of(given: _Given) -> TuningConfig:
    """The settings that the bank's soft prompts were tuned with."""
    record = next(SoftPromptBank(find_artifact(given.source.bank, "bank").folder).records())
    known = {item.name: record["tuning"][item.name] for item in fields(TuningConfig) if item.name in record["tuning"]}
    if "num_virtual_tokens" not in known:
        raise ConfigError(
            f"planning study {given.study!r}: bank {given.source.bank!r} does not say how its soft prompts were tuned. Give "
            "the settings in the section `tuning`."
        )
    return TuningConfig(**known)


def _out_of_domain(given: _Given) -> list[PlannedPoint]:
    return [given.point(f"tested-on-{name}", evaluated_on=source) for name, source in given.named()]


_STUDIES: dict[str, tuple[Callable[[_Given], list[PlannedPoint]], bool, bool]] = {
    "dod-size": (_dod_size, False, False),
    "paraphrase-factor": (_paraphrase_factor, False, False),
    "prefill": (_prefill, True, False),
    "labels": (_labels, False, True),
    "accuracy": (_accuracy, True, False),
    "out-of-domain": (_out_of_domain, True, True),
}
"""Name → what makes its points, whether it takes a given translator, whether it takes other DoDs."""
STUDIES = tuple(_STUDIES)


def _require_tasks(study: str, points: Sequence[PlannedPoint]) -> None:
    """Trainings take hours: that there is nothing to train or to test on should be known before the first."""
    for point in points:
        for source, side in ((point.trained_on, "train"), (point.evaluated_on, "test")):
            if source is not None and not (source.train_tasks if side == "train" else source.test_tasks):
                raise DataError(
                    f"planning study {study!r}: bank {source.bank!r} has no soft prompt of a {side} task of DoD "
                    f"{source.dod_name!r}, which point {point.name!r} needs. Tune those tasks too, and mark them with split "
                    f"'{side}' in the DoD."
                )


def _with_possible_methods(point: PlannedPoint, given: TranslatorRecord | None, notes: list[str]) -> PlannedPoint:
    """Without the control where the translator's training tasks, whose texts it counts, are not in the evaluated DoD."""
    trained = given.train_tasks if point.trained_on is None and given else ()
    trained = point.trained_on.train_tasks if point.trained_on is not None else trained
    methods = tuple(name for name in point.evaluation.methods if name != CONTROL)
    if CONTROL not in point.evaluation.methods or not methods or set(trained) <= set(point.evaluated_on.dod_tasks):
        return point
    notes.append(
        f"{point.name}: without {CONTROL}, since the translator learned from another DoD than it is tested on."
    )
    return replace(point, evaluation=replace(point.evaluation, methods=methods))
