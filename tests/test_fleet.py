"""The fleet: who shares the batch, memory that runs out and a neighbour that fails change nothing for a soft prompt."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from small_tasks import CONFIG, TASKS, make_task, write_dod
from tiny_llm import tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError, ConfigError
from softprompt_registry.soft_prompts import fleet as fleet_module
from softprompt_registry.soft_prompts import progress as progress_module
from softprompt_registry.soft_prompts.fleet import Fleet, train_step
from softprompt_registry.soft_prompts.progress import EncodedTask, Progress, begin, prepare
from softprompt_registry.soft_prompts.token_budget import TokenBudget, pieces
from softprompt_registry.soft_prompts.tuning import tune_soft_prompts
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig


def tiny_double() -> BaseModel:
    base = tiny_base_model()
    base.model.double()
    return base


Found = dict[str, tuple[Progress, dict[str, float]]]


def tuned(base: BaseModel, tasks: Sequence[Task], config: TuningConfig) -> Found:
    return {progress.task.name: (progress, scores) for progress, scores in Fleet(base, config).tune(tasks)}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base_model()


@pytest.fixture(scope="module")
def expected() -> Found:
    """All tasks in a fleet that nothing disturbs, in float64."""
    return tuned(tiny_double(), TASKS, CONFIG)


# The same answer ------------------------------------------------------------------------------------------------------

FALLING = replace(CONFIG, schedule="cosine", patience_epochs=1, epochs=5)


@pytest.fixture(scope="module")
def alone() -> Found:
    """Each task tuned by itself, in float64."""
    base, config, found = tiny_double(), replace(FALLING, slots=1, tokens_per_forward=10_000), {}
    for task in TASKS:
        found |= tuned(base, [task], config)
    return found


@pytest.mark.parametrize(
    ("config", "order"),
    [
        (FALLING, [0, 1, 2, 3, 4]),
        (FALLING, [4, 2, 3, 0, 1]),
        (replace(FALLING, slots=5, tokens_per_forward=50), [3, 0, 4, 1, 2]),
        (replace(FALLING, slots=2, tokens_per_forward=10_000), [1, 4, 2, 3, 0]),
    ],
    ids=["in order", "other order", "all at once, small pieces", "two at a time, one piece"],
)
def test_a_prompt_tuned_in_a_fleet_is_the_prompt_tuned_alone(
    alone: Found, config: TuningConfig, order: list[int]
) -> None:
    """In float64, but for norms and softmax, which transformers always works out in float32: 1e-6 after all steps."""
    together = tuned(tiny_double(), [TASKS[i] for i in order], config)
    assert sorted(together) == sorted(alone)
    for name, (by_itself, scores) in alone.items():
        shared, shared_scores = together[name]
        assert shared.prompt.dtype == torch.float64
        torch.testing.assert_close(shared.prompt, by_itself.prompt, rtol=0, atol=1e-6)
        assert shared.train_losses == pytest.approx(by_itself.train_losses, abs=1e-6)
        assert shared.validation_losses == pytest.approx(by_itself.validation_losses, abs=1e-6)
        assert (shared.best_epoch, shared_scores) == (by_itself.best_epoch, scores)


def without_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a model that keeps other things than all keys and values: rows take the soft prompts themselves."""
    monkeypatch.setattr(BaseModel, "prefixes", lambda self, soft_prompts, lead=(): None)


@pytest.mark.filterwarnings("ignore")  # torch warns of what it does itself while it compiles
def test_a_compiled_model_gives_the_same_prompts() -> None:
    config = replace(CONFIG, epochs=1)
    plain = tuned(tiny_base_model(), TASKS[:3], config)
    base = tiny_base_model()
    compiled = tuned(base, TASKS[:3], replace(config, compile=True))
    parts = {type(module).__name__ for module in base.model.modules() if module._compiled_call_impl is not None}
    assert parts == {"LlamaRMSNorm", "LlamaMLP"}
    for name, (progress, scores) in plain.items():
        torch.testing.assert_close(compiled[name][0].prompt, progress.prompt, rtol=0, atol=1e-5)
        assert compiled[name][1] == scores


def test_compiling_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="torch.compile needs a C\\+\\+ compiler"):
        Fleet(tiny_base_model(), replace(CONFIG, compile=True))


def test_a_model_without_shareable_prefixes_gives_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tuned(tiny_double(), TASKS, CONFIG)
    without_prefixes(monkeypatch)
    own = tuned(tiny_double(), TASKS, CONFIG)
    for task in TASKS:
        torch.testing.assert_close(own[task.name][0].prompt, shared[task.name][0].prompt, rtol=0, atol=1e-6)
        assert own[task.name][1] == shared[task.name][1]


def test_each_gradient_is_that_of_peft(base: BaseModel) -> None:
    """A plain PEFT prompt-tuning model, its own loss (a mean over target tokens), autograd from end to end."""
    progresses = [prepare(base, task, CONFIG) for task in TASKS]
    for number, progress in enumerate(progresses):
        noise = torch.randn(progress.prompt.shape, generator=torch.Generator().manual_seed(number))
        progress.prompt.data += 0.1 * noise
    losses = train_step(base, [p.prompt for p in progresses], [p.train for p in progresses], 150)
    for progress, loss in zip(progresses, losses, strict=True):
        own = tiny_base_model()
        settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=CONFIG.num_virtual_tokens)
        peft_model: Any = get_peft_model(own.model, settings)
        weight = peft_model.prompt_encoder["default"].embedding.weight
        weight.data.copy_(progress.prompt.detach())
        longest = max(row.num_tokens for row in progress.train)
        ids = torch.zeros(len(progress.train), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, row in enumerate(progress.train):
            ids[i, : row.num_tokens] = torch.tensor([*row.prompt, *row.target])
            mask[i, : row.num_tokens] = 1
            labels[i, len(row.prompt) : row.num_tokens] = torch.tensor(row.target)
        expected = peft_model(input_ids=ids, attention_mask=mask, labels=labels).loss
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert progress.prompt.grad is not None
        torch.testing.assert_close(progress.prompt.grad, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_on_the_packaged_model_a_fleet_agrees_with_tuning_alone() -> None:
    """In float32 the difference of rounding grows step by step through AdamW: below 1e-3 of a start of size 0.1."""
    packaged_model = load_base_model("packaged:smollm2-135m-instruct")
    config = replace(CONFIG, learning_rate=1e-3, epochs=1, max_sequence_tokens=64)
    together = tuned(packaged_model, TASKS[:2], config)
    for task in TASKS[:2]:
        ((alone, _),) = tuned(packaged_model, [task], replace(config, slots=1)).values()
        shared, _ = together[task.name]
        assert shared.validation_losses == pytest.approx(alone.validation_losses, rel=1e-3)
        torch.testing.assert_close(shared.prompt, alone.prompt, rtol=0, atol=1e-3)


# Slots ----------------------------------------------------------------------------------------------------------------


def test_the_next_task_takes_a_free_slot_at_once(base: BaseModel) -> None:
    """Two slots: `long` keeps one of them all the time while the short tasks take turns in the other."""
    tasks = [make_task("long", train=16), *(make_task(f"short{n}", train=4) for n in range(4))]
    told: list[tuple[str, int]] = []
    drawn: list[str] = []

    def drawing() -> Iterator[Task]:
        for task in tasks:
            drawn.append(task.name)
            yield task

    config = replace(CONFIG, slots=2, epochs=1)
    for _ in Fleet(base, config).tune(drawing(), on_epoch=lambda task, epoch: told.append((task, epoch))):
        pass
    # `long` has four batches, the others one each: after step 4 it is done, and three of them before.
    assert [task for task, _ in told] == ["short0", "short1", "short2", "long", "short3"]
    assert drawn == [task.name for task in tasks]


def test_tasks_are_drawn_when_they_are_needed(base: BaseModel) -> None:
    drawn: list[str] = []

    def drawing() -> Iterator[Task]:
        for number in range(20):
            drawn.append(str(number))
            yield make_task(f"task{number}", train=2)

    tuning = Fleet(base, replace(CONFIG, slots=2, epochs=1)).tune(drawing())
    next(tuning)
    assert len(drawn) <= 2 + fleet_module.PREPARED_AHEAD + 1
    assert sum(1 for _ in tuning) == 19


def test_a_dod_gives_its_tasks_one_at_a_time(base: BaseModel, tmp_path: Path) -> None:
    with DodStore.open(write_dod(tmp_path / "dod.sqlite", TASKS)) as store:
        stored = store.stored_tasks(["c", "free", "a"])
        assert [task.name for task in stored] == ["c", "free", "a"]
        assert (len(stored), stored[-1], list(stored[:2])) == (3, TASKS[1], [TASKS[2], TASKS[3]])
        bank = tune_soft_prompts(base, stored, replace(CONFIG, epochs=1), tmp_path / "bank")
    assert bank.tasks() == ["c", "free", "a"]


def test_what_was_done_is_counted(base: BaseModel) -> None:
    fleet = Fleet(base, CONFIG)
    progresses = [progress for progress, _ in fleet.tune(TASKS)]
    rows = [row for progress in progresses for row in progress.train]
    expected = CONFIG.epochs * sum(len(row.prompt) + len(row.target) + CONFIG.num_virtual_tokens for row in rows)
    assert fleet.statistics.train_tokens == expected
    assert fleet.statistics.seconds > 0 and fleet.statistics.halvings == 0


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_what_a_failed_try_has_left_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out at the fifth forward pass, when gradients of the pieces before it lie in the prompts already."""
    without_prefixes(monkeypatch)
    config = replace(CONFIG, tokens_per_forward=120)
    expected = tuned(tiny_double(), TASKS[:3], config)
    base = tiny_double()
    real: Callable[..., Any] = base.score_targets
    calls: list[bool] = []

    def score_targets(*args: Any) -> Any:
        calls.append(any(prompt.grad is not None for prompt in progressing))
        if len(calls) == 5:
            raise torch.OutOfMemoryError("out of memory")
        return real(*args)

    progressing: list[torch.nn.Parameter] = []

    def watched(base_model: BaseModel, encoded: EncodedTask, config: TuningConfig) -> Progress:
        progress = begin(base_model, encoded, config)
        progressing.append(progress.prompt)
        return progress

    monkeypatch.setattr(fleet_module, "begin", watched)
    monkeypatch.setattr(base, "score_targets", score_targets)
    found = tuned(base, TASKS[:3], config)
    assert calls[4] and not calls[5], "there was something to undo, and it was undone"
    for name, (progress, _) in found.items():
        torch.testing.assert_close(progress.prompt, expected[name][0].prompt, rtol=0, atol=1e-6)


def small_memory(monkeypatch: pytest.MonkeyPatch, base: BaseModel, cells: int, error: Exception) -> list[int]:
    """Forward passes of more than `cells` padded tokens fail after they have begun; returns the sizes that were tried."""
    real: Callable[..., Any] = base.model.base_model.forward
    tried: list[int] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("inputs_embeds")
        given = kwargs["input_ids"] if given is None else given
        tokens = given.shape[0] * given.shape[1]
        tried.append(tokens)
        result = real(*args, **kwargs)
        if tokens > cells:
            raise error
        return result

    monkeypatch.setattr(base.model.base_model, "forward", forward)
    return tried


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: …"),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_halves_the_forward_pass_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, expected: Found, error: Exception
) -> None:
    base = tiny_double()
    tried = small_memory(monkeypatch, base, 130, error)
    fleet = Fleet(base, replace(CONFIG, tokens_per_forward=1000))
    found = {progress.task.name: (progress, scores) for progress, scores in fleet.tune(TASKS)}
    assert fleet.statistics.halvings >= 2 and max(tried) > 260
    assert set(found) == set(expected)
    for name, (progress, scores) in found.items():
        torch.testing.assert_close(progress.prompt, expected[name][0].prompt, rtol=0, atol=1e-6)
        assert scores == expected[name][1]


def test_memory_that_does_not_hold_one_row_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base_model()
    small_memory(monkeypatch, base, 0, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        list(Fleet(base, CONFIG).tune(TASKS[:1]))


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base_model()
    tried = small_memory(monkeypatch, base, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(Fleet(base, CONFIG).tune(TASKS[:1]))
    assert len(tried) == 1


def test_one_loss_that_is_not_a_number_fails_that_task_and_no_other(
    monkeypatch: pytest.MonkeyPatch, expected: Found, tmp_path: Path
) -> None:
    def with_one_broken(base_model: BaseModel, encoded: EncodedTask, config: TuningConfig) -> Progress:
        progress = begin(base_model, encoded, config)
        if encoded.task.name == "a":
            progress.prompt.data[0, 0] = math.nan
        return progress

    monkeypatch.setattr(fleet_module, "begin", with_one_broken)
    found = tuned(tiny_double(), TASKS, CONFIG)
    assert found["a"][0].failure == "its train loss became nan in epoch 1"
    for name in ("b", "c", "d", "free"):
        torch.testing.assert_close(found[name][0].prompt, expected[name][0].prompt, rtol=0, atol=1e-6)

    bank = tune_soft_prompts(tiny_base_model(), TASKS, CONFIG, tmp_path / "bank")
    assert bank.tasks() == ["b", "c", "free", "d"]
    assert bank.failures() == {"a": "its train loss became nan in epoch 1"}
    with pytest.raises(
        ArtifactError, match=r"reading 'a' of bank 'bank': that task could not be tuned: its train loss became nan"
    ):
        bank.member("a")
    again = tune_soft_prompts(tiny_base_model(), TASKS, CONFIG, tmp_path / "bank")
    assert again.digest == bank.digest and again.failures() == bank.failures()


def test_a_validation_loss_that_is_not_a_number_fails_the_task(
    monkeypatch: pytest.MonkeyPatch, base: BaseModel
) -> None:
    monkeypatch.setattr(
        fleet_module, "validation_losses", lambda base, progresses, tokens: [math.inf] * len(progresses)
    )
    ((progress, scores),) = tuned(base, TASKS[:1], CONFIG).values()
    assert (progress.failure, scores) == ("its validation loss became inf in epoch 1", {})


def test_a_target_that_does_not_fit_and_a_prompt_that_becomes_infinite_fail_alone(
    monkeypatch: pytest.MonkeyPatch, base: BaseModel, tmp_path: Path
) -> None:
    endless = Task("endless", "generation", (Pair("a", "word " * base.max_positions), Pair("b", "short")))
    bank = tune_soft_prompts(base, [TASKS[0], endless], CONFIG, tmp_path / "bank")
    assert bank.tasks() == ["b"]
    assert bank.failures()["endless"].startswith("its longest row has 2")
    assert bank.failures()["endless"].endswith(f"the base model takes {base.max_positions}")

    # Without validation pairs the last step's result is seen by nobody: here it is the only step.
    train = tuple(pair for pair in TASKS[4].pairs if pair.split == "train")
    monkeypatch.setattr(progress_module, "scheduled_rate", lambda *settings: math.inf)
    ((progress, _),) = tuned(base, [replace(TASKS[4], pairs=train)], replace(CONFIG, epochs=1)).values()
    assert progress.failure == "its soft prompt became NaN or infinite in epoch 1"


def test_a_task_with_one_pair_and_inputs_longer_than_the_context(base: BaseModel, tmp_path: Path) -> None:
    one = Task("one", "classification", (Pair("a", "joy"),), ("joy", "fear"))
    text = "word " * (2 * base.max_positions)
    long_pairs = tuple(Pair(f"{n} {text}", "joy", split) for n, split in enumerate(("train", "validation", "test")))
    long = Task("long", "classification", long_pairs, ("joy", "fear"))  # type: ignore[arg-type]
    config = replace(CONFIG, max_sequence_tokens=10 * base.max_positions)
    bank = tune_soft_prompts(base, [one, long], config, tmp_path / "bank")
    assert bank.tasks() == ["one", "long"]
    record = bank.record("one")
    assert record["tuning"]["num_train_pairs"] == 1 and set(record["metrics"]) == {"validation_loss"}
    assert bank.record("long")["tuning"]["num_truncated_inputs"] == 3
    assert set(bank.record("long")["metrics"]) == {"validation_loss", "label_accuracy", "exact_match"}


# Pieces ---------------------------------------------------------------------------------------------------------------


def test_pieces_hold_each_row_once_and_keep_to_the_budget() -> None:
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randint(1, 60) for _ in range(draw.randint(0, 50))]
        tokens = draw.randint(1, 300)
        rows = list(enumerate(lengths))
        cut = list(pieces(rows, lambda row: row[1], tokens))
        assert sorted(row for piece in cut for row in piece) == rows
        for piece in cut:
            longest = max(length for _, length in piece)
            assert len(piece) == 1 or longest * len(piece) <= tokens
        flat = [length for piece in cut for _, length in piece]
        assert flat == sorted(lengths, reverse=True)


def test_a_budget_is_undone_and_halved_until_it_fits() -> None:
    undone: list[int] = []
    budget = TokenBudget(100)

    def work(tokens: int) -> int:
        if tokens > 30:
            raise MemoryError
        return tokens

    assert budget.run(work, lambda: undone.append(budget.tokens)) == 25
    assert (undone, budget.tokens, budget.halvings) == ([100, 50], 25, 2)
    assert budget.run(work) == 25, "the smaller size is kept"
