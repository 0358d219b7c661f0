"""Texts as token ids: the tokenizer's own ids of a whole row, and the layout of each soft prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny_llm import sentencepiece_tokenizer, tiny_base_model

from softprompt_registry.base_models.frozen import LAYOUT_WITHOUT_BOS, SEQUENCE_LAYOUT, BaseModel
from softprompt_registry.dod.task import TEMPLATES, Pair, PairSplit, Task
from softprompt_registry.errors import ArtifactError
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.encoding import RowEncoder, encode_inside, encoding_for
from softprompt_registry.soft_prompts.performance import Trial, choose_labels, generate_answers
from softprompt_registry.soft_prompts.soft_prompt import (
    AS_ONE_TEXT,
    ENCODED_APART,
    SoftPrompt,
    SoftPromptRecord,
    soft_prompt_from_bytes,
)
from softprompt_registry.soft_prompts.tuning import tune_soft_prompts
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig
from softprompt_registry.verbalization.patching import target_prompt
from softprompt_registry.verbalization.proposers.instruction_induction import (
    InductionConfig,
    InstructionInductionProposer,
)
from softprompt_registry.verbalization.verbalizer import VerbalizationConfig
from softprompt_registry.verbalization.verifier import Verifier

WORDS = ("good", "bad", "Sentence", "Label", "fine", "day", "x")
KINDS = ("llama2", "mistral", "unigram")
TEMPLATE = TEMPLATES["classification"]
SPLITS: tuple[PairSplit, ...] = ("train", "validation", "test")
MOODS = Task(
    "moods",
    "classification",
    tuple(
        Pair(f"a {word} day {n}", label, split)
        for split in SPLITS
        for n in range(2)
        for word, label in [("fine", "good"), ("sad", "bad")]
    ),
    ("good", "bad"),
)


def model_like(like: str) -> BaseModel:
    kind: Any = like
    return tiny_base_model(tokenizer=sentencepiece_tokenizer(kind, WORDS))


@pytest.fixture(scope="module")
def llama2() -> BaseModel:
    return model_like("llama2")


def pieces_of(base: BaseModel, ids: list[int]) -> list[str]:
    return list(base.tokenizer.convert_ids_to_tokens(ids))


# Rows as one text -----------------------------------------------------------------------------------------------------


@pytest.mark.supports(
    "tokenizers",
    "SentencePiece-like (Llama 2, Mistral, unigram)",
    "a row has the tokens of its whole text",
)
@pytest.mark.parametrize("like", KINDS)
def test_a_row_has_the_tokens_of_its_whole_text(like: str) -> None:
    base = model_like(like)
    encoder = RowEncoder.of_new_prompts(base)
    assert encoder.encoding == AS_ONE_TEXT
    for template, text in (
        (TEMPLATE, "a fine day"),
        (TEMPLATES["generation"], "x y"),
        ("{x}", "day "),
        ("{x} is:\n", "1"),
    ):
        for output in ("good", "so good", "3"):
            row, cut = encoder.pair(template, Pair(text, output), 200)
            whole = base.tokenizer(f"{template.replace('{x}', text)} {output}", add_special_tokens=False)["input_ids"]
            assert [*row.prompt, *row.target] == [0, *whole, 1] and not cut
            assert row.prompt[1:] == base.tokenize(template.replace("{x}", text)) or template == "{x}"
    row, _ = encoder.pair(TEMPLATE, Pair("day", "good"), 200)
    assert pieces_of(base, row.target) == ["▁good", "<eos>"]  # no lone "▁"
    assert encoder.label(TEMPLATE, "bad good") == (0, base.tokenizer.convert_tokens_to_ids(["▁bad", "▁good"]))
    assert pieces_of(base, encode_inside(base, "\n")) == ["\n"]


def test_a_token_across_the_boundary_belongs_to_the_target(llama2: BaseModel) -> None:
    row, _ = RowEncoder.of_new_prompts(llama2).pair("{x} ", Pair("day", "bad"), 200)
    assert pieces_of(llama2, row.prompt) == ["<bos>", "▁day"]
    assert pieces_of(llama2, row.target) == ["▁▁", "b", "a", "d", "<eos>"]
    assert (
        RowEncoder.of_new_prompts(llama2).label("{x} ", "bad")[0] == 1
    )  # the prompt alone ends with a token for its space


@pytest.mark.parametrize("like", KINDS)
def test_a_cut_row_loses_tokens_of_its_input_alone(like: str) -> None:
    base = model_like(like)
    row, cut = RowEncoder.of_new_prompts(base).pair(TEMPLATE, Pair("fine day fine day", "good"), 9)
    assert cut and row.num_tokens == 9
    expected = ["<bos>", "▁Sentence", ":", "▁fine", "▁day", "▁Label", ":", "▁good", "<eos>"]
    assert pieces_of(base, [*row.prompt, *row.target]) == expected
    quoted, _ = RowEncoder.of_new_prompts(base).pair(
        "“{x}”", Pair("dddd", "x"), 7
    )  # nothing begins with "▁" but the row
    assert "".join(pieces_of(base, quoted.prompt)).count("▁") == 1


@pytest.mark.supports(
    "tokenizers",
    "names of special tokens in inputs and outputs",
    "text; in a template they are the tokens",
)
@pytest.mark.parametrize("like", ["bytes", "llama2"])
def test_special_tokens_in_data_are_text_and_in_a_template_are_tokens(like: str) -> None:
    """A row that ends where its input says `<eos>` teaches to end there (gemma 770, vllm 11691)."""
    base = tiny_base_model() if like == "bytes" else model_like(like)
    encoder = RowEncoder.of_new_prompts(base)
    bos, eos = base.bos[0], base.eos_id
    for room in (200, 24):
        row, cut = encoder.pair(TEMPLATE, Pair("to <eos> or not to <bos><eos>", "a <eos> day"), room)
        assert cut == (room == 24)
        assert [*row.prompt, *row.target].count(eos) == 1 and row.target[-1] == eos
        assert row.prompt.count(bos) == 1 and row.prompt[0] == bos
    assert base.decode(encoder.label(TEMPLATE, "a <eos> day")[1]).strip() == "a <eos> day"
    chat = "<bos>user {x}<eos>"
    for room in (200, 24):
        row, cut = encoder.pair(chat, Pair("a long sad day by the sea", "good"), room)
        assert cut == (room == 24)
        assert row.prompt.count(bos) == 2 and [*row.prompt, *row.target].count(eos) == 2, "the template's own stay"


def test_old_prompts_are_read_in_their_own_encoding(llama2: BaseModel) -> None:
    record = SoftPromptRecord("moods", "classification", llama2.ref, TEMPLATE)
    assert record.encoding == ENCODED_APART
    row, _ = RowEncoder.of(llama2, record).pair(TEMPLATE, Pair("day", "good"), 200)
    assert row.target == [*llama2.tokenize(" good"), 1]
    assert pieces_of(llama2, row.target)[0] == "▁▁"


@pytest.mark.supports(
    "tokenizers",
    "byte-level BPE",
    "prompt and target have the same tokens together and apart",
)
@pytest.mark.parametrize("template", [*TEMPLATES.values(), "{x}", "“{x}” is\n"])
def test_with_a_byte_level_tokenizer_both_encodings_are_one(template: str) -> None:
    base = tiny_base_model()
    assert encoding_for(base.tokenizer) == ENCODED_APART
    apart, as_one = (RowEncoder(base, SEQUENCE_LAYOUT, encoding) for encoding in (ENCODED_APART, AS_ONE_TEXT))
    for pair in (Pair("déjà vu", "3"), Pair(" 東京 ", "a b"), Pair("x" * 90, "no"), Pair("tail\n", "yes")):
        for room in (200, 60):
            assert as_one.pair(template, pair, room) == apart.pair(template, pair, room)
            assert as_one.prompt(template, pair.input, room) == apart.prompt(template, pair.input, room)
        assert as_one.label(template, pair.output) == apart.label(template, pair.output)


@pytest.mark.parametrize("like", KINDS)
def test_texts_put_together_elsewhere_have_the_tokens_of_one_text(like: str) -> None:
    base = model_like(like)
    proposer = InstructionInductionProposer(base, {"moods": MOODS}, InductionConfig(num_pairs=2))
    ids = proposer.prompt_of("moods", VerbalizationConfig(prefill="day"))
    assert ids == [0, *base.tokenize(base.decode(ids))] and base.decode(ids).endswith("\nThe instruction was: day")
    assert pieces_of(base, [target_prompt(base, ["a"]).placeholder]) == ["▁x"]


# At work --------------------------------------------------------------------------------------------------------------


def loglikelihood(base: BaseModel, soft: torch.Tensor, before: list[int], ids: list[int], num_target: int) -> float:
    """Of the last tokens, by the plain model."""
    embeds = torch.cat([soft, base.input_embeddings[[*before, *ids]]])[None]
    with torch.no_grad():
        logits = base.model(inputs_embeds=embeds, use_cache=False).logits[0].log_softmax(dim=1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(-num_target, 0))


def test_labels_are_chosen_by_the_tokens_of_whole_texts(llama2: BaseModel) -> None:
    encoder = RowEncoder.of_new_prompts(llama2)
    chosen = []
    for labels in (("good", "bad"), ("so good", "3")):
        task = replace(MOODS, pairs=tuple(Pair("a", label) for label in labels), labels=labels)
        for seed in range(4):
            soft = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
            trial = Trial(task, soft, [encoder.prompt(TEMPLATE, "fine", 99)[0]], ())

            def score(label: str) -> float:
                text = f"Sentence: fine Label: {label}"
                ids = llama2.tokenizer(text, add_special_tokens=False)["input_ids"]
                num_target = len(ids) - 5  # ▁Sentence : ▁fine ▁Label :
                if num_target == 1:
                    return loglikelihood(llama2, soft, [0], ids, 1)  # noqa: B023
                return loglikelihood(llama2, soft, [0], [*ids, 1], num_target + 1)  # noqa: B023

            expected = max(labels, key=score)
            assert choose_labels(llama2, [trial], 1000) == [[expected]]
            chosen.append(expected)
    assert len(set(chosen)) > 2, "labels of both kinds differ"


def test_answers_are_cut_behind_the_longest_label_and_keep_their_spaces(llama2: BaseModel) -> None:
    trial = Trial(MOODS, torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), [[0, 5, 6]], ())
    ids = llama2.generate(trial.soft_prompt[None], [[0, 5, 6]], max_new_tokens=3)[0]  # type: ignore[index]
    assert generate_answers(llama2, [trial], max_new_tokens=9, tokens_per_forward=99) == [[llama2.decode(ids).strip()]]
    before, after = llama2.tokenize("so"), llama2.tokenizer.convert_tokens_to_ids(["▁good", "▁day"])
    assert llama2.decode(after) == "good day" and llama2.decode(after, after=before) == " good day"


def test_a_prompt_is_tuned_in_the_encoding_that_its_record_names(llama2: BaseModel, tmp_path: Path) -> None:
    config = TuningConfig(num_virtual_tokens=2, epochs=1, batch_size=4, learning_rate=1e-2)
    bank = tune_soft_prompts(llama2, [MOODS], config, tmp_path / "bank")
    member = bank.member("moods")
    assert (member.record.encoding, bank.header["format_version"]) == (AS_ONE_TEXT, 3)
    total, count = 0.0, 0
    for pair in MOODS.pairs_of("validation"):
        ids = llama2.tokenizer(f"Sentence: {pair.input} Label: {pair.output}", add_special_tokens=False)["input_ids"]
        total -= loglikelihood(llama2, member.embeddings, [0], [*ids, 1], 2)  # the label and EOS
        count += 2
    assert member.record.metrics["validation_loss"] == pytest.approx(total / count, rel=1e-5)


# The layout belongs to the soft prompt --------------------------------------------------------------------------------


def prompt_without_bos(base: BaseModel, kind: str = "classification") -> SoftPrompt:
    embeddings = torch.randn(3, 64, generator=torch.Generator().manual_seed(7))
    record = SoftPromptRecord("moods", kind, base.ref, TEMPLATE, ("good", "bad"), layout=LAYOUT_WITHOUT_BOS)
    return SoftPrompt(embeddings, None, record)


def test_layout_and_encoding_stay_with_the_soft_prompt(tmp_path: Path) -> None:
    base = tiny_base_model()
    usual = prompt_without_bos(base)
    for layout, encoding, version in (
        (SEQUENCE_LAYOUT, ENCODED_APART, 1),
        (LAYOUT_WITHOUT_BOS, ENCODED_APART, 2),
        (SEQUENCE_LAYOUT, AS_ONE_TEXT, 2),
    ):
        prompt = replace(usual, record=replace(usual.record, layout=layout, encoding=encoding))
        prompt.save(tmp_path / str(encoding) / "prompt")
        stored = json.loads((tmp_path / str(encoding) / "prompt" / "soft_prompt.json").read_text())
        assert stored["format_version"] == version
        payload = (tmp_path / str(encoding) / "prompt" / "soft_prompt.safetensors").read_bytes()
        bank = SoftPromptBank.save([prompt], tmp_path / str(encoding) / "bank")
        assert bank.header["format_version"] == version + 1
        for again in (
            SoftPrompt.load(tmp_path / str(encoding) / "prompt").record,
            bank.member("moods").record,
            soft_prompt_from_bytes(payload, base.ref).record,
            soft_prompt_from_bytes(prompt.to_bytes(), base.ref).record,
        ):
            assert (again.layout, again.encoding) == (layout, encoding)


@pytest.mark.parametrize("change", [{"layout": "[text][soft tokens]"}, {"encoding": 3}])
def test_an_unknown_layout_or_encoding_is_refused(change: dict[str, Any]) -> None:
    record = prompt_without_bos(tiny_base_model()).record
    with pytest.raises(ArtifactError, match=r"its layout is .* expected one of '\[soft tokens\]\[BOS\]"):
        replace(record, **change)


@pytest.mark.parametrize("evidence", ["pairs", "inputs"])
def test_the_verifier_reads_a_prompt_in_its_own_layout(evidence: Literal["pairs", "inputs"]) -> None:
    base = tiny_base_model()
    prompt = prompt_without_bos(base)
    if evidence == "inputs":
        found = Verifier(base).verify(prompt, [], inputs=["a day", "b", "c", "dd"])
        assert all(score < 0 for score in found.no_prompt_scores) and found.soft_prompt_scores == (0.0,) * 4
        return
    pairs = [Pair(text, output) for text, output in (("a day", "good"), ("b", "bad"), ("c", "x"), ("dd", "good"))]
    found = Verifier(base).verify(prompt, ["Say it"], pairs=pairs)
    befores = {
        "soft": prompt.embeddings,
        "none": prompt.embeddings[:0],
        "text": base.input_embeddings[base.tokenize("Say it\n")],
    }
    expected: dict[str, list[float]] = {name: [] for name in befores}
    for pair in pairs:
        ids = base.tokenize(f"Sentence: {pair.input} Label: {pair.output}") + [1]
        for name, before in befores.items():
            expected[name].append(loglikelihood(base, before, [], ids, len(pair.output) + 2) / (len(pair.output) + 2))
    assert found.soft_prompt_scores == pytest.approx(expected["soft"], rel=1e-4)
    assert found.no_prompt_scores == pytest.approx(expected["none"], rel=1e-4)
    assert found.candidates[0].item_scores == pytest.approx(expected["text"], rel=1e-4)


def test_answers_come_in_the_prompts_own_layout() -> None:
    from mlflow_plugins.flavor_parts import _prompt_ids
    from softprompt_registry.language_models.protocol import Completion, CompletionRequest
    from softprompt_registry.portability.soft_prompted import SoftPrompted
    from softprompt_registry.verbalization.proposers.behaviour import BehaviourProposer

    base = tiny_base_model()
    prompt = prompt_without_bos(base, kind="generation")
    text = "Sentence: a Label:"
    (row,) = base.generate(prompt.embeddings[None], [base.tokenize(text)], max_new_tokens=8)
    with_bos = replace(prompt, record=replace(prompt.record, layout=SEQUENCE_LAYOUT))
    (answer,) = SoftPrompted(base, prompt).complete([CompletionRequest(text, max_tokens=8)])
    assert isinstance(answer, Completion) and answer.text == base.decode(row).removeprefix(" ")
    assert answer.prompt_tokens == 3 + len(base.tokenize(text))
    assert SoftPrompted(base, prompt).identity != SoftPrompted(base, with_bos).identity  # answers are kept by it
    assert _prompt_ids(base, prompt, "a", 0, 8) == base.tokenize(text)
    assert _prompt_ids(base, with_bos, "a", 0, 8) == [0, *base.tokenize(text)]
    trial = BehaviourProposer(base, {prompt.record.task: ["a"]})._trial(prompt)
    assert trial.prompts == [base.tokenize(text)]
