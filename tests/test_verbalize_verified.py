"""Where people meet verified verbalizations: what texts are tried on, the served model and `softprompt verbalize`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from llm_server import LlmServer
from mlflow.pyfunc import PyFuncModel
from portable_models import PortableModel, encoded, predict
from safetensors.torch import save as save_tensors
from tiny_llm import HIDDEN_SIZE

from mlflow_plugins.portable_prompt import NOT_ASKED
from mlflow_plugins.serving_requests import ServingConfig
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.cli import main
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import TEMPLATES, Pair, Task, fill_template
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.verbalization.abstention import DEFAULT_MIN_FAITHFULNESS, AbstentionRule
from softprompt_registry.verbalization.evidence import TriedOn, collect_evidence, inputs_of_file, pairs_of_file
from softprompt_registry.verbalization.methods import apply_methods
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import NOT_VERIFIED, Candidate, VerbalizationConfig, verbalize
from softprompt_registry.verbalization.verification import Verification
from softprompt_registry.verbalization.verifier import Verifier, VerifierConfig, fitting_template

ANYTHING = AbstentionRule(-1e9)
"""A rule that gives every text that says something."""
FEELINGS = {"joy": ["a gift", "the sun", "a song", "cake"], "fear": ["a noise", "the dark", "a storm", "teeth"]}
INPUTS = [text for texts in FEELINGS.values() for text in texts]
TEST_PAIRS = tuple(Pair(f"{text}!", label, "test") for label, texts in FEELINGS.items() for text in texts)
MOODS = Task(
    "moods",
    "classification",
    (*(Pair(text, label) for label, texts in FEELINGS.items() for text in texts), *TEST_PAIRS),
    ("joy", "fear"),
    split="test",
)
STORIES = Task("stories", "generation", tuple(Pair(f"{n}", f"once {n}", "test") for n in range(6)), split="test")


def tuned_in(base: BaseModel, template: str) -> SoftPrompt:
    """A soft prompt that knows the labels of `MOODS`, tuned in a template."""
    pairs = MOODS.pairs_of("train")
    heads = [[*base.bos, *base.tokenize(fill_template(template, pair.input))] for pair in pairs]
    targets = [[*base.tokenize(f" {pair.output}"), base.eos_id] for pair in pairs]
    soft = torch.nn.Parameter(0.1 * torch.randn(4, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam([soft], lr=3e-2)
    for _ in range(60):
        scores = base.score_targets(soft.expand(len(heads), -1, -1), heads, targets)
        optimizer.zero_grad()
        (-scores.log_likelihood.sum()).backward()
        optimizer.step()
    record = SoftPromptRecord("moods", "classification", base.ref, template, task_digest=MOODS.digest)
    return SoftPrompt(soft.detach(), None, record)


@pytest.fixture(scope="module")
def plain_base(portable: PortableModel) -> BaseModel:
    """The base model, without the layers of any adapter."""
    return load_base_model(str(portable.base_folder))


@pytest.fixture(scope="module")
def moods(plain_base: BaseModel) -> SoftPrompt:
    return tuned_in(plain_base, MOODS.template)


# What texts are tried on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES.values())
@pytest.mark.parametrize("data", [TriedOn(pairs=TEST_PAIRS), TriedOn(inputs=tuple(INPUTS))], ids=["pairs", "inputs"])
def test_a_soft_prompt_shows_which_template_it_was_tuned_in(
    plain_base: BaseModel, template: str, data: TriedOn
) -> None:
    assert fitting_template(Verifier(plain_base), tuned_in(plain_base, template), data) == template


class TableProposer:
    """The same candidates for every soft prompt."""

    def __init__(self, name: str, candidates: Sequence[Candidate]) -> None:
        self.name = name
        self.candidates = list(candidates)

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        return [self.candidates for _ in soft_prompts]


def test_the_verifier_chooses_among_the_candidates_of_all_proposers(plain_base: BaseModel, moods: SoftPrompt) -> None:
    """Against the proposers' own scores: answers that begin like the labels are made likelier by naming them."""
    proposers = [
        TableProposer("one", [Candidate("qqq", "one", -0.1), Candidate("joy, fear", "one", -3.0)]),
        TableProposer("two", [Candidate("zz zz", "two", -0.2), Candidate("qqq", "two", -0.3)]),
    ]
    texts = ["qqq", "zz zz", "joy, fear"]
    expected = Verifier(plain_base).verify(moods, texts, pairs=TEST_PAIRS, test_order=True)
    assert expected.order is not None and len(expected.order.order_scores) == 19
    order = [candidate.text for candidate in expected.candidates]
    assert order != texts, "the verifier does not agree with the proposers"
    verify = partial(verbalize, [moods], proposers, verifier=Verifier(plain_base))

    (found,) = verify(evidence=[TriedOn(pairs=TEST_PAIRS)], rule=ANYTHING)
    assert [candidate.text for candidate in found.candidates] == order and found.text == order[0]
    assert found.verification == expected
    assert (found.evidence, found.abstained, found.reason) == ("pairs", False, None)

    (withheld,) = verify(evidence=[TriedOn(pairs=TEST_PAIRS)], rule=AbstentionRule(1.5))
    assert withheld.abstained and "less than the required 1.50" in str(withheld.reason)

    (untried,) = verify()
    assert [candidate.text for candidate in untried.candidates] == texts
    assert (untried.reason, untried.verification) == (NOT_VERIFIED, None)

    (few,) = verify(evidence=[TriedOn(pairs=TEST_PAIRS[:3])])
    assert few.text == "qqq" and few.faithfulness is None
    assert few.reason == (
        "not verified: found 3 pairs, expected at least 4; candidates are ranked by the proposer's own score"
    )


def jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def as_rows(pairs: Sequence[Pair]) -> list[dict[str, str]]:
    return [{"input": pair.input, "output": pair.output} for pair in pairs]


def test_pairs_and_inputs_are_read_from_files(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", [{**row, "note": 1} for row in as_rows(TEST_PAIRS)])
    assert pairs_of_file(file) == tuple(Pair(pair.input, pair.output) for pair in TEST_PAIRS)
    (tmp_path / "pairs.csv").write_text(
        "input,output\n" + "".join(f"{pair.input},{pair.output}\n" for pair in TEST_PAIRS)
    )
    assert pairs_of_file(tmp_path / "pairs.csv") == pairs_of_file(file)
    (tmp_path / "inputs.txt").write_text("\ufeffone\n\n  two \nthree\nfour")
    assert inputs_of_file(tmp_path / "inputs.txt") == ("one", "two", "three", "four")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"input": "a", "output": "b"}\n[1]\n', "line 2 is a JSON list, expected an object"),
        (b'{"input": "a"\n', "line 1 is broken JSON"),
        (b'{"input": " "}\n', "line 1 has no text under 'input' and 'output'"),
        (b'{"input": "a", "output": 3}\n', "line 1 has no text under 'output'"),
        (b'{"input": "a", "output": "b"}\n' * 3, "found 3, expected at least 4 pairs. Add some."),
        (b"one\ntwo\n\n", "found 2, expected at least 4 inputs, one on each line"),
        (b"\xff\xfe", "bytes that are not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    is_pairs = content.startswith(b"{")
    path = tmp_path / "given.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        (pairs_of_file if is_pairs else inputs_of_file)(path)
    doing = f"reading {'pairs' if is_pairs else 'inputs'} from {str(path)!r}: "
    assert str(caught.value).startswith(doing) and words in str(caught.value)


def dod_of(path: Path, *tasks: Task) -> Path:
    with DodStore.create(path) as store:
        for task in tasks:
            store.add_task(task)
    return path


def named(prompt: SoftPrompt, task: Task | str, **changes: Any) -> SoftPrompt:
    name, digest = (task, None) if isinstance(task, str) else (task.name, task.digest)
    return replace(prompt, record=replace(prompt.record, task=name, task_digest=digest, **changes))


def test_a_dod_gives_test_pairs_and_labels(tmp_path: Path, moods: SoftPrompt) -> None:
    dod = dod_of(tmp_path / "dod.sqlite", MOODS, STORIES)
    prompts = [named(moods, STORIES), moods, moods]
    found = collect_evidence(prompts, dod=dod, labels_from_data=True)
    assert [data.pairs for data in found.tried_on] == [STORIES.pairs, TEST_PAIRS, TEST_PAIRS]
    assert {name: task.labels for name, task in found.labelled_tasks.items()} == {"moods": ("joy", "fear")}
    assert collect_evidence(prompts, dod=dod).labelled_tasks == {}
    # Labels are those that occur, not those that a task declares.
    declared = replace(MOODS, labels=("anger", "fear", "joy"))
    dod = dod_of(tmp_path / "declared.sqlite", declared)
    found = collect_evidence([named(moods, declared)], dod=dod, labels_from_data=True)
    assert found.labelled_tasks["moods"].labels == ("joy", "fear")


def test_what_a_dod_lacks_is_said(tmp_path: Path, moods: SoftPrompt) -> None:
    few = Task("few", "generation", tuple(Pair(f"{n}", "x", "test") for n in range(3)))
    dod = dod_of(tmp_path / "dod.sqlite", MOODS, STORIES, few)
    with pytest.raises(DataError, match=r"tasks 'a', 'b', 'c' and 1 more are missing; it has 3 tasks\. Give the DoD"):
        collect_evidence([moods, *(named(moods, name) for name in "dcba")], dod=dod)
    with pytest.raises(DataError, match="test pairs of task 'few': found 3, expected at least 4 test pairs"):
        collect_evidence([named(moods, few)], dod=dod)
    with pytest.raises(
        DataError, match=f"'moods' has the digest {MOODS.digest[:12]}, but the soft prompt was tuned on "
    ):
        collect_evidence([named(moods, replace(MOODS, pairs=MOODS.pairs[1:])), moods], dod=dod)
    with pytest.raises(DataError, match="labels from the outputs of task 'stories' is no classification"):
        collect_evidence([named(moods, STORIES)], dod=dod, labels_from_data=True)


def test_pairs_are_of_one_task_and_their_outputs_must_be_labels(tmp_path: Path, moods: SoftPrompt) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", as_rows(TEST_PAIRS))
    with pytest.raises(ConfigError, match="found 2 soft prompts, expected one, since pairs are of one task"):
        collect_evidence([moods, moods], pairs=file)
    found = collect_evidence([moods], pairs=file, labels_from_data=True)
    assert found.labelled_tasks["moods"].labels == ("joy", "fear") and found.what == "8 pairs"
    free = jsonl(tmp_path / "free.jsonl", as_rows(STORIES.pairs))
    with pytest.raises(DataError, match="6 pairs have 6 different outputs; expected at least two labels, each twice"):
        collect_evidence([moods], pairs=free, labels_from_data=True)


# The served model -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(portable: PortableModel, base_in_environment: None) -> PyFuncModel:
    return portable.served(min_faithfulness=-1e9)


def row_of(prompt: SoftPrompt, pairs: Sequence[Pair] = (), **columns: Any) -> dict[str, Any]:
    row = {"soft_prompt": encoded(prompt.to_bytes()), **columns}
    return {**row, "task_pairs": json.dumps(as_rows(pairs))} if pairs else row


def expected_of(base: BaseModel, prompt: SoftPrompt, result: dict[str, Any], **data: Any) -> Verification:
    """What a verifier on the plain base model says of a served row's candidates."""
    texts = [candidate["text"] for candidate in result["candidates"]]
    return Verifier(base, VerifierConfig(max_pairs=64)).verify(prompt, texts, template=MOODS.template, **data)


@pytest.mark.parametrize("evidence", ["pairs", "probe inputs"])
def test_served_candidates_are_ranked_by_the_base_model_without_the_adapter(
    model: PyFuncModel, portable: PortableModel, plain_base: BaseModel, moods: SoftPrompt, evidence: str
) -> None:
    data: dict[str, Any] = {"pairs": TEST_PAIRS} if evidence == "pairs" else {"inputs": INPUTS}
    row = row_of(moods, TEST_PAIRS) if evidence == "pairs" else row_of(moods, inputs=INPUTS)
    (result,) = predict(model, row, num_candidates=4)
    expected = expected_of(plain_base, moods, result, **data)
    best = expected.candidates[0]

    assert len(result["candidates"]) > 2
    assert [candidate["text"] for candidate in result["candidates"]] == [one.text for one in expected.candidates]
    scores = [candidate["verified_score"] for candidate in result["candidates"]]
    assert scores == pytest.approx([one.score for one in expected.candidates], rel=1e-4)
    assert (result["hard_prompt"], result["evidence"], result["abstained"]) == (best.text, evidence, False)
    assert result["faithfulness"] == pytest.approx(best.faithfulness, abs=1e-4)
    assert result["faithfulness_interval"] == pytest.approx([best.low, best.high], abs=1e-4)
    assert result["reason"] is None
    json.dumps(result, allow_nan=False)

    # What the numbers would be with the adapter left on.
    with portable.translator.reading():
        wrong = expected_of(portable.base_model, moods, result, **data)
    assert wrong.candidates[0].score != pytest.approx(best.score, rel=1e-2)


def test_the_own_ranking_can_differ_and_stays_where_nothing_is_tried(
    model: PyFuncModel, portable: PortableModel, moods: SoftPrompt
) -> None:
    own = predict(model, row_of(moods, TEST_PAIRS), num_candidates=8, verify=False)[0]
    assert (own["faithfulness"], own["abstained"], own["reason"], own["evidence"]) == (None, False, NOT_VERIFIED, None)
    assert {candidate["verified_score"] for candidate in own["candidates"]} == {None}
    assert own == predict(model, row_of(moods), num_candidates=8)[0]
    verified = predict(model, row_of(moods, TEST_PAIRS), num_candidates=8)[0]
    texts = [[candidate["text"] for candidate in result["candidates"]] for result in (own, verified)]
    assert sorted(texts[0]) == sorted(texts[1]) and texts[0] != texts[1]

    few = predict(model, row_of(moods, TEST_PAIRS[:3], inputs=INPUTS), row_of(moods, inputs=INPUTS[:1]))
    assert few[0]["hard_prompt"] == few[1]["hard_prompt"] == predict(model, row_of(moods))[0]["hard_prompt"]
    assert [row["reason"].partition(";")[0] for row in few] == [
        "not verified: found 3 pairs, expected at least 4",
        "not verified: found 1 inputs, expected at least 4",
    ]


def test_a_row_below_the_threshold_has_no_hard_prompt_but_its_candidates(
    portable: PortableModel, base_in_environment: None, moods: SoftPrompt
) -> None:
    given = predict(portable.served(min_faithfulness=-1e9), row_of(moods, TEST_PAIRS))[0]
    strict = portable.served(min_faithfulness=given["faithfulness"] + 0.01)
    lenient = portable.served(min_faithfulness=given["faithfulness"] - 0.01)
    withheld = predict(strict, row_of(moods, TEST_PAIRS))[0]
    assert withheld["hard_prompt"] is None and withheld["abstained"] is True and withheld["error"] is None
    assert (
        withheld["reason"].startswith("the best text keeps")
        and "8 pairs), less than the required" in withheld["reason"]
    )
    unchanged = ("faithfulness", "faithfulness_interval", "evidence", "candidates")
    assert [withheld[name] for name in unchanged] == [given[name] for name in unchanged]
    assert predict(lenient, row_of(moods, TEST_PAIRS))[0] == given
    assert ServingConfig().min_faithfulness == DEFAULT_MIN_FAITHFULNESS == 0.5


def test_the_target_llm_is_not_asked_with_an_abstained_text(
    portable: PortableModel, base_in_environment: None, moods: SoftPrompt, llm_server: LlmServer
) -> None:
    model = portable.served(min_faithfulness=1e9, target_model="big", target_base_url=llm_server.url)
    rows = [row_of(moods, TEST_PAIRS, inputs=["held", "back"]), row_of(moods, inputs=["asked"])]
    withheld, asked = predict(model, *rows, answer=True)
    assert withheld["hard_prompt"] is None
    assert withheld["answers"] == [{"input": text, "answer": None, "error": NOT_ASKED} for text in ("held", "back")]
    assert withheld["usage"] == {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
    assert asked["hard_prompt"] and asked["answers"][0]["error"] is None
    assert [received.body["messages"][-1]["content"] for received in llm_server.received] == [
        f"{asked['hard_prompt']} Input: asked\nOutput:"
    ]
    assert predict(model, rows[0], answer=True)[0] == withheld and len(llm_server.received) == 1


def test_a_fault_in_verifying_spoils_no_other_row(model: PyFuncModel, moods: SoftPrompt) -> None:
    alone = predict(model, row_of(moods, TEST_PAIRS))[0]
    long = [Pair("a", "x" * 600, "test")] * 4
    first, too_long, second = predict(model, row_of(moods, TEST_PAIRS), row_of(moods, long), row_of(moods, TEST_PAIRS))
    assert first == second == alone
    assert "soft prompt 'soft_prompt' with pair 0" in too_long["error"] and "moods" not in too_long["error"]
    assert (too_long["hard_prompt"], too_long["faithfulness"], too_long["abstained"]) == (None, None, None)


def test_an_unexpected_error_spoils_no_other_row(model: PyFuncModel, moods: SoftPrompt) -> None:
    served = model._model_impl
    verifier = served._verifier

    class BreaksOnce:
        def verify(self, *arguments: Any, **settings: Any) -> Verification:
            served._verifier = verifier
            raise RuntimeError("in /some/path")

    served._verifier = BreaksOnce()
    broken, good = predict(model, row_of(moods, TEST_PAIRS), row_of(moods, TEST_PAIRS))
    assert "the server's log has it under entry" in broken["error"] and "/some/path" not in broken["error"]
    assert good["error"] is None and good["evidence"] == "pairs"


def test_threads_verify_one_after_the_other(model: PyFuncModel, portable: PortableModel, moods: SoftPrompt) -> None:
    """While one thread reads with the adapter on, another must not score."""
    rows = [row_of(moods, TEST_PAIRS), row_of(portable.soft_prompt(1)), row_of(moods, inputs=INPUTS)] * 2
    alone = [predict(model, row, num_candidates=3)[0] for row in rows[:3]] * 2
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda row: predict(model, row, num_candidates=3)[0], rows))
    assert together == alone


def test_a_payload_in_half_precision_is_verified_too(model: PyFuncModel, moods: SoftPrompt) -> None:
    header = {"base_fingerprint": moods.record.base_model.fingerprint}
    half = encoded(save_tensors({"embeddings": moods.embeddings.half()}, metadata=header))
    whole, rounded = predict(model, row_of(moods, TEST_PAIRS), {**row_of(moods, TEST_PAIRS), "soft_prompt": half})
    assert rounded["faithfulness"] == pytest.approx(whole["faithfulness"], abs=0.01)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, moods: SoftPrompt) -> Path:
    """A bank with two soft prompts, their DoD, pairs and inputs."""
    folder = tmp_path_factory.mktemp("command")
    stories = named(moods, STORIES, kind="generation", template=STORIES.template)
    SoftPromptBank.save([moods, replace(stories, embeddings=moods.embeddings.flip(0))], folder / "bank")
    dod_of(folder / "dod.sqlite", MOODS, STORIES)
    jsonl(folder / "pairs.jsonl", as_rows(TEST_PAIRS))
    (folder / "inputs.txt").write_text("\n".join(INPUTS))
    return folder


def verbalize_command(portable: PortableModel, *arguments: str, code: int = 0) -> Result:
    base, translator = str(portable.base_folder), str(portable.translator_folder)
    given = ["verbalize", *arguments, "--translator", translator, "--base-model", base, "-s", "max_new_tokens=8"]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_without_anything_to_try_texts_on_the_command_says_how(portable: PortableModel, folder: Path) -> None:
    result = verbalize_command(portable, f"{folder}/bank#moods")
    assert "verbalization" in result.stdout and "faithfulness" not in result.stdout
    assert "Not verified: give --dod, --pairs or --inputs" in result.stderr
    (row,) = json.loads(verbalize_command(portable, f"{folder}/bank#moods", "--json").stdout)
    assert (row["faithfulness"], row["reason"], row["verification"]) == (None, NOT_VERIFIED, None)


def test_the_command_tries_texts_on_the_test_pairs_of_each_task(
    portable: PortableModel, plain_base: BaseModel, folder: Path
) -> None:
    settings = ["--dod", f"{folder}/dod.sqlite", "--min-faithfulness", "-1000", "-s", "num_candidates=3"]
    rows = json.loads(verbalize_command(portable, f"{folder}/bank", *settings, "--json").stdout)
    assert [row["task"] for row in rows] == ["moods", "stories"]
    for row, task in zip(rows, (MOODS, STORIES), strict=True):
        prompt = SoftPromptBank(folder / "bank").member(task.name)
        texts = [candidate["text"] for candidate in row["candidates"]]
        expected = Verifier(plain_base).verify(prompt, texts, pairs=task.pairs_of("test"))
        assert [candidate["text"] for candidate in row["candidates"]] == [one.text for one in expected.candidates]
        found = Verification.from_json(row["verification"])
        assert found.gain == pytest.approx(expected.gain, rel=1e-4) and found.evidence == row["evidence"] == "pairs"
        assert found.items == tuple(range(len(task.pairs_of("test"))))


def test_the_table_shows_faithfulness_with_its_interval_and_what_is_withheld(
    portable: PortableModel, folder: Path
) -> None:
    prompt = f"{folder}/bank#moods"
    pairs = ["--pairs", f"{folder}/pairs.jsonl"]
    (row,) = json.loads(verbalize_command(portable, prompt, *pairs, "--min-faithfulness", "-1000", "--json").stdout)
    low, high = row["faithfulness_interval"]
    given = verbalize_command(portable, prompt, *pairs, "--min-faithfulness", "-1000")
    assert "tried on 8 pairs; required faithfulness -1000" in given.stdout
    assert f"{row['faithfulness']:.2f} ({low:.2f} to {high:.2f})" in " ".join(given.stdout.split())
    assert " no " in given.stdout and given.stderr == ""
    withheld = verbalize_command(portable, prompt, *pairs, "--min-faithfulness", "9")
    assert " yes " in withheld.stdout and "the best text keeps" in " ".join(withheld.stdout.split())
    inputs = ["--inputs", f"{folder}/inputs.txt", "--json"]
    rows = json.loads(verbalize_command(portable, f"{folder}/bank", *inputs).stdout)
    assert [(row["evidence"], len(row["verification"]["items"])) for row in rows] == [("probe inputs", 8)] * 2
    for row in rows:
        required = row["faithfulness"] is not None and row["faithfulness"] >= DEFAULT_MIN_FAITHFULNESS
        assert row["abstained"] is not required


@pytest.mark.parametrize("source", [["--dod", "dod.sqlite"], ["--pairs", "pairs.jsonl"]], ids=["dod", "pairs"])
def test_lists_of_the_labels_are_among_the_candidates(portable: PortableModel, folder: Path, source: list[str]) -> None:
    given = [source[0], f"{folder}/{source[1]}", "--labels", "from-data", "--min-faithfulness", "-1000"]
    prompts = f"{folder}/bank" if source[0] == "--dod" else f"{folder}/bank#moods"
    rows = {row["task"]: row for row in json.loads(verbalize_command(portable, prompts, *given, "--json").stdout)}
    candidates = {task: [one["proposer"] for one in row["candidates"]] for task, row in rows.items()}
    assert sorted(candidates["moods"]) == ["label_list", "label_list", "translator:greedy"]
    assert candidates.get("stories", ["translator:greedy"]) == ["translator:greedy"]
    lists = [one["text"] for one in rows["moods"]["candidates"] if one["proposer"] == "label_list"]
    assert all(set(text.rpartition(": ")[2].split(", ")) == {"joy", "fear"} for text in lists)
    scores = [one["verified_score"] for one in rows["moods"]["candidates"]]
    assert scores == sorted(scores, reverse=True) and rows["moods"]["text"] == rows["moods"]["candidates"][0]["text"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["--dod", "dod.sqlite", "--pairs", "pairs.jsonl"],
            2,
            "Found --dod and --pairs; texts are tried on one of them",
        ),
        (["--inputs", "inputs.txt", "--labels", "from-data"], 2, "give --dod or --pairs with it"),
        (["--min-faithfulness", "0.5"], 2, "--min-faithfulness needs something to try texts on"),
        (["--dod", "dod.sqlite", "--min-faithfulness", "nan"], 1, "min_faithfulness is nan, expected a finite number"),
        (["--dod", "none.sqlite"], 1, "none.sqlite': there is no such file"),
        (["--inputs", "none.txt"], 1, "No such file or directory: '"),
        (["--pairs", "pairs.jsonl"], 1, "found 2 soft prompts, expected one"),
    ],
)
def test_misuse_of_the_command_is_said(
    portable: PortableModel, folder: Path, arguments: list[str], code: int, words: str
) -> None:
    files = [f"{folder}/{part}" if "." in part and part[0].isalpha() else part for part in arguments]
    result = verbalize_command(portable, f"{folder}/bank{'' if 'found 2' in words else '#moods'}", *files, code=code)
    assert words in " ".join(result.stderr.split()) and "Traceback" not in result.output


def test_command_served_model_evaluation_and_python_give_the_same_text(
    portable: PortableModel, model: PyFuncModel, folder: Path, moods: SoftPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the translator repeats a label, which the text does not."""
    written = portable.base_model.tokenize("joy, fear, joy")
    monkeypatch.setattr(BaseModel, "generate", lambda self, soft, prompt_ids, **settings: [written for _ in prompt_ids])
    proposers = [TranslatorProposer(portable.translator)]
    config, verifier = VerbalizationConfig(max_new_tokens=8), Verifier(portable.base_model)
    (by_python,) = verbalize([moods], proposers, config)
    (by_command,) = json.loads(verbalize_command(portable, f"{folder}/bank#moods", "--json").stdout)
    (by_server,) = predict(model, row_of(moods))
    evaluated = apply_methods([moods], {"moods": MOODS}, proposers, config, verifier, ANYTHING).texts["translator"][0]
    texts = [by_python.text, by_command["text"], by_server["hard_prompt"], evaluated.text]
    assert texts == ["joy, fear"] * 4

    (by_python,) = verbalize(
        [moods], proposers, config, verifier=verifier, evidence=[TriedOn(TEST_PAIRS)], rule=ANYTHING
    )
    pairs = ["--pairs", f"{folder}/pairs.jsonl", "--min-faithfulness", "-1e9"]
    (by_command,) = json.loads(verbalize_command(portable, f"{folder}/bank#moods", *pairs, "--json").stdout)
    (by_server,) = predict(model, row_of(moods, TEST_PAIRS))
    assert by_python.text == by_command["text"] == by_server["hard_prompt"] == "joy, fear"
    found = [by_command["faithfulness"], by_server["faithfulness"]]
    assert found == pytest.approx([by_python.faithfulness] * 2, abs=1e-4)
