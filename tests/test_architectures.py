"""Base models of other architectures than Llama: what is read, scored and continued is what the model itself computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_decoders import base_of, soft_prompts
from small_tasks import CONFIG, make_task
from tiny_llm import tiny_base_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from softprompt_registry.base_models.decoding import RowDecoder
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.errors import BaseModelError
from softprompt_registry.evaluation.control_prompts import control_prompts
from softprompt_registry.soft_prompts.fleet import train_step
from softprompt_registry.soft_prompts.progress import (
    DodOrigin,
    encode_task,
    finished_prompt,
    initial_embeddings,
    prepare,
)
from softprompt_registry.verbalization.proposers.nearest_tokens import NearestTokensProposer
from softprompt_registry.verbalization.verbalizer import VerbalizationConfig

USUAL = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Scales the rows of its embedding matrix by the root of D, has windows, and caps its logits.
    "gemma2": {**USUAL, "sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    # Embeds tokens in fewer dimensions than its layers have.
    "opt": {**USUAL, "ffn_dim": 64, "word_embed_proj_dim": 16},
    # Counts the distances of its windows in columns of the cache.
    "gpt_neo": {**USUAL, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    # Penalizes distances in columns.
    "mpt": {**USUAL, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    # Keeps no keys and values.
    "mamba": {**USUAL, "state_size": 4},
}  # fmt: skip
TEXTS = ["abc def", "a", "hello world"]
TARGETS = [" x", " yes no", " z"]
OWNERS = [0, 1, 0]


def of_type(model_type: str) -> BaseModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **ARCHITECTURES[model_type])
        return base_of(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), torch.float32)


@pytest.fixture(params=list(ARCHITECTURES))
def base(request: pytest.FixtureRequest) -> BaseModel:
    return of_type(request.param)


@pytest.mark.supports("base models", "Gemma 2, OPT, GPT-Neo, MPT", "as the model computes each row alone")
def test_scores_and_texts_are_those_of_each_row_alone(base: BaseModel) -> None:
    """The reference: the model's own logits of one unpadded row, worked out anew for each token."""
    soft = soft_prompts(base).float()
    prompts = [base.bos + base.tokenize(text) for text in TEXTS]
    targets = [[*base.tokenize(text), base.eos_id] for text in TARGETS]
    read = base.model.get_input_embeddings()

    def log_probabilities(owner: int, ids: list[int]) -> torch.Tensor:
        row = torch.cat([soft[owner], read(torch.tensor(ids))])
        logits: torch.Tensor = base.model(inputs_embeds=row[None], use_cache=False).logits[0]
        return logits.log_softmax(dim=-1)[soft.shape[1] :]  # of what follows each token of the text

    scores, texts = [], []
    with torch.no_grad():
        for owner, prompt, target in zip(OWNERS, prompts, targets, strict=True):
            follows = log_probabilities(owner, prompt + target)[len(prompt) - 1 :]
            scores.append(float(sum(follows[place, token] for place, token in enumerate(target))))
            text: list[int] = []
            while (
                len(text) < 12 and (token := int(log_probabilities(owner, prompt + text)[-1].argmax())) != base.eos_id
            ):
                text.append(token)
            texts.append(text)
        prefixes = base.prefixes(soft, (0,))
        for start in [soft[OWNERS], *([] if prefixes is None else [prefixes.of_rows(OWNERS)])]:
            found = base.score_targets(start, prompts, targets).log_likelihood.tolist()
            assert found == pytest.approx(scores, abs=1e-4)
            assert base.generate(start, prompts, max_new_tokens=12) == texts
    assert len({tuple(text) for text in texts}) == len(texts), "texts that are all alike would prove nothing"


def test_a_soft_prompt_is_tuned_on_it(base: BaseModel) -> None:
    """It starts from tokens as the model reads them, and has the width of what the model reads."""
    task = make_task("task", train=2)
    assert encode_task(base, task, CONFIG).failure is None
    progress = prepare(base, task, CONFIG)
    (loss,) = train_step(base, [progress.prompt], [progress.train], tokens_per_forward=1024)
    assert loss > 0 and float(progress.prompt.grad.abs().sum()) > 0  # type: ignore[union-attr]
    tokens = base.model.get_input_embeddings()(torch.arange(base.ref.vocab_size)).float()
    assert all((tokens == row).all(dim=1).any() for row in progress.initial)
    soft_prompt = finished_prompt(base, progress, CONFIG, {}, DodOrigin())
    (random_vectors,) = control_prompts(base, [soft_prompt], 1)
    assert random_vectors.kind == "random vectors"
    assert random_vectors.soft_prompt.embeddings.std().item() == pytest.approx(tokens.std().item(), rel=0.3)


def falcon_h1(**settings: float) -> BaseModel:
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model("falcon_h1", **{**USUAL, **sizes, **settings})
        return base_of(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), torch.float32)


def test_logits_are_measured_and_not_looked_up_in_the_config() -> None:
    """Falcon-H1 multiplies its logits, under a setting of its own."""
    falcon = falcon_h1(lm_head_multiplier=0.3)
    ids = [0, 40, 41, 60, 1]
    with torch.no_grad():
        loss = falcon.model(input_ids=torch.tensor([ids]), labels=torch.tensor([[-100, -100, -100, 60, 1]])).loss
        scores = falcon.score_targets(None, [ids[:3]], [ids[3:]])
    assert scores.log_likelihood.item() == pytest.approx(-2 * loss.item(), rel=1e-4)
    assert tiny_base_model()._plain_head, "the fast way is for most models"


@pytest.mark.supports("base models", "models that read more than embeddings (Falcon-H1)", "refused, in one sentence")
def test_a_model_that_reads_more_than_embeddings_is_refused() -> None:
    """Falcon-H1 scales embeddings, but not those that it is handed."""
    with pytest.raises(BaseModelError, match="from a token's id .* model type is 'falcon_h1'.*soft tokens have no ids"):
        falcon_h1(embedding_multiplier=2.0)


@pytest.mark.supports("base models", "Mamba", "tuned; InSPEcT and row decoding are refused")
def test_a_model_without_keys_and_values_says_so_where_they_are_needed() -> None:
    base = of_type("mamba")
    with pytest.raises(BaseModelError, match="the model type 'mamba' keeps no keys and values; expected a transformer"):
        RowDecoder(base, base.join(None, [[0, 5]], pad_side="left"))


@pytest.mark.parametrize(
    "setting",
    [{"suppress_tokens": True}, {"bad_words_ids": True}, {"repetition_penalty": 5.0}, {"forced_eos_token_id": 1},
     {"exponential_decay_length_penalty": (1, 100.0)}, {"return_dict_in_generate": True}],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
def test_generation_settings_of_a_checkpoint_do_not_bend_a_text(setting: dict[str, Any]) -> None:
    plain = tiny_base_model()
    soft = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    (expected,) = plain.generate(soft, [[0, 5]], max_new_tokens=6)
    assert len(expected) == 6
    if "suppress_tokens" in setting:
        setting = {"suppress_tokens": [expected[0]]}
    elif "bad_words_ids" in setting:
        setting = {"bad_words_ids": [[expected[1]]]}
    plain.model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[1, 7], pad_token_id=1, **setting)
    bent = BaseModel(plain.model, plain.tokenizer, plain.ref)
    assert bent.generate(soft, [[0, 5]], max_new_tokens=6) == [expected]
    assert bent.model.generation_config.eos_token_id == [1, 7], "which tokens end a text is no such setting"


def test_rows_of_the_matrix_that_belong_to_no_token_are_not_used() -> None:
    """Qwen pads its embedding matrix with hundreds of rows that were never trained."""
    base = tiny_base_model()
    base.model.resize_token_embeddings(4 * len(base.tokenizer), mean_resizing=False)
    padded = base_of(base.model, torch.float32)
    task = make_task("task", train=2)
    known = padded.input_embeddings[: len(padded.tokenizer)]
    initial = initial_embeddings(padded, CONFIG, task)
    assert len(initial) == CONFIG.num_virtual_tokens
    assert all((known == row).all(dim=1).any() for row in initial)
    progress = prepare(padded, task, CONFIG)
    soft_prompt = finished_prompt(padded, progress, CONFIG, {}, DodOrigin())
    # One that lies on rows without a token is still named by tokens.
    object.__setattr__(soft_prompt, "embeddings", padded.input_embeddings[-len(initial) :].float().clone())
    ((candidate,),) = NearestTokensProposer(padded).propose([soft_prompt], VerbalizationConfig())
    assert len(candidate.text) > 0
