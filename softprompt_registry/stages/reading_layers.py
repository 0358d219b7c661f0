"""The layer grid of InSPEcT as an MLflow run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlflow

from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import flatten
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.grid_figure import heatmap
from softprompt_registry.evaluation.layer_grid import LayerGridConfig, read_layer_grid
from softprompt_registry.evaluation.metrics import SentenceEncoder
from softprompt_registry.registry import conventions
from softprompt_registry.stages.running import dod_stage
from softprompt_registry.verbalization.layer_grid import LayerGrid


@dataclass(frozen=True)
class LayerGridResult:
    """The grid, and the run that holds it."""

    run_id: str
    grid: LayerGrid


def read_grid(
    base_model: BaseModel,
    bank_uri: str,
    dod_path: Path,
    config: LayerGridConfig,
    out: Path,
    *,
    train_tasks: int,
    test_tasks: int | None = None,
) -> LayerGridResult:
    """Read training tasks with every layer pair to choose one, and test tasks to measure it beside the oracle.

    Args:
        train_tasks: the first so many of the bank's training tasks.
        test_tasks: the same for test tasks; None takes all.
    """
    with dod_stage(conventions.STAGE_INSPECT_GRID, base_model, dod_path, context="evaluation", bank=bank_uri) as stage:
        bank, store = stage.bank, stage.store
        in_bank = set(bank.tasks())
        train = [name for name in store.task_names("train") if name in in_bank][:train_tasks]
        test = [name for name in store.task_names("test") if name in in_bank][:test_tasks]
        if not train:
            raise DataError(
                f"choosing a layer pair: the bank has no soft prompt of a training task of DoD {store.name!r}; expected at "
                "least one. Tune training tasks too: a pair chosen on test tasks would be an oracle."
            )
        recorder = MlflowRecorder(dataset=stage.dataset)
        recorder.params("layer_grid", {**flatten(config), "train_tasks": len(train), "test_tasks": len(test)})
        members = [(bank.member(name), store.task(name)) for name in (*train, *test)]
        grid = read_layer_grid(base_model, members, SentenceEncoder(), out, config, recorder=recorder)
        for kind in grid.kinds:
            for name, value in grid.metrics(kind).items():
                recorder.metric(f"{conventions.EVALUATION_PREFIX}inspect_{kind}_{name}", value)
            for split in ("train", "test"):
                if any((item.split, item.kind) == (split, kind) for item in grid.tasks):
                    title = f"InSPEcT: mean score of every layer pair, {kind}, {split} tasks"
                    recorder.figure(f"layer_grid_{kind}_{split}.png", heatmap(title, grid.mean_scores(split, kind)))
        oracle = {f"{task} (oracle)": item._asdict() for task, item in grid.oracle().items()}
        mlflow.log_dict(oracle, "oracle.json")
        recorder.artifact(out)
    return LayerGridResult(stage.run_id, grid)
