"""`softprompt publish`: from an evaluation's run to prompts that any MLflow program can load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner, Result
from llm_server import LlmServer
from logged_models import DOD_DIGEST, FINGERPRINT, Chain, log_chain, log_dataset
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput
from mlflow.entities.model_registry import PromptVersion
from small_evaluations import log_record
from task_files import write_classifications

from softprompt_registry.cli import main
from softprompt_registry.dod.task import TaskKind
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.evaluation.text_scores import EvaluatedTask
from softprompt_registry.portability.analysis import Portability
from softprompt_registry.portability.scoring import ScoredAnswer
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.verbalizer import Candidate, Verbalization
from softprompt_registry.verbalization.verification import Gain, Verification, Verified

METHOD = "all+verifier"


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def publish(*arguments: str) -> Any:
    return json.loads(run("publish", *arguments, "--json").stdout)


def load(name: str) -> PromptVersion:
    return mlflow.genai.load_prompt(f"prompts:/{name}")


# --- An evaluation's run, as the stage leaves it ---

SPEEDS = "Say how fast it is, as {{speed}}."
"""Half as faithful on pairs that it was not chosen on."""


def verbalization(task: str, text: str, **changes: Any) -> Verbalization:
    candidates = (Candidate(text, "translator", -0.5, -1.25), Candidate("other", "inspect", None, -2.0))
    values: dict[str, Any] = {
        "candidates": candidates if text else (),
        "soft_prompt_id": f"id of {task}",
        "base_fingerprint": FINGERPRINT,
        "faithfulness": 0.75,
        "faithfulness_interval": (0.5, 1.0),
        "reason": None,
    }
    return Verbalization(text, task, **(values | changes))


def verification(task: str, text: str) -> Verification:
    tried = Verified(text, -1.5, 0.375, 0.25, 0.5, (-1.5,))
    return Verification(
        task,
        f"id of {task}",
        FINGERPRINT,
        "pairs",
        (0,),
        (-2.0,),
        (-1.0,),
        Gain(1.0, 0.9, 1.1),
        None,
        (tried,),
        0,
        10,
        0.95,
        0,
    )


TEXTS = (
    verbalization("moods", "joy, fear"),
    verbalization("speeds", SPEEDS),
    verbalization("heats", "Bake it.", faithfulness=0.1, abstained=True, reason="faithfulness 0.10 is below 0.50"),
    verbalization("bare", "", faithfulness=None, faithfulness_interval=None, abstained=True, reason="no candidate"),
    verbalization("words/short", "Shorten it.", faithfulness=None, faithfulness_interval=None),
)


def evaluated_task(name: str, kind: TaskKind) -> EvaluatedTask:
    return EvaluatedTask(name, kind, (), (), "", "")


RECORD = EvaluationRecord(
    {text.task: evaluated_task(text.task, "generation" if "/" in text.task else "classification") for text in TEXTS},
    {method: list(TEXTS) for method in ("translator", METHOD, "behaviour")},
    [],
    [verification(text.task, text.text) for text in TEXTS[:2]],
    AbstentionRule(),
)


@pytest.fixture
def chain(mlflow_store: str) -> Chain:
    return log_chain()


@pytest.fixture
def evaluated(chain: Chain, tmp_path: Path) -> str:
    with mlflow.start_run(tags={"softprompt.stage": "evaluate"}) as logged:
        log_dataset(logged.info.run_id)
        for model_id in (chain.base_id, chain.translator_id, chain.bank_id):
            mlflow.log_input(model=LoggedModelInput(model_id))
        log_record(RECORD, tmp_path / "evaluation")
    return str(logged.info.run_id)


def test_the_text_of_a_task_becomes_a_prompt_with_its_provenance(chain: Chain, evaluated: str) -> None:
    done = publish(evaluated, "--task", "speeds")
    assert done["held_back"] == {} and done["method"] == METHOD
    [item] = done["published"]
    assert (item["task"], item["uri"], item["version"], item["is_new"]) == ("speeds", "prompts:/speeds.hard/1", 1, True)
    prompt = load("speeds.hard@champion")
    assert prompt.format(input="a snail") == "Say how fast it is, as {{speed}}. Input: a snail\nOutput:"
    assert prompt.tags == {
        "softprompt.task": "speeds",
        "softprompt.soft_prompt_id": "id of speeds",
        "softprompt.evaluation_run_id": evaluated,
        "softprompt.method": METHOD,
        "softprompt.proposer": "translator",
        "softprompt.verified_score": "-1.25",
        "softprompt.faithfulness": "0.75",
        "softprompt.faithfulness_interval": "0.5 to 1",
        "softprompt.heldout_faithfulness": "0.375",
        "softprompt.heldout_faithfulness_interval": "0.25 to 0.5",
        "softprompt.abstained": "false",
        "softprompt.bank_model_id": chain.bank_id,
        "softprompt.translator_model_id": chain.translator_id,
        "softprompt.bank_digest": "ba" * 32,
        "softprompt.base_fingerprint": FINGERPRINT,
        "softprompt.base_model": "tiny-llama",
        "softprompt.dod_name": "sample",
        "softprompt.dod_digest": DOD_DIGEST,
    }


def test_runs_and_models_show_the_prompt_and_the_run_what_was_done(chain: Chain, evaluated: str) -> None:
    done = publish(f"runs:/{evaluated}", "--task", "moods", "--alias", "candidate")
    client = MlflowClient()
    entry = '[{"name": "moods.hard", "version": "1"}]'
    own = client.get_run(done["run_id"])
    for run_id in (evaluated, done["run_id"]):
        assert client.get_run(run_id).data.tags["mlflow.linkedPrompts"] == entry
    for model_id in (chain.bank_id, chain.translator_id):
        assert client.get_logged_model(model_id).tags["mlflow.linkedPrompts"] == entry
    assert "mlflow.linkedPrompts" not in client.get_logged_model(chain.base_id).tags
    assert own.data.tags["softprompt.stage"] == "publish"
    assert own.data.params["publish.evaluation_run_id"] == evaluated
    assert own.data.params["publish.alias"] == "candidate"
    assert own.data.metrics == {"num_published": 1.0, "num_new_versions": 1.0, "num_held_back": 0.0}
    assert own.inputs is not None
    assert {item.model_id for item in own.inputs.model_inputs} == {chain.base_id, chain.bank_id, chain.translator_id}
    table = mlflow.load_table("published.json", run_ids=[done["run_id"]])
    # A bare list of labels is published as the instruction that portability asks with.
    instruction = "Classify the given input into one of the following: joy, fear."
    assert list(table["hard_prompt"]) == [instruction]
    assert load("moods.hard@candidate").template == f"{instruction} Input: {{{{input}}}}\nOutput:"


def test_all_publishes_what_was_not_held_back_and_names_the_rest(evaluated: str) -> None:
    done = publish(evaluated, "--all")
    assert [item["task"] for item in done["published"]] == ["moods", "speeds", "words/short"]
    assert done["held_back"] == {
        "heats": "the verifier abstained: faithfulness 0.10 is below 0.50",
        "bare": "the method wrote nothing",
    }
    name = done["published"][2]["name"]
    assert name.startswith("words-short-") and name.endswith(".hard")
    prompt = load(f"{name}@champion")
    assert prompt.template == "Shorten it. Input: {{input}}\nOutput:"
    assert prompt.tags["softprompt.task"] == "words/short"
    assert not {"softprompt.faithfulness", "softprompt.heldout_faithfulness"} & set(prompt.tags)
    assert MlflowClient().get_prompt("heats.hard") is None and MlflowClient().get_prompt("bare.hard") is None

    again = run("publish", evaluated, "--all").stdout
    assert again.count("same text: no new version") == 3
    assert "withheld: heats (the verifier abstained: faithfulness 0.10 is below 0.50)" in again


def test_a_held_back_text_is_published_only_on_purpose_and_marked(evaluated: str) -> None:
    refused = run("publish", evaluated, "--task", "heats", "--task", "moods", code=1).stderr
    assert "the verifier abstained: faithfulness 0.10 is below 0.50. The text is 'Bake it.'" in refused
    assert "--allow-abstained" in refused
    assert MlflowClient().get_prompt("moods.hard") is None  # nothing is written before all is checked
    publish(evaluated, "--task", "heats", "--allow-abstained")
    tags = load("heats.hard@champion").tags
    assert tags["softprompt.abstained"] == "true"
    assert tags["softprompt.abstention_reason"] == "faithfulness 0.10 is below 0.50"
    refused = run("publish", evaluated, "--task", "bare", "--allow-abstained", code=1).stderr
    assert "the method wrote nothing" in refused and "--allow-abstained" not in refused


def test_the_template_is_a_setting(evaluated: str) -> None:
    publish(evaluated, "--task", "speeds", "--template", "{input}\n\n{hard_prompt}")
    assert load("speeds.hard@champion").format(input="a snail") == f"a snail\n\n{SPEEDS}"
    assert "expected {hard_prompt} once" in run("publish", evaluated, "--all", "--template", "{input}", code=1).stderr


def log_portability(evaluation: str, **settings: str) -> str:
    """As `softprompt portability` leaves it."""
    asked = {"translated": 0.25, "verified_best": 0.5, "few_shot_3_translated": 0.75}
    scored = [
        ScoredAnswer(
            *("gpt-5", condition, "speeds", "classification", 0, "answered"),
            *({"rouge_l": score, "accuracy_lenient": score / 2}, False, False, 1, 1),
        )
        for condition, score in asked.items()
    ]
    with mlflow.start_run() as logged:
        mlflow.log_params({"portability.evaluation_run_id": evaluation})
        mlflow.log_params({f"portability.{name}": value for name, value in settings.items()})
        mlflow.log_dict(Portability(tuple(scored)).to_json(), "portability.json")
        mlflow.log_dict({"answers": []}, "answers.json")
    return str(logged.info.run_id)


def test_scores_on_target_llms_are_those_of_the_methods_condition(evaluated: str) -> None:
    run_id = log_portability(evaluated)
    expected = {METHOD: ("verified_best", "0.5"), "translator": ("translated", "0.25")}
    for method, (condition, score) in expected.items():
        publish(evaluated, "--task", "speeds", "--method", method, "--portability", run_id)
        tags = load("speeds.hard@champion").tags
        assert tags["softprompt.target_rouge_l.gpt-5"] == score
        assert float(tags["softprompt.target_accuracy_lenient.gpt-5"]) == float(score) / 2
        assert tags["softprompt.portability_condition"] == condition
        assert tags["softprompt.portability_run_id"] == run_id
    other_words = {"label_list": "Pick: {labels}", "templates.prompt": "{hard_prompt}: {input}"}
    for other, words in (
        (log_portability("another"), "measured those of 'another'"),
        *(
            (log_portability(evaluated, **{name: text}), f"asked with {name} {text!r}")
            for name, text in other_words.items()
        ),
        ("0" * 32, "it is not in this MLflow store"),
    ):
        refused = run("publish", evaluated, "--task", "speeds", "--portability", other, code=1)
        assert words in refused.stderr
    refused = run("publish", evaluated, "--task", "speeds", "--method", "behaviour", "--portability", run_id, code=1)
    assert "no condition of `softprompt portability` asks with the texts of 'behaviour'" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "tastes"], "it has none for ['tastes']; it has texts for ['bare', 'heats', 'moods'"),
        (
            ["--task", "moods", "--method", "magic"],
            "'magic' is not among those evaluated, ['translator', 'all+verifier'",
        ),
        (["--task", "moods", "--alias", "latest"], "keeps 'latest'"),
    ],
)
def test_what_is_not_there_is_named_with_what_there_is(evaluated: str, arguments: list[str], words: str) -> None:
    assert words in run("publish", evaluated, *arguments, code=1).stderr


def test_only_an_evaluation_can_be_published(chain: Chain) -> None:
    for other in ("0" * 32, chain.tune_run):
        refused = run("publish", other, "--all", code=1).stderr
        assert f"reading the evaluation of run {other!r}: " in refused
        assert "Expected a run of `softprompt evaluate`" in refused


def test_tasks_or_all_but_not_both(mlflow_store: str) -> None:
    for arguments in ([], ["--all", "--task", "moods"]):
        assert "expected one of the two" in run("publish", "run", *arguments, code=2).stderr


# --- Any MLflow program ---

PROGRAM = """
import sys
sys.modules["softprompt_registry"] = sys.modules["mlflow_plugins"] = None  # importing either fails from here on
import mlflow
import openai

prompt = mlflow.genai.load_prompt("prompts:/speeds.hard@champion")
answer = openai.OpenAI().chat.completions.create(
    model="any", messages=[{"role": "user", "content": prompt.format(input="a {{snail}}")}]
)
print(answer.choices[0].message.content)
"""


def test_a_program_that_knows_nothing_of_us_loads_and_uses_the_prompt(
    evaluated: str, mlflow_store: str, llm_server: LlmServer, tmp_path: Path
) -> None:
    publish(evaluated, "--task", "speeds")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "MLFLOW_TRACKING_URI": mlflow_store, "OPENAI_BASE_URL": llm_server.url}
    environment.pop("PYTHONPATH", None)
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=elsewhere, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    # The server answers in capital letters.
    assert finished.stdout == "SAY HOW FAST IT IS, AS {{SPEED}}. INPUT: A {{SNAIL}}\nOUTPUT:\n"
    [received] = llm_server.received
    assert received.body["messages"][0]["content"] == f"{SPEEDS} Input: a {{{{snail}}}}\nOutput:"


# --- The whole way ---


def test_a_real_evaluation_is_published(shared_folder: Path) -> None:
    words = {
        "sizes": {"big": ["whale", "tower", "planet"], "small": ["ant", "seed", "atom"]},
        "speeds": {"fast": ["jet", "hare", "light"], "slow": ["snail", "sloth", "glacier"]},
    }
    folder = shared_folder / "tasks"
    write_classifications(folder, words, test_task="speeds")
    run("build-dod", "files", str(folder), "--out", "tasks.sqlite")
    settings = ["num_virtual_tokens=4", "epochs=1", "max_sequence_tokens=64"]
    made = run(
        "tune",
        "--dod",
        "tasks.sqlite",
        "--out",
        "bank",
        *(part for value in settings for part in ("-s", value)),
        "--json",
    )
    bank = json.loads(made.stdout)["model_uri"]
    made = run(
        "train-translator", "--dod", "tasks.sqlite", "--bank", bank, "--out", "translator", "-s", "epochs=1", "--json"
    )
    translator = json.loads(made.stdout)["model_uri"]
    few = ["-s", "methods=[most_frequent_target]", "-s", "abstention.min_faithfulness=-1000", "-s", "verifier.draws=50"]
    evaluated = json.loads(
        run("evaluate", "--dod", "tasks.sqlite", "--bank", bank, "--translator", translator, *few, "--json").stdout
    )
    texts = mlflow.artifacts.load_dict(f"runs:/{evaluated['run_id']}/candidates.json")
    [text] = texts["most_frequent_target"]

    done = publish(evaluated["run_id"], "--task", "speeds", "--method", "most_frequent_target", "--allow-abstained")
    assert done["published"][0]["uri"] == "prompts:/speeds.hard/1"
    prompt = load("speeds.hard@champion")
    # The one training task's labels.
    instruction = "Classify the given input into one of the following: big, small."
    assert prompt.template == f"{instruction} Input: {{{{input}}}}\nOutput:"
    assert prompt.tags["softprompt.soft_prompt_id"] == text["soft_prompt_id"]
    assert f"models:/{prompt.tags['softprompt.bank_model_id']}" == bank
    assert f"models:/{prompt.tags['softprompt.translator_model_id']}" == translator
    assert len(prompt.tags["softprompt.dod_digest"]) == 64
    assert prompt.tags["softprompt.abstained"] == str(text["abstained"]).lower()
