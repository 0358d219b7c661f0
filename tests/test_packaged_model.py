"""The packaged SmolLM2-135M-Instruct: conversion, identity, and that tuning works on a real model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import PACKAGED_MODELS, load_base_model, quiet_transformers
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import fill_template
from softprompt_registry.sample import build_sample_dod
from softprompt_registry.soft_prompts.encoding import RowEncoder, encode_inside
from softprompt_registry.soft_prompts.performance import Trial, measure
from softprompt_registry.soft_prompts.soft_prompt import AS_ONE_TEXT, ENCODED_APART
from softprompt_registry.soft_prompts.tuning import tune_soft_prompts
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig

pytestmark = pytest.mark.slow

REFERENCE = "packaged:smollm2-135m-instruct"


@pytest.fixture(scope="module")
def base_model() -> Iterator[BaseModel]:
    yield load_base_model(REFERENCE)


def test_the_fingerprint_is_the_one_in_artifacts_out_there(base_model: BaseModel) -> None:
    assert base_model.ref.fingerprint.startswith("eb96e000cae7")
    assert (base_model.ref.hidden_size, base_model.ref.num_layers, base_model.ref.vocab_size) == (576, 30, 49152)


def test_the_converted_copy_gives_the_logits_of_the_gguf_file(base_model: BaseModel) -> None:
    packaged = PACKAGED_MODELS["smollm2-135m-instruct"]
    spec = importlib.util.find_spec(packaged.module)
    assert spec is not None and spec.submodule_search_locations
    folder = str(Path(next(iter(spec.submodule_search_locations))))
    with quiet_transformers():
        original = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=packaged.file, dtype=torch.float32, attn_implementation="eager"
        )
    ids = torch.tensor([base_model.bos + base_model.tokenize("The capital of France is")])
    with torch.no_grad():
        assert torch.equal(original(ids).logits, base_model.model(ids).logits)


def test_its_token_ids_are_those_of_prompt_and_target_apart(base_model: BaseModel, tmp_path: Path) -> None:
    encoder = RowEncoder.of_new_prompts(base_model)
    assert encoder.encoding == ENCODED_APART
    as_one_text = replace(encoder, encoding=AS_ONE_TEXT)
    with DodStore.open(build_sample_dod(tmp_path / "sample.sqlite")) as store:
        tasks = [store.task(name) for name in store.task_names()]
    for task in tasks:
        for pair in task.pairs:
            row, _ = as_one_text.pair(task.template, pair, 256)
            assert row.prompt == base_model.bos + base_model.tokenize(fill_template(task.template, pair.input))
            assert row.target == [*base_model.tokenize(f" {pair.output}"), base_model.eos_id]
            assert as_one_text.pair(task.template, pair, 20) == encoder.pair(task.template, pair, 20)
        for label in task.labels:
            assert as_one_text.label(task.template, label) == (0, base_model.tokenize(f" {label}"))
    assert encode_inside(base_model, "\n") == base_model.tokenize("\n")


def test_a_soft_prompt_teaches_a_task_that_the_bare_model_cannot_do(base_model: BaseModel, tmp_path: Path) -> None:
    with DodStore.open(build_sample_dod(tmp_path / "sample.sqlite")) as store:
        task = store.task("rooms")
    before = {name: tensor.clone() for name, tensor in base_model.model.state_dict().items()}
    config = TuningConfig(
        num_virtual_tokens=8,
        learning_rate=2e-2,
        schedule="cosine",
        epochs=2,
        patience_epochs=None,
        batch_size=2,
        max_train_pairs=24,
        max_validation_pairs=4,
        max_test_pairs=16,
    )
    bank = tune_soft_prompts(base_model, [task], config, tmp_path / "bank")
    pairs = task.pairs_of("test")
    prompts = [RowEncoder.of_new_prompts(base_model).pair(task.template, pair, 256)[0].prompt for pair in pairs]
    outputs = [pair.output for pair in pairs]
    bare, tuned = (
        measure(base_model, [Trial(task, None, prompts, outputs)], max_new_tokens=8, tokens_per_forward=1024),
        measure(
            base_model,
            [Trial(task, bank.member("rooms").embeddings, prompts, outputs)],
            max_new_tokens=8,
            tokens_per_forward=1024,
        ),
    )
    assert bare[0]["exact_match"] == 0.0
    assert tuned[0]["exact_match"] >= 0.5
    assert tuned[0]["label_accuracy"] > bare[0]["label_accuracy"]
    after = base_model.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
