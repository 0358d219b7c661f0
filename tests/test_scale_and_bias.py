"""Scale and bias: what is learned, that it goes on after a kill, and what stands in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llm import HIDDEN_SIZE, tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError, BaseModelMismatch, BusyError, ConfigError, DataError
from softprompt_registry.recording import NullRecorder
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.storage import locked
from softprompt_registry.translators.scale_and_bias import ScaleAndBias, read_record
from softprompt_registry.translators.scale_and_bias_training import ScaleAndBiasConfig, train_scale_and_bias
from softprompt_registry.translators.training import TranslatorConfig, train_translator
from softprompt_registry.translators.translator import TranslatorRecord
from softprompt_registry.verbalization.proposers.scale_and_bias import ScaleAndBiasProposer
from softprompt_registry.verbalization.verbalizer import VerbalizationConfig

K = 4
LABELS = {"moods": ("joy", "fear"), "sides": ("up", "down"), "paint": ("red", "blue"), "rooms": ("hall", "attic")}
TASKS = {name: Task(name, "classification", tuple(Pair(x, x) for x in own), own) for name, own in LABELS.items()}
CONFIG = ScaleAndBiasConfig(learning_rate=5e-2, epochs=100, batch_size=4, validation_share=0.0)
SHORT = replace(CONFIG, epochs=4, batch_size=2)


def soft_prompt(base: BaseModel, name: str, seed: int, num_virtual_tokens: int = K) -> SoftPrompt:
    generator = torch.Generator().manual_seed(seed)
    record = SoftPromptRecord(name, "classification", base.ref, "{x}", dod_name="d", dod_digest="ab" * 32)
    return SoftPrompt(0.5 * torch.randn(num_virtual_tokens, HIDDEN_SIZE, generator=generator), None, record)


def make_bank(base: BaseModel, folder: Path) -> SoftPromptBank:
    return SoftPromptBank.save([soft_prompt(base, name, seed) for seed, name in enumerate(LABELS)], folder)


def assert_same_numbers(left: ScaleAndBias, right: ScaleAndBias) -> None:
    assert torch.equal(left.scale, right.scale) and torch.equal(left.bias, right.bias)


class ListRecorder(NullRecorder):
    def __init__(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}

    def metric(self, name: str, value: float, step: int = 0) -> None:
        self.curves.setdefault(name, []).append((step, value))


class FailingRecorder(NullRecorder):
    """The store behind the recorder goes away at an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def metric(self, name: str, value: float, step: int = 0) -> None:
        if step == self.epoch:
            raise ConnectionError("the tracking server is gone")


@dataclass(frozen=True)
class Trained:
    base: BaseModel
    bank: SoftPromptBank
    made: ScaleAndBias
    folder: Path
    recorder: ListRecorder
    weights_before: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_base_model()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    bank, recorder = make_bank(base, folder / "bank"), ListRecorder()
    made = train_scale_and_bias(base, bank, TASKS, CONFIG, folder / "made", recorder=recorder)
    return Trained(base, bank, made, folder / "made", recorder, before)


# What is learned, and what is not -------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_leaves_the_base_model_alone(trained: Trained) -> None:
    losses = trained.made.record.training["train_losses"]
    assert len(losses) == 100 and losses[0] > 5 and losses[-1] < 0.85 * losses[0]
    assert trained.recorder.curves["train_loss"] == list(enumerate(losses, start=1))
    after = trained.base.model.state_dict()
    assert list(after) == list(trained.weights_before)
    assert all(torch.equal(after[name], tensor) for name, tensor in trained.weights_before.items())
    assert not any(parameter.requires_grad for parameter in trained.base.model.parameters())


def test_the_texts_become_likelier_than_those_of_untrained_reading(trained: Trained) -> None:
    untouched = ScaleAndBias(trained.base, trained.made.record, torch.ones(HIDDEN_SIZE), torch.zeros(HIDDEN_SIZE))
    base = trained.base
    targets = [[*base.tokenize(", ".join(own)), base.eos_id] for own in LABELS.values()]

    def score(reader: ScaleAndBias) -> float:
        with reader.soft_tokens(list(trained.bank)) as soft:
            return float(base.score_targets(soft, [base.bos] * 4, targets).log_likelihood.sum())

    assert score(trained.made) > 0.85 * score(untouched)  # both are negative


def test_the_first_loss_is_that_of_the_soft_tokens_as_they_are(tmp_path: Path) -> None:
    base = tiny_base_model()
    bank = make_bank(base, tmp_path / "bank")
    members = list(bank)
    targets = [[*base.tokenize(", ".join(LABELS[member.record.task])), 1] for member in members]
    with torch.no_grad():
        soft = torch.stack([member.embeddings for member in members])
        expected = -float(base.score_targets(soft, [[0]] * 4, targets).log_likelihood.sum()) / sum(map(len, targets))
    config = replace(CONFIG, epochs=1, shuffle_labels=False)
    record = train_scale_and_bias(base, bank, TASKS, config, tmp_path / "made").record
    assert record.metrics["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_first_step_moves_each_number_by_the_learning_rate(tmp_path: Path) -> None:
    """Adam's first step is the learning rate in size, whatever the gradient; the bias is in units of the spread."""
    base = tiny_base_model()
    bank = make_bank(base, tmp_path / "bank")
    made = train_scale_and_bias(base, bank, TASKS, replace(CONFIG, epochs=1), tmp_path / "made")
    spread = float(torch.stack([member.embeddings for member in bank]).std())
    torch.testing.assert_close((made.scale - 1).abs(), torch.full((HIDDEN_SIZE,), 5e-2), rtol=1e-3, atol=0)
    torch.testing.assert_close(made.bias.abs(), torch.full((HIDDEN_SIZE,), 5e-2 * spread), rtol=1e-3, atol=0)


def test_noise_order_and_labels_follow_the_seed_and_nothing_else(tmp_path: Path) -> None:
    noisy = replace(SHORT, noise=0.3, epochs=2)
    variants = {
        "first": noisy,
        "again": noisy,
        "seed": replace(noisy, seed=1),
        "noise": replace(noisy, noise=0.0),
        "labels": replace(noisy, shuffle_labels=False),
        "schedule": replace(noisy, schedule="cosine"),
    }
    base = tiny_base_model()
    bank = make_bank(base, tmp_path / "bank")
    made = {}
    for name, config in variants.items():
        with torch.random.fork_rng():
            torch.manual_seed(len(name))  # torch's global state has no say
            state = torch.get_rng_state()
            made[name] = train_scale_and_bias(base, bank, TASKS, config, tmp_path / name)
            assert torch.equal(torch.get_rng_state(), state)
    assert_same_numbers(made["first"], made["again"])
    assert made["first"].id == made["again"].id
    assert len({one.id for one in made.values()}) == 5


def test_divided_steps_give_the_same_up_to_rounding(tmp_path: Path) -> None:
    base = tiny_base_model()
    bank = make_bank(base, tmp_path / "bank")
    config = replace(SHORT, batch_size=4, validation_share=0.25, noise=0.1)
    whole = train_scale_and_bias(base, bank, TASKS, config, tmp_path / "whole")
    divided = train_scale_and_bias(base, bank, TASKS, replace(config, micro_batch_size=1), tmp_path / "divided")
    torch.testing.assert_close(whole.scale, divided.scale, rtol=0, atol=1e-3)
    torch.testing.assert_close(whole.bias, divided.bias, rtol=0, atol=1e-3)
    one, other = whole.record.training, divided.record.training
    assert one["validation_losses"] == pytest.approx(other["validation_losses"], rel=1e-4)


# Held-out tasks -------------------------------------------------------------------------------------------------------


def test_the_same_tasks_are_held_out_as_for_a_translator(tmp_path: Path) -> None:
    base = tiny_base_model()
    bank = make_bank(base, tmp_path / "bank")
    for seed in (0, 1, 2):
        config = replace(SHORT, epochs=1, validation_share=0.5, seed=seed)
        ours = train_scale_and_bias(base, bank, TASKS, config, tmp_path / f"ours-{seed}").record
        lora = TranslatorConfig(epochs=1, validation_share=0.5, seed=seed, target_modules=("q_proj",))
        theirs = train_translator(base, bank, TASKS, lora, tmp_path / f"theirs-{seed}").record
        assert ours.training["validation_tasks"] == theirs.training["validation_tasks"]
        assert len(ours.training["validation_tasks"]) == 2


def test_the_best_epoch_is_kept_with_its_own_losses(tmp_path: Path) -> None:
    base = tiny_base_model()
    bank = make_bank(base, tmp_path / "bank")
    config = replace(CONFIG, learning_rate=0.1, epochs=80, validation_share=0.5, shuffle_labels=False)
    best = train_scale_and_bias(base, bank, TASKS, config, tmp_path / "best")
    losses = best.record.training["validation_losses"]
    kept = losses.index(min(losses)) + 1
    assert best.record.training["kept_epoch"] == kept < 80
    assert best.record.metrics["validation_loss"] == min(losses)
    assert best.record.metrics["train_loss"] == best.record.training["train_losses"][kept - 1]
    # A training that ends there anyway gives the same numbers.
    ended = train_scale_and_bias(base, bank, TASKS, replace(config, epochs=kept, keep_best=False), tmp_path / "ended")
    assert_same_numbers(best, ended)
    last = train_scale_and_bias(base, bank, TASKS, replace(config, keep_best=False), tmp_path / "last").record
    assert last.training["kept_epoch"] == 80 and last.metrics["validation_loss"] == losses[-1]


def test_a_held_out_task_has_no_part_in_the_numbers(tmp_path: Path) -> None:
    base = tiny_base_model()
    bank = make_bank(base, tmp_path / "bank")
    config = replace(SHORT, validation_share=0.25, keep_best=False)
    one = train_scale_and_bias(base, bank, TASKS, config, tmp_path / "one")
    (held_out,) = one.record.training["validation_tasks"]
    changed = TASKS | {held_out: replace(TASKS[held_out], labels=("other", *TASKS[held_out].labels))}
    other = train_scale_and_bias(base, bank, changed, config, tmp_path / "two")
    assert_same_numbers(one, other)
    assert one.record.training["validation_losses"] != other.record.training["validation_losses"]


# Interrupted, started again, started twice ----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_training_goes_on_and_gives_the_same_bits(tmp_path: Path, every: int) -> None:
    config = replace(SHORT, checkpoint_every_epochs=every, noise=0.1, weight_decay=0.1, validation_share=0.25)
    bank = make_bank(tiny_base_model(), tmp_path / "bank")
    for epoch in (2, 4):
        with pytest.raises(ConnectionError):
            train_scale_and_bias(
                tiny_base_model(), bank, TASKS, config, tmp_path / "out", recorder=FailingRecorder(epoch)
            )
        assert not (tmp_path / "out").exists()
    recorder = ListRecorder()
    resumed = train_scale_and_bias(tiny_base_model(), bank, TASKS, config, tmp_path / "out", recorder=recorder)
    undisturbed = train_scale_and_bias(tiny_base_model(), bank, TASKS, config, tmp_path / "undisturbed")
    assert_same_numbers(resumed, undisturbed)
    assert resumed.record == undisturbed.record
    assert [step for step, _ in recorder.curves["train_loss"]] == [1, 2, 3, 4], "the curve is whole"
    assert not (tmp_path / "out.training").exists()


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    base = tiny_base_model()
    bank = make_bank(base, tmp_path / "bank")
    with pytest.raises(ConnectionError):
        train_scale_and_bias(base, bank, TASKS, SHORT, tmp_path / "out", recorder=FailingRecorder(3))
    other = replace(SHORT, learning_rate=3e-3)
    made = train_scale_and_bias(base, bank, TASKS, other, tmp_path / "out")
    assert_same_numbers(made, train_scale_and_bias(base, bank, TASKS, other, tmp_path / "undisturbed"))


def test_a_finished_one_is_taken_over_or_refused(tmp_path: Path) -> None:
    base = tiny_base_model()
    bank = make_bank(base, tmp_path / "bank")
    first, second = ListRecorder(), ListRecorder()
    made = train_scale_and_bias(base, bank, TASKS, SHORT, tmp_path / "out", recorder=first)
    time = (tmp_path / "out" / "scale_and_bias.safetensors").stat().st_mtime_ns
    again = train_scale_and_bias(
        base, bank, TASKS, replace(SHORT, micro_batch_size=1), tmp_path / "out", recorder=second
    )
    assert (again.id, again.record) == (made.id, made.record) and second.curves == first.curves
    assert (tmp_path / "out" / "scale_and_bias.safetensors").stat().st_mtime_ns == time
    fewer = {name: TASKS[name] for name in ("moods", "sides")}
    for tasks, config in ((fewer, SHORT), (TASKS, replace(SHORT, seed=1))):
        with pytest.raises(ArtifactError, match="writing a scale and bias .*made from other inputs or settings"):
            train_scale_and_bias(base, bank, tasks, config, tmp_path / "out")


def test_a_second_training_into_the_same_output_is_sent_away(trained: Trained, tmp_path: Path) -> None:
    with locked(tmp_path / "out.training"), pytest.raises(BusyError, match="another process is working there"):
        train_scale_and_bias(trained.base, trained.bank, TASKS, SHORT, tmp_path / "out")


# Saving and loading ---------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved(trained: Trained, tmp_path: Path) -> None:
    trained.made.save(tmp_path / "copy")
    loaded = ScaleAndBias.load(tmp_path / "copy", tiny_base_model())
    assert_same_numbers(loaded, trained.made)
    assert (loaded.record, loaded.id) == (trained.made.record, trained.made.id)
    assert read_record(tmp_path / "copy") == trained.made.record
    prompts = list(trained.bank)
    assert loaded.translate(prompts, max_new_tokens=12) == trained.made.translate(prompts, max_new_tokens=12)
    record = loaded.record
    assert (record.num_virtual_tokens, record.bank_digest) == (K, trained.bank.digest)
    assert (record.dod_name, record.dod_digest, record.train_tasks) == ("d", "ab" * 32, tuple(LABELS))


def test_the_folder_is_small_and_holds_no_path(trained: Trained) -> None:
    assert sorted(path.name for path in trained.folder.iterdir()) == [
        "scale_and_bias.json",
        "scale_and_bias.safetensors",
    ]
    tensors = load_file(trained.folder / "scale_and_bias.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "scale": (HIDDEN_SIZE,),
        "bias": (HIDDEN_SIZE,),
    }
    assert json.loads((trained.folder / "scale_and_bias.json").read_text())["format_version"] == 1
    for path in trained.folder.iterdir():
        assert str(trained.folder.parent).encode() not in path.read_bytes() and path.stat().st_size < 20_000


def test_a_damaged_folder_is_an_artifact_error(trained: Trained, tmp_path: Path) -> None:
    base = tiny_base_model()
    with pytest.raises(ArtifactError, match="reading a scale and bias: .*scale_and_bias.json' is missing"):
        ScaleAndBias.load(tmp_path / "none", base)
    folder = tmp_path / "made"
    file = folder / "scale_and_bias.safetensors"
    good = {"scale": torch.ones(HIDDEN_SIZE), "bias": torch.zeros(HIDDEN_SIZE)}
    for tensors, message in (
        (good | {"more": torch.ones(1)}, r"found the tensors \['bias', 'more', 'scale'\], expected 'bias' and 'scale'"),
        ({"scale": good["scale"]}, r"found the tensors \['scale'\]"),
        (good | {"bias": torch.zeros(3)}, r"its 'bias' is torch.float32 of shape \(3,\); .*of shape \(64,\)"),
        (good | {"scale": good["scale"].half()}, "its 'scale' is torch.float16 of shape"),
        (good | {"scale": good["scale"] / 0}, "its 'scale' holds NaN or infinity"),
    ):
        trained.made.save(folder)
        save_file(tensors, file)
        with pytest.raises(ArtifactError, match=message):
            ScaleAndBias.load(folder, base)
    trained.made.save(folder)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="scale_and_bias.safetensors cannot be read .*Train it again"):
        ScaleAndBias.load(folder, base)
    trained.made.save(folder)
    stored = json.loads((folder / "scale_and_bias.json").read_text())
    (folder / "scale_and_bias.json").write_text(json.dumps(stored | {"format_version": 2}))
    with pytest.raises(ArtifactError, match="its format_version is 2; .* reads 1"):
        ScaleAndBias.load(folder, base)
    (folder / "scale_and_bias.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(ArtifactError, match="its record is incomplete"):
        ScaleAndBias.load(folder, base)


def test_another_base_model_is_refused_and_both_are_named(trained: Trained, tmp_path: Path) -> None:
    other = tiny_base_model(seed=1, name="elsewhere")
    with pytest.raises(BaseModelMismatch, match="loading a scale and bias: .*tiny@.*elsewhere@"):
        ScaleAndBias.load(trained.folder, other)
    with pytest.raises(BaseModelMismatch, match="translating: soft prompt 'moods' belongs to base model elsewhere@"):
        trained.made.translate([soft_prompt(other, "moods", 0)])
    with pytest.raises(BaseModelMismatch, match="training a scale and bias: the bank belongs to base model tiny@"):
        train_scale_and_bias(other, trained.bank, TASKS, SHORT, tmp_path / "out")


# Errors of inputs and settings ----------------------------------------------------------------------------------------


def test_bank_and_tasks_must_fit(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the bank's 4 soft prompts belongs to one of the 1 training tasks"):
        train_scale_and_bias(trained.base, trained.bank, {"x": TASKS["moods"]}, SHORT, tmp_path / "out")
    mute = {"moods": Task("moods", "generation", (Pair("x", "y"),))}
    with pytest.raises(DataError, match=r"the tasks \['moods'\] have no ground-truth hard prompt"):
        train_scale_and_bias(trained.base, trained.bank, mute, SHORT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_explodes_says_so_and_leaves_nothing(trained: Trained, tmp_path: Path) -> None:
    config = replace(SHORT, learning_rate=float("inf"))
    with pytest.raises(ArtifactError, match="in epoch . the train loss became .*Lower the learning rate"):
        train_scale_and_bias(trained.base, trained.bank, TASKS, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected >= 1"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"schedule": "linear"}, "schedule is 'linear'; constant or cosine"),
        ({"validation_share": 1.0}, r"validation_share 1.0 is not in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScaleAndBiasConfig(**values)  # type: ignore[arg-type]


# Translating ----------------------------------------------------------------------------------------------------------


def test_it_reads_as_the_base_model_reads_the_changed_soft_tokens(trained: Trained) -> None:
    base, draw = trained.base, torch.Generator().manual_seed(3)
    scale, bias = 1 + torch.rand(HIDDEN_SIZE, generator=draw), torch.randn(HIDDEN_SIZE, generator=draw)
    made = ScaleAndBias(base, TranslatorRecord(base.ref, K), scale, bias)
    member = trained.bank.member("moods")
    (found,) = made.translate([member], prefill="One of: ", max_new_tokens=8)
    head = [0, *base.tokenize("One of: ")]
    read = (scale * member.embeddings + bias)[None]
    (row,) = base.generate(read, [head], max_new_tokens=8)
    assert found.text == ("One of: " + base.decode(row)).strip() and found.prefill == "One of: "
    with torch.no_grad():
        score = base.score_targets(read, [head], [[*row, 1]])
    assert found.log_likelihood == pytest.approx(float(score.log_likelihood[0]) / (len(row) + 1), rel=1e-5)


def test_a_batch_reads_as_its_rows_do_and_sizes_are_not_mixed(trained: Trained) -> None:
    members = list(trained.bank)
    batch = trained.made.translate(members, max_new_tokens=12)
    assert [trained.made.translate([member], max_new_tokens=12)[0].text for member in members] == [
        item.text for item in batch
    ]
    longer = soft_prompt(trained.base, "longer", 9, num_virtual_tokens=6)
    with pytest.raises(ArtifactError, match=r"translating: the soft prompts have K=\[4, 6\]"):
        trained.made.translate([members[0], longer])
    with pytest.raises(ArtifactError, match="expected at least one"):
        trained.made.translate([])


def test_its_proposer_says_what_it_translates(trained: Trained) -> None:
    longer = soft_prompt(trained.base, "longer", 9, num_virtual_tokens=6)
    prompts = [longer, *trained.bank]
    config = VerbalizationConfig(num_candidates=2, max_new_tokens=8, seed=3)
    proposer = ScaleAndBiasProposer(trained.made, prefills=("One of: ",), num_beams=2)
    assert proposer.name == "scale_and_bias"
    found = proposer.propose(prompts, config)
    greedy = trained.made.translate(list(trained.bank), max_new_tokens=8)
    sampled = trained.made.translate(list(trained.bank), max_new_tokens=8, temperature=0.7, seed=4)
    assert [(each[0].text, each[0].score) for each in found[1:]] == [(t.text, t.log_likelihood) for t in greedy]
    assert [(each[1].text, each[1].score) for each in found[1:]] == [(t.text, t.log_likelihood) for t in sampled]
    assert found[0][0].text == trained.made.translate([longer], max_new_tokens=8)[0].text
    names = [candidate.proposer.removeprefix("scale_and_bias:") for candidate in found[0]]
    assert names[:4] == ["greedy", "sampled", "prefill", "prefill"] and set(names[4:]) == {"beam"}
