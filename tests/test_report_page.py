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
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.evaluation.analysis import Confusion
from softprompt_registry.evaluation.metrics import label_score
from softprompt_registry.evaluation.report_data import Faithfulness, ReportData, report_data, report_json
from softprompt_registry.evaluation.report_figures import report_figures
from softprompt_registry.evaluation.report_page import report_page, verdict
from softprompt_registry.evaluation.statistics import paired_bootstrap
from softprompt_registry.evaluation.verbalizations import Evaluation, evaluate_verbalizations
from softprompt_registry.pages.formatting import signed
from softprompt_registry.pages.svg import inline_svg
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


def evaluated(
    tasks: Sequence[Task],
    prefill: str = "",
    abstained: Mapping[tuple[str, str], str] | None = None,
    reporting: Sequence[Verification] | None = None,
    **methods: Sequence[str],
) -> Evaluation:
    """By method, a text for each task in order; `abstained` has reasons by method and task."""
    said = {}
    for method, texts in methods.items():
        said[method] = []
        for text, task in zip(texts, tasks, strict=True):
            reason = (abstained or {}).get((method, task.name))
            item = Verbalization(text, task.name, (), f"id of {task.name}", "f" * 64, prefill=prefill)
            if reason is not None:
                item = dataclasses.replace(item, abstained=True, reason=reason)
            said[method].append(item)
    return evaluate_verbalizations(said, {task.name: task for task in tasks}, BagEncoder(), reporting=reporting)


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


def reported(tasks: Sequence[Task], evaluation: Evaluation, **known: Any) -> ReportData:
    known = {"title": "A report"} | known
    return report_data(evaluation, {task.name: task for task in tasks}, **known)


WORDS = ["joy", "fear", "up", "down", "red", "blue", "hot", "cold"]
TASKS = [classification(f"{a}-{b}", a, b) for a in WORDS for b in WORDS[::-1] if a < b][:8]


def eight(abstained: Mapping[tuple[str, str], str] | None = None, **known: Any) -> ReportData:
    """Eight tasks: the translator names all labels, the other method the first one with some noise, the last nothing."""
    evaluation = evaluated(
        TASKS,
        abstained=abstained,
        translator=[task.ground_truth for task in TASKS],
        inspect=[f"{task.labels[0]} or some thing" for task in TASKS],
        silent=[""] * 8,
    )
    return reported(TASKS, evaluation, **known)


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
    assert heads[:7] == ["Method", "Label F1", "Label recall", "ROUGE-L", "Cosine", "Percentile rank", "Top-1"]
    assert heads[7:] == ["translator", "inspect", "silent"]
    assert table.texts["small"][:2] == ["chance 0.50", f"chance {data.methods[0].metrics['top1_chance']:.2f}"]
    f1 = data.methods[1].intervals["label_f1"]
    assert f"{f1.low:.2f} to {f1.high:.2f}" in table.texts["small"]
    assert len(table.texts["strong"]) == 6 and set(table.texts["strong"]) == {"1.00"}, (
        "the translator wins every column"
    )
    assert table.count("td") == 18
    everything = Page(re.findall(r"<table>.*?</table>", page.html, flags=re.DOTALL)[1])
    names = {name for name in data.methods[0].metrics if not name.endswith("_chance")}
    assert names <= set(everything.texts["th"])
    assert len(everything.texts["td"]) == 4 * len(names)


def test_a_lead_that_may_be_chance_is_no_victory() -> None:
    texts = [task.ground_truth for task in TASKS]
    mixed = evaluated(TASKS, a=["", *texts[1:]], b=[*texts[:6], "", ""], c=texts[:1] + [""] * 7)
    found = verdict(reported(TASKS, mixed))
    assert found.tone == "warning"
    assert found.headline.startswith("No method is clearly the best; a scores highest: Label F1 0.88 (")
    assert found.points[0][0] == "warning" and found.points[0][1].startswith("The lead over b may be chance: +0.12 (−")
    assert found.points[1][0] == "fine" and found.points[1][1].startswith("Ahead of c by +0.75 (")


def test_winning_on_five_tasks_is_not_enough_and_on_six_it_is() -> None:
    for count, tone in ((5, "warning"), (6, "fine")):
        tasks = TASKS[:count]
        evaluation = evaluated(tasks, good=[task.ground_truth for task in tasks], bad=[""] * count)
        assert verdict(reported(tasks, evaluation)).tone == tone


def test_the_best_method_is_compared_even_if_it_is_not_the_first() -> None:
    texts = [task.ground_truth for task in TASKS]
    evaluation = evaluated(TASKS, weak=[""] * 8, best=texts, middle=[task.labels[0] for task in TASKS])
    data = reported(TASKS, evaluation, seed=3)
    assert [(item.method, item.other) for item in data.comparisons] == [
        ("weak", "best"),
        ("weak", "middle"),
        ("best", "weak"),
        ("best", "middle"),
    ]
    expected = paired_bootstrap([1.0] * 8, [2 / 3] * 8, seed=3)
    assert data.comparisons[3].metrics["label_f1"] == expected
    assert data.comparisons[0].metrics == evaluation.comparisons["best"]
    assert verdict(data).headline.startswith("best is the best method")


def test_a_method_that_is_told_the_labels_is_shown_and_is_no_rival() -> None:
    texts = [task.ground_truth for task in TASKS]
    evaluation = evaluated(TASKS, told=texts, weak=[""] * 8, honest=[task.labels[0] for task in TASKS])
    data = reported(TASKS, evaluation, told=["told"])
    assert data.best.name == "honest" and ("honest", "weak") in [(item.method, item.other) for item in data.comparisons]
    found = verdict(data)
    assert found.headline.startswith("honest is the best method")
    assert not any("told" in words for _, words in found.points)
    assert "told: told what is asked for, and no rivals of the others." in " ".join(report_page(data).split())
    assert verdict(reported(TASKS, evaluation)).headline.startswith("told is the best method")
    with pytest.raises(DataError, match="found told of 'other'"):
        reported(TASKS, evaluation, told=["other"])


def test_what_the_verifier_changes_about_a_method_is_among_the_differences() -> None:
    texts = [task.ground_truth for task in TASKS]
    named = {"first": texts, "plain": [""] * 8, "plain+verifier": [task.labels[0] for task in TASKS]}
    data = reported(TASKS, evaluated(TASKS, **named))
    pairs = [(item.method, item.other) for item in data.comparisons]
    assert pairs == [("first", "plain"), ("first", "plain+verifier"), ("plain+verifier", "plain")]
    assert data.comparisons[2].metrics["label_f1"].difference == pytest.approx(2 / 3)
    rows = [row for table in cells_of(report_page(data)) for row in table]
    assert [row[1] for row in rows if row[0] == "plain+verifier − plain"] == ["+0.67+0.67 to +0.67 8 / 0 / 0"]


def test_texts_at_chance_are_called_so_and_empty_ones_are_counted() -> None:
    same = evaluated(TASKS, constant=["nothing"] * 8)
    at_chance = "percentile rank 0.50 (0.50 to 0.50), chance 0.50"
    warned = ("warning", f"Its texts may not tell the tasks apart better than chance: {at_chance}.")
    assert warned in verdict(reported(TASKS, same)).points
    silent = verdict(reported(TASKS, evaluated(TASKS, silent=["x"] * 7 + [""]))).points
    assert ("warning", "1 of its 8 texts is empty, which scores lowest.") in silent


def test_faithfulness_and_abstentions_are_in_the_verdict_and_in_the_task() -> None:
    first, second, third = (("translator", task.name) for task in TASKS[:3])
    data = eight(
        faithfulness={first: Faithfulness(0.5, 0.25, 0.75), second: Faithfulness(None), third: Faithfulness(1.25)},
        abstained={second: "the soft prompt gains nothing"},
    )
    page = Page(report_page(data))
    assert "Mean faithfulness 0.88 over the 2 of 8 texts that have one." in page.text
    assert "It abstains on 1 of 8 tasks, which count all the same; the others have Label F1 1.00." in page.text
    one, two, three = (said_in(page.article(number), 1) for number in (1, 2, 3))
    meter = next(found for tag, found in one.tags if found.get("class") == "meter")
    assert (meter["role"], meter["aria-label"]) == ("img", "faithfulness 0.50, 0.25 to 0.75")
    styles = [found["style"] for tag, found in one.tags if "%" in str(found.get("style"))]
    assert styles == ["left: 0; width: 50.0%", "left: 25.0%; right: 25.0%"]
    assert two.tags[0] == ("div", {"class": "said abstained"})
    assert "Abstained: the soft prompt gains nothing" in flat(two.text)
    assert "faithfulness not defined" in two.text
    assert "width: 100.0%" in three.html and "1.25" in three.text, "the bar ends where it ends"
    assert "abstained" not in one.html and "faithfulness" not in said_in(page.article(4), 1).text


def test_abstentions_may_be_said_beside_the_evaluation() -> None:
    evaluation = evaluated(TASKS[:3], abstained={("a", TASKS[0].name): "its own"}, a=["x"] * 3)
    data = reported(TASKS[:3], evaluation, abstained={("a", TASKS[1].name): "from outside"})
    found = [(task.texts["a"].abstained, task.texts["a"].reason) for task in data.tasks]
    assert found == [(True, "its own"), (True, "from outside"), (False, None)]


def test_what_was_decided_on_makes_the_curve_and_what_was_measured_on_other_pairs_is_shown() -> None:
    tasks = TASKS[:3]
    texts = [tasks[0].ground_truth, tasks[1].labels[0], ""]
    found = [
        verified(tasks[0], Verified(texts[0], -1.25, 0.75, 0.5, 1.0, (-1.5, -1.0))),
        verified(tasks[1], Verified(texts[1], -1.75, 0.25, -0.5, 0.5, (-2.0, -1.5))),
        verified(tasks[2], Verified(texts[2], -2.0, None, None, None, (-2.0, -2.0))),
    ]
    evaluation = evaluated(tasks, reporting=found, a=texts)
    data = reported(tasks, evaluation)
    measured = [task.texts["a"].faithfulness for task in data.tasks]
    assert measured == [Faithfulness(0.75, 0.5, 1.0), Faithfulness(0.25, -0.5, 0.5), Faithfulness(None)]
    assert [point.threshold for point in data.curves["a"].points] == [0.75, 0.25, None]
    page = Page(report_page(data))
    assert "Mean faithfulness 0.50 over the 2 of 3 texts that have one." in page.text
    assert "Held-out log-likelihood −1.75" in said_in(page.article(2), 1).text
    assert said_in(page.article(2), 1).text.count("aithfulness") == 1, "as a bar, not once more as a number"
    assert [figure.name for figure in report_figures(data)] == ["methods", "faithfulness", "coverage"]
    assert ["−1.67−2.00 to −1.25"] == [row[8] for row in cells_of(page.html)[0][1:]]
    decided = {("a", task.name): Faithfulness(value) for task, value in zip(tasks, (0.1, 0.2, 0.3), strict=True)}
    data = reported(tasks, evaluation, faithfulness=decided)
    assert [point.threshold for point in data.curves["a"].points] == [0.3, 0.2, 0.1]
    assert [task.texts["a"].faithfulness for task in data.tasks] == measured


def test_each_task_shows_the_truth_beside_every_methods_text() -> None:
    tasks = [*TASKS[:2], generation("free", "Say it.", "Tell them now.")]
    evaluation = evaluated(tasks, a=["red", "", "say it"], b=["x", "y", "z"])
    page = Page(report_page(reported(tasks, evaluation, accuracy={tasks[0].name: 0.825})))
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
    evaluation = evaluated([task], a=[text])
    page = Page(report_page(reported([task], evaluation)))
    said = said_in(page.article(1), 1)
    assert said.texts["mark"] == ["Not toxic", "TOXIC", "e mail"]
    assert said.texts["s"] == ["joy"]
    assert "3 of 4 labels, missing: joy" in flat(said.text)
    assert label_score(text, task.labels, mode="phrase").recall == 3 / 4
    assert text in said.text, "the marks change no letter"


def test_the_prefill_is_shown_and_neither_marked_nor_counted() -> None:
    task = classification("moods", "joy", "fear")
    evaluation = evaluated([task], prefill="Name the joy: ", a=["Name the joy: fear"])
    data = reported([task], evaluation, prefills={("a", "moods"): "Name the joy: "})
    said = said_in(Page(report_page(data)).article(1), 1)
    assert said.texts["mark"] == ["fear"] and said.texts["s"] == ["joy"]
    assert "Name the joy: fear" in said.text
    assert data.tasks[0].texts["a"].scores["label_recall"] == 1 / 2
    nothing = evaluated([task], prefill="Name the joy: ", a=["Name the joy:"])
    data = reported([task], nothing, prefills={("a", "moods"): "Name the joy: "})
    assert (data.tasks[0].texts["a"].text, data.tasks[0].texts["a"].prefill) == ("", "Name the joy:")


def test_a_text_nearer_to_another_task_says_so() -> None:
    found = [Confusion(task.name, TASKS[3].name, 0.5, 0.25) for task in TASKS]
    page = Page(report_page(eight(confusions={"inspect": found})))
    said = said_in(page.article(1), 2)
    assert f"nearest to {TASKS[3].name}" in flat(said.text)
    assert ("a", {"href": "#task-4"}) in said.tags
    assert "nearest" not in page.article(4).text, "that is its own"


def test_categories_correlations_and_curves_have_their_tables() -> None:
    names = [task.name for task in TASKS]
    data = eight(
        categories={name: "light" if number < 3 else "dark" for number, name in enumerate(names)},
        accuracy={name: number / 8 for number, name in enumerate(names)},
        faithfulness={("inspect", name): Faithfulness(number / 8) for number, name in enumerate(names)},
    )
    page = Page(report_page(data))
    rows = [row for table in cells_of(page.html) for row in table]
    assert ["dark", "5", "1.00"] in [row[:3] for row in rows] and ["light", "3", "1.00"] in [row[:3] for row in rows]
    assert ["translator", "not defined: quality is the same in all 8 tasks", "8"] in rows
    curve = data.curves["inspect"]
    assert ["inspect", f"{curve.area:.2f}", f"{curve.no_abstention:.2f}"] in rows
    assert [option for option in page.texts["option"] if option in ("dark", "light")] == ["dark", "light"]
    assert list(data.curves) == ["inspect"] and set(data.correlations) == {"translator", "inspect", "silent"}


def test_a_mixed_evaluation_is_ranked_by_what_all_tasks_have() -> None:
    tasks = [*TASKS[:2], generation("free", "Say it.")]
    evaluation = evaluated(tasks, a=["x"] * 3, b=["say it"] * 3)
    data = reported(tasks, evaluation)
    assert (data.ranked_by, data.best.name) == ("cosine", "b")
    assert data.category_names == {"classification": 2, "generation": 1}
    assert reported(tasks, evaluation, ranked_by="rouge_l").ranked_by == "rouge_l"
    assert reported(TASKS[:2], evaluated(TASKS[:2], a=["x", "y"])).ranked_by == "label_f1"
    with pytest.raises(ConfigError, match="found ranked_by='label_f1', expected a metric that every task has"):
        reported(tasks, evaluation, ranked_by="label_f1")


def test_the_least_there_can_be() -> None:
    """One task, one method, nothing known beside."""
    task = generation("free", "Say it.")
    data = reported([task], evaluated([task], only=["Say what?"]))
    page = Page(report_page(data))
    assert page.texts["strong"][0].startswith("only reaches Cosine 0.50 (0.50 to 0.50); there is no other method")
    assert "Only 1 task:" in page.text and "1 method on the same soft prompts of 1 task" in page.text
    assert (page.count("article"), page.count("figure"), page.count("table")) == (1, 1, 2)
    assert "Differences" not in page.text and "Categories" not in page.text and "chance:" not in page.text
    assert len(page.texts["strong"]) == 1, "nothing wins without a rival"


def test_tasks_that_do_not_fit_are_refused() -> None:
    evaluation = evaluated(TASKS, a=["x"] * 8)
    with pytest.raises(DataError, match=r"found no task \['joy-.*expected one soft prompt for each task"):
        reported(TASKS[1:], evaluation)
    twice = evaluated([TASKS[0]] * 2, a=["x", "y"])
    with pytest.raises(DataError, match="more than once"):
        reported(TASKS, twice)


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"faithfulness": {("b", TASKS[0].name): None}}, "found faithfulness of .*which is no text"),
        ({"abstained": {("a", "other"): "why"}}, "found abstained of .*which is no text"),
        ({"prefills": {("a", "other"): "Say"}}, "found prefills of .*which is no text"),
        ({"accuracy": {"other": 1.0}}, "found accuracy of 'other', which is no task"),
        ({"confusions": {"b": []}}, "found confusions of 'b', which is no method"),
        ({"categories": {"other": "x"}}, "found no category for"),
    ],
)
def test_what_is_said_of_something_else_is_refused(known: Mapping[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        reported(TASKS, evaluated(TASKS, a=["x"] * 8), **known)


# As JSON --------------------------------------------------------------------------------------------------------------


def test_json_holds_everything_under_names() -> None:
    key = ("translator", TASKS[0].name)
    accuracy = {task.name: number / 8 for number, task in enumerate(TASKS)}
    data = eight(
        faithfulness={key: Faithfulness(0.5, 0.25, 0.75)},
        abstained={key: "why"},
        accuracy=accuracy,
        settings={"seed": 1, "path": Path("x"), "prefill": None},
    )
    record = json.loads(json.dumps(report_json(data), allow_nan=False))
    assert record["format_version"] == 1
    assert set(record) == {"format_version"} | {field.name for field in dataclasses.fields(ReportData)}
    text = record["tasks"][0]["texts"]["translator"]
    assert text["faithfulness"] == {"value": 0.5, "low": 0.25, "high": 0.75}
    assert (text["abstained"], text["reason"], text["text"]) == (True, "why", TASKS[0].ground_truth)
    assert record["comparisons"][0]["metrics"]["label_f1"]["wins"] == 8
    assert record["curves"]["translator"]["points"][0] == {"coverage": 0.125, "quality": 1.0, "threshold": 0.5}
    assert record["correlations"]["silent"]["reason"] == "quality is the same in all 8 tasks"
    assert record["settings"] == {"seed": 1, "path": "x", "prefill": None}
    assert record["methods"][0]["intervals"]["cosine"] == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})


# As a page ------------------------------------------------------------------------------------------------------------


def hostile_data() -> ReportData:
    """The same hostile text in every place that takes one."""
    task = classification(f"moods {HOSTILE}", f"joy {HOSTILE}", "fear")
    other = generation("free", f"Say {HOSTILE}")
    methods = {
        f"a {HOSTILE}": [f"{HOSTILE} fear joy {HOSTILE}", f"{UNPRINTABLE} \n\t x"],
        f"_{HOSTILE}": [HOSTILE, "y"],
    }
    names = list(methods)
    evaluation = evaluated([task, other], abstained={(names[0], task.name): HOSTILE}, **methods)
    return reported(
        [task, other],
        evaluation,
        title=HOSTILE,
        when=HOSTILE,
        base_model=HOSTILE,
        settings={HOSTILE: HOSTILE},
        accuracy={task.name: 0.5, other.name: 0.25},
        categories={task.name: HOSTILE, other.name: "\u611f\u60c5 #000000"},
        faithfulness={(names[0], task.name): Faithfulness(0.5, 0.25, 0.75)},
        prefills={(names[1], task.name): "<script>"},
        confusions={names[0]: [Confusion(task.name, other.name, 1.0, 0.5), Confusion(other.name, HOSTILE, 1.0, 0.5)]},
    )


def test_hostile_texts_are_shown_as_they_are() -> None:
    page = Page(report_page(hostile_data()))
    assert page.texts["h1"] == page.texts["title"] == [HOSTILE]
    article = page.article(1)
    assert article.texts["h3"] == [f"moods {HOSTILE}"]
    assert said_in(article, 0).texts["p"] == [f"joy {HOSTILE}, fear"]
    assert f"{HOSTILE} fear joy {HOSTILE}" in said_in(article, 1).text
    assert said_in(article, 1).texts["mark"] == ["fear", f"joy {HOSTILE}"]
    assert f"Abstained: {HOSTILE}" in said_in(article, 1).text
    assert "\N{REPLACEMENT CHARACTER}" in said_in(page.article(2), 1).text
    assert "\u611f\u60c5 #000000 (1)" in page.text, "in the figure too, and not taken for a colour"


def full_data() -> ReportData:
    """Eight tasks with all that gives a figure."""
    names = [task.name for task in TASKS]
    return eight(
        categories={name: "ab"[number % 2] for number, name in enumerate(names)},
        accuracy={name: number / 8 for number, name in enumerate(names)},
        faithfulness={("inspect", name): Faithfulness(number / 8) for number, name in enumerate(names)},
    )


def test_all_tasks_are_there_without_javascript_and_controls_are_hidden() -> None:
    page = Page(report_page(full_data()))
    assert page.count("label") == page.count("select") + page.count("input") == 4
    assert next(found for tag, found in page.tags if found.get("id") == "controls")["hidden"] is None
    assert page.count("article") == 8


def test_figures_are_there_and_drawn_from_the_data() -> None:
    drawn = {figure.name: figure for figure in report_figures(full_data())}
    assert list(drawn) == ["methods", "coverage", "accuracy", "categories"]
    assert (
        "Percentile rank: translator 1.00, inspect " in drawn["methods"].alt and "chance 0.50." in drawn["methods"].alt
    )
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


def large_data() -> ReportData:
    """Five methods and a hundred tasks, with texts as long as real ones, and all that can be known."""
    generator = np.random.default_rng(0)
    words = [f"word{number}" for number in range(500)]

    def some(count: int) -> str:
        return " ".join(generator.choice(words, count))

    tasks = [
        classification(f"task{number:03d}", *map(str, generator.choice(words, 5, replace=False)))
        if number % 2
        else generation(f"task{number:03d}", some(120))
        for number in range(100)
    ]
    methods = {f"method {number}": [some(40) for _ in tasks] for number in range(5)}
    keys = [(method, task.name) for method in methods for task in tasks]
    values = dict(zip(keys, generator.random(len(keys)).tolist(), strict=True))
    return reported(
        tasks,
        evaluated(
            tasks, abstained={key: "below the threshold" for key, value in values.items() if value < 0.2}, **methods
        ),
        accuracy={task.name: value for task, value in zip(tasks, generator.random(100).tolist(), strict=True)},
        faithfulness={key: Faithfulness(value, value / 2, value * 1.1) for key, value in values.items()},
    )


def test_a_page_of_five_methods_and_a_hundred_tasks_is_small() -> None:
    page = report_page(large_data())
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
