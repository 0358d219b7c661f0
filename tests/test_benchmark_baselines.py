"""The baselines of the tuning benchmark do the same work as ours: same losses, same order, nothing left behind."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llm import tiny_base_model
from torch.utils.flop_counter import FlopCounterMode

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.soft_prompts.encoding import RowEncoder
from softprompt_registry.soft_prompts.progress import initial_embeddings
from softprompt_registry.soft_prompts.tuning import tune_soft_prompts
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CONFIG = TuningConfig(
    num_virtual_tokens=4,
    learning_rate=0.05,
    epochs=4,
    patience_epochs=None,
    batch_size=4,
    max_sequence_tokens=96,
    max_new_tokens=4,
    seed=3,
)
WORDS = ("cat", "horse", "ox", "mouse", "elephant", "hen", "wolf", "bee", "fox", "owl")


def small_tasks() -> list[Task]:
    """Two tasks with rows and targets of several lengths, and a last batch that is not full."""
    tasks = []
    for name, labels in (("size", ("big", "small one")), ("letter", ("a", "bc"))):
        pairs = tuple(
            Pair(f"the {word}{' again' * (i % 3)}", labels[len(word) % 2], "train" if i < 7 else "validation")
            for i, word in enumerate(WORDS)
        )
        tasks.append(Task(name=name, kind="classification", pairs=pairs, labels=labels))
    return tasks


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[Any]:
    """`peft_baselines` and `matrix_products`, which are scripts' modules and no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


@pytest.fixture(scope="module")
def baselines(benchmarks: Any) -> Any:
    return benchmarks("peft_baselines")


@pytest.fixture(scope="module")
def base_model() -> BaseModel:
    return tiny_base_model()


@pytest.fixture(scope="module")
def rows(baselines: Any, base_model: BaseModel) -> list[Any]:
    def encoded(task: Task, split: Any) -> list[tuple[list[int], list[int]]]:
        pairs = [
            RowEncoder.of_new_prompts(base_model).pair(task.template, pair, 92)[0] for pair in task.pairs_of(split)
        ]
        return [(pair.prompt, pair.target) for pair in pairs]

    return [
        baselines.Rows(
            task.name,
            encoded(task, "train"),
            encoded(task, "validation"),
            initial_embeddings(base_model, CONFIG, task),
        )
        for task in small_tasks()
    ]


@pytest.fixture(scope="module")
def settings(baselines: Any) -> Any:
    return baselines.Settings(CONFIG.epochs, CONFIG.batch_size, CONFIG.learning_rate, CONFIG.seed)


@pytest.fixture(scope="module")
def results(baselines: Any, base_model: BaseModel, rows: list[Any], settings: Any) -> dict[str, list[Any]]:
    """Both baselines, in float32."""
    model, tokenizer = base_model.model, base_model.tokenizer
    return {
        "trainer": baselines.with_trainer(model, tokenizer, rows, settings),
        "loop": baselines.with_loop(model, tokenizer, rows, settings, dtype=torch.float32),
    }


@pytest.mark.parametrize("way", ["trainer", "loop"])
def test_both_baselines_lower_the_loss(results: dict[str, list[Any]], rows: list[Any], way: str) -> None:
    assert [result.task for result in results[way]] == ["size", "letter"]
    for result, task_rows in zip(results[way], rows, strict=True):
        assert len(result.validation_losses) == CONFIG.epochs
        assert result.validation_losses[-1] < result.validation_losses[0] - 0.1
        assert result.seconds > 0
        assert result.embeddings.shape == (4, 64) and result.embeddings.dtype == torch.float32
        assert not torch.equal(result.embeddings, task_rows.initial)


def test_both_baselines_take_the_same_steps(results: dict[str, list[Any]]) -> None:
    for one, other in zip(results["trainer"], results["loop"], strict=True):
        assert one.validation_losses == pytest.approx(other.validation_losses, abs=1e-4)
        assert one.final_train_loss == pytest.approx(other.final_train_loss, abs=1e-4)
        assert torch.allclose(one.embeddings, other.embeddings, atol=1e-3)
        assert one.train_tokens == other.train_tokens


def test_the_baselines_take_the_steps_of_ours(
    results: dict[str, list[Any]], base_model: BaseModel, tmp_path: Path
) -> None:
    bank = tune_soft_prompts(base_model, small_tasks(), CONFIG, tmp_path / "bank")
    for result in results["loop"]:
        tuning = bank.member(result.task).record.tuning
        assert result.validation_losses == pytest.approx(tuning["validation_losses"], abs=1e-4)
        assert result.final_train_loss == pytest.approx(tuning["train_losses"][-1], abs=1e-4)


def test_peft_scores_rows_as_we_do(baselines: Any, base_model: BaseModel, rows: list[Any]) -> None:
    assert baselines.check_same_loss(base_model, rows) < 1e-4


@pytest.mark.parametrize("way", ["with_trainer", "with_loop"])
def test_the_base_model_is_left_as_it_was(baselines: Any, rows: list[Any], settings: Any, way: str) -> None:
    base_model = tiny_base_model(seed=1)
    model, tokenizer = base_model.model, base_model.tokenizer
    tokenizer.padding_side = "left"

    def state() -> tuple[Any, ...]:
        modules = [(name, module.training, module.forward) for name, module in model.named_modules()]
        settings = model.config.to_dict(), model.generation_config.to_dict(), tokenizer.padding_side
        return modules, settings, [name for name in vars(model) if not name.startswith("_")]

    before, weights = state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = getattr(baselines, way)(model, tokenizer, rows[:1], settings, dtype=None)[0]
    lower = getattr(baselines, way)(model, tokenizer, rows[:1], settings, dtype=torch.bfloat16)[0]
    assert state() == before
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert lower.embeddings.dtype == torch.float32
    # bfloat16 was used, and tuned the same task.
    assert own.validation_losses != lower.validation_losses
    assert own.validation_losses == pytest.approx(lower.validation_losses, rel=0.1)


@pytest.mark.parametrize("backward", [True, False])
def test_flops_are_those_that_torch_counts(benchmarks: Any, base_model: BaseModel, backward: bool) -> None:
    products = benchmarks("matrix_products")
    config = base_model.model.config
    rows, tokens = 3, 20
    embeds = torch.randn(rows, tokens, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = base_model.model(inputs_embeds=embeds, use_cache=False).logits
        if backward:
            logits.sum().backward()
    # Eager attention also computes the pairs that the mask hides.
    hidden_pairs = rows * tokens * (tokens - 1) // 2
    done_in_vain = 4 * 64 * 2 * hidden_pairs * (3 if backward else 1)
    needed = products.flops_of_training(config, [tokens] * rows, rows * tokens, backward=backward)
    # torch also counts the product that makes the rotary angles.
    assert counter.get_total_flops() == pytest.approx(needed + done_in_vain, rel=1e-3)
    weights = [p.numel() for name, p in base_model.model.named_parameters() if "layers" in name and p.dim() == 2]
    assert products.layer_weights(config) == sum(weights)
