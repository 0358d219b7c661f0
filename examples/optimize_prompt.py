"""Hands a published hard prompt to MLflow's prompt optimizer as its start, and compares with starting from nothing.

    pip install "softprompt-registry[optimize]"
    softprompt publish EVALUATION_RUN --task instruments
    vllm serve Qwen/Qwen3-4B-Instruct-2507 --port 8000

    OPENAI_API_KEY=none python examples/optimize_prompt.py --prompt prompts:/instruments.hard@champion --dod tasks.sqlite \\
        --base-url http://127.0.0.1:8000/v1 --model Qwen/Qwen3-4B-Instruct-2507

`mlflow.genai.optimize_prompts` with `GepaPromptOptimizer` runs twice, with the same pairs, the same seed and the same budget
of calls of the target LLM: once from the published prompt, once from a prompt that holds the input and no instruction. Both
starts and both results are then tried on test pairs that no optimizer saw.

What this shows: whether, on this task and this LLM, an optimizer gets further, or as far with fewer calls, when it starts at
the text that the registry chose for a soft prompt (its tag `softprompt.proposer` says who wrote it). What it does not show:
that the published text is good (a bad one may lose to no instruction), what holds for other tasks or LLMs, or a difference
beyond chance: it is one task and one seed, and a share of 50 test pairs is known to 0.14 or so. Making the published text
took no call of the target LLM, so none is counted for it.

Metric calls (answers of the target LLM that are scored) are limited; calls of the LLM that reflects and those on test pairs
are counted beside them. The optimizer stops before a step that could go over the budget, so it may leave a few calls unused.
By itself GEPA calls the LLM that reflects through litellm; here it is called through the openai client, without litellm.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlflow.entities.model_registry import PromptVersion

    from softprompt_registry.dod.task import Pair, Task

MINIMAL = "Input: {{input}}\nOutput:"
MINIBATCH = 3
"""Pairs on which a new text is first compared with the one that it came from."""
METRIC, REFLECTION, TEST = "metric", "reflection", "test"

REFLECT = """I use the following prompt template, in which {{input}} stands for the input:
```
<curr_param>
```

Here are inputs with the answers that an assistant gave, what was expected, and the score of each:
```
<side_info>
```

Write a better prompt template. Say what the task is, and what an answer looks like, so that answers are as expected. \
Keep {{input}} where the input goes. Answer with the new template within ``` blocks, and nothing else."""


@dataclass(frozen=True)
class Point:
    """A template that the optimizer tried on all training pairs."""

    calls: int
    """Metric calls until its score was known."""
    score: float
    best: float
    """Highest score so far."""


@dataclass(frozen=True)
class Outcome:
    """One optimization."""

    start: str
    template: str
    """Where it started."""
    optimized: str
    uri: str
    """The version that MLflow registered."""
    curve: list[Point]
    """On training pairs."""
    test_score_of_start: float
    test_score: float
    calls: dict[str, int]


class Llm:
    """An LLM behind an OpenAI-compatible server, and how often it answered."""

    def __init__(self, base_url: str, model: str, reflection_model: str, max_tokens: int) -> None:
        import openai

        self._client = openai.OpenAI(base_url=base_url)
        self._models = {METRIC: model, TEST: model, REFLECTION: reflection_model}
        self._max_tokens = {METRIC: max_tokens, TEST: max_tokens, REFLECTION: 2048}
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()
        self.failures: list[str] = []

    def ask(self, prompt: str, purpose: str) -> str:
        try:
            completion = self._client.chat.completions.create(
                model=self._models[purpose],
                messages=[{"role": "user", "content": prompt}],
                max_tokens=self._max_tokens[purpose],
                temperature=0.0,
            )
        except Exception as error:
            # MLflow takes a failure for a wrong answer and goes on; it is raised at the end.
            with self._lock:
                self.failures.append(f"{type(error).__name__}: {error}")
            raise
        with self._lock:
            self.calls[purpose] += 1
        return completion.choices[0].message.content or ""

    def require_answers(self) -> None:
        if self.failures:
            raise click.ClickException(
                f"asking the LLM: {len(self.failures)} calls failed, so scores mean nothing; the first: {self.failures[0]}"
            )

    def close(self) -> None:
        self._client.close()


class Curve:
    """Told by GEPA of every template that it tried on all training pairs."""

    def __init__(self, llm: Llm) -> None:
        self._llm = llm
        self.points: list[Point] = []

    def on_valset_evaluated(self, event: dict[str, Any]) -> None:
        score = float(event["average_score"])
        best = max([score, *(point.score for point in self.points)])
        self.points.append(Point(self._llm.calls[METRIC], score, best))


class ToStderr:
    """GEPA's own report; stdout is for the result."""

    def log(self, message: str) -> None:
        print(message, file=sys.stderr)


def score_of(task: Task) -> Callable[[str, str], float]:
    """A function of an answer and the expected output: whether the label is named, or ROUGE-L where there are no labels."""
    from softprompt_registry.evaluation.metrics import rouge_l
    from softprompt_registry.portability.scoring import named_labels

    if task.kind == "classification":
        return lambda answer, expected: float(named_labels(answer, task.labels)[:1] == [expected])
    return lambda answer, expected: rouge_l(answer, [expected])


def optimize(
    name: str, prompt: PromptVersion, llm: Llm, task: Task, train: list[Pair], test: list[Pair], budget: int, seed: int
) -> Outcome:
    """One run of MLflow's optimizer from `prompt`, and the start and the result on test pairs."""
    import mlflow
    from gepa.proposer.reflective_mutation.reflection_lm import StatelessReflectionLM
    from mlflow.genai.optimize import GepaPromptOptimizer
    from mlflow.genai.scorers import scorer

    score = score_of(task)
    start = str(prompt.template)
    calls_before = Counter(llm.calls)
    curve = Curve(llm)
    curve_start = llm.calls[METRIC]

    def answer(input: str) -> str:
        return llm.ask(str(prompt.format(input=input)), METRIC)

    @scorer
    def right(outputs: str, expectations: dict[str, str]) -> float:
        return score(outputs, expectations["expected_response"])

    def reflect(request: str | list[dict[str, Any]]) -> str:
        text = request if isinstance(request, str) else str(request[-1]["content"])
        return _with_input(llm.ask(text, REFLECTION))

    optimizer = GepaPromptOptimizer(
        # Only a name here: `reflection_strategy` does the asking.
        reflection_model="openai:/none",
        max_metric_calls=budget,
        gepa_kwargs={
            "reflection_strategy": StatelessReflectionLM(reflect, REFLECT),
            "reflection_minibatch_size": MINIBATCH,
            # A step is a minibatch under the old text and the new one, and all training pairs if the new one is better.
            "stop_callbacks": lambda state: state.total_num_evals + 2 * MINIBATCH + len(train) > budget,
            "callbacks": [curve],
            "logger": ToStderr(),
            "seed": seed,
        },
    )
    with mlflow.start_run(run_name=f"optimize from {name}", nested=mlflow.active_run() is not None):
        result = mlflow.genai.optimize_prompts(
            predict_fn=answer,
            train_data=[
                {"inputs": {"input": pair.input}, "expectations": {"expected_response": pair.output}} for pair in train
            ],
            prompt_uris=[prompt.uri],
            optimizer=optimizer,
            scorers=[right],
        )
        llm.require_answers()
        [best] = result.optimized_prompts
        on_test = [
            fmean(score(llm.ask(str(version.format(input=pair.input)), TEST), pair.output) for pair in test)
            for version in (prompt, best)
        ]
        mlflow.log_metrics({"test_score_of_start": on_test[0], "test_score": on_test[1]})
    return Outcome(
        start=name,
        template=start,
        optimized=str(best.template),
        uri=best.uri,
        curve=[Point(point.calls - curve_start, point.score, point.best) for point in curve.points],
        test_score_of_start=on_test[0],
        test_score=on_test[1],
        calls=dict(llm.calls - calls_before),
    )


def _with_input(proposal: str) -> str:
    """What the LLM that reflects proposes, with the input put back where it was lost."""
    from gepa.strategies.instruction_proposal import InstructionProposalSignature

    template = InstructionProposalSignature.output_extractor(proposal.strip())["new_instruction"]
    if not re.search(r"\{\{\s*input\s*\}\}", template):
        template = f"{template}\n{MINIMAL}"
    return f"```\n{template}\n```"


def draw(pairs: list[Pair], count: int, seed: int) -> list[Pair]:
    """So many of the pairs; of a classification each label in turn, since an LLM cannot learn of one that it never sees."""
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    seen: Counter[str] = Counter()
    turn = {}
    for pair in shuffled:
        turn[pair] = seen[pair.output]
        seen[pair.output] += 1
    return sorted(shuffled, key=lambda pair: turn[pair])[:count]


def seed_of_evaluation(tags: Mapping[str, str]) -> int:
    """By which the evaluation divided the held-out pairs into those that chose a text and those that did not."""
    import mlflow

    run_id = tags.get("softprompt.evaluation_run_id")
    return 0 if run_id is None else int(mlflow.get_run(run_id).data.params.get("evaluation.verifier.seed", 0))


@click.command()
@click.option("--prompt", "uri", required=True, help="A published prompt: prompts:/TASK.hard@champion.")
@click.option("--dod", required=True, type=click.Path(path_type=Path), help="DoD file with the prompt's task.")
@click.option("--base-url", required=True, help="Of an OpenAI-compatible server; its key comes from OPENAI_API_KEY.")
@click.option("--model", required=True, help="Target LLM.")
@click.option("--reflection-model", help="LLM that writes new templates. Default: the target LLM.")
@click.option("--budget", default=60, show_default=True, type=click.IntRange(1), help="Metric calls for each start.")
@click.option("--train-pairs", default=10, show_default=True, type=click.IntRange(MINIBATCH), help="To optimize on.")
@click.option("--test-pairs", default=50, show_default=True, type=click.IntRange(1), help="To try the results on.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1), help="Of an answer.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(
    uri: str,
    dod: Path,
    base_url: str,
    model: str,
    reflection_model: str | None,
    budget: int,
    train_pairs: int,
    test_pairs: int,
    max_tokens: int,
    seed: int,
    as_json: bool,
) -> None:
    """Optimize a published prompt and a prompt without an instruction, with the same budget, and compare."""
    needed = train_pairs + 2 * MINIBATCH + train_pairs
    if budget < needed:
        raise click.UsageError(
            f"--budget {budget} allows no step with {train_pairs} training pairs; give at least {needed}."
        )
    # MLflow would ask the LLM once more to see whether the function is traced.
    os.environ.setdefault("MLFLOW_GENAI_EVAL_SKIP_TRACE_VALIDATION", "true")
    import mlflow

    from softprompt_registry.dod.store import DodStore
    from softprompt_registry.verbalization.held_out import split_pairs

    published = mlflow.genai.load_prompt(uri)
    name = published.tags.get("softprompt.task")
    if name is None:
        raise click.ClickException(f"{uri} has no tag 'softprompt.task'; expected a prompt of `softprompt publish`.")
    with DodStore.open(dod) as store:
        task = store.task(name)
    training = task.pairs_of("train")
    # The other half of the held-out pairs chose the published text.
    testing = split_pairs(task, seed_of_evaluation(published.tags)).reporting
    if len(training) < train_pairs or not testing:
        raise click.ClickException(
            f"task {name!r} has {len(training)} training and {len(testing)} test pairs; expected {train_pairs} and 1 or more."
        )
    train, test = draw(training, train_pairs, seed), draw(testing, test_pairs, seed)
    minimal = mlflow.genai.register_prompt(f"{published.name.removesuffix('.hard')}.minimal", MINIMAL)
    llm = Llm(base_url, model, reflection_model or model, max_tokens)
    try:
        outcomes = [
            optimize(start, prompt, llm, task, train, test, budget, seed)
            for start, prompt in (("published", published), ("minimal", minimal))
        ]
    finally:
        llm.close()
    if as_json:
        click.echo(
            json.dumps({"task": name, "budget": budget, "starts": [asdict(item) for item in outcomes]}, indent=2)
        )
        return
    click.echo(
        f"task {name}: {len(train)} training pairs, {len(test)} test pairs, at most {budget} metric calls for each start"
    )
    for item in outcomes:
        click.echo(f"\nfrom {item.start}: {item.template!r}")
        for point in item.curve:
            click.echo(f"  after {point.calls:3} calls: {point.score:.2f} on training pairs, best {point.best:.2f}")
        click.echo(f"  to {item.uri}: {item.optimized!r}")
        click.echo(f"  test pairs: {item.test_score_of_start:.2f} at the start, {item.test_score:.2f} at the end")
        click.echo("  calls: " + ", ".join(f"{count} {purpose}" for purpose, count in item.calls.items()))


if __name__ == "__main__":
    main()
