"""`softprompt portability`: an evaluation's texts at work on a real server, what the runs hold, going on after trouble."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from click.testing import CliRunner, Result
from llm_server import KEY, LlmServer, Reply, chat, error_body
from mlflow import MlflowClient
from small_evaluations import log_record
from small_tasks import make_task
from tiny_llm import HIDDEN_SIZE, tiny_base_model

from softprompt_registry.cli import main
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.evaluation.text_scores import EvaluatedTask
from softprompt_registry.portability.conditions import CONDITIONS
from softprompt_registry.registry.artifacts import find_evaluation, find_portability
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.verbalizer import Verbalization

SPLITS = ("train",) * 6 + ("validation",) * 4 + ("test",) * 6
WORDS = tuple("sun rain moon fog wind ice sand leaf rock salt fern clay reed dew ash oak".split())


def task(name: str, *labels: str) -> Task:
    """A classification by its labels; without any a task that repeats a word."""
    pairs = tuple(
        Pair(f"{name} {word}", labels[place % len(labels)] if labels else f"{word} {word}", split)  # type: ignore[arg-type]
        for place, (word, split) in enumerate(zip(WORDS, SPLITS, strict=True))
    )
    if labels:
        return Task(name, "classification", pairs, labels, split="test")
    return Task(name, "generation", pairs, hard_prompts=("Write the last word twice.",), split="test")


TASKS = (task("moods", "joy", "fear"), task("twice"))
CLASSIFY = "Classify the given input into one of the following: joy, fear."


@pytest.fixture
def evaluated(mlflow_store: str, tiny_folder: Path, tmp_path: Path) -> list[str]:
    """What `evaluate` left behind, as options: its run, the DoD, the bank."""
    with DodStore.create(tmp_path / "tasks.sqlite") as store:
        for one in TASKS:
            store.add_task(one)
        dod_name, digest = store.name, store.digest
    generator = torch.Generator().manual_seed(0)
    members = [
        SoftPrompt(
            torch.randn(4, HIDDEN_SIZE, generator=generator),
            None,
            SoftPromptRecord(
                one.name, one.kind, tiny_base_model().ref, one.template, dod_name=dod_name, dod_digest=digest
            ),
        )
        for one in TASKS
    ]
    SoftPromptBank.save(members, tmp_path / "bank")
    said = {"moods": "joy, fear", "twice": "Say the last word two times."}
    ids = {member.record.task: member.id for member in members}
    texts = [Verbalization(text, name, (), ids[name], "base") for name, text in said.items()]
    methods = {method: texts for condition in CONDITIONS.values() for method in condition.methods}
    tasks = {one.name: EvaluatedTask.of(one) for one in TASKS}
    with mlflow.start_run():
        run_id = log_record(EvaluationRecord(tasks, methods, [], [], AbstentionRule()), tmp_path / "evaluation")
    return [run_id, "--dod", str(tmp_path / "tasks.sqlite"), "--bank", str(tmp_path / "bank")]


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["portability", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def asking(server: LlmServer, *names: str) -> list[str]:
    options = ["--base-url", server.url, "-s", "questions.max_items=3", "-s", "trace=false"]
    return [*options, *(part for name in names or ("big",) for part in ("--target", name))]


def by_rule(prompt: str) -> Reply:
    """What a good LLM would say that only follows what it is told."""
    text = prompt.rsplit("Input: ", 1)[1].removesuffix("\nOutput:")
    word = text.split()[-1]
    if "two times" in prompt or "twice" in prompt.split("Input: ")[0]:
        return Reply(body=chat(f"{word} {word}"))
    return Reply(body=chat(("Joy." if WORDS.index(word) % 2 == 0 else "fear") if CLASSIFY in prompt else "No idea."))


def children(run_id: str) -> dict[tuple[str, str], dict[str, float]]:
    parent = mlflow.get_run(run_id)
    found = MlflowClient().search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return {(one.data.params["target"], one.data.params["condition"]): one.data.metrics for one in found}


def test_a_target_that_thinks_and_refuses_the_system_role_scores_as_one_that_does_not(
    evaluated: list[str], llm_server: LlmServer
) -> None:
    """Both kinds of tasks: labels, which are asked for with a stop string, and texts, which are not."""

    def reply(body: dict[str, Any]) -> Reply:
        prompt = body["messages"][-1]["content"]
        if body["model"] == "plain":
            return by_rule(prompt)
        if body["messages"][0]["role"] == "system":
            return Reply(400, body=error_body("System role not supported"))
        said = by_rule(prompt).body["choices"][0]["message"]["content"]
        return Reply(body=chat("<think>" if "stop" in body else f"<think>\nfear, joy\n</think>\n\n{said}"))

    llm_server.reply_to_body = reply
    conditions = ["-s", "conditions=[translated, ground_truth]"]
    shown = run(*evaluated, *asking(llm_server, "plain", "thinker"), *conditions).stdout
    assert "thinker refuses what was set, so answers were asked for with send_system=False" in shown
    assert "plain refuses" not in shown
    run_id = re.findall(r"run (\w{32})", shown)[-1]
    metrics = children(run_id)
    for name in ("portability.accuracy_lenient", "portability.accuracy_strict", "portability.rouge_l"):
        assert metrics["thinker", "translated"][name] == metrics["plain", "translated"][name]
    params = mlflow.get_run(run_id).data.params
    assert "send_system=False, send_stop=False" in params["portability.targets.thinker.adapted"]
    assert "portability.targets.plain.adapted" not in params
    raws = {one.question.target: one.raw for one in find_portability(run_id)[1]}
    assert raws["plain"] is None and str(raws["thinker"]).startswith("<think>\nfear, joy")


def test_every_condition_of_every_target_is_asked_scored_and_logged(
    evaluated: list[str], llm_server: LlmServer
) -> None:
    llm_server.reply_to = by_rule
    found = json.loads(run(*evaluated, *asking(llm_server, "big", "bigger"), "--json").stdout)
    metrics = children(found["run_id"])
    expected = {(target, name) for target in ("big", "bigger") for name in CONDITIONS if name != "soft_prompt"}
    small = {place for place in metrics if place[1] == "soft_prompt"}
    assert set(metrics) == expected | small and len(small) == 1
    told, untold = metrics["big", "translated"], metrics["big", "no_prompt"]
    assert told["portability.accuracy_lenient"] == 1 and told["portability.accuracy_strict"] < 1, "Joy. is not joy"
    assert untold["portability.accuracy_lenient"] == 0 == untold["portability.rouge_l_generation"]
    assert told["portability.rouge_l_generation"] == 1
    assert metrics["big", "few_shot_5"]["portability.num_items"] == 6
    assert found["missing"] == [] and found["left_out"] == {}
    assert {received.body["model"] for received in llm_server.received} == {"big", "bigger"}

    # All numbers come back from the run alone.
    result, answers = find_portability(found["run_id"])
    for (target, condition), logged in metrics.items():
        again = {f"portability.{name}": value for name, value in result.metrics(target, condition).items()}
        assert logged == pytest.approx(again)
    assert len(answers) == 6 * len(metrics) and not any(answer.is_missing for answer in answers)

    files = {item.path for item in MlflowClient().list_artifacts(found["run_id"])}
    assert {"answers.json", "portability.json", "portability.html", "conditions.json", "comparisons.json"} <= files
    assert sum(name.endswith(".png") for name in files) >= 6
    page = mlflow.artifacts.load_text(f"runs:/{found['run_id']}/portability.html")
    assert "Say the last word two times." in page and "No idea." in page
    inputs = mlflow.get_run(found["run_id"]).inputs
    assert [item.dataset.name for item in inputs.dataset_inputs] == ["tasks"]


def test_a_second_start_asks_for_nothing_and_says_the_same(evaluated: list[str], llm_server: LlmServer) -> None:
    llm_server.reply_to = by_rule
    first = json.loads(run(*evaluated, *asking(llm_server), "--json").stdout)
    asked = len(llm_server.received)
    second = json.loads(run(*evaluated, *asking(llm_server), "--json").stdout)
    assert len(llm_server.received) == asked > 0
    assert second["conditions"] == first["conditions"] and second["comparisons"] == first["comparisons"]
    shown = run(*evaluated, *asking(llm_server)).stdout
    assert "big: asked 0 requests now (0 tokens)" in shown and "were answered before" in shown


def test_a_dry_run_says_what_it_would_cost_and_asks_nothing(evaluated: list[str], llm_server: LlmServer) -> None:
    prices = ["price_per_million_prompt_tokens: 2.0", "price_per_million_completion_tokens: 8.0"]
    target = f"targets=[{{model: big, options: {{base_url: '{llm_server.url}'}}, max_tokens: 10, {', '.join(prices)}}}]"
    options = [*evaluated, "-s", target, "-s", "questions.max_items=3", "-s", "trace=false"]
    plan = json.loads(run(*options, "--dry-run", "--json").stdout)
    assert llm_server.received == [] and plan["tokens"] > 0
    row = next(one for one in plan["conditions"] if one["condition"] == "no_prompt")
    assert (row["questions"], row["requests"], row["completion_tokens"]) == (6, 6, 60)
    assert plan["cost"] == pytest.approx(sum(one["cost"] for one in plan["conditions"]))
    assert "nothing was asked" in run(*options, "--dry-run").stdout
    refused = run(*options, "-s", f"budget.max_tokens={plan['tokens'] - 1}", code=1).stderr
    assert "nothing was asked" in refused and llm_server.received == []
    llm_server.reply_to = by_rule
    run(*options, "-s", f"budget.max_tokens={plan['tokens']}")
    assert json.loads(run(*options, "--dry-run", "--json").stdout)["tokens"] == 0


def test_trouble_leaves_a_list_and_the_next_start_asks_for_that_alone(
    evaluated: list[str], llm_server: LlmServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And no key in anything that is written."""

    def moody(prompt: str) -> Reply:
        if prompt.startswith("Input: moods") and prompt.count("Input:") == 1:
            return Reply(400, {"error": {"message": f"the key {KEY} may not ask that"}})
        return by_rule(prompt)

    llm_server.reply_to = moody
    first = run(*evaluated, *asking(llm_server), "-s", "trace=true", "--json", code=1)
    found = json.loads(first.stdout)
    missing = {(row["condition"], row["task"], row["item"]) for row in found["missing"]}
    assert missing == {("no_prompt", "moods", item) for item in range(3)}
    table = mlflow.load_table("missing.json", run_ids=[found["run_id"]])
    assert len(table) == 3 and all("400" in error for error in table["error"])
    assert children(found["run_id"])["big", "no_prompt"]["portability.num_missing"] == 3

    llm_server.reply_to = by_rule
    asked = len(llm_server.received)
    again = json.loads(run(*evaluated, *asking(llm_server), "--json").stdout)
    assert again["missing"] == [] and len(llm_server.received) == asked + 3

    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"Say the last word two times." in content for content in written), "the search finds what is there"
    assert not any(KEY.encode() in content for content in written)
    assert KEY not in first.output + caplog.text


def test_what_cannot_be_asked_is_refused_before_anything_is(
    evaluated: list[str], llm_server: LlmServer, tmp_path: Path
) -> None:
    other = tmp_path / "other.sqlite"
    with DodStore.create(other) as store:
        store.add_task(replace(make_task("moods"), split="test"))
    swapped = [evaluated[0], "--dod", str(other)]
    assert "tasks are missing or another one there" in run(*swapped, *asking(llm_server), code=1).stderr
    assert "found none, expected at least one" in run(*evaluated, code=1).stderr
    without_bank = [*evaluated[:3], *asking(llm_server), "-s", "conditions=[soft_prompt]"]
    assert "needs the bank" in run(*without_bank, code=1).stderr
    assert (
        "Expected a run of `softprompt evaluate`" in run("0" * 32, *evaluated[1:], *asking(llm_server), code=1).stderr
    )
    assert "expected some of" in run(*evaluated, *asking(llm_server), "-s", "conditions=[magic]", code=1).stderr
    assert llm_server.received == []


def test_without_settings_what_the_evaluation_has_is_asked(
    evaluated: list[str], llm_server: LlmServer, tmp_path: Path
) -> None:
    """And names of targets may hold anything."""
    llm_server.reply_to = by_rule
    record = find_evaluation(evaluated[0])
    with mlflow.start_run():
        other = log_record(replace(record, texts={"translator": record.texts["translator"]}), tmp_path / "other")
    named = "GPT-4 (Azure), new+"
    server = f"options: {{base_url: '{llm_server.url}', send_stop: false}}"
    target = f"targets=[{{model: /srv/models/gpt, name: '{named}', {server}}}]"
    few = ["-s", target, "-s", "questions.max_items=2", "-s", "trace=false"]
    done = json.loads(run(other, *evaluated[1:3], *few, "--json").stdout)
    without = "translated_verified verified_best inspect nearest_tokens instruction_induction soft_prompt"
    assert done["not_asked"] == without.split()
    params = mlflow.get_run(done["run_id"]).data.params
    assert params["portability.targets.GPT-4--Azure---new-.model"] == "gpt"
    assert {target for target, _ in children(done["run_id"])} == {named}
    assert not any("stop" in received.body for received in llm_server.received)
    twice = "targets=[{model: a, name: 'x (y)'}, {model: b, name: 'x +y-'}]"
    assert "more than once" in run(*evaluated, "-s", twice, code=1).stderr


def test_the_packaged_way_works_without_a_server(evaluated: list[str], tiny_folder: Path) -> None:
    """A model in this process as its own target."""
    options = ["--target", str(tiny_folder), "--engine", "transformers", "-s", "questions.max_items=2"]
    plain = ["-s", "conditions=[no_prompt, translated, soft_prompt]", "-s", "trace=false"]
    target = (
        f"targets=[{{model: '{tiny_folder}', engine: transformers, options: {{prompt_format: plain}}, max_tokens: 6}}]"
    )
    refused = run(*evaluated, *options, *plain, code=1).stderr
    assert "no chat template" in refused
    found = json.loads(run(*evaluated, "-s", target, *options[4:], *plain, "--json").stdout)
    assert found["missing"] == [] and len(found["conditions"]["condition"]) == 3
    assert str(tiny_folder) not in json.dumps(mlflow.get_run(found["run_id"]).data.params)
