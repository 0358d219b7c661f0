"""`softprompt study`: every study from end to end, what its runs hold, going on after an interruption, and clear refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import Run
from small_tasks import CONFIG
from small_tasks import make_task as small_task
from tiny_llm import tiny_base_model

from softprompt_registry.cli import main
from softprompt_registry.cli.options import section_of
from softprompt_registry.cli.studies import NAMES
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, PairSplit, Task
from softprompt_registry.evaluation.statistics import bootstrap_mean, paired_bootstrap
from softprompt_registry.registry import conventions
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.tuning import tune_soft_prompts
from softprompt_registry.stages.study_plans import STUDIES
from softprompt_registry.stages.study_settings import read_study_config
from softprompt_registry.stages.studying import read_study
from softprompt_registry.storage import locked
from softprompt_registry.translators.training import TranslatorConfig, train_translator
from softprompt_registry.translators.translator import read_record

TRANSLATOR = TranslatorConfig(lora_rank=2, lora_dropout=0.0, learning_rate=1e-2, epochs=2, validation_share=0.25)
QUICK = [
    *("translator.lora_rank=2", "translator.epochs=2", "translator.learning_rate=0.01", "translator.lora_dropout=0.0"),
    *("translator.validation_share=0.25", "evaluation.verbalization.max_new_tokens=10"),
    *("evaluation.verifier.draws=50", "evaluation.abstention.num_tasks=1"),
]


def make_task(name: str, labels: tuple[str, ...] = ("joy", "fear")) -> Task:
    """With enough held-out pairs to rank on one half and to report on the other."""
    return small_task(name, labels, test=8)


def said(name: str, split: str, num_hard_prompts: int) -> Task:
    """A task without labels, with several hard prompts."""
    counts: dict[PairSplit, int] = {"train": 4, "validation": 2, "test": 6}
    pairs = [Pair(f"{name} {side} {n}", f"{name} {n}", side) for side, count in counts.items() for n in range(count)]
    prompts = tuple(f"Say {name} and a number, way {number}." for number in range(num_hard_prompts))
    task = Task(name, "generation", tuple(pairs), hard_prompts=prompts)
    return replace(task, split="test" if split == "test" else "train")


TASKS = [
    make_task("moods"),
    make_task("sides", ("up", "down")),
    make_task("paint", ("red", "blue")),
    make_task("rooms", ("hall", "attic")),
    said("cows", "train", 3),
    said("pigs", "train", 2),
    replace(make_task("sizes", ("big", "small")), split="test"),
    replace(make_task("tastes", ("sweet", "sour")), split="test"),
    replace(make_task("heats", ("hot", "cold")), split="test"),
    said("hens", "test", 1),
]
OTHERS = [
    make_task("mixed", ("drum", "seven")),
    make_task("random", ("cloud", "tax")),
    replace(make_task("odd", ("fork", "moon")), split="test"),
    replace(make_task("even", ("knee", "law")), split="test"),
]


@dataclass(frozen=True)
class Inputs:
    dod: str
    bank: str
    other_dod: str
    other_bank: str
    translator: str

    @property
    def own(self) -> list[str]:
        return ["--dod", self.dod, "--bank", self.bank]

    @property
    def other(self) -> list[str]:
        return ["--other", self.other_dod, self.other_bank]


def tuned(folder: Path, name: str, tasks: Sequence[Task]) -> tuple[str, str]:
    """A DoD and its bank."""
    path = folder / f"{name}.sqlite"
    with DodStore.create(path) as store:
        for task in tasks:
            store.add_task(task)
        digest = store.digest
    tune_soft_prompts(tiny_base_model(), tasks, CONFIG, folder / f"{name}-bank", dod_name=name, dod_digest=digest)
    return str(path), str(folder / f"{name}-bank")


@pytest.fixture(scope="module")
def inputs(shared_folder: Path) -> Inputs:
    own, other = tuned(shared_folder, "tasks", TASKS), tuned(shared_folder, "unrelated", OTHERS)
    train = {task.name: task for task in TASKS if task.split == "train"}
    bank, base = SoftPromptBank(Path(own[1])), tiny_base_model()
    train_translator(base, bank, train, TRANSLATOR, shared_folder / "translator")
    return Inputs(*own, *other, str(shared_folder / "translator"))


def invoke(*arguments: str, settings: Sequence[str] = (), code: int = 0) -> Result:
    given = [part for setting in (*QUICK, *settings) for part in ("-s", setting)]
    result = CliRunner().invoke(main, ["study", *arguments, *given])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def study(*arguments: str, settings: Sequence[str] = ()) -> Any:
    return json.loads(invoke(*arguments, "--json", settings=settings).stdout)


def children(run_id: str) -> list[Run]:
    """In the order they were started."""
    client = MlflowClient()
    parent = client.get_run(run_id)
    found = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    points = [run for run in found if run.data.tags[conventions.STAGE_TAG] == "study-point"]
    return sorted(points, key=lambda run: int(run.info.start_time))


def stages() -> list[str]:
    """Of all runs so far, sorted."""
    return sorted(run.data.tags.get(conventions.STAGE_TAG, "") for run in mlflow.search_runs(output_format="list"))


def logged_table(run_id: str, name: str = "study.json") -> dict[str, list[Any]]:
    table = mlflow.artifacts.load_dict(f"runs:/{run_id}/{name}")
    return {column: [row[place] for row in table["data"]] for place, column in enumerate(table["columns"])}


def near(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two columns are the same up to rounding."""
    return [pytest.approx(value, abs=1e-9) if isinstance(value, float) else value for value in left] == list(right)


def texts(run_id: str, point: str) -> dict[str, str]:
    """What the translator said at a point, by task."""
    columns = logged_table(run_id, "study_tasks.json")
    rows = zip(columns["point"], columns["method"], columns["task"], columns["text"], strict=True)
    return {task: text for of, method, task, text in rows if (of, method) == (point, "translator")}


def check_study(found: Mapping[str, Any], name: str, points: Sequence[str]) -> list[Run]:
    """What holds for every study; returns the runs of its points."""
    runs = children(found["run_id"])
    assert [run.data.params["point"] for run in runs] == list(points)
    assert all(run.data.params["study"] == name and run.data.params["method"] == "translator" for run in runs)
    assert all(run.info.status == "FINISHED" for run in runs)
    if name != "out-of-domain":  # points on other tasks have other metrics; results that were taken over have the same
        assert len({tuple(sorted(run.data.metrics)) for run in runs}) == 1
    # The means are what the children logged, and the logged table is the printed one; MLflow keeps ten digits of a table.
    columns = found["table"]
    logged = logged_table(found["run_id"])
    assert logged.keys() == columns.keys()
    assert all(near(logged[column], values) for column, values in columns.items())
    of_method = [place for place, method in enumerate(columns["method"]) if method == "translator"]
    assert [columns["point"][place] for place in of_method] == list(points)
    for run, place in zip(runs, of_method, strict=True):
        assert run.data.metrics["evaluation.num_tasks"] == columns["num_tasks"][place]
        for metric in ("label_recall", "label_f1", "rouge_l", "cosine", "mpr_midrank"):
            assert columns[metric][place] == run.data.metrics[f"evaluation.{metric}"]
            assert columns[f"{metric}_low"][place] <= columns[metric][place] <= columns[f"{metric}_high"][place]
    client = MlflowClient()
    parent = client.get_run(found["run_id"])
    assert parent.data.params["study"] == name and parent.info.run_name == f"study {name}"
    files = {item.path: item.file_size for item in client.list_artifacts(found["run_id"])}
    assert {"study.json", "study_tasks.json", "study_points.json", "study_differences.json"} <= files.keys()
    assert files["study.png"] > 5_000
    # All of it again, from the run alone.
    again = read_study(found["run_id"])
    assert json.loads(json.dumps(again.columns())) == found["table"]
    assert {
        point: {metric: item._asdict() for metric, item in by.items()} for point, by in again.differences.items()
    } == (found["differences"])
    return runs


# Each study -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """A study that was stopped between its two points, and started again."""

    out: Path
    arguments: list[str]
    found: Any
    stages: list[list[str]]
    """Before, when it had stopped, and after the second start."""
    first_written: list[int]
    """When the first point's result was written, as seen after each start."""


SHARES = ["shares=[0.5, 1.0]"]


@pytest.fixture(scope="module")
def sizes(inputs: Inputs, shared_folder: Path) -> Sizes:
    out = shared_folder / "sizes"
    arguments = ["dod-size", *inputs.own, "--out", str(out)]
    result = out / "share-0.5" / "result.json"
    before = stages()
    out.mkdir()
    (out / "share-1").write_text("in the way")
    invoke(*arguments, settings=SHARES, code=1)
    assert not (out / "share-1" / "result.json").exists()
    stopped, written = stages(), result.stat().st_mtime_ns
    (out / "share-1").unlink()
    found = study(*arguments, settings=SHARES)
    return Sizes(out, arguments, found, [before, stopped, stages()], [written, result.stat().st_mtime_ns])


def test_dod_size_trains_on_nested_shares_and_tests_on_the_same_tasks(sizes: Sizes) -> None:
    found = sizes.found
    runs = check_study(found, "dod-size", ["share-0.5", "share-1"])
    assert [run.data.params["value"] for run in runs] == ["0.5", "1.0"]
    # A quarter of six tasks is held out at both shares: two. Half of the other four is two.
    assert [run.data.params["train_tasks"] for run in runs] == ["2", "4"]
    half, whole = (read_record(sizes.out / f"share-{share}" / "translator") for share in ("0.5", "1"))
    assert half.training["validation_tasks"] == whole.training["validation_tasks"]
    assert set(half.train_tasks) < set(whole.train_tasks) == {task.name for task in TASKS if task.split == "train"}
    assert texts(found["run_id"], "share-0.5").keys() == texts(found["run_id"], "share-1").keys()
    # The differences are those of the tasks, paired by name.
    columns = read_study(found["run_id"]).task_columns()
    cosines: dict[str, list[float]] = {"share-0.5": [], "share-1": []}
    for point, method, cosine in zip(columns["point"], columns["method"], columns["cosine"], strict=True):
        if method == "translator":
            cosines[point].append(cosine)
    expected = paired_bootstrap(cosines["share-1"], cosines["share-0.5"], 0)
    assert found["differences"]["share-1"]["cosine"] == expected._asdict() and expected.n == 4
    assert found["table"]["cosine_low"][0] == bootstrap_mean(cosines["share-0.5"], 0).low
    # The default compares with a control that looks at no soft prompt, and with nothing that costs more.
    assert set(found["table"]["method"]) == {"translator", "most_frequent_target", "all+verifier"}


def test_a_paraphrase_factor_is_how_many_hard_prompts_are_learned(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "factors"
    found = study("paraphrase-factor", *inputs.own, "--out", str(out), settings=["factors=[1, 3]", "scale_epochs=true"])
    runs = check_study(found, "paraphrase-factor", ["factor-1", "factor-3"])
    logged = [(run.data.params["epochs"], run.data.params["tasks_with_fewer"]) for run in runs]
    assert logged == [("2", "0"), ("6", "1")]
    records = [read_record(out / f"factor-{factor}" / "translator") for factor in (1, 3)]
    assert [record.training["max_hard_prompts"] for record in records] == [1, 3]
    assert [record.training["epochs"] for record in records] == [2, 6]
    assert found["notes"] == ["factor 3: 1 of 2 training tasks have fewer hard prompts."]


def test_a_prefill_begins_the_texts_of_the_same_translator(inputs: Inputs, tmp_path: Path) -> None:
    given = ["--translator", inputs.translator, "--out", str(tmp_path / "prefills")]
    found = study("prefill", *inputs.own, *given, settings=["prefills=['Name it:']"])
    runs = check_study(found, "prefill", ["no-prefill", "prefill-1"])
    assert [run.data.params["prefill"] for run in runs] == ["", "Name it:"]
    without, with_prefill = (texts(found["run_id"], point) for point in ("no-prefill", "prefill-1"))
    assert all(text.startswith("Name it:") for text in with_prefill.values())
    assert not any(text.startswith("Name it:") for text in without.values())
    assert not (tmp_path / "prefills" / "translator").exists(), "the given one is read"


def test_label_sets_are_compared_by_the_translators_they_make(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    found = study("labels", *inputs.own, *inputs.other, "--out", str(out))
    runs = check_study(found, "labels", ["trained-on-tasks", "trained-on-unrelated"])
    assert [run.data.params["trained_on"] for run in runs] == ["tasks", "unrelated"]
    assert [run.data.params["tested_on"] for run in runs] == ["tasks", "tasks"]
    assert read_record(out / "trained-on-unrelated" / "translator").train_tasks == ("mixed", "random")
    assert found["differences"]["trained-on-unrelated"]["cosine"]["n"] == 4
    # The control counts the texts that a translator was trained on, which the tested DoD does not have here.
    rows = list(zip(found["table"]["point"], found["table"]["method"], strict=True))
    assert ("trained-on-tasks", "most_frequent_target") in rows
    assert ("trained-on-unrelated", "most_frequent_target") not in rows
    assert found["notes"] == [
        "trained-on-unrelated: without most_frequent_target, since the translator learned from another DoD than it is "
        "tested on."
    ]


def test_accuracy_sets_how_well_a_soft_prompt_does_against_how_well_it_reads(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "accuracy"
    given = ["--translator", inputs.translator, "--out", str(out)]
    found = study("accuracy", *inputs.own, *given, settings=["varied=epochs", "amounts=[1, 9]"])
    runs = check_study(found, "accuracy", ["epochs-1", "epochs-9"])
    few, many = (SoftPromptBank(out / f"epochs-{amount}" / "bank") for amount in (1, 9))
    tests = [task.name for task in TASKS if task.split == "test"]
    assert few.tasks() == many.tasks() == tests, "only what is read is tuned"
    settings = few.record("sizes")["tuning"]
    assert (settings["epochs"], settings["learning_rate"]) == (1, CONFIG.learning_rate), "the rest is the bank's own"
    losses = [run.data.metrics["soft_prompts.negative_validation_loss"] for run in runs]
    assert losses[0] < losses[1] < 0, "more epochs make better soft prompts"
    columns = read_study(found["run_id"]).task_columns()
    assert all(
        near(values, columns[name]) for name, values in logged_table(found["run_id"], "study_tasks.json").items()
    )
    place = columns["task"].index("sizes")
    assert columns["negative_validation_loss"][place] == -few.record("sizes")["metrics"]["validation_loss"]
    assert columns["accuracy"][place] == few.record("sizes")["metrics"]["label_accuracy"]
    pooled = found["correlations"]["negative_validation_loss and cosine"]["all points"]
    assert -1 <= pooled["low"] <= pooled["rho"] <= pooled["high"] <= 1
    assert (pooled["num_pairs"], pooled["num_tasks"]) == (8, 4)
    files = {item.path for item in MlflowClient().list_artifacts(found["run_id"])}
    assert {"accuracy.png", "correlations.json"} <= files


def test_out_of_domain_reads_the_test_tasks_of_every_dod(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "domains"
    found = study("out-of-domain", *inputs.own, *inputs.other, "--out", str(out))
    check_study(found, "out-of-domain", ["tested-on-tasks", "tested-on-unrelated"])
    assert read_record(out / "translator").dod_name == "tasks", "without a given translator one is trained"
    assert texts(found["run_id"], "tested-on-unrelated").keys() == {"odd", "even"}
    assert found["differences"] == {}, "other tasks cannot be paired"
    printed = invoke("out-of-domain", *inputs.own, *inputs.other, "--out", str(out)).stdout
    for word in ("tested-on-unrelated", "MPR (chance .50)", "with study.png"):
        assert word in printed


# Going on -------------------------------------------------------------------------------------------------------------


def test_a_study_that_was_stopped_evaluates_no_point_twice(sizes: Sizes) -> None:
    before, stopped, after = sizes.stages
    assert stopped.count("evaluate") - before.count("evaluate") == 1
    assert after.count("evaluate") - stopped.count("evaluate") == 1
    assert after.count("train-translator") - stopped.count("train-translator") == 1
    assert sizes.first_written[0] == sizes.first_written[1]

    done = [name for name in stages() if name in ("evaluate", "train-translator")]
    again = study(*sizes.arguments, settings=SHARES)
    assert again["table"] == sizes.found["table"] and again["run_id"] != sizes.found["run_id"]
    check_study(again, "dod-size", ["share-0.5", "share-1"])
    assert [name for name in stages() if name in ("evaluate", "train-translator")] == done

    fewer = study(*sizes.arguments, settings=["shares=[1.0]"])
    assert fewer["table"]["point"] == again["table"]["point"][3:], "the points may change, and keep their results"
    refused = invoke(*sizes.arguments, settings=[*SHARES, "method=translator+verifier"], code=1).stderr
    assert (
        "point 'share-0.5' has no method 'translator+verifier'; it has translator, most_frequent_target, all" in refused
    )


def test_a_study_killed_before_a_result_takes_over_what_was_trained(sizes: Sizes, tmp_path: Path) -> None:
    shutil.copytree(sizes.out, tmp_path / "sizes")
    arguments = [*sizes.arguments[:-1], str(tmp_path / "sizes")]
    point = tmp_path / "sizes" / "share-1"
    (point / "result.json").unlink()
    adapter = point / "translator" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    again = study(*arguments, settings=["shares=[1.0]"])
    assert adapter.stat().st_mtime_ns == written
    row = again["table"]["method"].index("translator")
    whole = sizes.found["table"]["method"].index("translator", 1)
    assert sizes.found["table"]["point"][whole] == "share-1"
    for metric in ("label_f1", "rouge_l", "cosine", "heldout_log_likelihood"):
        assert again["table"][metric][row] == sizes.found["table"][metric][whole]

    for other in ("translator.epochs=3", "evaluation.verbalization.max_new_tokens=5", "evaluation.seed=1"):
        refused = invoke(*arguments, settings=["shares=[1.0]", other], code=1).stderr
        assert "writing point 'share-1' of a study to" in refused and "made from other inputs or settings" in refused
        assert "Choose another output, or remove that folder" in refused
    # Without the point's result it is the training that notices.
    (point / "result.json").unlink()
    refused = invoke(*arguments, settings=["shares=[1.0]", "translator.epochs=3"], code=1).stderr
    assert "writing a translator to" in refused and "made from other inputs or settings" in refused
    assert adapter.stat().st_mtime_ns == written


def test_two_studies_do_not_share_a_folder_at_a_time(inputs: Inputs, tmp_path: Path) -> None:
    with locked(tmp_path):
        refused = invoke("dod-size", *inputs.own, "--out", str(tmp_path), code=1)
    assert "another process is working there" in refused.stderr


# Refusals -------------------------------------------------------------------------------------------------------------


def test_the_command_names_every_study() -> None:
    assert NAMES == STUDIES
    assert "'dod-size'" in invoke("sizes", "--dod", "x", "--bank", "y", "--out", "z", code=2).stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_at_the_papers_size_can_be_read(name: str) -> None:
    file = Path(__file__).parents[1] / "configs" / "studies" / f"{name}.yaml"
    settings = read_study_config(section_of("study", file, []))
    assert settings.evaluation.methods == ("translator", "most_frequent_target"), "nothing that costs more"
    assert settings.evaluation.verbalization.max_new_tokens >= 64
    text = file.read_text()
    assert f"# softprompt study {name} --dod" in text and f"--config configs/studies/{name}.yaml" in text


REFUSALS: list[tuple[list[str], list[str], str]] = [
    (["dod-size", "--translator", "TRANSLATOR"], [], "trains one for each of its points. Leave --translator out"),
    (["labels"], [], "found no other DoD with a bank (--other), expected at least one"),
    (["prefill", "OTHER"], [], "found 1 other DoDs with a bank (--other), expected none"),
    (["dod-size"], ["translator.train_share=0.5"], "translator.train_share is 0.5, but that is what the study varies"),
    (
        ["paraphrase-factor"],
        [],
        "the most is 3. Write more with `softprompt paraphrase-dod`, or leave them out: -s factors=[1]",
    ),
    (["paraphrase-factor"], ["translator.shuffle_labels=false"], "learns each task's first hard prompt only"),
    (["prefill"], ["evaluation.verbalization.prefill=A"], "evaluation.verbalization.prefill is 'A', but that is what"),
    (["accuracy"], ["tuning.num_virtual_tokens=6"], "tuning.num_virtual_tokens is 6, but the soft prompts of bank"),
    (["dod-size"], ["shares=[]"], "shares: found [], expected one or more, each once"),
    (["prefill"], ["prefills=['']"], "expected none that is blank"),
    (["dod-size"], ["method=inspect"], "method is 'inspect', but evaluation.methods is ['translator', 'most_frequent_"),
    (["dod-size"], ["share=[1.0]"], "unknown 'share'; known are method, shares"),
]


@pytest.mark.parametrize(("arguments", "settings", "words"), REFUSALS, ids=[words[:40] for *_, words in REFUSALS])
def test_what_cannot_be_studied_is_refused(
    inputs: Inputs, tmp_path: Path, arguments: list[str], settings: list[str], words: str
) -> None:
    name, *more = arguments
    spelled = [part for item in more for part in (inputs.other if item == "OTHER" else [item])]
    spelled = [inputs.translator if part == "TRANSLATOR" else part for part in spelled]
    refused = invoke(name, *inputs.own, *spelled, "--out", str(tmp_path / "out"), settings=settings, code=1)
    assert words in " ".join(refused.stderr.split())


def test_a_study_without_test_tasks_or_of_another_base_model_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    train = [task for task in OTHERS if task.split == "train"]
    dod, bank = tuned(tmp_path, "trained", train)
    refused = invoke("prefill", "--dod", dod, "--bank", bank, "--out", str(tmp_path / "out"), code=1).stderr
    assert "has no soft prompt of a test task of DoD 'trained', which point 'no-prefill' needs" in refused
    longer = replace(CONFIG, num_virtual_tokens=5)
    tune_soft_prompts(tiny_base_model(), OTHERS, longer, tmp_path / "k5")
    base = tiny_base_model(seed=1, name="stranger")
    tune_soft_prompts(base, OTHERS, CONFIG, tmp_path / "stranger")
    for folder, words in (("k5", "K=4, those of"), ("stranger", "Use artifacts of one base model")):
        other = ["--other", inputs.other_dod, str(tmp_path / folder)]
        refused = invoke("out-of-domain", *inputs.own, *other, "--out", str(tmp_path / "out"), code=1).stderr
        assert words in refused
    refused = invoke("prefill", "--dod", inputs.other_dod, "--bank", inputs.bank, "--out", "x", code=1).stderr
    assert "Use the DoD that the bank was tuned on" in refused
