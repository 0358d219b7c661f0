"""Reading and scoring a layer grid: which layer pair of InSPEcT says most of training tasks (appendix A.3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import PositiveInt

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.config import settings
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.metrics import TextEncoder, cosine_similarity, label_score
from softprompt_registry.fingerprints import SHORT, digest_of_json
from softprompt_registry.recording import NullRecorder, ProgressBar, Recorder
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.storage import (
    check_format_version,
    forget,
    locked,
    read_json,
    require_same_origin,
    write_json,
)
from softprompt_registry.verbalization.layer_grid import FORMAT_VERSION, LayerGrid, TaskReadings
from softprompt_registry.verbalization.patching import (
    MAX_NEW_TOKENS,
    LayerPair,
    PatchedRow,
    all_pairs,
    cut_description,
    read_examples,
    read_patched,
    source_states,
    target_prompt,
)


@settings
class LayerGridConfig:
    """Which pairs are tried, and how the texts are read."""

    step: PositiveInt = 1
    """Distance of the layers that are tried; 1 is the full grid of L² pairs, 2 a quarter of them."""
    max_new_tokens: PositiveInt = MAX_NEW_TOKENS
    """Length cap of a text before it is cut to its first description."""
    examples_folder: str | None = None
    """Folder with changed copies of the example descriptions; None takes our own."""
    rows_per_batch: PositiveInt | None = None
    """Texts that are read together; None takes as many as fit in memory."""


def score_texts(texts: Sequence[str], task: Task, encoder: TextEncoder) -> list[float]:
    """How near each text is to the task's truth: what the pair is chosen by (appendix A.3).

    For classification the mean of F1 and recall of the label set, with labels of several words as phrases; for other tasks
    the cosine with the first ground-truth hard prompt.
    """
    if task.kind == "classification":
        scores = [label_score(text, task.labels, mode="phrase") for text in texts]
        return [(score.f1 + score.recall) / 2 for score in scores]
    return cosine_similarity(texts, [task.ground_truth] * len(texts), encoder)


def read_layer_grid(
    base_model: BaseModel,
    members: Sequence[tuple[SoftPrompt, Task]],
    encoder: TextEncoder,
    out: Path,
    config: LayerGridConfig | None = None,
    *,
    recorder: Recorder | None = None,
) -> LayerGrid:
    """Read every soft prompt with every layer pair, score the texts and write the grid to `out`.

    The texts of each soft prompt are on the disk, in `<out>.reading`, as soon as the last of them is read; a second start
    with the same base model and settings resumes there, and takes a finished grid as it is. A soft prompt shares no
    batch with another one, so its texts depend on nothing but itself.

    Args:
        members: soft prompts with their tasks, of training tasks to choose a pair and of test tasks to measure it.
        encoder: for tasks that are no classification.
        out: a JSON file.

    Raises:
        DataError: there is no soft prompt, one belongs to another task, a task occurs twice or has no ground truth.
        BaseModelMismatch: a soft prompt belongs to another base model.
        ConfigError: the base model is no plain stack of decoder layers, or its context is too short (see `read_patched`).
        ArtifactError: `out` holds a grid made from other soft prompts, tasks, settings or base model.
        BusyError: another process reads a grid into `out`.
    """
    config = config or LayerGridConfig()
    recorder = recorder or NullRecorder()
    _check_members(base_model, members)
    examples = {task.kind: read_examples(task.kind, config.examples_folder) for _, task in members}
    settings = {"step": config.step, "max_new_tokens": config.max_new_tokens, "examples": examples}
    origin = [base_model.ref.fingerprint, base_model.ref.dtype]
    made_from = digest_of_json([*origin, settings, [[prompt.id, task.digest, task.split] for prompt, task in members]])
    if out.exists():
        return _take_over(out, made_from)
    work = out.with_name(f"{out.name}.reading")
    with locked(work):
        if out.exists():  # another process finished it just now
            forget(work)
            return _take_over(out, made_from)
        pairs = all_pairs(base_model.ref.num_layers, config.step)
        tasks = []
        with recorder.progress("read layer grid", len(members) * len(pairs)) as bar:
            for soft_prompt, task in members:
                texts_of = digest_of_json([*origin, {**settings, "examples": examples[task.kind]}])[:SHORT]
                kept = work / texts_of / f"{soft_prompt.id}.json"
                bar.advance(0, task.name)
                texts = _texts(base_model, soft_prompt, pairs, examples[task.kind], config, kept, bar)
                scores = score_texts(texts, task, encoder)
                tasks.append(
                    TaskReadings(
                        task=task.name,
                        kind=task.kind,
                        split=task.split,
                        truth=task.ground_truth,
                        soft_prompt_id=soft_prompt.id,
                        texts=tuple(texts),
                        scores=tuple(scores),
                    )
                )
        grid = LayerGrid(base_model.ref, tuple(pairs), tuple(tasks), settings, made_from)
        grid.save(out)
        forget(work)
    return grid


def _texts(
    base_model: BaseModel,
    soft_prompt: SoftPrompt,
    pairs: Sequence[LayerPair],
    examples: Sequence[str],
    config: LayerGridConfig,
    kept: Path,
    bar: ProgressBar,
) -> list[str]:
    """What every pair says of one soft prompt, from the disk where an earlier start has left it."""
    what = f"the readings of soft prompt {soft_prompt.record.task!r}"
    if kept.exists():
        record = read_json(kept, what)
        check_format_version(record, FORMAT_VERSION, what)
        bar.advance(len(pairs), "taken from an earlier start")
        return list(record["texts"])
    found = read_patched(
        base_model,
        source_states(base_model, soft_prompt.embeddings[None]),
        [PatchedRow(0, pair) for pair in pairs],
        target_prompt(base_model, examples),
        max_new_tokens=config.max_new_tokens,
        rows_per_batch=config.rows_per_batch,
        on_rows=lambda rows: bar.advance(rows, soft_prompt.record.task),
    )
    texts = [cut_description(base_model.decode(ids)) for ids in found]
    write_json(kept, {"format_version": FORMAT_VERSION, "texts": texts})
    return texts


def _take_over(out: Path, made_from: str) -> LayerGrid:
    grid = LayerGrid.load(out)
    require_same_origin("a layer grid", out, grid.made_from, made_from)
    return grid


def _check_members(base_model: BaseModel, members: Sequence[tuple[SoftPrompt, Task]]) -> None:
    names = [task.name for _, task in members]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if not members or doubled:
        found = f"the tasks {doubled[:5]} occur twice" if doubled else "there is no soft prompt"
        raise DataError(
            f"reading a layer grid: {found}; expected soft prompts of distinct tasks. Correct the choice of them."
        )
    for soft_prompt, task in members:
        if soft_prompt.record.task != task.name or not task.ground_truth:
            found = f"soft prompt {soft_prompt.record.task!r} stands beside it"
            if soft_prompt.record.task == task.name:
                found = "it has no ground truth"
            raise DataError(
                f"reading a layer grid for task {task.name!r}: {found}; expected the task's own soft prompt, and labels or a "
                "hard prompt to compare with. Choose other tasks, or correct this one."
            )
        require_same_base(
            "reading a layer grid",
            f"soft prompt {soft_prompt.record.task!r}",
            soft_prompt.record.base_model,
            "the loaded model",
            base_model.ref,
        )
