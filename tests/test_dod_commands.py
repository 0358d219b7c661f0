"""The commands that make and check DoDs, as a user types them: what they print, what they write, and the run they leave."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner, Result
from llm_server import KEY, LlmServer, Reply, chat, error_body
from mlflow.entities import Run
from small_tasks import write_dod
from task_files import csv_bytes, jsonl_bytes
from writing_llm import WritingLlm

from softprompt_registry.cli import main
from softprompt_registry.dod.paraphrase import digest_before_paraphrasing
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, PairSplit, Task
from softprompt_registry.registry import conventions
from softprompt_registry.stages.dods import log_dod

CONFIGS = Path(__file__).parents[1] / "configs"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def run_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


def all_runs() -> list[Run]:
    client = mlflow.MlflowClient()
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def artifact(run_id: str, name: str) -> Any:
    return mlflow.artifacts.load_dict(f"runs:/{run_id}/{name}")


def table(run_id: str) -> dict[str, list[Any]]:
    """`tasks.json` by columns."""
    value = artifact(run_id, "tasks.json")
    return {column: [row[place] for row in value["data"]] for place, column in enumerate(value["columns"])}


def left_run(stage: str, prefix: str, dod: Path, *, context: str, artifacts: Iterable[str] = ()) -> Run:
    """The one run that there is, once everything is checked that every command leaves."""
    [found] = all_runs()
    client = mlflow.MlflowClient()
    found = client.get_run(found.info.run_id)
    run_id = found.info.run_id
    assert found.info.status == "FINISHED"
    assert (found.info.run_name, found.data.tags[conventions.STAGE_TAG]) == (stage, stage)
    assert found.data.params and all(key.startswith(f"{prefix}.") for key in found.data.params)
    with DodStore.open(dod) as store:
        manifest = json.loads(json.dumps(store.manifest()))
    [given] = found.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == (dod.stem, manifest["digest"][:36])
    assert given.dataset.source_type == "dod"
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", context)]
    assert artifact(run_id, "dod_manifest.json") == manifest
    assert (found.data.metrics["num_tasks"], found.data.metrics["num_pairs"]) == (
        manifest["num_tasks"],
        manifest["num_pairs"],
    )
    names = {item.path for item in client.list_artifacts(run_id)}
    assert names == {"dod_manifest.json", "tasks.json", *artifacts}
    # The way back to the file.
    source = mlflow.data.get_source(given.dataset)
    assert source.load() == dod
    assert mlflow.data.from_dod(dod).digest == given.dataset.digest
    return found


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- What they are built from ---


def folder_of_files(folder: Path) -> Path:
    """Two tasks: 8 pairs after one duplicate, and 3 pairs after one bad row."""
    folder.mkdir()
    rows = [{"input": f"text {n}", "output": ("warm", "cold")[n % 2]} for n in range(8)]
    (folder / "mood.csv").write_bytes(csv_bytes([*rows, rows[0]]))
    shouts = [{"input": f"hey {n}", "output": f"HEY {n}"} for n in range(3)]
    (folder / "shout.jsonl").write_bytes(jsonl_bytes([*shouts, {"input": "", "output": "x"}]))
    (folder / "tasks.jsonl").write_bytes(
        jsonl_bytes([{"name": "shout", "split": "test", "hard_prompts": ["Shout."], "source": "us"}])
    )
    return folder


def folder_of_sets(folder: Path) -> Path:
    """SST-2 with 4, 2 and 2 pairs."""
    folder.mkdir()
    for split, count in (("train", 4), ("validation", 2), ("test", 2)):
        rows = [{"text": f"{split} film {n}", "label": ("positive", "negative")[n % 2]} for n in range(count)]
        (folder / f"sst2_{split}.jsonl").write_bytes(jsonl_bytes(rows))
    return folder


def file_of_reviews(path: Path) -> Path:
    """Two reviews in each of the five folds."""
    labels = ("truthful", "deceptive")
    rows = [{"text": f"stay {f} {label}", "label": label, "fold": str(f)} for f in range(1, 6) for label in labels]
    path.write_bytes(csv_bytes(rows))
    return path


def flat_copy(folder: Path) -> Path:
    """Three tasks: one of five pairs, one of three for the test side, and one with a single pair."""
    folder.mkdir()
    sides = {"task001_a": "train", "task002_b": "test", "task003_c": "train"}
    records = [
        {"task": name, "split": side, "definition": f"Do what {name} says.", "source": ["quoref"]}
        for name, side in sides.items()
    ]
    counts = {"task001_a": 5, "task002_b": 3, "task003_c": 1}
    rows = [
        {"task": name, "input": f"{name} {n}", "output": f"out {n}"}
        for name, count in counts.items()
        for n in range(count)
    ]
    (folder / "tasks.jsonl").write_bytes(jsonl_bytes(records))
    (folder / "pairs.jsonl").write_bytes(jsonl_bytes(rows))
    return folder


def words_file(path: Path) -> Path:
    words = ("stone", "noun", 9), ("quiet", "adj", 7), ("garden", "noun", 5), ("running", "verb", 99)
    path.write_bytes(csv_bytes([{"word": word, "pos": pos, "count": str(count)} for word, pos, count in words]))
    return path


SPLITS: tuple[PairSplit, ...] = (*("train",) * 4, *("validation",) * 2, *("test",) * 2)
PAIRS = tuple(Pair(f"Sample {n}", ("weaving", "pottery")[n % 2], split) for n, split in enumerate(SPLITS))
CRAFTS = Task("crafts", "classification", PAIRS, labels=("pottery", "weaving"))
SHOUT = Task(
    "shout", "generation", (Pair("hey", "HEY"), Pair("oh", "OH")), hard_prompts=("Write the text in capitals.",)
)


# --- Building ---


def test_files(tmp_path: Path, mlflow_store: str) -> None:
    folder, out = folder_of_files(tmp_path / "in"), tmp_path / "built" / "tasks.sqlite"
    (folder / "notes.txt").write_text("not a task")
    (folder / "mood.csv").write_text((folder / "mood.csv").read_text().replace("text 2,warm", "text 2,Warm "))
    printed = run("build-dod", "files", folder, "--out", out, "-s", "skip_bad_rows=true", "-s", "test_share=0")
    with DodStore.open(out) as store:
        digest = store.digest
    assert printed.stdout == (
        f"{out}: 2 tasks, 11 pairs, digest {digest[:12]}\ndropped 1 duplicate pairs, skipped 1 rows\n"
        "took spellings of a label for one (label_spelling=keep leaves them): 'Warm ' as 'warm' in mood.csv\n"
        "left out what is no task file: 'notes.txt'\n"
    )
    left = left_run("build-dod-files", "build_dod_files", out, context="built")
    assert left.data.params["build_dod_files.skip_bad_rows"] == "True"
    assert left.data.params["build_dod_files.pair_shares"] == "[0.8, 0.1, 0.1]"
    assert table(left.info.run_id) == {
        "name": ["mood", "shout"],
        "kind": ["classification", "generation"],
        "split": ["train", "test"],
        "num_pairs": [8, 3],
        "source": ["", "us"],
    }
    assert files_below(out.parent) == ["tasks.sqlite"]

    told = run_json("build-dod", "files", folder, "--out", out, "--overwrite", "-s", "skip_bad_rows=true")
    assert told == {
        "run_id": told["run_id"],
        "path": str(out),
        "digest": digest,
        "tasks": 2,
        "pairs": 11,
        "duplicates": {"mood.csv": 1},
        "skipped_rows": {"shout.jsonl": {"empty input": 1}},
        "respelled_labels": {"mood.csv": {"warm": {"Warm ": 1}}},
        "left_out": ["notes.txt"],
    }
    assert [found.info.run_id for found in all_runs()][0] == told["run_id"]


PUBLIC_SETS: dict[str, tuple[str, dict[str, str], dict[str, list[Any]]]] = {
    "inspect": (
        "1 tasks, 8 pairs",
        {"sets": "['sst2']"},
        {"set": ["sst2"], "train": [4], "validation": [2], "test": [2]},
    ),
    "ood": ("1 tasks, 10 pairs", {"reviews_test_fold": "5"}, {"train": [6], "validation": [2], "test": [2]}),
    "general": (
        "2 tasks, 8 pairs",
        {"min_pairs": "2"},
        {"status": ["kept", "kept", "too few pairs"], "available": [5, 3, 1], "drawn": [5, 3, 0]},
    ),
}
"""Builder → what it prints, some of its params, and some columns of its table."""


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_public_sets(name: str, tmp_path: Path, mlflow_store: str, tiny_folder: Path) -> None:
    sizes, params, columns = PUBLIC_SETS[name]
    out = tmp_path / "public.sqlite"
    arguments = (*prepared(name, tmp_path, ""), "--out", out)
    printed = run(*arguments).stdout
    assert re.search(rf"{re.escape(str(out))}: {sizes}, digest [0-9a-f]{{12}}\n$", printed)
    left = left_run(f"build-dod-{name}", f"build_dod_{name}", out, context="built")
    assert {key: left.data.params[f"build_dod_{name}.{key}"] for key in params} == params
    found = table(left.info.run_id)
    assert {column: found[column] for column in columns} == columns
    given = run_json(*arguments, "--overwrite")
    rows = given["rows" if name == "general" else "sets"]
    assert [row[column] for row in rows for column in columns if column != "set"] == [
        columns[column][place] for place in range(len(rows)) for column in columns if column != "set"
    ]


CLASSIFICATION = """
classification:
  num_tasks: 3
  labels_per_task: 2
  sentences_per_label: 5
  sentences_per_call: 5
  test_share: 0
  generator:
    model: from-the-file
    options: {max_concurrency: 2}
"""


def test_classification(tmp_path: Path, mlflow_store: str, llm_server: LlmServer) -> None:
    config, out = tmp_path / "settings.yaml", tmp_path / "c.sqlite"
    config.write_text(CLASSIFICATION)
    words = words_file(tmp_path / "words.csv")
    llm_server.reply_to_body = writer = WritingLlm()
    arguments = ("build-dod", "classification", "--out", out, "--config", config, "--words", words, "-s", "num_tasks=2")
    generator = ("--model", "writer", "--base-url", llm_server.url)
    printed = run(*arguments, *generator, "--unrelated-labels").stdout
    with DodStore.open(out) as store:
        digest = store.digest
        tasks = list(store.tasks())
    # 2 label sets and 2 × 2 labels with one request each; the server says 7 and 3 tokens for each.
    assert printed.splitlines()[0] == f"{out}: 2 tasks, 20 pairs, digest {digest[:12]}"
    assert re.fullmatch(
        r"asked 6 requests in \d+ s: 42 prompt tokens, 18 completion tokens; what was answered before was not asked again",
        printed.splitlines()[1],
    )
    assert [len(task.labels) for task in tasks] == [2, 2]
    assert {task.split for task in tasks} == {"train"}
    label_sets = [request for request in writer.requests if "a different field of life" in request]
    assert len(label_sets) == 2
    # Three of the words, "running" not being one: it is a verb.
    assert all(word in request for request in label_sets for word in ("stone", "quiet", "garden"))

    left = left_run("build-dod-classification", "build_dod_classification", out, context="built")
    params = {key.removeprefix("build_dod_classification."): value for key, value in left.data.params.items()}
    assert {key: params[key] for key in ("num_tasks", "sentences_per_label", "related_labels", "generator.model")} == {
        "num_tasks": "2",
        "sentences_per_label": "5",
        "related_labels": "False",
        "generator.model": "writer",
    }
    assert params["generator.options"] == str({"max_concurrency": 2, "base_url": llm_server.url})
    assert table(left.info.run_id)["num_pairs"] == [10, 10]

    told = run_json(*arguments, *generator, "--unrelated-labels", "--overwrite")
    assert (told["digest"], told["asked"]["requests"], told["tasks"], told["given_up"]) == (digest, 0, 2, {})
    assert "last_failure" not in told["asked"]


def test_dry_run(tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither key nor words nor server are needed, and there is no run."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "label_set.txt").write_text("{count} {words}")  # "3 word0, word1, word2": 21 characters
    (prompts / "sentences.txt").write_text("{count}{label}")  # "10label0": 8 characters
    settings = {"num_tasks": 2, "labels_per_task": 3, "sentences_per_label": 15, "prompts_folder": prompts}
    given = [part for key, value in settings.items() for part in ("-s", f"{key}={value}")]
    out = tmp_path / "c.sqlite"
    told = json.loads(run("build-dod", "classification", "--out", out, "--dry-run", *given).stdout)
    assert told == {
        "label_requests": 2,
        "sentence_requests": 2 * 3 * 2,
        "prompt_tokens": 2 * 5 + 12 * 2,
        "completion_tokens": 2 * 4 * 3 + 12 * (8 + 22 * 10),
        "max_completion_tokens": 2 * (20 + 12 * 3) + 12 * (20 + 60 * 10),
    }
    # The paper's size, by the settings that come with the project: as the README says.
    for config in ([], ["--config", CONFIGS / "classification.yaml"]):
        told = json.loads(run("build-dod", "classification", "--out", out, "--dry-run", *config).stdout)
        assert told["label_requests"] + told["sentence_requests"] == 280_500
    assert not out.exists() and all_runs() == []


# --- Paraphrasing ---


def rewrite(body: Mapping[str, Any]) -> Reply:
    """A paraphrase that follows from the style; one style gets none."""
    [style] = re.findall(r"^- Style: (.*)\.$", body["messages"][-1]["content"], re.MULTILINE)
    return Reply(body=chat("" if style == "formal" else f"Use capitals; be {style}."))


def test_paraphrase(tmp_path: Path, mlflow_store: str, tiny_folder: Path, llm_server: LlmServer) -> None:
    dod, out = write_dod(tmp_path / "tasks.sqlite", [CRAFTS, SHOUT]), tmp_path / "x4.sqlite"
    llm_server.reply_to_body = rewrite
    generator = ("--model", "writer", "--base-url", llm_server.url)
    arguments = ("paraphrase-dod", dod, "--out", out, "--factor", 4, *generator, "-s", "condense_over=1000")
    printed = run(*arguments).stdout.splitlines()
    with DodStore.open(dod) as original, DodStore.open(out) as store:
        digest = store.digest
        assert digest_before_paraphrasing(store) == original.digest
        assert len(store.task("shout").hard_prompts) == 1 + 3
    assert printed[0] == f"{out}: 3 of 4 paraphrases for 1 tasks, 25.0 % failed, digest {digest[:12]}"
    assert any(re.search(r"empty\W+3\b", line) for line in printed)
    assert printed[-1].startswith("asked 6 requests in ")

    left = left_run("paraphrase-dod", "paraphrase_dod", out, context="built")
    assert (left.data.params["paraphrase_dod.factor"], left.data.metrics["failed_share"]) == ("4", 0.25)
    assert artifact(left.info.run_id, "dod_manifest.json")["metadata"]["build"]["failed_by_task"] == {"shout": 1}
    assert table(left.info.run_id)["name"] == ["crafts", "shout"]

    told = run_json(*arguments, "--overwrite")
    assert (told["digest"], told["failed_share"], told["failed_by_task"]) == (digest, 0.25, {"shout": 1})
    assert (told["refused"], told["asked"]["requests"]) == ({"empty": 3}, 0)
    assert "last_failure" not in told["asked"]


# --- Auditing ---

FIGURES = {"pairs_per_task.png", "label_balance.png", "label_in_inputs.png", "pair_lengths.png"}


def test_audit_of_a_leak(tmp_path: Path, mlflow_store: str, tiny_folder: Path) -> None:
    leaking = Task("leaking", "classification", (*PAIRS, Pair("sample 0", "weaving", "test")), labels=CRAFTS.labels)
    dod = write_dod(tmp_path / "leak.sqlite", [leaking])
    with DodStore.open(dod) as store:
        digest = store.digest
    page = tmp_path / "leak.sqlite.audit.html"
    # rich breaks a title at the width of its table
    printed = " ".join(run("audit-dod", dod, "-s", "min_pairs_per_task=3").stdout.split())
    title = "1 input in train and in validation or test pairs of one task"
    assert f"{dod}: 1 tasks, 9 pairs" in printed and title in printed and f"page {page} run " in printed

    left = left_run("audit-dod", "audit", dod, context="audited", artifacts={page.name} | FIGURES)
    assert left.data.params["audit.min_pairs_per_task"] == "3"
    assert {key: left.data.metrics[key] for key in ("errors", "warnings", "notes")} == {
        "errors": 1,
        "warnings": 0,
        "notes": 0,
    }
    assert (table(left.info.run_id)["name"], table(left.info.run_id)["leaks"]) == (["leaking"], [1])
    content = page.read_text(encoding="utf-8")
    assert title in content and mlflow.artifacts.load_text(f"runs:/{left.info.run_id}/{page.name}") == content
    with DodStore.open(dod) as store:
        noted = store.metadata()["audit"]
        assert store.digest == digest == noted["digest"]
    assert [finding["code"] for finding in noted["findings"]] == ["leaks_between_splits"]

    # Strictly the same findings are a failure of the command, not of its run.
    told = run_json(
        "audit-dod", dod, "-s", "min_pairs_per_task=3", "--strict", "--page", tmp_path / "p" / "x.html", code=1
    )
    assert (told["passed"], told["page"]) == (False, str(tmp_path / "p" / "x.html"))
    assert told["findings"] == noted["findings"] and (tmp_path / "p" / "x.html").is_file()
    assert [found.info.status for found in all_runs()] == ["FINISHED", "FINISHED"]


# --- What goes wrong ---


def prepared(name: str, folder: Path, url: str) -> list[object]:
    """The arguments of a command that would work."""
    generator = ("--model", "writer", "--base-url", url, "-s", "generator.options.max_attempts=1")
    settings = ("-s", "num_tasks=1", "-s", "labels_per_task=2", "-s", "sentences_per_label=5")
    small: dict[str, Callable[[], list[object]]] = {
        "files": lambda: ["build-dod", "files", folder_of_files(folder / "in"), "-s", "skip_bad_rows=true"],
        "inspect": lambda: ["build-dod", "inspect", folder_of_sets(folder / "in"), "-s", "sets=[sst2]"],
        "ood": lambda: ["build-dod", "ood", "--reviews", file_of_reviews(folder / "in.csv")],
        "general": lambda: ["build-dod", "general", flat_copy(folder / "in"), "-s", "min_pairs=2"],
        "classification": lambda: [
            "build-dod",
            "classification",
            "--words",
            words_file(folder / "in.csv"),
            *settings,
            *generator,
        ],
        "paraphrase": lambda: ["paraphrase-dod", write_dod(folder / "in.sqlite", [SHOUT]), *generator],
    }
    return small[name]()


BUILDERS = ("files", "inspect", "ood", "general", "classification", "paraphrase")


def one_message(result: Result) -> str:
    """What the user is told: one error, without a traceback."""
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.count("Error: ") == 1
    return result.stderr.partition("Error: ")[2]


@pytest.mark.parametrize("name", BUILDERS)
def test_an_existing_dod_is_not_replaced(
    name: str, tmp_path: Path, mlflow_store: str, tiny_folder: Path, llm_server: LlmServer
) -> None:
    out = tmp_path / "out" / "old.sqlite"
    out.parent.mkdir()
    out.write_text("precious")
    result = run(*prepared(name, tmp_path, llm_server.url), "--out", out, code=1)
    assert "exists already; expected a new name" in one_message(result)
    assert out.read_text() == "precious" and files_below(out.parent) == ["old.sqlite"]
    # Where a large model would be loaded first, nothing begins.
    begun = name not in ("classification", "paraphrase")
    assert [found.info.status for found in all_runs()] == ["FAILED"] * begun
    assert llm_server.received == []


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["build-dod", "files", "nowhere"], "there is no such folder", ["FAILED"]),
        (["build-dod", "ood"], "expected", ["FAILED"]),
        (["paraphrase-dod", "nowhere.sqlite", "--model", "m"], "there is no such file", []),
        (["build-dod", "classification", "--words", "nowhere.csv", "--model", "m"], "nowhere.csv", []),
        (["build-dod", "classification", "--words", "words.csv"], "no model is named", []),
        (["build-dod", "files", "in", "-s", "test_share=2"], "test_share is 2", []),
        (["build-dod", "classification", "-s", "generator=gpt", "--model", "m"], "'generator' is a value", []),
        (["paraphrase-dod", "in", "-s", "generator.options=x", "--base-url", "http://x"], "'options' is a value", []),
        (["paraphrase-dod", "in", "--factor", "0"], "factor is 0", []),
        (
            ["build-dod", "classification", "--words", "words.csv", "--model", "m", "--base-url", "ftp://x"],
            "base_url is not a usable address",
            [],
        ),
    ],
)
def test_misuse_is_said_in_one_message(
    arguments: list[str],
    words: str,
    status: list[str],
    tmp_path: Path,
    mlflow_store: str,
    tiny_folder: Path,
    llm_server: LlmServer,
) -> None:
    words_file(tmp_path / "words.csv")
    result = run(*arguments, "--out", tmp_path / "out" / "new.sqlite", code=1)
    assert words in one_message(result)
    assert not (tmp_path / "out").exists() or files_below(tmp_path / "out") == []
    assert [found.info.status for found in all_runs()] == status


def test_an_audit_that_fails(tmp_path: Path, mlflow_store: str, tiny_folder: Path) -> None:
    assert "there is no such file" in one_message(run("audit-dod", tmp_path / "no.sqlite", code=1))
    empty = write_dod(tmp_path / "empty.sqlite", [])
    assert "found no tasks" in one_message(run("audit-dod", empty, code=1))
    assert "balance is 2, expected 1 or less" in one_message(
        run("audit-dod", empty, "-s", "min_label_balance=2", code=1)
    )
    assert [found.info.status for found in all_runs()] == ["FAILED", "FAILED"]
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("name", ["classification", "paraphrase"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_key_is_written_down_nowhere(
    name: str, fails: bool, tmp_path: Path, mlflow_store: str, tiny_folder: Path, llm_server: LlmServer
) -> None:
    """Not even where the server repeats it in an error."""
    refused = Reply(status=401, body=error_body(f"Incorrect API key provided: {KEY}"))
    good = WritingLlm() if name == "classification" else rewrite
    llm_server.reply_to_body = (lambda body: refused) if fails else good
    out = tmp_path / "out" / "new.sqlite"
    result = run(*prepared(name, tmp_path, llm_server.url), "--out", out, code=int(fails))
    if fails:
        message = one_message(result)
        assert (
            "Check the key in the environment variable OPENAI_API_KEY" in message
            and "run the same command" in message.lower()
        )
        # The answers stay, for the next start; there are none yet.
        assert files_below(out.parent) == ["new.sqlite.answers"]
    else:
        assert files_below(out.parent) == ["new.sqlite", "new.sqlite.answers"]
    assert [found.info.status for found in all_runs()] == ["FAILED" if fails else "FINISHED"]
    assert {received.authorization for received in llm_server.received} == {f"Bearer {KEY}"}
    assert KEY not in result.output
    # The tracking store, the run's artifacts, the DoD and its answers all lie here.
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "mlflow.db" in files
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


# --- A large DoD in MLflow ---


def test_a_dod_of_1000_tasks_is_logged_in_a_handful_of_calls(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of the tracking store: on a server each of them is a request."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    calls: list[str] = []

    def counted(name: str, method: Any) -> Any:
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            calls.append(name)
            return method(self, *arguments, **named)

        return call

    for name, method in vars(SqlAlchemyStore).items():
        if not name.startswith("_") and callable(method):
            monkeypatch.setattr(SqlAlchemyStore, name, counted(name, method))

    labels = ("music", "films")
    seen: list[list[str]] = []
    for num_tasks in (3, 1000):
        path = tmp_path / f"{num_tasks}.sqlite"
        pairs = (Pair(f"text {number}", "music") for number in range(num_tasks))
        write_dod(path, (Task(f"task{n:05d}", "classification", (pair,), labels) for n, pair in enumerate(pairs)))
        with mlflow.start_run() as active:
            calls.clear()
            manifest = log_dod(path, context="built")
            seen.append(list(calls))
        found = mlflow.get_run(active.info.run_id)
        assert manifest["num_tasks"] == found.data.metrics["num_tasks"] == num_tasks
        [given] = found.inputs.dataset_inputs
        assert json.loads(given.dataset.profile)["num_tasks"] == num_tasks
        # What the database keeps of it does not grow with the tasks.
        assert len(given.dataset.profile) + len(given.dataset.source) + len(given.dataset.schema) < 1500
        assert len(artifact(active.info.run_id, "dod_manifest.json")["tasks"]) == num_tasks
    assert seen[0] == seen[1]
    assert Counter(seen[1])["log_inputs"] == 1 and len(seen[1]) <= 10, seen[1]
