"""examples/optimize_prompt.py from end to end: MLflow's optimizer and GEPA as they are, an LLM that answers by rule."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner, Result
from llm_server import LlmServer, Reply, chat, error_body

from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.registry.publishing import draft, publish_prompt

# MLflow names the source of the pairs that it optimizes on in a way that it warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:The specified dataset source can be interpreted:UserWarning")

EXAMPLE = Path(__file__).parent.parent / "examples" / "optimize_prompt.py"
FAST = ("jet", "hare", "light", "rocket", "falcon", "bullet", "comet", "horse")
SLOW = ("snail", "sloth", "glacier", "tortoise", "slug", "moss", "dune", "tide")
BUDGET, TRAIN, TEST = 30, 4, 3
NAMED = "Name the speed: fast, slow."


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("optimize_prompt", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dod(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.sqlite"
    pairs = [
        Pair(f"a {word}", label, "train" if number < 4 else "test")
        for label, words in (("fast", FAST), ("slow", SLOW))
        for number, word in enumerate(words)
    ]
    with DodStore.create(path) as store:
        store.add_task(Task("speeds", "classification", tuple(pairs), labels=("fast", "slow")))
    return path


class Speedometer:
    """Knows how fast things are, and says so if it is told which words to use. Told only to name the speed, it knows the slow
    ones. As the one that reflects it first finds that the speed is wanted, and names the words when shown that."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()

    def __call__(self, body: dict[str, Any]) -> Reply:
        text = body["messages"][-1]["content"]
        self.requests[body["model"]] += 1
        if body["model"] == "thinker":
            current = text.split("```")[1]
            if "speed" in current:
                return Reply(
                    body=chat("Here it is:\n```text\nName the speed: fast, slow. Input: {{ input }}\nOutput:\n```")
                )
            return Reply(body=chat("```\nName the speed.\n```"))  # it forgets the input
        thing = next(word for word in FAST + SLOW if f"a {word}\n" in text)
        speed = "Fast." if thing in FAST else "Slow."
        if "fast, slow" in text:
            return Reply(body=chat(speed))
        return Reply(body=chat("Slow." if "Name the speed" in text and thing in SLOW else "I see."))


@pytest.fixture
def llm(llm_server: LlmServer) -> Speedometer:
    speedometer = Speedometer()
    llm_server.reply_to_body = speedometer
    return speedometer


Start = Callable[..., Result]


@pytest.fixture
def start(example: ModuleType, dod: Path, mlflow_store: str, llm_server: LlmServer) -> Start:
    def run(*arguments: str) -> Result:
        named = ["--prompt", "prompts:/speeds.hard@champion", "--dod", str(dod), "--base-url", llm_server.url]
        models = ["--model", "target", "--reflection-model", "thinker", "--budget", str(BUDGET)]
        sizes = ["--train-pairs", str(TRAIN), "--test-pairs", str(TEST)]
        return CliRunner().invoke(example.main, [*named, *models, *sizes, *arguments])

    return run


def test_both_starts_get_the_same_budget_and_every_call_is_counted(
    start: Start, llm: Speedometer, llm_server: LlmServer
) -> None:
    publish_prompt(draft("speeds", NAMED), alias="champion")
    done = start("--json")
    assert done.exit_code == 0, done.output + repr(done.exception)
    result = json.loads(done.stdout)
    published, minimal = result["starts"]
    assert (result["task"], result["budget"]) == ("speeds", BUDGET)

    for outcome in (published, minimal):
        # What is left does not suffice for one more step: two minibatches and all training pairs.
        assert BUDGET - (3 + 3 + TRAIN) < outcome["calls"]["metric"] <= BUDGET
        assert outcome["calls"]["test"] == 2 * TEST
        assert outcome["curve"][0]["calls"] == TRAIN
    counted = Counter(published["calls"]) + Counter(minimal["calls"])
    assert llm.requests == {"target": counted["metric"] + counted["test"], "thinker": counted["reflection"]}
    assert len(llm_server.received) == counted.total()

    assert [point["score"] for point in published["curve"]] == [1.0]
    assert (published["test_score_of_start"], published["test_score"]) == (1.0, 1.0)
    assert published["optimized"] == published["template"] == "Name the speed: fast, slow. Input: {{input}}\nOutput:"
    # Nothing to the label words and the slow half in between.
    assert [point["score"] for point in minimal["curve"]] == [0.0, 0.5, 1.0]
    assert [point["best"] for point in minimal["curve"]] == [0.0, 0.5, 1.0]
    assert [point["calls"] for point in minimal["curve"]][1:] == [TRAIN + 10, TRAIN + 20]
    assert (minimal["test_score_of_start"], minimal["test_score"]) == (0.0, 1.0)
    assert minimal["template"] == "Input: {{input}}\nOutput:"
    assert minimal["optimized"] == "Name the speed: fast, slow. Input: {{ input }}\nOutput:"

    # The result is a new version; the alias stays with what was published.
    assert published["uri"] == "prompts:/speeds.hard/2" and minimal["uri"] == "prompts:/speeds.minimal/2"
    assert mlflow.genai.load_prompt("prompts:/speeds.hard@champion").version == 1
    assert mlflow.genai.load_prompt(minimal["uri"]).format(input="a jet").endswith("Input: a jet\nOutput:")


def test_calls_that_fail_are_no_wrong_answers(start: Start, llm_server: LlmServer) -> None:
    publish_prompt(draft("speeds", NAMED), alias="champion")
    llm_server.reply_to_body = lambda body: Reply(401, error_body("no such key"))
    failed = start()
    assert failed.exit_code == 1
    assert "calls failed, so scores mean nothing; the first: AuthenticationError" in failed.stderr


def test_what_cannot_work_is_said_before_anything_is_asked(start: Start, llm: Speedometer) -> None:
    mlflow.genai.register_prompt("other", "Mine: {{input}}")
    publish_prompt(draft("speeds", NAMED), alias="champion")
    refused = start("--budget", "13")
    assert refused.exit_code == 2 and "give at least 14" in refused.stderr
    assert "has no tag 'softprompt.task'" in start("--prompt", "prompts:/other/1").stderr
    assert "has 8 training and 4 test pairs; expected 9" in start("--train-pairs", "9").stderr
    assert not llm.requests
