"""The report of an evaluation: what it says, and that filter and sort work in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import HOSTILE, UNPRINTABLE, Page, browsed, flat, in_browser, rows_of
from numpy.typing import NDArray

from softprompt_registry import figures
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.metrics import label_score
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.evaluation.report_data import ReportData, report_data, report_json
from softprompt_registry.evaluation.report_figures import report_figures
from softprompt_registry.evaluation.report_page import report_page, verdict
from softprompt_registry.evaluation.statistics import paired_bootstrap
from softprompt_registry.evaluation.text_scores import EvaluatedTask
from softprompt_registry.evaluation.verbalizations import Faithfulness, evaluate_verbalizations
from softprompt_registry.pages.formatting import signed
from softprompt_registry.pages.svg import inline_svg
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.verbalizer import Verbalization
from softprompt_registry.verbalization.verification import Gain, Verification, Verified


class BagEncoder:
    """Words in common make texts near."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.zeros((len(texts), 4096), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().replace(",", " ").split():
                row[zlib.crc32(word.encode(errors="surrogatepass")) % 4096] += 1
        return rows


def classification(name: str, *labels: str) -> Task:
    return Task(name, "classification", (Pair("x", labels[0]),), labels)


def generation(name: str, *prompts: str) -> Task:
    return Task(name, "generation", (Pair("x", "y"),), hard_prompts=prompts)


def said(task: Task, text: str, faithfulness: float | None = None, **known: Any) -> Verbalization:
    return Verbalization(text, task.name, (), f"id of {task.name}", "f" * 64, faithfulness=faithfulness, **known)


def verified(task: Task, *candidates: Verified) -> Verification:
    return Verification(
        task=task.name,
        soft_prompt_id=f"id of {task.name}",
        base_fingerprint="f" * 64,
        evidence="pairs",
        items=(0, 1),
        no_prompt_scores=(-2.0, -2.0),
        soft_prompt_scores=(-1.0, -1.0),
        gain=Gain(1.0, 1.0, 1.0),
        reason=None,
        candidates=candidates,
        truncated_inputs=0,
        draws=10,
        level=0.95,
        seed=0,
    )


def reported(
    tasks: Sequence[Task],
    methods: Mapping[str, Sequence[str | Verbalization]],
    *,
    accuracy: Mapping[str, float] | None = None,
    reporting: Sequence[Verification] | None = None,
    settings: Mapping[str, Any] | None = None,
    **known: Any,
) -> ReportData:
    """The report of texts: by method, one for each task in order."""
    texts = {
        method: [
            item if isinstance(item, Verbalization) else said(task, item)
            for item, task in zip(items, tasks, strict=True)
        ]
        for method, items in methods.items()
    }
    kept = {task.name: EvaluatedTask.of(task, (accuracy or {}).get(task.name)) for task in tasks}
    record = EvaluationRecord(kept, texts, [], list(reporting or ()), AbstentionRule(), {"seed": 3, **(settings or {})})
    plain = evaluate_verbalizations(texts, kept, BagEncoder(), reporting=reporting, seed=record.seed)
    return report_data(record, plain, **known)


WORDS = ["joy", "fear", "up", "down", "red", "blue", "hot", "cold"]
TASKS = [classification(f"{a}-{b}", a, b) for a in WORDS for b in WORDS[::-1] if a < b][:8]


def eight(
    *, faithfulness: Mapping[int, float] | None = None, abstained: Mapping[int, str] | None = None, **known: Any
) -> ReportData:
    """Eight tasks: the translator names all labels, the other method the first one with some noise, the last nothing.

    `faithfulness` of the second method's texts, and why they are withheld, by the place of the task.
    """
    second = [
        said(
            task,
            f"{task.labels[0]} or some thing",
            (faithfulness or {}).get(number),
            abstained=number in (abstained or {}),
            reason=(abstained or {}).get(number),
        )
        for number, task in enumerate(TASKS)
    ]
    return reported(
        TASKS, {"translator": [task.ground_truth for task in TASKS], "inspect": second, "silent": [""] * 8}, **known
    )


def said_in(article: Page, method: int) -> Page:
    """What one method said in a task; 0 is the truth."""
    return Page('<div class="said' + article.html.split('<div class="said')[method + 1].rsplit("</article>", 1)[0])


def cells_of(html: str) -> list[list[list[str]]]:
    """By table, by row, the words of each cell."""
    return [rows_of(table) for table in re.findall(r"<table>.*?</table>", html, flags=re.DOTALL)]


# What it says ---------------------------------------------------------------------------------------------------------


def test_the_first_screen_says_which_method_is_best_and_why() -> None:
    data = eight(title="Moods", when="2 May", base_model="tiny@1")
    page = Page(report_page(data))
    assert page.texts["h1"] == ["Moods"]
    assert "2 May · tiny@1 · 3 methods on the same soft prompts of 8 tasks" in flat(page.text)
    assert page.texts["strong"][0] == "translator is the best method: Label F1 1.00 (1.00 to 1.00)."
    difference = data.comparisons[0].metrics["label_f1"].difference
    assert f"Ahead of inspect by {signed(difference)} (" in page.text
    assert "better in 8, equal in 0 and worse in 0 of 8 tasks" in page.text
    assert "Ahead of silent by +1.00 (+1.00 to +1.00)" in page.text
    assert "Only 8 tasks" in page.text
    assert "Its faithfulness is not known" in page.text


def test_the_table_has_every_method_with_intervals_and_chance_beside_the_ranking_metrics() -> None:
    data = eight()
    page = Page(report_page(data))
    table = Page(re.findall(r"<table>.*?</table>", page.html, flags=re.DOTALL)[0])
    heads = [flat(head) for head in table.texts["th"]]
    controls = next(found for tag, found in page.tags if found.get("id") == "controls")
    assert "hidden" in controls, "without JavaScript there are none"
    assert heads[:7] == ["Method", "Label F1", "Label recall", "ROUGE-L", "Cosine", "Percentile rank", "Top-1"]
    assert heads[7:] == ["translator", "inspect", "silent"]
    assert table.texts["small"][:2] == ["chance 0.50", f"chance {data.methods[0].metrics['top1_chance']:.2f}"]
    f1 = data.methods[1].intervals["label_f1"]
    assert f"{f1.low:.2f} to {f1.high:.2f}" in table.texts["small"]
    assert table.texts["strong"] == ["1.00"] * 6, "the translator wins every column"
    assert table.count("td") == 18
    everything = Page(re.findall(r"<table>.*?</table>", page.html, flags=re.DOTALL)[1])
    names = {name for name in data.methods[0].metrics if not name.endswith("_chance")}
    assert names <= set(everything.texts["th"])
    assert len(everything.texts["td"]) == 4 * len(names)


def test_a_lead_that_may_be_chance_is_no_victory() -> None:
    texts = [task.ground_truth for task in TASKS]
    mixed = {"a": ["", *texts[1:]], "b": [*texts[:6], "", ""], "c": texts[:1] + [""] * 7}
    found = verdict(reported(TASKS, mixed))
    assert found.tone == "warning"
    assert found.headline.startswith("No method is clearly the best; a scores highest: Label F1 0.88 (")
    assert found.points[0][0] == "warning" and found.points[0][1].startswith("The lead over b may be chance: +0.12 (−")
    assert found.points[1][0] == "fine" and found.points[1][1].startswith("Ahead of c by +0.75 (")
    for count, tone in ((5, "warning"), (6, "fine")):  # five tasks are not enough
        few = {"good": texts[:count], "bad": [""] * count}
        assert verdict(reported(TASKS[:count], few)).tone == tone


def test_the_best_method_is_compared_even_if_it_is_not_the_first() -> None:
    texts = [task.ground_truth for task in TASKS]
    data = reported(TASKS, {"weak": [""] * 8, "best": texts, "middle": [task.labels[0] for task in TASKS]})
    pairs = [(item.method, item.other) for item in data.comparisons]
    assert pairs == [("weak", "best"), ("weak", "middle"), ("best", "weak"), ("best", "middle")]
    expected = paired_bootstrap([1.0] * 8, [2 / 3] * 8, seed=3)
    assert data.comparisons[3].metrics["label_f1"] == expected
    assert verdict(data).headline.startswith("best is the best method")


def test_a_method_with_privileged_information_is_shown_and_is_no_rival() -> None:
    texts = [task.ground_truth for task in TASKS]
    methods = {"label_list": texts, "weak": [""] * 8, "honest": [task.labels[0] for task in TASKS]}
    data = reported(TASKS, methods)
    assert data.best.name == "honest" and ("honest", "weak") in [(item.method, item.other) for item in data.comparisons]
    found = verdict(data)
    assert found.headline.startswith("honest is the best method")
    assert not any("label_list" in words for _, words in found.points)
    assert "label_list: given privileged information, and no rivals" in " ".join(report_page(data).split())


def test_what_the_verifier_changes_about_a_method_is_among_the_differences() -> None:
    texts = [task.ground_truth for task in TASKS]
    named = {"first": texts, "plain": [""] * 8, "plain+verifier": [task.labels[0] for task in TASKS]}
    data = reported(TASKS, named)
    pairs = [(item.method, item.other) for item in data.comparisons]
    assert pairs == [("first", "plain"), ("first", "plain+verifier"), ("plain+verifier", "plain")]
    assert data.comparisons[2].metrics["label_f1"].difference == pytest.approx(2 / 3)
    rows = [row for table in cells_of(report_page(data)) for row in table]
    assert [row[1] for row in rows if row[0] == "plain+verifier − plain"] == ["+0.67+0.67 to +0.67 8 / 0 / 0"]


def test_texts_at_chance_are_called_so_and_empty_ones_are_counted() -> None:
    same = {"constant": ["nothing"] * 8}
    at_chance = "percentile rank 0.50 (0.50 to 0.50), chance 0.50"
    warned = ("warning", f"Its texts may not tell the tasks apart better than chance: {at_chance}.")
    assert warned in verdict(reported(TASKS, same)).points
    silent = verdict(reported(TASKS, {"silent": ["x"] * 7 + [""]})).points
    assert ("warning", "1 of its 8 texts is empty, which scores lowest.") in silent


def test_what_was_decided_on_makes_the_curve_and_what_was_measured_on_other_pairs_is_shown() -> None:
    tasks = TASKS[:4]
    texts = [tasks[0].ground_truth, tasks[1].labels[0], "", "x"]
    found = [
        verified(tasks[0], Verified(texts[0], -1.25, 0.75, 0.5, 1.0, (-1.5, -1.0))),
        verified(tasks[1], Verified(texts[1], -1.75, 0.25, -0.5, 0.5, (-2.0, -1.5))),
        verified(tasks[2], Verified(texts[2], -2.0, None, None, None, (-2.0, -2.0))),
        verified(tasks[3], Verified(texts[3], -0.5, 1.25, 1.0, 1.5, (-1.0, 0.0))),
    ]
    why = "the soft prompt gains nothing"
    items = [said(task, text, value) for task, text, value in zip(tasks, texts, (0.1, 0.2, 0.3, 0.4), strict=True)]
    items[2] = dataclasses.replace(items[2], abstained=True, reason=why)
    data = reported(tasks, {"a": items}, reporting=found)
    measured = [task.texts["a"].faithfulness for task in data.tasks]
    assert measured[:3] == [Faithfulness(0.75, 0.5, 1.0), Faithfulness(0.25, -0.5, 0.5), Faithfulness(None)]
    assert [point.threshold for point in data.curves["a"].points] == [0.4, 0.3, 0.2, 0.1]
    page = Page(report_page(data))
    assert "Mean faithfulness 0.75 over the 3 of 4 texts that have one." in page.text
    assert "It abstains on 1 of 4 tasks, which count all the same; the others have Label F1 0.56." in page.text
    one, two, three, four = (said_in(page.article(number), 1) for number in (1, 2, 3, 4))
    meter = next(found for tag, found in one.tags if found.get("class") == "meter")
    assert (meter["role"], meter["aria-label"]) == ("img", "faithfulness 0.75, 0.50 to 1.00")
    styles = [found["style"] for tag, found in one.tags if "%" in str(found.get("style"))]
    assert styles == ["left: 0; width: 75.0%", "left: 50.0%; right: 0.0%"]
    assert "Held-out log-likelihood −1.75" in two.text
    assert two.text.count("aithfulness") == 1, "as a bar, not once more as a number"
    assert three.tags[0] == ("div", {"class": "said abstained"}) and f"Abstained: {why}" in flat(three.text)
    assert "faithfulness not defined" in three.text
    assert "width: 100.0%" in four.html and "1.25" in four.text, "the bar ends where it ends"
    assert [figure.name for figure in report_figures(data)] == ["methods", "faithfulness", "coverage"]


def test_each_task_shows_the_truth_beside_every_methods_text() -> None:
    tasks = [*TASKS[:2], generation("free", "Say it.", "Tell them now.")]
    methods = {"a": ["red", "", "say it"], "b": ["x", "y", "z"]}
    page = Page(report_page(reported(tasks, methods, accuracy={tasks[0].name: 0.825})))
    assert page.count("article") == 3
    assert page.texts["h3"][-3:] == [task.name for task in tasks]
    for number, task in enumerate(tasks, start=1):
        assert said_in(page.article(number), 0).texts["p"] == [task.ground_truth]
    assert "(empty)" in said_in(page.article(2), 1).text
    assert "accuracy of the soft prompt 0.82" in page.article(1).text and "accuracy" not in page.article(2).text
    assert "ROUGE-L 1.00" in said_in(page.article(3), 1).text
    assert "labels" not in said_in(page.article(3), 1).text


def test_labels_are_marked_exactly_where_the_metric_counts_them() -> None:
    task = classification("toxic?", "toxic", "not toxic", "e-mail", "joy")
    text = "Not toxic, TOXIC: an e mail; enjoy <joyful> toxics"
    page = Page(report_page(reported([task], {"a": [text]})))
    said = said_in(page.article(1), 1)
    assert said.texts["mark"] == ["Not toxic", "TOXIC", "e mail"]
    assert said.texts["s"] == ["joy"]
    assert "3 of 4 labels, missing: joy" in flat(said.text)
    assert label_score(text, task.labels, mode="phrase").recall == 3 / 4
    assert text in said.text, "the marks change no letter"


def test_the_prefill_is_shown_and_neither_marked_nor_counted() -> None:
    task = classification("moods", "joy", "fear")
    data = reported([task], {"a": [said(task, "Name the joy: fear", prefill="Name the joy: ")]})
    shown = said_in(Page(report_page(data)).article(1), 1)
    assert shown.texts["mark"] == ["fear"] and shown.texts["s"] == ["joy"]
    assert "Name the joy: fear" in shown.text
    assert data.tasks[0].texts["a"].scores["label_recall"] == 1 / 2
    data = reported([task], {"a": [said(task, "Name the joy:", prefill="Name the joy: ")]})
    assert (data.tasks[0].texts["a"].found, data.tasks[0].texts["a"].prefill) == ("", "Name the joy:")


def test_categories_correlations_and_curves_have_their_tables() -> None:
    data = full_data()
    page = Page(report_page(data))
    rows = [row for table in cells_of(page.html) for row in table]
    assert ["a", "4", "1.00"] in [row[:3] for row in rows] and ["b", "4", "1.00"] in [row[:3] for row in rows]
    assert ["translator", "not defined: quality is the same in all 8 tasks", "8"] in rows
    curve = data.curves["inspect"]
    assert ["inspect", f"{curve.area:.2f}", f"{curve.no_abstention:.2f}"] in rows
    assert [option for option in page.texts["option"] if option in ("a", "b")] == ["a", "b"]
    assert list(data.curves) == ["inspect"] and set(data.correlations) == {"translator", "inspect", "silent"}


def test_a_mixed_evaluation_is_ranked_by_what_all_tasks_have() -> None:
    tasks = [*TASKS[:2], generation("free", "Say it.")]
    data = reported(tasks, {"a": ["x"] * 3, "b": ["say it"] * 3})
    assert (data.ranked_by, data.best.name) == ("cosine", "b")
    assert data.category_names == {"classification": 2, "generation": 1}
    assert reported(TASKS[:2], {"a": ["x", "y"]}).ranked_by == "label_f1"
    with pytest.raises(DataError, match="found no category for"):
        reported(tasks, {"a": ["x"] * 3}, categories={"free": "x"})


def test_the_least_there_can_be() -> None:
    """One task, one method, nothing known beside."""
    task = generation("free", "Say it.")
    data = reported([task], {"only": ["Say what?"]})
    page = Page(report_page(data))
    assert page.texts["strong"][0].startswith("only reaches Cosine 0.50 (0.50 to 0.50); there is no other method")
    assert "Only 1 task:" in page.text and "1 method on the same soft prompts of 1 task" in page.text
    assert (page.count("article"), page.count("figure"), page.count("table")) == (1, 1, 2)
    assert "Differences" not in page.text and "Categories" not in page.text and "chance:" not in page.text
    assert len(page.texts["strong"]) == 1, "nothing wins without a rival"


# As JSON --------------------------------------------------------------------------------------------------------------


def test_json_holds_everything_under_names() -> None:
    accuracy = {task.name: number / 8 for number, task in enumerate(TASKS)}
    data = eight(
        faithfulness={0: 0.5}, abstained={0: "why"}, accuracy=accuracy, settings={"path": Path("x"), "prefill": None}
    )
    record = json.loads(json.dumps(report_json(data), allow_nan=False))
    assert record["format_version"] == 1
    assert set(record) == {"format_version"} | {field.name for field in dataclasses.fields(ReportData)}
    text = record["tasks"][0]["texts"]["inspect"]
    assert set(text["scores"]) >= {"label_f1", "cosine"} and text["text"] == f"{TASKS[0].labels[0]} or some thing"
    assert {name: value for name, value in text.items() if name not in ("text", "scores")} == {
        **{"prefill": "", "faithfulness": None, "decided_on": 0.5, "abstained": True, "reason": "why", "nearest": None}
    }
    assert record["comparisons"][0]["metrics"]["label_f1"]["wins"] == 8
    assert record["curves"]["inspect"]["points"][0] == {"coverage": 0.125, "quality": 1 / 3, "threshold": 0.5}
    assert record["correlations"]["silent"]["reason"] == "quality is the same in all 8 tasks"
    assert record["settings"] == {"seed": 3, "path": "x", "prefill": None}
    assert record["methods"][0]["intervals"]["cosine"] == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})


# As a page ------------------------------------------------------------------------------------------------------------


def hostile_data() -> ReportData:
    """The same hostile text in every place that takes one."""
    task = classification(f"moods {HOSTILE}", f"joy {HOSTILE}", "fear")
    other = generation("free", f"Say {HOSTILE}")
    methods = {
        f"a {HOSTILE}": [
            said(task, f"{HOSTILE} fear joy {HOSTILE}", 0.5, abstained=True, reason=HOSTILE),
            f"{UNPRINTABLE} \n\t x",
        ],
        f"_{HOSTILE}": [said(task, HOSTILE, prefill=HOSTILE[:8]), "y"],
    }
    return reported(
        [task, other],
        methods,
        title=HOSTILE,
        when=HOSTILE,
        base_model=HOSTILE,
        settings={HOSTILE: HOSTILE},
        accuracy={task.name: 0.5, other.name: 0.25},
        categories={task.name: HOSTILE, other.name: "\u611f\u60c5 #000000"},
    )


def full_data() -> ReportData:
    """Eight tasks with all that gives a figure."""
    names = [task.name for task in TASKS]
    return eight(
        categories={name: "ab"[number % 2] for number, name in enumerate(names)},
        accuracy={name: number / 8 for number, name in enumerate(names)},
        faithfulness={number: number / 8 for number in range(8)},
    )


def test_figures_are_there_and_drawn_from_the_data() -> None:
    drawn = {figure.name: figure for figure in report_figures(full_data())}
    assert list(drawn) == ["methods", "coverage", "accuracy", "categories"]
    assert "Percentile rank: translator 1.00, inspect " in drawn["methods"].alt
    assert "inspect: Label F1 " in drawn["coverage"].alt
    assert "translator: no correlation: quality is the same in all 8 tasks." in drawn["accuracy"].alt
    assert "a (4): translator 1.00, inspect " in drawn["categories"].alt
    points = [line for line in drawn["accuracy"].figure.axes[0].lines if line.get_label() == "translator"][0]
    assert [tuple(point) for point in points.get_xydata()] == [(number / 8, 1.0) for number in range(8)]
    assert all(len(inline_svg(figure)) < 40_000 for figure in drawn.values())
    few = report_figures(eight())
    assert [figure.name for figure in few] == ["methods"]


def test_a_series_that_repeats_a_colour_looks_different() -> None:
    names = [f"method {number}" for number in range(2 * len(figures.PALETTE))]
    places = {name: [(0.5, 0.5)] for name in names}
    points = figures.scatter("x", places, x="x", y="y").axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in points}) == len(names)
    steps = [
        line for line in figures.quality_by_coverage("x", places, y="y").axes[0].lines if line.get_label() in names
    ]
    assert len({(line.get_color(), line.get_linestyle()) for line in steps}) == len(names)


def test_a_page_of_five_methods_and_a_hundred_tasks_is_small() -> None:
    words = [f"word{number}" for number in range(120)]
    tasks = [
        classification(f"task{n:03d}", *words[:5]) if n % 2 else generation(f"task{n:03d}", " ".join(words))
        for n in range(100)
    ]
    said_of = [
        said(task, " ".join(words[:40]), n / 100, abstained=n < 20, reason="below the threshold")
        for n, task in enumerate(tasks)
    ]
    accuracy = {task.name: n / 100 for n, task in enumerate(tasks)}
    page = report_page(reported(tasks, {f"method {n}": said_of for n in range(5)}, accuracy=accuracy))
    assert Page(page).count("article") == 100
    assert len(page.encode()) < 1_500_000


# In a browser ---------------------------------------------------------------------------------------------------------


@in_browser
def test_filter_and_sort_work(tmp_path: Path) -> None:
    names = [task.name for task in TASKS]
    data = eight(
        accuracy={name: [0.5, 0.1, 0.9, 0.3][number] for number, name in enumerate(names[:4])},
        categories={name: "ab"[number % 2] for number, name in enumerate(names)},
    )
    driver = """<script>
    const set = (id, value) => {
      const control = document.getElementById(id);
      control.value = value;
      control.dispatchEvent(new Event("input"));
    };
    const listed = () => [...document.querySelectorAll("article:not([hidden])")].map((task) => task.id.slice(5)).join(" ");
    const steps = [listed()];
    for (const step of STEPS) {
      set(...step);
      steps.push(listed() + " | " + document.getElementById("shown").textContent);
    }
    document.title = JSON.stringify(steps);
    </script></body>"""
    accuracy = Page(report_page(data)).texts["option"].index("accuracy of the soft prompt")
    first_sort = Page(report_page(data)).texts["option"].index("order of the evaluation")
    key = str(accuracy - first_sort - 1)
    steps = [
        ["sort", key],
        ["order", "lowest"],
        ["category", "1"],
        ["category", ""],
        ["filter", f" {names[2].upper()}  truth "],
        ["filter", "no such word"],
        ["filter", ""],
        ["sort", ""],
    ]
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report_page(data))
    shown, console = browsed(tmp_path, html.replace("</body>", driver.replace("STEPS", json.dumps(steps))))
    assert console == []
    assert re.search(r'<div id="controls"[^>]*>', shown).group().count("hidden") == 0  # type: ignore[union-attr]
    found = json.loads(re.search(r"<title>(.*?)</title>", shown).group(1))  # type: ignore[union-attr]
    assert found == [
        "1 2 3 4 5 6 7 8",
        "3 1 4 2 5 6 7 8 | 8 of 8 tasks",
        "2 4 1 3 5 6 7 8 | 8 of 8 tasks",
        "2 4 6 8 | 4 of 8 tasks",
        "2 4 1 3 5 6 7 8 | 8 of 8 tasks",
        "3 | 1 of 8 tasks",
        " | 0 of 8 tasks",
        "2 4 1 3 5 6 7 8 | 8 of 8 tasks",
        "1 2 3 4 5 6 7 8 | 8 of 8 tasks",
    ]
