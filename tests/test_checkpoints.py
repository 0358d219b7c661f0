"""Checkpoints of many kinds, made in code: each loads and computes what transformers does, or is refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_prompts import edit_json, translated
from tiny_llm import HIDDEN_SIZE, save_tiny_model, tiny_base_model, tiny_tokenizer

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.layers import linear_layers
from softprompt_registry.base_models.loading import load_base_model, load_tokenizer
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import BaseModelError, ConfigError
from softprompt_registry.language_models.on_transformers import OnTransformers, TransformersConfig
from softprompt_registry.language_models.protocol import Completion, CompletionRequest
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.translators.training import LLAMA_LAYERS, TranslatorConfig, train_translator
from softprompt_registry.translators.translator import Translator, adapter_parameters

VOCABULARY = len(tiny_tokenizer()) + 6
"""Checkpoints often have more rows in their embedding matrix than their tokenizer has tokens."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
EYES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
EYES |= {"image_size": 28, "patch_size": 14}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}


def gemma3() -> Any:
    text = SIZES | {"head_dim": 16, "sliding_window": 64}
    config = transformers.Gemma3Config(text_config=text, vision_config=EYES, eos_token_id=[1, 200])
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    eyes = EYES | {"model_type": "clip_vision_model", "projection_dim": 16}
    config = transformers.LlavaConfig(text_config=SIZES | {"model_type": "llama"}, vision_config=eyes)
    return transformers.LlavaForConditionalGeneration(config)


def mistral3() -> Any:
    text, eyes = SIZES | {"model_type": "mistral", "head_dim": 16}, EYES | {"model_type": "pixtral", "head_dim": 8}
    config = transformers.Mistral3Config(text_config=text, vision_config=eyes)
    return transformers.Mistral3ForConditionalGeneration(config)


def qwen2_vl() -> Any:
    eyes = {"depth": 1, "embed_dim": 16, "hidden_size": HIDDEN_SIZE, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=SIZES | ROPE, vision_config=eyes)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    """What reads images has layers of the same names as the decoder: `gate_proj`, `up_proj`, `down_proj`."""
    eyes = {"depth": 1, "hidden_size": 16, "out_hidden_size": HIDDEN_SIZE, "num_heads": 2, "intermediate_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=SIZES | ROPE, vision_config=eyes)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def phi3() -> Any:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES))


def gpt2() -> Any:
    sizes = {"n_positions": 256, "n_embd": HIDDEN_SIZE, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, **sizes)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def saved(make: Callable[[], Any], folder: Path) -> tuple[Any, Path]:
    """The model as transformers made it, and the folder that it was written to, with a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model, folder


# Loaded, and computed as transformers does ----------------------------------------------------------------------------


@pytest.mark.supports(
    "base models",
    "multimodal: Gemma 3, LLaVA, Mistral 3, Qwen2-VL, Qwen2.5-VL",
    "the language model is used",
)
@pytest.mark.parametrize("make", [gemma3, llava, mistral3, qwen2_vl, qwen2_5_vl])
def test_the_language_model_of_a_multimodal_checkpoint_reads_soft_prompts(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    whole, folder = saved(make, tmp_path / "whole")
    base = load_base_model(str(folder))
    assert (base.ref.hidden_size, base.ref.num_layers, base.ref.vocab_size) == (HIDDEN_SIZE, 2, VOCABULARY)
    assert base.max_positions == 256 and base.end_ids == ((1, 200) if make is gemma3 else (1,))
    assert base.model.config.name_or_path == str(folder)
    assert load_base_model(str(folder), dtype="bfloat16").ref.fingerprint == base.ref.fingerprint

    soft = 0.3 * torch.randn(2, 3, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    prompts, targets = [[0, 40, 41], [0, 50]], [[60, 1], [61, 62, 1]]
    read = whole.get_input_embeddings()
    with torch.no_grad():
        assert torch.equal(base.input_embeddings[[0, 40]], read(torch.tensor([0, 40]))), "Gemma's are scaled"
        scores = base.score_targets(soft, prompts, targets).log_likelihood
        written = base.generate(soft, prompts, max_new_tokens=4)
        prefixes = base.prefixes(soft, (0,))
        assert (prefixes is None) == (make in (gemma3, mistral3)), "sliding windows"
        if prefixes is not None:
            shared = base.score_targets(prefixes.of_rows([0, 1]), prompts, targets).log_likelihood
            torch.testing.assert_close(shared, scores, rtol=1e-4, atol=1e-4)
            assert base.generate(prefixes.of_rows([0, 1]), prompts, max_new_tokens=4) == written
        for row in range(2):

            def logits(ids: list[int], row: int = row) -> torch.Tensor:
                """(T, V) after the soft tokens, by the whole model."""
                embeds = torch.cat([soft[row], read(torch.tensor(ids))])[None]
                places = torch.arange(embeds.shape[1])[None]
                found: torch.Tensor = whole(inputs_embeds=embeds, position_ids=places).logits[0, 3:]
                return found

            prompt, target = prompts[row], targets[row]
            likely = logits([*prompt, *target])[len(prompt) - 1 : -1].log_softmax(dim=1)
            expected = sum(float(likely[i, token]) for i, token in enumerate(target))
            assert float(scores[row]) == pytest.approx(expected, rel=1e-4)
            ids = list(prompt)
            while len(ids) < len(prompt) + 4:
                ids.append(int(logits(ids)[-1].argmax()))
            assert base.until_end(ids[len(prompt) :]) == written[row]


@pytest.mark.supports("tokenizers", "no BOS, no pad token", "supported")
def test_a_tokenizer_without_bos_and_pad_is_enough(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "bare")
    edit_json(folder / "tokenizer_config.json", bos_token=..., pad_token=...)
    base, plain = load_base_model(str(folder)), tiny_base_model()
    assert base.bos == [] and base.tokenizer.pad_token_id is None
    prompts = [base.tokenize("abc"), base.tokenize("a")]
    assert base.generate(None, prompts, max_new_tokens=5) == plain.generate(None, prompts, max_new_tokens=5)


@pytest.mark.supports(
    "tokenizers",
    "more tokens than the embedding matrix has rows",
    "supported; such a token is refused where it occurs",
)
def test_tokens_beyond_the_embedding_matrix_are_refused_where_they_occur(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    base = load_base_model(str(folder))
    assert base.generate(None, [base.tokenize("abc")], max_new_tokens=3)
    with pytest.raises(BaseModelError, match="the token '<extra>' the id 258, expected ids below 258, the rows of its"):
        base.generate(None, [base.tokenize("abc<extra>")], max_new_tokens=3)
    model = OnTransformers(TransformersConfig("tiny", prompt_format="plain"), base)
    request = CompletionRequest("Hi", max_tokens=200, json_schema='{"enum": ["yes", "no"]}')
    (answer,) = model.complete([request])
    assert isinstance(answer, Completion) and json.loads(answer.text) in ("yes", "no"), (
        "a grammar knows all of the tokenizer's tokens"
    )


# Refused --------------------------------------------------------------------------------------------------------------


def no_file_but(folder: Path, *kept: str) -> None:
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


def bitsandbytes(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def own_code(folder: Path) -> None:
    code = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
    (folder / "configuration_mine.py").write_text(code)
    (folder / "modeling_mine.py").write_text(code)
    classes = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    edit_json(folder / "config.json", model_type="mine", auto_map=classes)


def own_tokenizer_code(folder: Path) -> None:
    (folder / "tokenization_mine.py").write_text(f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")
    classes = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map=classes)


def no_end_token(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=...)


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_base_model().model.save_pretrained(folder, max_shard_size="100KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def missing_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_head(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_base_model().model.model.save_pretrained(folder)


def other_size(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=64)


def embeddings_in_every_layer(folder: Path) -> None:
    no_file_but(folder, "tokenizer.json", "tokenizer_config.json")
    text = SIZES | {"num_hidden_layers": 1, "head_dim": 16, "hidden_size_per_layer_input": 8}
    text |= {"layer_types": ["full_attention"], "vocab_size_per_layer_input": VOCABULARY}
    transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**text)).save_pretrained(folder)


def encoder_and_decoder(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="t5")


@pytest.mark.supports(
    "base models",
    "code of their own, quantization without its package, no end token, missing shards, weights or heads",
    "refused, in one sentence",
)
@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (bitsandbytes, ["requires bitsandbytes", "Install the package that it names", "without quantization"]),
        (own_code, ["contains custom code", "Code that comes with a checkpoint is never run"]),
        (own_tokenizer_code, ["contains custom code", "Code that comes with a checkpoint is never run"]),
        (no_end_token, ["its tokenizer has no end token", "Set eos_token in its tokenizer_config.json"]),
        (missing_shard, ["model-00002-of-00005.safetensors", "with all its files"]),
        (missing_weight, ["1 of its weights (['model.layers.1.mlp.up_proj.weight'])", "at random"]),
        (without_head, ["1 of its weights (['lm_head.weight'])", "a whole causal language model"]),
        (other_size, ["6 of its weights (['model.layers.0.mlp.down_proj.weight', ", "in another size"]),
        (embeddings_in_every_layer, ["(hidden_size_per_layer_input)", "soft tokens have no ids"]),
        (encoder_and_decoder, ["Unrecognized configuration class", "T5Config"]),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused_in_a_sentence(
    change: Callable[[Path], None], messages: list[str], tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    change(folder)
    with pytest.raises(BaseModelError, match="loading base model .*tiny'") as caught:
        load_base_model(str(folder))
    assert all(message in str(caught.value) for message in messages), str(caught.value)
    assert not (folder / "ran").exists(), "code of the checkpoint"
    if change is own_tokenizer_code:
        with pytest.raises(BaseModelError, match="Code that comes with a checkpoint is never run"):
            load_tokenizer(str(folder))


# Where an adapter goes ------------------------------------------------------------------------------------------------

TASKS = {name: Task(name, "classification", (Pair("x", "no"),), (name, "no")) for name in ("moods", "sides")}
CONFIG = TranslatorConfig(epochs=1, lora_rank=2, lora_dropout=0.0, learning_rate=1e-2, validation_share=0.0)


def bank_of(base: BaseModel, folder: Path) -> SoftPromptBank:
    generator = torch.Generator().manual_seed(0)
    members = []
    for name in TASKS:
        record = SoftPromptRecord(name, "classification", base.ref, "{x}")
        members.append(SoftPrompt(0.5 * torch.randn(4, HIDDEN_SIZE, generator=generator), None, record))
    return SoftPromptBank.save(members, folder)


@pytest.mark.supports(
    "base models",
    "translators on Llama, Qwen2.5-VL, Phi-3, GPT-2",
    "all linear layers of the decoder but the head, by their names",
)
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (llama, LLAMA_LAYERS),
        (qwen2_5_vl, LLAMA_LAYERS),
        (phi3, ("o_proj", "qkv_proj", "gate_up_proj", "down_proj")),
        (gpt2, ("c_attn", "c_proj", "c_fc")),
    ],
)
def test_a_translator_adapts_all_linear_layers_of_the_decoder(
    make: Callable[[], Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    _, folder = saved(make, tmp_path / "base")
    base = load_base_model(str(folder))
    bank = bank_of(base, tmp_path / "bank")
    translator = train_translator(base, bank, TASKS, CONFIG, tmp_path / "out")
    # Recorded as if they had been named, so that the same training is taken over.
    assert tuple(translator.record.training["target_modules"]) == expected
    named = dataclasses.replace(CONFIG, target_modules=expected)
    train_translator(base, bank, TASKS, named, tmp_path / "out")
    adapted = {name.partition(".lora_")[0] for name in adapter_parameters(base, translator.adapter_name)}
    assert {name.rpartition(".")[2] for name in adapted} == set(expected)
    decoder = "transformer" if make is gpt2 else "model.language_model" if make is qwen2_5_vl else "model"
    assert all(name.startswith(f"{decoder}.") for name in adapted), adapted
    assert tuple(linear_layers(base)) == expected, "also below an adapter"
    # Training changed something in every layer, and it is all in the file.
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)
    prompts = list(bank)
    again = Translator.load(tmp_path / "out", load_base_model(str(folder)))
    assert translated(translator, prompts, max_new_tokens=5) == translated(again, prompts, max_new_tokens=5)


@pytest.mark.supports(
    "base models",
    "`target_modules` that the model does not have",
    "refused; missing and existing names are listed",
)
def test_target_modules_that_are_not_found_are_named(tmp_path: Path) -> None:
    """A part of them would be passed over without a word by PEFT."""
    _, folder = saved(phi3, tmp_path / "base")
    base = load_base_model(str(folder))
    bank = bank_of(base, tmp_path / "bank")
    for names, missing in ((LLAMA_LAYERS, "'gate_proj', 'k_proj', 'q_proj', 'up_proj', 'v_proj'"), (("x",), "'x'")):
        config = dataclasses.replace(CONFIG, target_modules=names)
        with pytest.raises(ConfigError) as caught:
            train_translator(base, bank, TASKS, config, tmp_path / "out")
        assert missing in str(caught.value)
        assert "its linear layers are ['o_proj', 'qkv_proj', 'gate_up_proj', 'down_proj']" in str(caught.value)
        assert not any("lora_" in name for name, _ in base.model.named_parameters()), "nothing is left of the attempt"


def test_trainings_that_began_with_the_layers_of_a_llama_as_the_default_are_taken_over() -> None:
    assert CONFIG.identity == dataclasses.replace(CONFIG, target_modules=LLAMA_LAYERS).identity
    assert CONFIG.identity != dataclasses.replace(CONFIG, target_modules=("q_proj",)).identity


@pytest.mark.supports("base models", "models of the Hub, by name, branch or commit", "recorded with the commit")
def test_a_model_of_the_hub_is_recorded_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 no longer says which commit it has loaded. The folder is laid out as the Hub's cache on the disk."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--team--tiny"
    save_tiny_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for reference in ("team/tiny", "team/tiny@main", f"team/tiny@{commit}"):
        ref = load_base_model(reference).ref
        assert (ref.name, ref.revision) == ("team/tiny", commit)
