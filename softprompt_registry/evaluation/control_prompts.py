"""Control prompts: does the abstention rule refuse soft prompts that were not tuned?

Three kinds take the place of the real soft prompts of the same tasks: vectors drawn at random, noise with the mean and spread
of a real soft prompt, and a real one with its tokens shuffled. The last may still do some of what the real one does, so the
kinds are counted apart. Metrics and files keep the name `garbage`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.verbalization.verbalizer import Verbalization

KINDS = ("random vectors", "noise", "shuffled tokens")
THRESHOLDS = tuple(step / 20 for step in range(21))
"""Thresholds of faithfulness that the curve is drawn for."""


@dataclass(frozen=True)
class ControlPrompt:
    """A soft prompt that was not tuned, in the place of one that was."""

    kind: str
    """One of `KINDS`."""
    soft_prompt: SoftPrompt
    """Its record is that of the real one: it claims to be for the same task."""


def control_prompts(
    base_model: BaseModel, soft_prompts: Sequence[SoftPrompt], count: int, *, seed: int = 0
) -> list[ControlPrompt]:
    """`count` control prompts, the kinds in turn, for the tasks of the real ones in turn.

    Random vectors are normal, with mean and standard deviation of the base model's token embeddings; noise has those of the
    real soft prompt, dimension by dimension over its K tokens. A soft prompt of one token cannot be shuffled and gives noise.
    """
    generator = torch.Generator().manual_seed(seed)
    # Rows that pad the matrix belong to no token.
    vocabulary = base_model.input_embeddings[: len(base_model.tokenizer)].float()
    spread, middle = vocabulary.std().item(), vocabulary.mean().item()
    made = []
    for number in range(count):
        real = soft_prompts[number // len(KINDS) % len(soft_prompts)]
        kind = KINDS[number % len(KINDS)]
        embeddings = real.embeddings.detach().float().cpu()
        if kind == "shuffled tokens" and len(embeddings) == 1:
            kind = "noise"
        if kind == "random vectors":
            changed = torch.randn(embeddings.shape, generator=generator) * spread + middle
        elif kind == "noise":
            changed = _noise_like(embeddings, generator)
        else:
            changed = embeddings[_other_order(len(embeddings), generator)]
        made.append(ControlPrompt(kind, replace(real, embeddings=changed.to(real.embeddings.dtype))))
    return made


def _noise_like(embeddings: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal noise (K, D) with the mean of each dimension over K tokens, and the spread of the whole about these means."""
    means = embeddings.mean(dim=0, keepdim=True)
    spread = (embeddings - means).std() if len(embeddings) > 1 else embeddings.std()
    return means + spread * torch.randn(embeddings.shape, generator=generator)


def _other_order(length: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.arange(length)
    while torch.equal(order, torch.arange(length)):
        order = torch.randperm(length, generator=generator)
    return order


class ControlPoint(NamedTuple):
    """What a rule with one threshold of faithfulness lets through; shares."""

    threshold: float
    garbage_refused: float
    random_vectors_refused: float | None
    """None where there is none of that kind; so are the others."""
    noise_refused: float | None
    shuffled_tokens_refused: float | None
    good_passed: float | None
    """Share of the real soft prompts with a good text that pass; None where there is no such text."""
    real_passed: float
    """Share of all real soft prompts that pass."""


@dataclass(frozen=True)
class ControlResult:
    """How many control prompts were refused, and how many good texts of real soft prompts were given."""

    rows: dict[str, list[Any]]
    """Columns kind, task, text, abstained, reason, faithfulness: one row per control prompt."""
    metrics: dict[str, float]
    """garbage_refused_share over all and per kind (`garbage_refused_share_noise`); good_passed_share of the real soft prompts
    whose text is good, where there is one; real_passed_share of all real ones; how many of each."""
    curve: tuple[ControlPoint, ...]
    """The same shares for thresholds from 0 to 1, independent of the rule."""

    @property
    def curve_table(self) -> dict[str, list[Any]]:
        """The curve's columns."""
        return {name: [getattr(point, name) for point in self.curve] for name in ControlPoint._fields}


def control_result(
    controls: Sequence[ControlPrompt],
    verbalized: Sequence[Verbalization],
    real: Sequence[Verbalization],
    good: Mapping[str, bool],
    not_tuned: Collection[str] = (),
) -> ControlResult:
    """The counts.

    Args:
        verbalized: of each control prompt, judged by the rule.
        real: of the real soft prompts, judged by the same rule.
        good: by task, whether the real soft prompt's text says what the task is.
        not_tuned: tasks whose real soft prompts are refused whatever their text says.
    """
    metrics = {"num_garbage": float(len(controls)), "garbage_refused_share": _share(verbalized, abstained=True)}
    for kind in KINDS:
        of_kind = [text for item, text in zip(controls, verbalized, strict=True) if item.kind == kind]
        if of_kind:
            metrics[f"garbage_refused_share_{kind.replace(' ', '_')}"] = _share(of_kind, abstained=True)
    good_ones = [text for text in real if good[text.task]]
    metrics |= {"num_good": float(len(good_ones)), "real_passed_share": _share(real, abstained=False)}
    if good_ones:
        metrics["good_passed_share"] = _share(good_ones, abstained=False)
    rows: dict[str, list[Any]] = {
        "kind": [item.kind for item in controls],
        "task": [text.task for text in verbalized],
        "text": [text.text for text in verbalized],
        "abstained": [text.abstained for text in verbalized],
        "reason": [text.reason for text in verbalized],
        "faithfulness": [text.faithfulness for text in verbalized],
    }
    shown = [(item.kind, _faithfulness(text)) for item, text in zip(controls, verbalized, strict=True)]
    kept = {text.task: None if text.task in not_tuned else _faithfulness(text) for text in real}
    curve = tuple(_point(threshold, shown, kept, good) for threshold in THRESHOLDS)
    return ControlResult(rows, metrics, curve)


def _faithfulness(text: Verbalization) -> float | None:
    """None if no threshold would give it."""
    return text.faithfulness if text.text.strip() else None


def _point(
    threshold: float,
    controls: Sequence[tuple[str, float | None]],
    real: Mapping[str, float | None],
    good: Mapping[str, bool],
) -> ControlPoint:
    def passed(values: Sequence[float | None]) -> float | None:
        return sum(value is not None and value >= threshold for value in values) / len(values) if values else None

    def refused(kinds: Sequence[str]) -> float | None:
        share = passed([value for kind, value in controls if kind in kinds])
        return None if share is None else 1 - share

    random_vectors, noise, shuffled_tokens = (refused([kind]) for kind in KINDS)
    return ControlPoint(
        threshold,
        refused(KINDS) or 0.0,
        random_vectors,
        noise,
        shuffled_tokens,
        passed([value for task, value in real.items() if good[task]]),
        passed(list(real.values())) or 0.0,
    )


def _share(texts: Sequence[Verbalization], *, abstained: bool) -> float:
    return sum(text.abstained == abstained for text in texts) / len(texts)
