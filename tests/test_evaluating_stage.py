"""`evaluate` and `reproduce` as commands: the verifier, control prompts, tasks that are left out, and what the run holds."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from softprompt_registry.cli import main
from softprompt_registry.registry import artifacts
from softprompt_registry.storage import locked

WORDS = {
    "colours": {"red": ["blood", "rose", "cherry"], "blue": ["sky", "sea", "denim"]},
    "sizes": {"big": ["whale", "tower", "planet"], "small": ["ant", "seed", "atom"]},
    "tastes": {"sweet": ["honey", "sugar", "candy"], "sour": ["lemon", "vinegar", "lime"]},
    "speeds": {"fast": ["jet", "hare", "light"], "slow": ["snail", "sloth", "glacier"]},
    "heats": {"hot": ["fire", "sun", "oven"], "cold": ["ice", "snow", "pole"]},
    "bare": {"in": ["hall", "room", "cellar"], "out": ["field", "wood", "beach"]},
    "few": {"up": ["hill", "roof", "cloud"], "down": ["mine", "well", "root"]},
    "mute": {"one": ["a", "b", "c"], "two": ["d", "e", "f"]},
}
TEST_TASKS = ("speeds", "heats", "bare", "few", "mute")
SPLITS = {"bare": ("train", "train", "train"), "few": ("train", "train", "test")}


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def trained(shared_folder: Path) -> list[str]:
    """Options that name a DoD, a bank and a translator. The task `bare` has no held-out pair, `few` has too few, and
    nobody has said what `mute` is about."""
    folder = shared_folder / "tasks"
    folder.mkdir()
    records = []
    for name, labels in WORDS.items():
        splits = SPLITS.get(name, ("train", "validation", "test"))
        rows = [
            {"input": f"{word} number {copy}", "output": label, "split": split}
            for label, words in labels.items()
            for word in words
            for copy, split in enumerate(splits)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        split = "test" if name in TEST_TASKS else "train"
        source = "words: ours" if name != "heats" else "more words, ours"
        kind = {"kind": "generation"} if name == "mute" else {"labels": list(labels)}
        records.append({"name": name, **kind, "split": split, "source": source})
    (folder / "tasks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    dod, bank, translator = (str(shared_folder / name) for name in ("tasks.sqlite", "bank", "translator"))
    run("build-dod", "files", str(folder), "--out", dod)
    settings = ["num_virtual_tokens=4", "epochs=3", "learning_rate=0.05", "max_sequence_tokens=64"]
    tuned = run("tune", "--dod", dod, "--out", bank, *(part for value in settings for part in ("-s", value)), "--json")
    made = run("train-translator", "--dod", dod, "--bank", bank, "--out", translator, "-s", "epochs=2", "--json")
    uris = [json.loads(command.stdout)["model_uri"] for command in (tuned, made)]
    return ["--dod", dod, "--bank", uris[0], "--translator", uris[1]]


SETTINGS = [
    *("-s", "verbalization.num_candidates=3", "-s", "verbalization.max_new_tokens=8", "-s", "verifier.draws=200"),
    *("-s", "garbage_prompts=6", "-s", "seed=5"),
]


@pytest.fixture(scope="module")
def found(trained: list[str]) -> Any:
    return json.loads(run("evaluate", *trained, *SETTINGS, "--json").stdout)


def test_every_method_stands_in_the_run_with_the_same_metrics(found: Any) -> None:
    assert {"translator", "translator+verifier", "behaviour", "nearest_tokens", "all+verifier"} <= set(found["metrics"])
    assert len({tuple(sorted(metrics)) for metrics in found["metrics"].values()}) == 1
    assert "heldout_log_likelihood" in found["metrics"]["translator"]
    assert set(found["verifier_effects"]) >= {"translator"}
    client = MlflowClient()
    parent = client.get_run(found["run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found['run_id']}'")
    logged = {run.data.params["method"]: run.data.metrics for run in children}
    assert {
        method: {f"evaluation.{name}": value for name, value in metrics.items()}
        for method, metrics in found["metrics"].items()
    } == logged
    files = {item.path for item in client.list_artifacts(found["run_id"])}
    assert {"report.html", "report.json", "verbalizations.json", "methods.png", "garbage.json", "rule.json"} <= files


def test_what_a_stage_reads_is_fetched_once(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a remote store each fetch is a download. The command reads the bank's base model before the stage reads the bank."""
    fetched = []
    fetch = mlflow.artifacts.download_artifacts

    def counted(*arguments: Any, **named: Any) -> str:
        fetched.append(named.get("artifact_uri"))
        return str(fetch(*arguments, **named))

    monkeypatch.setattr(artifacts, "_FETCHED", {})
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", counted)
    grid = [
        "inspect-grid",
        *trained[:4],
        "--out",
        str(tmp_path / "grid.json"),
        "--train-tasks",
        "1",
        "--test-tasks",
        "0",
    ]
    run(*grid, "-s", "step=2", "-s", "max_new_tokens=2")
    assert fetched == [trained[3]]


def test_a_task_that_cannot_be_verified_is_left_out_and_named(found: Any) -> None:
    why = found["left_out"]
    assert sorted(why) == ["bare", "few", "mute"] and "found 0 different inputs" in why["bare"]
    assert "are 3, expected at least 4" in why["few"] and "neither labels nor a hard prompt" in why["mute"]
    assert set(found["table"]["task"]) == {"speeds", "heats"}
    assert mlflow.get_run(found["run_id"]).data.metrics["evaluation.num_left_out"] == 3
    table = mlflow.load_table("left_out.json", run_ids=[found["run_id"]])
    assert sorted(table["task"]) == ["bare", "few", "mute"]


def test_control_prompts_are_read_and_counted(found: Any) -> None:
    table = mlflow.load_table("garbage.json", run_ids=[found["run_id"]])
    assert list(table["kind"]) == ["random vectors", "noise", "shuffled tokens"] * 2
    assert list(table["task"]) == ["heats"] * 3 + ["speeds"] * 3
    assert found["garbage"]["garbage_refused_share"] == pytest.approx(table["abstained"].mean())
    curve = mlflow.load_table("garbage_curve.json", run_ids=[found["run_id"]])
    assert list(curve["garbage_refused"]) == sorted(curve["garbage_refused"]) and len(curve) == 21
    assert found["garbage_curve"]["garbage_refused"] == list(curve["garbage_refused"])
    report = mlflow.artifacts.load_dict(f"runs:/{found['run_id']}/report.json")
    assert [point["garbage_refused"] for point in report["garbage"]] == list(curve["garbage_refused"])
    assert "Control prompts refused, texts given" in mlflow.artifacts.load_text(f"runs:/{found['run_id']}/report.html")
    logged = mlflow.get_run(found["run_id"]).data.metrics
    assert {name.removeprefix("evaluation.") for name in logged} >= set(found["garbage"])


def test_the_report_groups_tasks_by_where_they_are_from(found: Any) -> None:
    report = mlflow.artifacts.load_dict(f"runs:/{found['run_id']}/report.json")
    assert "classification · words" in json.dumps(report, ensure_ascii=False)
    page = mlflow.artifacts.load_text(f"runs:/{found['run_id']}/report.html")
    assert report["rule"] in page and "withheld" in report["rule"]
    assert "classification · more words" in json.dumps(report, ensure_ascii=False)


def test_all_numbers_come_back_from_the_run_alone(found: Any, trained: list[str]) -> None:
    dod = Path(trained[1])
    dod.rename(f"{dod}.gone")
    again = json.loads(run("reproduce", found["run_id"], "--json").stdout)
    Path(f"{dod}.gone").rename(dod)
    assert again["differences"] == []
    assert again["compared"] == sum(map(len, found["metrics"].values()))


def test_another_run_cannot_be_reproduced(trained: list[str]) -> None:
    with mlflow.start_run() as other:
        pass
    assert "Expected a run of `softprompt evaluate`" in run("reproduce", other.info.run_id, code=1).stderr


def test_people_read_tables_differences_and_a_verdict(trained: list[str]) -> None:
    out = run("evaluate", *trained, *SETTINGS, "-s", "abstention.min_faithfulness=0.25").stdout
    assert "left out: bare" in out and "Texts with a faithfulness below 0.25 are withheld; this threshold was" in out
    assert "translator with the verifier minus without" in out and "The verifier's choice" in out
    assert "control prompts: " in out and "of 6 refused" in out and "a threshold of 0: " in out


def test_categories_come_from_a_file(trained: list[str], tmp_path: Path) -> None:
    path = tmp_path / "categories.json"
    path.write_text(json.dumps({"speeds": "motion"}))
    few = [*trained, "-s", f"categories={path}", "-s", "methods=[translator]", "-s", "verbalization.max_new_tokens=4"]
    assert "none for ['heats']" in run("evaluate", *few, code=1).stderr
    path.write_text(json.dumps({"speeds": "motion", "heats": "weather"}))
    done = json.loads(run("evaluate", *few, "--json").stdout)
    report = json.dumps(mlflow.artifacts.load_dict(f"runs:/{done['run_id']}/report.json"))
    assert '"motion"' in report and '"weather"' in report
    path.write_text("[]")
    assert "one JSON object" in run("evaluate", *few, code=1).stderr


def test_a_translator_that_saw_the_test_tasks_is_refused(
    trained: list[str], shared_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(shared_folder / "translator", tmp_path / "translator")
    record = json.loads((tmp_path / "translator" / "translator.json").read_text())
    record["train_tasks"].append("heats")
    (tmp_path / "translator" / "translator.json").write_text(json.dumps(record))
    options = [*trained[:5], str(tmp_path / "translator")]
    assert "trained on ['heats']" in run("evaluate", *options, code=1).stderr


def test_an_evaluation_that_was_killed_resumes_with_the_same_result(
    found: Any, trained: list[str], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    command = [sys.executable, "-m", "softprompt_registry.cli", "evaluate", *trained, *SETTINGS, "--work", str(work)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(work.glob("*.json"))) < 4:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("*.json")}
    assert len(kept) >= 4
    with locked(work):
        assert "another process" in run("evaluate", *trained, *SETTINGS, "--work", str(work), code=1).stderr
    again = json.loads(run("evaluate", *trained, *SETTINGS, "--work", str(work), "--json").stdout)
    assert again["metrics"] == found["metrics"] and again["garbage"] == found["garbage"]
    assert not work.exists()


def test_a_number_that_was_changed_is_found(found: Any) -> None:
    client = MlflowClient()
    experiment = client.get_run(found["run_id"]).info.experiment_id
    mine = f"params.method = 'translator' and tags.`mlflow.parentRunId` = '{found['run_id']}'"
    child = client.search_runs([experiment], mine)[0]
    client.log_metric(child.info.run_id, "evaluation.cosine", 0.987)
    result = run("reproduce", found["run_id"], code=1)
    assert "translator: cosine was logged as 0.987" in result.stdout
    total = sum(map(len, found["metrics"].values()))
    assert f"{total - 1} of {total} numbers are as they were logged" in result.stdout
