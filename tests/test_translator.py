"""The translator: it learns to name what it reads, and touches the base model only while it reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_prompts import translated
from tiny_llm import HIDDEN_SIZE, tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError, BaseModelMismatch, BusyError, DataError
from softprompt_registry.recording import NullRecorder
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.storage import locked
from softprompt_registry.translators.training import TranslatorConfig, target_text, train_translator
from softprompt_registry.translators.translator import Translator, read_record

K = 4
LABELS = {"moods": ("joy", "fear"), "sides": ("up", "down"), "paint": ("red", "blue"), "rooms": ("hall", "attic")}
TASKS = {name: Task(name, "classification", tuple(Pair(x, x) for x in own), own) for name, own in LABELS.items()}
CONFIG = TranslatorConfig(
    lora_rank=8,
    lora_alpha=16,
    lora_dropout=0.0,
    learning_rate=1e-2,
    weight_decay=0.0,
    epochs=60,
    batch_size=4,
    validation_share=0.0,
    checkpoint_every_epochs=20,
)
SHORT = replace(CONFIG, epochs=4, batch_size=2, checkpoint_every_epochs=1)


def soft_prompt(base: BaseModel, name: str, seed: int, num_virtual_tokens: int = K) -> SoftPrompt:
    """Numbers that nobody tuned: enough to tell tasks apart."""
    generator = torch.Generator().manual_seed(seed)
    record = SoftPromptRecord(name, "classification", base.ref, "{x}", dod_name="d", dod_digest="ab" * 32)
    return SoftPrompt(0.5 * torch.randn(num_virtual_tokens, HIDDEN_SIZE, generator=generator), None, record)


def make_bank(base: BaseModel, folder: Path) -> SoftPromptBank:
    return SoftPromptBank.save([soft_prompt(base, name, seed) for seed, name in enumerate(LABELS)], folder)


@pytest.fixture
def base() -> BaseModel:
    return tiny_base_model()


@pytest.fixture
def bank(base: BaseModel, tmp_path: Path) -> SoftPromptBank:
    return make_bank(base, tmp_path / "bank")


def logits(base: BaseModel) -> torch.Tensor:
    with torch.no_grad():
        return base.score_targets(None, [[0, 40]], [[50, 51, 1]]).log_likelihood


def base_weights(base: BaseModel) -> dict[str, torch.Tensor]:
    """All weights but the adapters', under the names they have without any adapter."""
    return {
        name.replace(".base_layer.", "."): tensor.detach().clone()
        for name, tensor in base.model.state_dict().items()
        if "lora_" not in name
    }


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(left: Path, right: Path) -> None:
    one, other = adapter(left), adapter(right)
    assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


class ListRecorder(NullRecorder):
    def __init__(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}

    def metric(self, name: str, value: float, step: int = 0) -> None:
        self.curves.setdefault(name, []).append((step, value))


@dataclass(frozen=True)
class Trained:
    base: BaseModel
    bank: SoftPromptBank
    translator: Translator
    folder: Path
    weights_before: Mapping[str, torch.Tensor]
    logits_before: torch.Tensor
    recorder: ListRecorder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_base_model()
    bank = make_bank(base, folder / "bank")
    before, first_logits, recorder = base_weights(base), logits(base), ListRecorder()
    translator = train_translator(base, bank, TASKS, CONFIG, folder / "translator", recorder=recorder)
    return Trained(base, bank, translator, folder / "translator", before, first_logits, recorder)


# What is learned, and what is not -------------------------------------------------------------------------------------


def test_it_learns_to_name_the_labels_and_to_end(trained: Trained) -> None:
    losses = trained.translator.record.training["train_losses"]
    assert len(losses) == 60 and losses[0] > 5 and losses[-1] < 1
    assert trained.recorder.curves["train_loss"] == list(enumerate(losses, start=1))
    translations = translated(trained.translator, list(trained.bank), max_new_tokens=40)
    assert [set(item.text.split(", ")) for item in translations] == [set(own) for own in LABELS.values()]
    assert all(item.prefill == "" and item.score is not None and -1 < item.score < 0 for item in translations)


def test_the_first_loss_is_transformers_own(base: BaseModel, bank: SoftPromptBank, tmp_path: Path) -> None:
    """A new adapter adds nothing yet, so before the first step it is the base model's loss on all target tokens."""
    expected, count = 0.0, 0
    for member in bank:
        target = [*base.tokenize(", ".join(LABELS[member.record.task])), 1]
        text = base.input_embeddings[torch.tensor([0, *target])]
        labels = torch.tensor([[-100] * (K + 1) + target])
        with torch.no_grad():
            loss = base.model(inputs_embeds=torch.cat([member.embeddings, text])[None], labels=labels).loss
        expected, count = expected + float(loss) * len(target), count + len(target)
    config = replace(CONFIG, epochs=1, shuffle_labels=False)
    record = train_translator(base, bank, TASKS, config, tmp_path / "translator").record
    assert record.metrics["train_loss"] == pytest.approx(expected / count, rel=1e-5)


def test_the_base_model_stays_as_it_was_bit_for_bit(trained: Trained) -> None:
    after = base_weights(trained.base)
    assert list(after) == list(trained.weights_before)
    assert all(torch.equal(after[name], tensor) for name, tensor in trained.weights_before.items())
    assert not any(parameter.requires_grad for parameter in trained.base.model.parameters())
    assert not trained.base.model.training


def test_the_adapter_is_off_unless_it_reads(trained: Trained) -> None:
    assert torch.equal(logits(trained.base), trained.logits_before)
    with trained.translator.reading():
        assert not torch.allclose(logits(trained.base), trained.logits_before)
    assert torch.equal(logits(trained.base), trained.logits_before)
    with pytest.raises(RuntimeError, match="inside"), trained.translator.reading():
        raise RuntimeError("inside")
    assert torch.equal(logits(trained.base), trained.logits_before)


def test_two_translators_share_a_base_model(trained: Trained, tmp_path: Path) -> None:
    before = translated(trained.translator, list(trained.bank), max_new_tokens=12)
    other = train_translator(trained.base, trained.bank, TASKS, SHORT, tmp_path / "other")
    assert other.id != trained.translator.id
    assert translated(other, list(trained.bank), max_new_tokens=12) != before
    assert translated(trained.translator, list(trained.bank), max_new_tokens=12) == before
    assert torch.equal(logits(trained.base), trained.logits_before)
    adapters = set(trained.base.model.peft_config)
    assert adapters == {trained.translator.id, other.id}, "adapters in training are taken out"


def test_dropout_acts_in_training_steps_alone(base: BaseModel, bank: SoftPromptBank, tmp_path: Path) -> None:
    """PEFT adds a new adapter in training mode to a model in evaluation mode (peft 3753, transformers 34469)."""
    config = replace(SHORT, lora_dropout=0.5, validation_share=0.25)
    trained = train_translator(base, bank, TASKS, config, tmp_path / "dropout")
    shutil.copytree(tmp_path / "dropout", tmp_path / "none")
    stored = json.loads((tmp_path / "none/adapter_config.json").read_text())
    (tmp_path / "none/adapter_config.json").write_text(json.dumps(stored | {"lora_dropout": 0.0}))

    def reads(translator: Translator) -> list[float | None]:
        return [item.score for item in translated(translator, list(bank), max_new_tokens=12)]

    loaded = Translator.load(tmp_path / "dropout", tiny_base_model())
    expected = reads(Translator.load(tmp_path / "none", tiny_base_model()))
    assert reads(loaded) == reads(loaded) == reads(trained) == expected
    assert not any(module.training for module in loaded.base_model.model.modules())


# Random choices -------------------------------------------------------------------------------------------------------


def test_labels_are_named_in_a_new_order_each_time() -> None:
    task = Task("t", "classification", (Pair("x", "a"),), ("a", "b", "c"))
    draw = Random(0)
    drawn = [target_text(task, draw) for _ in range(60)]
    assert len(set(drawn)) == 6 and all(sorted(text.split(", ")) == ["a", "b", "c"] for text in drawn)
    again = Random(0)
    assert [target_text(task, again) for _ in range(60)] == drawn
    assert target_text(task, None) == "a, b, c"
    free = Task("t", "generation", (Pair("x", "y"),), hard_prompts=("Say y.", "Always y."))
    assert {target_text(free, draw) for _ in range(20)} == {"Say y.", "Always y."}
    assert target_text(free, None) == "Say y."


def test_noise_dropout_and_order_follow_the_seed(tmp_path: Path) -> None:
    noisy = replace(SHORT, noise=0.3, lora_dropout=0.2, epochs=2)
    variants = {
        "first": noisy,
        "again": noisy,
        "seed": replace(noisy, seed=1),
        "noise": replace(noisy, noise=0.0),
        "dropout": replace(noisy, lora_dropout=0.0),
        "labels": replace(noisy, shuffle_labels=False),
    }
    for name, config in variants.items():
        base = tiny_base_model()
        with torch.random.fork_rng():
            torch.manual_seed(len(name))  # torch's global state has no say
            state = torch.get_rng_state()
            train_translator(base, make_bank(base, tmp_path / f"{name}-bank"), TASKS, config, tmp_path / name)
            assert torch.equal(torch.get_rng_state(), state)
    assert_same_adapter(tmp_path / "first", tmp_path / "again")
    kinds = [adapter(tmp_path / name) for name in variants if name != "again"]
    key = next(iter(kinds[0]))
    for number, one in enumerate(kinds):
        assert not any(torch.equal(one[key], other[key]) for other in kinds[:number])


# Parts of the training tasks ------------------------------------------------------------------------------------------

ONE_EPOCH = replace(CONFIG, epochs=1, lora_rank=1, target_modules=("q_proj",))


def test_a_smaller_share_of_the_tasks_lies_within_a_larger_one(tmp_path: Path) -> None:
    base = tiny_base_model()
    names = [f"task {number}" for number in range(10)]
    tasks = {name: replace(TASKS["moods"], name=name) for name in names}
    bank = SoftPromptBank.save([soft_prompt(base, name, seed) for seed, name in enumerate(names)], tmp_path / "bank")
    settings = replace(ONE_EPOCH, validation_share=0.2)
    trained_on, held_out = {}, {}
    for share in (0.01, 0.25, 0.5, 1.0):
        config = replace(settings, train_share=share)
        record = train_translator(base, bank, tasks, config, tmp_path / f"share {share}").record
        held_out[share] = set(record.training["validation_tasks"])
        trained_on[share] = set(record.train_tasks) - held_out[share]
        assert list(record.train_tasks) == [name for name in names if name in trained_on[share] | held_out[share]]
    # Two of ten are held out; of the other eight at least one is trained on.
    assert [len(found) for found in trained_on.values()] == [1, 2, 4, 8]
    assert trained_on[0.01] < trained_on[0.25] < trained_on[0.5] < trained_on[1.0]
    assert len({frozenset(found) for found in held_out.values()}) == 1
    config = replace(settings, train_share=0.5, seed=1)
    other = train_translator(base, bank, tasks, config, tmp_path / "other seed").record
    assert set(other.train_tasks) - set(other.training["validation_tasks"]) != trained_on[0.5]


def test_only_the_first_hard_prompts_are_learned(base: BaseModel, bank: SoftPromptBank, tmp_path: Path) -> None:
    """Training on the first of three hard prompts is training on a task that has no other."""
    prompts = ("Say it.", "Say it again and again.", "Do not.")
    made = {}
    for name, kept, limit in (("all", 3, None), ("first", 3, 1), ("only", 1, None), ("two", 3, 2)):
        tasks = {"moods": Task("moods", "generation", (Pair("x", "y"),), hard_prompts=prompts[:kept])}
        config = replace(SHORT, max_hard_prompts=limit)
        train_translator(base, bank, tasks, config, tmp_path / name)
        made[name] = adapter(tmp_path / name)
    key = next(name for name in made["all"] if "lora_B" in name)
    assert torch.equal(made["first"][key], made["only"][key])
    assert not torch.equal(made["first"][key], made["all"][key])
    assert not torch.equal(made["two"][key], made["first"][key])


def test_trainings_from_before_these_settings_are_gone_on_with() -> None:
    assert "train_share" not in CONFIG.identity and "max_hard_prompts" not in CONFIG.identity
    assert replace(CONFIG, train_share=0.5).identity == CONFIG.identity | {"train_share": 0.5}
    assert replace(CONFIG, max_hard_prompts=1).identity == CONFIG.identity | {"max_hard_prompts": 1}


# Interrupted, started again, started twice ----------------------------------------------------------------------------


class FailingRecorder(NullRecorder):
    """The store behind the recorder goes away at an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def metric(self, name: str, value: float, step: int = 0) -> None:
        if step == self.epoch:
            raise ConnectionError("the tracking server is gone")


@pytest.mark.parametrize("every", [1, 2])
def test_an_interrupted_training_goes_on_and_gives_the_same_bits(
    base: BaseModel, bank: SoftPromptBank, tmp_path: Path, every: int
) -> None:
    config = replace(
        SHORT, checkpoint_every_epochs=every, lora_dropout=0.1, noise=0.1, weight_decay=0.1, validation_share=0.25
    )
    weights = base_weights(base)
    for epoch in (2, 4):
        with pytest.raises(ConnectionError):
            train_translator(base, bank, TASKS, config, tmp_path / "out", recorder=FailingRecorder(epoch))
        assert not (tmp_path / "out").exists()
        assert all(torch.equal(base_weights(base)[name], tensor) for name, tensor in weights.items())
        assert not any(parameter.requires_grad for parameter in base.model.parameters()) and not base.model.training
    recorder = ListRecorder()
    # A start in another process: nothing but the files is left of the first ones.
    resumed = train_translator(tiny_base_model(), bank, TASKS, config, tmp_path / "out", recorder=recorder)
    undisturbed = train_translator(tiny_base_model(), bank, TASKS, config, tmp_path / "undisturbed")
    assert_same_adapter(tmp_path / "out", tmp_path / "undisturbed")
    assert resumed.record == undisturbed.record
    assert [step for step, _ in recorder.curves["train_loss"]] == [1, 2, 3, 4], "the curve is whole"
    assert not (tmp_path / "out.training").exists()


def test_a_training_goes_on_when_its_output_is_spelled_otherwise(
    base: BaseModel, bank: SoftPromptBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint's tensors once bore a name made from the path as it was written."""
    with pytest.raises(ConnectionError):
        train_translator(base, bank, TASKS, SHORT, tmp_path / "out", recorder=FailingRecorder(3))
    monkeypatch.chdir(tmp_path)
    train_translator(base, bank, TASKS, SHORT, Path("out"))
    train_translator(tiny_base_model(), bank, TASKS, SHORT, Path("undisturbed"))
    assert_same_adapter(tmp_path / "out", tmp_path / "undisturbed")


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(
    base: BaseModel, bank: SoftPromptBank, tmp_path: Path
) -> None:
    with pytest.raises(ConnectionError):
        train_translator(base, bank, TASKS, SHORT, tmp_path / "out", recorder=FailingRecorder(3))
    other = replace(SHORT, learning_rate=3e-3)
    train_translator(base, bank, TASKS, other, tmp_path / "out")
    train_translator(tiny_base_model(), bank, TASKS, other, tmp_path / "undisturbed")
    assert_same_adapter(tmp_path / "out", tmp_path / "undisturbed")


def test_a_finished_translator_is_taken_over_or_refused(base: BaseModel, bank: SoftPromptBank, tmp_path: Path) -> None:
    first, second = ListRecorder(), ListRecorder()
    free = {"moods": Task("moods", "generation", (Pair("x", "y"),), hard_prompts=("Name the mood.",))}
    made = train_translator(base, bank, free, SHORT, tmp_path / "out", recorder=first)
    time = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    again = train_translator(base, bank, free, SHORT, tmp_path / "out", recorder=second)
    assert (again.id, again.record) == (made.id, made.record) and second.curves == first.curves
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == time
    # Other targets for the same soft prompts were once taken for the same training.
    reworded = {"moods": replace(free["moods"], hard_prompts=("Say which mood it is.",))}
    for tasks, config in ((TASKS, SHORT), (free, replace(SHORT, seed=1)), (reworded, SHORT)):
        with pytest.raises(ArtifactError, match="made from other inputs or settings is there already"):
            train_translator(base, bank, tasks, config, tmp_path / "out")


def test_a_second_training_into_the_same_output_is_sent_away(trained: Trained, tmp_path: Path) -> None:
    with locked(tmp_path / "out.training"), pytest.raises(BusyError, match="another process is working there"):
        train_translator(trained.base, trained.bank, TASKS, SHORT, tmp_path / "out")


# Held-out tasks -------------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_kept_with_its_own_losses(base: BaseModel, bank: SoftPromptBank, tmp_path: Path) -> None:
    """Two of four tasks are held out; soon the other two are learned by heart and the held-out loss rises."""
    config = replace(CONFIG, epochs=20, validation_share=0.5, keep_best=True, shuffle_labels=False)
    record = train_translator(base, bank, TASKS, config, tmp_path / "best").record
    losses = record.training["validation_losses"]
    kept = losses.index(min(losses)) + 1
    assert record.training["kept_epoch"] == kept < 20
    assert len(record.training["validation_tasks"]) == 2
    assert record.metrics["validation_loss"] == min(losses)
    assert record.metrics["train_loss"] == record.training["train_losses"][kept - 1]
    # A training that ends there anyway gives the same adapter.
    train_translator(base, bank, TASKS, replace(config, epochs=kept, keep_best=False), tmp_path / "ended")
    assert_same_adapter(tmp_path / "best", tmp_path / "ended")
    last = train_translator(base, bank, TASKS, replace(config, keep_best=False), tmp_path / "last").record
    assert last.training["kept_epoch"] == 20 and last.metrics["validation_loss"] == losses[-1]


def test_a_held_out_task_has_no_part_in_the_weights(base: BaseModel, bank: SoftPromptBank, tmp_path: Path) -> None:
    config = replace(SHORT, validation_share=0.25)
    (held_out,) = train_translator(base, bank, TASKS, config, tmp_path / "one").record.training["validation_tasks"]
    changed = TASKS | {held_out: replace(TASKS[held_out], labels=("other", *TASKS[held_out].labels))}
    train_translator(base, bank, changed, config, tmp_path / "two")
    assert_same_adapter(tmp_path / "one", tmp_path / "two")


def test_with_few_tasks_one_is_left_to_train_on(base: BaseModel, bank: SoftPromptBank, tmp_path: Path) -> None:
    few = {name: TASKS[name] for name in ("moods", "sides")}
    config = replace(SHORT, validation_share=0.9, epochs=1)
    record = train_translator(base, bank, few, config, tmp_path / "out").record
    assert len(record.training["validation_tasks"]) == 1 and record.train_tasks == ("moods", "sides")


def test_bank_and_tasks_must_fit(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the bank's 4 soft prompts belongs to one of the 1 training tasks"):
        train_translator(trained.base, trained.bank, {"x": TASKS["moods"]}, SHORT, tmp_path / "out")
    mute = {"moods": Task("moods", "generation", (Pair("x", "y"),))}
    with pytest.raises(DataError, match=r"the tasks \['moods'\] have no ground-truth hard prompt"):
        train_translator(trained.base, trained.bank, mute, SHORT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_long_targets_are_cut_and_still_end(base: BaseModel, bank: SoftPromptBank, tmp_path: Path) -> None:
    wordy = {"moods": Task("moods", "generation", (Pair("x", "y"),), hard_prompts=("abcdef" * 30,))}
    config = replace(CONFIG, max_target_tokens=6)
    translator = train_translator(base, bank, wordy, config, tmp_path / "out")
    assert translated(translator, [bank.member("moods")], max_new_tokens=40)[0].text == "abcdef"


# Saving and loading ---------------------------------------------------------------------------------------------------


def test_save_and_load_keep_adapter_and_record(trained: Trained, tmp_path: Path) -> None:
    trained.translator.save(tmp_path / "copy")
    loaded = Translator.load(tmp_path / "copy", tiny_base_model())
    assert_same_adapter(tmp_path / "copy", trained.folder)
    assert (loaded.record, loaded.id) == (trained.translator.record, trained.translator.id)
    record = loaded.record
    assert read_record(trained.folder) == record
    assert (record.num_virtual_tokens, record.bank_digest) == (K, trained.bank.digest)
    assert (record.dod_name, record.dod_digest) == ("d", "ab" * 32)
    assert record.train_tasks == tuple(LABELS) and record.training["lora_rank"] == 8
    # Loaded once more onto the same model it is the same adapter, not a second one.
    Translator.load(tmp_path / "copy", loaded.base_model)
    assert list(loaded.base_model.model.peft_config) == [loaded.id]


def test_the_folder_holds_the_adapter_alone_and_no_path(trained: Trained) -> None:
    names = sorted(path.name for path in trained.folder.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "translator.json"]
    tensors = adapter(trained.folder)
    assert all("lora_A" in key or "lora_B" in key for key in tensors), "weights of the base model"
    assert len(tensors) == 2 * 7 * 2, "two layers, seven modules, A and B"
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    for path in trained.folder.iterdir():
        content = path.read_bytes()
        assert str(trained.folder.parent).encode() not in content and b"/tmp" not in content
    assert b".training" not in (trained.folder / "translator.json").read_bytes()


@pytest.mark.parametrize("library", ["peft", "transformers"])
def test_other_libraries_can_read_the_adapter(trained: Trained, library: str) -> None:
    """The logits are those inside `reading()`."""
    model: Any = tiny_base_model().model
    if library == "peft":
        model = PeftModel.from_pretrained(model, str(trained.folder)).eval()
    else:
        model.load_adapter(str(trained.folder))
    ids = torch.tensor([[0, 40, 50, 51]])
    with trained.translator.reading(), torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, trained.base.model(input_ids=ids).logits)


def test_another_base_model_is_refused_and_both_are_named(trained: Trained, tmp_path: Path) -> None:
    other = tiny_base_model(seed=1, name="elsewhere")

    def assert_both_named(error: pytest.ExceptionInfo[BaseModelMismatch], doing: str) -> None:
        assert str(error.value).startswith(doing)
        assert str(other.ref) in str(error.value) and str(trained.base.ref) in str(error.value)

    with pytest.raises(BaseModelMismatch) as caught:
        Translator.load(trained.folder, other)
    assert_both_named(caught, "loading a translator: the translator belongs to base model tiny@")
    assert not hasattr(other.model, "peft_config"), "the refused model is left alone"
    with pytest.raises(BaseModelMismatch) as caught:
        translated(trained.translator, [soft_prompt(other, "moods", 0)])
    assert_both_named(caught, "translating: soft prompt 'moods' belongs to base model elsewhere@")
    with pytest.raises(BaseModelMismatch) as caught:
        train_translator(other, trained.bank, TASKS, SHORT, tmp_path / "out")
    assert_both_named(caught, "training a translator: the bank belongs to base model tiny@")


def test_a_damaged_folder_is_an_artifact_error(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="reading a translator: .*translator.json' is missing"):
        Translator.load(tmp_path / "none", tiny_base_model())
    trained.translator.save(tmp_path / "t")
    files = {path: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    record = json.loads(files[tmp_path / "t" / "translator.json"])
    incomplete = {key: value for key, value in record.items() if key != "base_model"}
    weights = files[tmp_path / "t" / "adapter_model.safetensors"]
    for name, content, message in (
        ("translator.json", json.dumps(record | {"format_version": 3}).encode(), "its format_version is 3; .* reads 1"),
        ("translator.json", json.dumps(incomplete).encode(), "its record is incomplete"),
        ("adapter_model.safetensors", None, "its adapter cannot be put on"),
        ("adapter_model.safetensors", weights[:-1], "its adapter cannot be put on"),
        ("adapter_config.json", None, "its adapter cannot be put on"),
    ):
        for path, whole in files.items():
            path.write_bytes(whole)
        if content is None:
            (tmp_path / "t" / name).unlink()
        else:
            (tmp_path / "t" / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            Translator.load(tmp_path / "t", tiny_base_model())


def test_an_adapter_that_does_not_fill_its_layers_is_refused(trained: Trained, tmp_path: Path) -> None:
    """PEFT takes it, and the layers without weights do nothing. The base model is left without it."""
    trained.translator.save(tmp_path / "t")
    path = tmp_path / "t" / "adapter_model.safetensors"
    whole = load_file(path)
    base_model = tiny_base_model()
    save_file({name: tensor for name, tensor in whole.items() if ".layers.1." not in name}, path)
    with pytest.raises(
        ArtifactError, match=r"lacks weights for layers of tiny@.*layers\.1\..*14 in all\), expected exactly"
    ):
        Translator.load(tmp_path / "t", base_model)
    save_file({**whole, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}, path)
    with pytest.raises(ArtifactError, match=r"holds weights that tiny@.* has no place for .*layers\.9\."):
        Translator.load(tmp_path / "t", base_model)
    assert not any("lora_" in name for name in base_model.model.state_dict())


# Translating ----------------------------------------------------------------------------------------------------------


def test_a_batch_reads_as_its_rows_do(trained: Trained) -> None:
    members = list(trained.bank)
    batch = translated(trained.translator, members, max_new_tokens=20)
    for member, expected in zip(members, batch, strict=True):
        (alone,) = translated(trained.translator, [member], max_new_tokens=20)
        assert alone.text == expected.text
        assert alone.score == pytest.approx(expected.score, rel=1e-4)


def test_the_prefill_is_the_beginning_of_the_text(trained: Trained) -> None:
    member = trained.bank.member("moods")
    first, second = translated(trained.translator, [member], max_new_tokens=20)[0].text.split(", ")
    prefilled = translated(trained.translator, [member], prefill=f"{first}, ", max_new_tokens=20)[0]
    assert (prefilled.text, prefilled.prefill) == (f"{first}, {second}", f"{first}, ")
    with trained.translator.reading(), torch.no_grad():
        base = trained.base
        target = [*base.tokenize(second), 1]
        score = base.score_targets(member.embeddings[None], [[0, *base.tokenize(f"{first}, ")]], [target])
    assert prefilled.score == pytest.approx(float(score.log_likelihood[0]) / len(target), rel=1e-4)


def test_a_text_is_capped(trained: Trained) -> None:
    member = trained.bank.member("rooms")
    whole = translated(trained.translator, [member], max_new_tokens=40)[0].text
    assert translated(trained.translator, [member], max_new_tokens=3)[0].text == whole[:3].strip()
    assert translated(trained.translator, [member], prefill="The ", max_new_tokens=1)[0].text[:3] == "The"


def test_soft_prompts_of_another_size_are_read_too(trained: Trained) -> None:
    longer = soft_prompt(trained.base, "longer", 9, num_virtual_tokens=6)
    first, second = translated(trained.translator, [longer, trained.bank.member("moods")], max_new_tokens=5)
    assert [first] == translated(trained.translator, [longer], max_new_tokens=5) != [second]
