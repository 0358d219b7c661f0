"""The commands as a user types them, against a real SQLite store and a real tiny Llama."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas
import pytest
from click.testing import CliRunner, Result
from task_files import write_classifications

from softprompt_registry.cli import main

TASKS = {
    "colours": {"red": ["blood", "rose", "cherry", "ruby"], "blue": ["sky", "sea", "denim", "sapphire"]},
    "sizes": {"big": ["whale", "tower", "planet", "ship"], "small": ["ant", "seed", "atom", "crumb"]},
    "tastes": {"sweet": ["honey", "sugar", "candy", "cake"], "sour": ["lemon", "vinegar", "lime", "pickle"]},
    "speeds": {"fast": ["jet", "hare", "light", "racer"], "slow": ["snail", "sloth", "glacier", "tortoise"]},
}
SETTINGS = ["-s", "num_virtual_tokens=4", "-s", "epochs=2", "-s", "learning_rate=0.05", "-s", "max_sequence_tokens=64"]


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def run_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    write_classifications(folder, TASKS, test_task="speeds")
    return folder


def test_the_chain_by_commands(
    task_folder: Path, tmp_path: Path, mlflow_store: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTPROMPT_BASE_MODEL", str(tiny_folder))
    # A folder's name may hold what is special in a URI: ours and MLflow's artifacts lie in such a one.
    folder = tmp_path / "C# Prüfung"
    place = mlflow.create_experiment("chain", artifact_location=str(folder / "artifacts"))
    mlflow.set_experiment(experiment_id=place)
    dod, bank, translator = (str(folder / name) for name in ("tasks.sqlite", "bank", "translator"))
    built = run_json("build-dod", "files", str(task_folder), "--out", dod)
    assert (built["tasks"], built["pairs"]) == (4, 96)

    tuned = run_json("tune", "--dod", dod, "--out", bank, *SETTINGS)
    assert sorted(tuned["soft_prompts"]["task"]) == sorted(TASKS)

    trained = run_json(
        "train-translator", "--dod", dod, "--bank", tuned["model_uri"], "--out", translator, "-s", "epochs=2"
    )
    assert trained["translator"]["train_tasks"] == ["colours", "sizes", "tastes"]

    texts = run_json("verbalize", f"{bank}#speeds", "--translator", translator, "-s", "max_new_tokens=8")
    assert (texts[0]["task"], texts[0]["faithfulness"], texts[0]["abstained"]) == ("speeds", None, False)

    refused = run("register", trained["model_uri"], "--name", "chain", code=1)
    assert "evaluat" in refused.stderr

    found = run_json("evaluate", "--dod", dod, "--bank", bank, "--translator", trained["model_uri"])
    assert {"translator", "behaviour", "nearest_tokens", "most_frequent_target", "all+verifier"} <= set(
        found["metrics"]
    )
    assert found["metrics"]["translator"].keys() == found["metrics"]["nearest_tokens"].keys()

    registered = run_json("register", trained["model_uri"], "--name", "chain")
    assert (registered["name"], registered["version"]) == ("chain", 1)

    policy = tmp_path / "policy.yaml"
    policy.write_text("minimum:\n  label_f1: 1.1\n")
    refused = run("promote", "chain", "--policy", str(policy), code=1)
    assert "label_f1" in refused.stderr and "1.1" in refused.stderr
    policy.write_text("minimum:\n  label_f1: 0.0\n")
    assert run_json("promote", "chain", "--policy", str(policy))["promoted"] is True

    listed = run_json("list")
    assert [(item["name"], item["aliases"]) for item in listed] == [("chain", ["champion"])]
    tree = run("lineage", "models:/chain@champion").stdout
    for word in ("tasks", "bank", "translator", "champion"):
        assert word in tree

    payload = base64.b64encode(_soft_prompt(bank, "speeds")).decode()
    served = mlflow.pyfunc.load_model("models:/chain@champion").predict(
        pandas.DataFrame({"soft_prompt": [payload]}), params={"max_new_tokens": 8}
    )
    # The text of the served model is the text of the command line.
    assert served["hard_prompt"][0] == texts[0]["text"]
    assert "not verified" in served["reason"][0]


def _soft_prompt(bank: str, task: str) -> bytes:
    from softprompt_registry.soft_prompts.bank import SoftPromptBank

    return SoftPromptBank(Path(bank)).member(task).to_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tune", "--dod", "none.sqlite", "--out", "bank"], 1, "none.sqlite"),
        (["tune", "--out", "bank"], 2, "Missing option '--dod'"),
        (["tune", "--dod", "x", "--out", "y", "-s", "epoch=3"], 1, "unknown 'epoch'; known are num_virtual_tokens"),
        (["tune", "--dod", "x", "--out", "y", "-s", "epochs=many"], 1, "epochs is 'many', expected a whole number"),
        (["tune", "--dod", "x", "--out", "y", "--config", "missing.yaml"], 1, "missing.yaml"),
        (["verbalize", "nowhere", "--translator", "nowhere"], 1, "nowhere"),
        (["register", "models:/m-0", "--name", "a"], 1, "m-0"),
        (["lineage", "models:/unknown@champion"], 1, "unknown"),
    ],
)
def test_misuse_is_said_in_one_message(
    arguments: list[str],
    code: int,
    words: str,
    mlflow_store: Any,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOFTPROMPT_BASE_MODEL", str(tiny_folder))
    result = run(*arguments, code=code)
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_a_translator_is_read_with_the_base_model_it_names(tmp_path: Path) -> None:
    from tiny_llm import save_tiny_model

    golden = Path(__file__).parent / "data" / "v1"
    # The golden artifacts name a base model that no name leads to; the right folder is accepted, another one refused.
    arguments = [
        "verbalize",
        str(golden / "soft_prompt"),
        "--translator",
        str(golden / "translator"),
        "-s",
        "max_new_tokens=4",
    ]
    right, wrong = save_tiny_model(tmp_path / "right"), save_tiny_model(tmp_path / "wrong", seed=1)
    assert run_json(*arguments, "--base-model", str(right))[0]["task"] == "colours"
    refused = run(*arguments, "--base-model", str(wrong), code=1)
    assert "tiny@" in refused.stderr and "local:wrong@" in refused.stderr


def test_tables_show_texts_that_look_like_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from softprompt_registry.printing import print_table

    print_table("Texts [bold]", {"text": ["ok [/INST] x", "positive, [none], :dog:"], "score": [0.5, None]})
    shown = capsys.readouterr().out
    assert "Texts [bold]" in shown and "ok [/INST] x" in shown and "positive, [none], :dog:" in shown
