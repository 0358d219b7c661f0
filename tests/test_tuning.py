"""Tuning: only soft prompts learn, tasks do not disturb each other, and a killed run resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_tasks
import torch
from small_tasks import make_task
from tiny_llm import save_tiny_model, tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.base_models.reference import reference_of
from softprompt_registry.dod.task import Pair, Task, fill_template
from softprompt_registry.errors import ArtifactError, BusyError, DataError
from softprompt_registry.recording import NullRecorder, ProgressBar
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.encoding import RowEncoder, choose_pairs
from softprompt_registry.soft_prompts.performance import Trial, choose_labels, generate_answers, measure
from softprompt_registry.soft_prompts.progress import initial_embeddings
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.soft_prompts.tuning import mean_curves, tune_soft_prompts
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig

CONFIG = replace(small_tasks.CONFIG, slots=2, tokens_per_forward=160)
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


TASKS = [make_task("b", length=2), make_task("a", ("up", "down"), train=5), make_task("c", ("red", "blue"), length=3)]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base_model()


class ListRecorder(NullRecorder):
    """Keeps curves and what the progress bar was told."""

    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {}
        self.notes: list[str] = []

    def metric(self, name: str, value: float, step: int = 0) -> None:
        self.curves.setdefault(name, []).append(value)

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.notes.append(note)

    def progress(self, title: str, total: int) -> AbstractContextManager[ProgressBar]:
        return contextlib.nullcontext(self)


def assert_same_bank(left: SoftPromptBank, right: SoftPromptBank) -> None:
    assert list(left.records()) == list(right.records())
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.embeddings, other.embeddings), one.record.task
        assert one.initial_embeddings is not None and other.initial_embeddings is not None
        assert torch.equal(one.initial_embeddings, other.initial_embeddings)


@pytest.fixture(scope="module")
def undisturbed(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> SoftPromptBank:
    return tune_soft_prompts(base, TASKS, CONFIG, tmp_path_factory.mktemp("undisturbed") / "bank", dod_name="d")


# What is learned, and what is not -------------------------------------------------------------------------------------


def test_the_base_model_stays_as_it_was_bit_for_bit(base: BaseModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    tune_soft_prompts(base, TASKS[:1], CONFIG, tmp_path / "bank")
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert base.ref == reference_of(base.model, base.tokenizer, name="tiny", revision=None, dtype="float32")
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_loss_falls_and_the_prompt_moves_away_from_its_start(base: BaseModel, tmp_path: Path) -> None:
    recorder = ListRecorder()
    config = replace(CONFIG, epochs=12, learning_rate=0.1)
    bank = tune_soft_prompts(base, TASKS[:2], config, tmp_path / "bank", recorder=recorder)
    for soft_prompt in bank:
        losses = soft_prompt.record.tuning["train_losses"]
        assert len(losses) == 12 and losses[-1] < losses[0] - 1.0, "less than a nat per token learned"
        assert soft_prompt.initial_embeddings is not None
        assert not torch.equal(soft_prompt.embeddings, soft_prompt.initial_embeddings)
    curves = mean_curves(bank)
    assert recorder.curves["mean_train_loss"] == curves["train_losses"]
    assert recorder.curves["mean_validation_loss"] == curves["validation_losses"]
    assert set(recorder.curves) == {
        "mean_train_loss",
        "mean_validation_loss",
        "best_validation_loss",
        "label_accuracy",
        "exact_match",
        "failed_tasks",
        "finished_tasks",
        "train_tokens_per_s",
        "memory_halvings",
    }


def test_a_long_run_reports_its_speed_on_the_way(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt_registry.soft_prompts.tuning.RECORD_EVERY_S", 0.0)
    recorder = ListRecorder()
    tune_soft_prompts(base, TASKS, replace(CONFIG, epochs=1, slots=1), tmp_path / "bank", recorder=recorder)
    assert recorder.curves["finished_tasks"] == [1, 2, 3, 3]
    assert all(speed > 0 for speed in recorder.curves["train_tokens_per_s"])


def test_the_record_says_what_was_done(base: BaseModel, undisturbed: SoftPromptBank) -> None:
    assert undisturbed.tasks() == ["b", "a", "c"], "the order of the tasks, not of the groups"
    record = undisturbed.member("a").record
    assert (record.base_model, record.task_digest, record.dod_name) == (base.ref, TASKS[1].digest, "d")
    assert (record.labels, record.ground_truth) == (("up", "down"), "up, down")
    assert record.tuning["learning_rate"] == 3e-2 and record.tuning["seed"] == 0
    assert (record.tuning["num_train_pairs"], record.tuning["num_validation_pairs"]) == (5, 2)
    assert set(record.metrics) == {"validation_loss", "label_accuracy", "exact_match"}


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    base: BaseModel, undisturbed: SoftPromptBank, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1234)  # torch's global state has no say
        assert_same_bank(tune_soft_prompts(base, TASKS, CONFIG, tmp_path / "again", dod_name="d"), undisturbed)
    other = tune_soft_prompts(base, TASKS[1:2], replace(CONFIG, seed=1), tmp_path / "other").member("a")
    assert not torch.equal(other.embeddings, undisturbed.member("a").embeddings)


# Which epoch is kept --------------------------------------------------------------------------------------------------


def validation_loss(base: BaseModel, soft_prompt: SoftPrompt, task: Task) -> float:
    pairs = [RowEncoder.of_new_prompts(base).pair(task.template, pair, 76)[0] for pair in task.pairs_of("validation")]
    with torch.no_grad():
        scores = base.score_targets(
            torch.stack([soft_prompt.embeddings] * len(pairs)), [p.prompt for p in pairs], [p.target for p in pairs]
        )
    return float(-scores.log_likelihood.sum() / scores.num_tokens.sum())


def test_the_best_epoch_is_kept_and_early_stopping_stops(base: BaseModel, tmp_path: Path) -> None:
    """Two tasks whose validation outputs are not what they train on, beside one that goes on getting better."""

    def contrary(name: str, output: str) -> Task:
        pairs = [Pair(f"{name} {number}", "joy") for number in range(6)]
        return Task(name, "generation", (*pairs, Pair("x", output, "validation"), Pair("y", output, "validation")))

    tasks = [contrary("x", "QQ"), contrary("y", "zzzz"), TASKS[0]]
    config = replace(CONFIG, learning_rate=0.1, epochs=12, patience_epochs=2, slots=3)
    bank = tune_soft_prompts(base, tasks, config, tmp_path / "bank")
    lengths = []
    for task in tasks:
        soft_prompt = bank.member(task.name)
        losses = soft_prompt.record.tuning["validation_losses"]
        best = losses.index(min(losses)) + 1
        assert soft_prompt.record.tuning["best_epoch"] == best
        assert soft_prompt.record.metrics["validation_loss"] == min(losses)
        assert validation_loss(base, soft_prompt, task) == pytest.approx(min(losses), rel=1e-4)
        assert len(losses) == min(best + 2, 12) and len(soft_prompt.record.tuning["train_losses"]) == len(losses)
        lengths.append(len(losses))
    assert max(lengths[:2]) < 12 == lengths[2], "the first two stop early, the last one does not"


def test_without_patience_every_epoch_is_run(base: BaseModel, tmp_path: Path) -> None:
    task = Task("t", "generation", (Pair("x", "joy"), Pair("x", "zzzz", "validation")))
    bank = tune_soft_prompts(base, [task], replace(CONFIG, learning_rate=0.1, epochs=8), tmp_path / "bank")
    assert len(bank.record("t")["tuning"]["validation_losses"]) == 8
    assert bank.record("t")["tuning"]["best_epoch"] < 6


def test_without_validation_pairs_the_train_loss_stands_in(base: BaseModel, tmp_path: Path) -> None:
    task = Task("t", "generation", (Pair("x", "y"), Pair("z", "w")))
    record = tune_soft_prompts(base, [task], CONFIG, tmp_path / "bank").member("t").record
    assert record.tuning["validation_losses"] == record.tuning["train_losses"]
    assert record.metrics == {"validation_loss": min(record.tuning["train_losses"])}, "without test pairs no scores"


def test_the_cosine_schedule_falls_from_the_full_rate(base: BaseModel, tmp_path: Path) -> None:
    one = replace(CONFIG, epochs=1)
    first = tune_soft_prompts(base, TASKS[:1], one, tmp_path / "constant")
    assert_numbers_equal(
        first, tune_soft_prompts(base, TASKS[:1], replace(one, schedule="cosine"), tmp_path / "cosine")
    )
    constant = tune_soft_prompts(base, TASKS[:1], CONFIG, tmp_path / "constant3").member("b")
    cosine = tune_soft_prompts(base, TASKS[:1], replace(CONFIG, schedule="cosine"), tmp_path / "cosine3").member("b")
    assert not torch.equal(constant.embeddings, cosine.embeddings)


def assert_numbers_equal(left: SoftPromptBank, right: SoftPromptBank) -> None:
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(left, right, strict=True))


# Where tuning starts --------------------------------------------------------------------------------------------------


def test_a_start_is_made_of_vocabulary_embeddings_shared_or_own(base: BaseModel) -> None:
    own = replace(CONFIG, init="own_vocabulary")
    shared = [initial_embeddings(base, CONFIG, task) for task in TASKS]
    single = [initial_embeddings(base, own, task) for task in TASKS]
    assert torch.equal(shared[0], shared[1]) and not torch.equal(single[0], single[1])
    assert torch.equal(initial_embeddings(base, own, TASKS[0]), single[0])
    vocabulary = [tuple(row) for row in base.input_embeddings.tolist()]
    for start in [*shared, *single]:
        tokens = [vocabulary.index(tuple(row)) for row in start.tolist()]
        assert len(set(tokens)) == 4 and not set(tokens) & {0, 1}, "BOS and EOS are no starts"
    shared[0].zero_()
    assert base.input_embeddings.any(), "the start is a copy"


# Pairs as tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["Sentence: {x} Label:", "Input: {x}\nOutput:", "{x} ->", "Say:{x}"])
def test_a_long_input_gives_way_and_its_target_never_does(base: BaseModel, template: str) -> None:
    """What is left of the input stands in the template just as a whole one does (a space was once doubled there)."""
    text, output = "abcdefghij" * 5, "a long target"
    whole, _ = RowEncoder.of_new_prompts(base).pair(template, Pair(text, output), 1000)
    length = len(whole.prompt) + len(whole.target)
    assert RowEncoder.of_new_prompts(base).pair(template, Pair(text, output), length) == (whole, False)
    for room in (length - 1, length - 20, length - 49):
        short, cut = RowEncoder.of_new_prompts(base).pair(template, Pair(text, output), room)
        assert cut and short.target == whole.target
        assert len(short.prompt) + len(short.target) == room
        assert base.decode(short.prompt) == fill_template(template, text[: 50 - (length - room)])


def test_a_target_longer_than_the_room_is_still_whole(base: BaseModel) -> None:
    pair, cut = RowEncoder.of_new_prompts(base).pair("Sentence: {x} Label:", Pair("abc", "x" * 100), 60)
    assert cut and base.decode(pair.target) == " " + "x" * 100


def test_cut_inputs_are_counted(base: BaseModel, tmp_path: Path) -> None:
    # "Sentence: " and " Label:" are 17 tokens, BOS 1, " yes" and EOS 5: of 50, less 4 soft tokens, 23 are left for text.
    pairs = [Pair("x" * length, "yes", split) for length, split in ((23, "train"), (24, "train"), (30, "test"))]  # type: ignore[arg-type]
    task = Task("t", "classification", tuple(pairs), ("yes", "no"))
    config = replace(CONFIG, epochs=1, max_sequence_tokens=50)
    record = tune_soft_prompts(base, [task], config, tmp_path / "bank").member("t").record
    assert record.tuning["num_truncated_inputs"] == 2


# Choice of pairs ------------------------------------------------------------------------------------------------------


def test_a_small_choice_is_balanced_over_labels() -> None:
    outputs = ["many"] * 20 + ["few"] * 3 + ["one"]
    task = Task(
        "t", "classification", tuple(Pair(f"{n}", out) for n, out in enumerate(outputs)), ("many", "few", "one")
    )

    def counts(limit: int) -> dict[str, int]:
        chosen = choose_pairs(task, "train", limit, seed=0)
        assert len(chosen) == len(set(chosen)) == limit
        return {label: sum(pair.output == label for pair in chosen) for label in task.labels}

    assert counts(3) == {"many": 1, "few": 1, "one": 1}
    assert counts(6) == {"many": 2, "few": 3, "one": 1}
    assert counts(12) == {"many": 8, "few": 3, "one": 1}
    assert choose_pairs(task, "train", None, 0) == choose_pairs(task, "train", 24, 0) == list(task.pairs)
    assert choose_pairs(task, "test", 5, 0) == []


def test_a_choice_follows_its_seed_and_takes_generation_tasks_as_they_are() -> None:
    task = Task("t", "generation", tuple(Pair(f"{n}", "same" if n < 18 else f"{n}") for n in range(20)))
    first = choose_pairs(task, "train", 8, seed=0)
    assert choose_pairs(task, "train", 8, seed=0) == first != choose_pairs(task, "train", 8, seed=1)
    assert sum(pair.output == "same" for pair in first) >= 6


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "there are no tasks; expected tasks with distinct names"),
        ([TASKS[0], TASKS[1], TASKS[0]], r"the names \['b'\] occur twice"),
        ([Task("t", "generation", (Pair("x", "y", "test"),))], "tuning task 't': it has no train pairs"),
    ],
)
def test_tasks_that_cannot_be_tuned_are_refused(
    base: BaseModel, tmp_path: Path, tasks: list[Task], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tune_soft_prompts(base, tasks, CONFIG, tmp_path / "bank")
    assert list(tmp_path.iterdir()) == []


# How well a prompt does its task --------------------------------------------------------------------------------------


def label_log_likelihood(base: BaseModel, soft: torch.Tensor | None, prompt: Sequence[int], target: list[int]) -> float:
    """By transformers' own loss on one row."""
    text = base.input_embeddings[torch.tensor([*prompt, *target])]
    embeds = (text if soft is None else torch.cat([soft, text]))[None]
    labels = torch.tensor([[-100] * (embeds.shape[1] - len(target)) + target])
    with torch.no_grad():
        return -float(base.model(inputs_embeds=embeds, labels=labels).loss) * len(target)


def test_the_chosen_label_has_the_highest_likelihood_with_its_end(base: BaseModel) -> None:
    """Labels that begin one another: without the end token the shortest would win every time."""
    labels = ("a", "ab", "abc", "c")
    task = Task("t", "classification", (Pair("x", "a"),), labels)
    prompts = [[0, *base.tokenize(text)] for text in ("x", "yy", "a longer one", "?", "ab", "cc")]
    generator = torch.Generator().manual_seed(1)
    trials, expected, without_end = [], [], []
    for scale in (None, 0.5, 3.0):
        soft = None if scale is None else scale * torch.randn(4, 64, generator=generator)
        targets = {label: base.tokenize(f" {label}") for label in labels}
        expected.append(
            [max(labels, key=lambda label: label_log_likelihood(base, soft, p, [*targets[label], 1])) for p in prompts]  # noqa: B023
        )
        without_end.append(
            [max(labels, key=lambda label: label_log_likelihood(base, soft, p, targets[label])) for p in prompts]  # noqa: B023
        )
        trials.append(Trial(task, soft, prompts, [""] * len(prompts)))
    assert choose_labels(base, trials[:1], 100) == expected[:1]
    for tokens_per_forward in (1, 5, 100):
        assert choose_labels(base, trials[1:], tokens_per_forward) == expected[1:]
    assert expected != without_end and len({label for row in expected for label in row}) > 1


def test_scores_are_shares_of_the_pairs(base: BaseModel) -> None:
    """Outputs chosen by hand so that one of two, or two of three, are what the model says."""
    soft = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    prompts = [[0, *base.tokenize(text)] for text in ("x", "longer text")]
    labels = ("joy", "fear")
    task = Task("t", "classification", (Pair("x", "joy"),), labels)
    free = Task("g", "generation", (Pair("x", "y"),))
    trial = Trial(task, soft, prompts, ["joy", "joy"])
    (chosen,) = choose_labels(base, [trial], 8)
    wrong = labels[1 - labels.index(chosen[1])]
    (answers,) = generate_answers(base, [Trial(free, soft, prompts, ["", ""])], max_new_tokens=5, tokens_per_forward=8)
    assert all(answers)
    results = measure(
        base,
        [
            Trial(task, soft, prompts, [chosen[0], wrong]),
            Trial(free, soft, [prompts[0], prompts[1], prompts[0]], [answers[0].upper(), answers[1], "something else"]),
            Trial(free, soft, [], []),
        ],
        max_new_tokens=5,
        tokens_per_forward=2,
    )
    assert results[0]["label_accuracy"] == 1 / 2
    assert results[1] == {"exact_match": 2 / 3}
    assert results[2] == {}


# Killed, started again, started twice ---------------------------------------------------------------------------------


class StallingRecorder(ListRecorder):
    """Says so and waits for ever after the first epoch of task a, which comes last."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        if note.startswith("a: epoch 1"):
            print("stalled", flush=True)
            time.sleep(600)


@contextlib.contextmanager
def stalled_process(folder: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    script = (
        "import sys; from pathlib import Path; import test_tuning as t\n"
        "base = t.load_base_model(sys.argv[1])\n"
        "t.tune_soft_prompts(base, t.TASKS, t.CONFIG, Path(sys.argv[2]), dod_name='d', recorder=t.StallingRecorder())\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(out)], env=environment, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"stalled\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    base = load_base_model(str(folder))
    out, work = tmp_path / "bank", tmp_path / "bank.tuning"
    with stalled_process(folder, out) as process:
        # While the first process works, a second one is sent away.
        with pytest.raises(BusyError, match="another process is working there"):
            tune_soft_prompts(base, TASKS, CONFIG, out, dod_name="d")
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    (index,) = work.glob("*/bank.sqlite")
    with closing(sqlite3.connect(index)) as connection:
        kept = dict(connection.execute("SELECT task, id FROM members").fetchall())
    assert set(kept) == {"b", "c"}, "longest first: b and c share the slots, a comes after them"
    recorder = ListRecorder()
    # Neither the number of slots nor the size of a forward pass is part of what is tuned.
    other = replace(CONFIG, slots=1, tokens_per_forward=None)
    bank = tune_soft_prompts(base, TASKS, other, out, dod_name="d", recorder=recorder)
    assert recorder.notes[0] == "taken from an earlier start"
    assert [note for note in recorder.notes if ": epoch" in note] == [f"a: epoch {n} of 3" for n in (1, 2, 3)]
    assert {task: bank.member(task).id for task in kept} == kept
    undisturbed = tune_soft_prompts(base, TASKS, CONFIG, tmp_path / "undisturbed", dod_name="d")
    assert bank.tasks() == undisturbed.tasks()
    for one, expected in zip(bank, undisturbed, strict=True):
        torch.testing.assert_close(one.embeddings, expected.embeddings, **CLOSE)
        assert one.record.metrics == pytest.approx(expected.record.metrics, rel=1e-4)
    assert not work.exists(), "what was kept is forgotten"


def test_a_finished_bank_is_taken_over_with_its_curves(base: BaseModel, tmp_path: Path) -> None:
    first, second = ListRecorder(), ListRecorder()
    bank = tune_soft_prompts(base, TASKS[:2], CONFIG, tmp_path / "bank", recorder=first)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").iterdir()}
    again = tune_soft_prompts(base, TASKS[:2], CONFIG, tmp_path / "bank", recorder=second)
    assert again.digest == bank.digest
    of_the_work_itself = ("finished_tasks", "train_tokens_per_s", "memory_halvings")  # which is not done again
    for name in of_the_work_itself:
        del first.curves[name]
    assert (second.curves, second.notes) == (first.curves, [])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").iterdir()} == times


def test_a_bank_of_other_settings_tasks_or_base_model_is_not_overwritten(base: BaseModel, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    bank = tune_soft_prompts(base, TASKS[:1], config, tmp_path / "bank", dod_digest="1" * 64)
    other_text = replace(TASKS[0], pairs=(*TASKS[0].pairs, Pair("one more", "joy")))
    attempts: list[tuple[Any, list[Task], TuningConfig]] = [
        (base, TASKS[:1], replace(config, learning_rate=0.5)),
        (base, TASKS[:2], config),
        (base, [other_text], config),
        (tiny_base_model(seed=1), TASKS[:1], config),
    ]
    for model, tasks, settings in attempts:
        with pytest.raises(ArtifactError, match="made from other inputs or settings is there already"):
            tune_soft_prompts(model, tasks, settings, tmp_path / "bank", dod_digest="1" * 64)
    with pytest.raises(ArtifactError, match="made from other inputs or settings is there already"):
        tune_soft_prompts(base, TASKS[:1], config, tmp_path / "bank", dod_digest="2" * 64)
    assert SoftPromptBank(tmp_path / "bank").digest == bank.digest


def test_nothing_written_carries_a_path(base: BaseModel, tmp_path: Path) -> None:
    tune_soft_prompts(base, TASKS[:1], replace(CONFIG, epochs=1), tmp_path / "bank")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


def test_a_loss_that_is_not_a_number_stops_with_the_name_of_the_task(tmp_path: Path) -> None:
    base = tiny_base_model()
    with torch.no_grad():
        base.model.get_output_embeddings().weight.fill_(float("nan"))
    task = Task("moods", "classification", (Pair("a", "x"), Pair("b", "y")), ("x", "y"))
    with pytest.raises(
        ArtifactError, match="none could be tuned; of task 'moods', its train loss became nan in epoch 1"
    ):
        tune_soft_prompts(base, [task], TuningConfig(num_virtual_tokens=2, epochs=2), tmp_path / "bank")
    assert not (tmp_path / "bank").exists() and not list((tmp_path / "bank.tuning").glob("*/"))
