"""The page and the figures of portability: what they say, and how large the page is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from html_page import HOSTILE, UNPRINTABLE, Page, articles_of, browsed, flat, in_browser, rows_of
from matplotlib.patches import Rectangle

from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.language_models.protocol import Prices, Usage
from softprompt_registry.pages.svg import inline_svg
from softprompt_registry.portability.analysis import Portability
from softprompt_registry.portability.answers import Answer, Question
from softprompt_registry.portability.conditions import (
    CONDITIONS,
    FEW_SHOT_3,
    FEW_SHOT_5,
    FEW_SHOT_TRANSLATED,
    NO_PROMPT,
    SOFT_PROMPT,
    TRANSLATED,
    TRANSLATED_VERIFIED,
)
from softprompt_registry.portability.figures import portability_figures
from softprompt_registry.portability.page import portability_page, summary
from softprompt_registry.portability.scoring import score_answers
from softprompt_registry.portability.shown_tasks import MAX_INPUTS, shown_tasks

DRAWS = 200
PRICES = {"big": Prices(1.0, 2.0)}
EXAMPLES = (FEW_SHOT_3, FEW_SHOT_5, FEW_SHOT_TRANSLATED)


MOODS = Task(
    "moods",
    "classification",
    (Pair("I won", "joy", "test"), Pair("A ghost", "fear", "test"), Pair("A gift", "joy", "test")),
    ("joy", "fear"),
)
FREE = Task("free", "generation", (Pair("one", "the red house", "test"), Pair("two", "the blue sea", "test")))
TASKS = {task.name: task for task in (MOODS, FREE)}
SAID: dict[str, dict[str, list[str | None]]] = {
    NO_PROMPT: {"moods": ["green", "", None], "free": ["I cannot answer this", "no"]},
    TRANSLATED: {"moods": ["Joy.", "fear", "joy"], "free": ["the red car", "the blue sea"]},
    FEW_SHOT_3: {"moods": ["joy", "joy", "fear"], "free": ["the red house", "the blue sea"]},
}
HARD = {TRANSLATED: {"moods": "Say joy or fear.", "free": ""}}


def answers_of(
    said: Mapping[str, Mapping[str, Sequence[str | None]]], target: str = "big", tasks: Mapping[str, Task] = TASKS
) -> list[Answer]:
    found = []
    for task in tasks.values():
        for condition, by_task in said.items():
            for item, text in enumerate(by_task.get(task.name, ())):
                pair = task.pairs[item]
                hard = HARD.get(condition, {}).get(task.name)
                examples = "Input: an example\nOutput: its answer\n\n" if condition in EXAMPLES else ""
                prompt = f"{hard or ''}{examples}Input: {pair.input}\nOutput:"
                question = Question(task.name, condition, target, item, pair.input, pair.output, None, prompt, hard)
                if text is None:
                    found.append(Answer(question, None, error="server error 500"))
                else:
                    found.append(Answer(question, text, "length" if text == "green" else "stop", len(prompt), 3))
    return found


ANSWERS = [*answers_of(SAID), *answers_of({SOFT_PROMPT: {"moods": ["joy", "fear", "joy"]}}, "small $x$")]


def measured(
    answers: Sequence[Answer], tasks: Mapping[str, Task] = TASKS, prices: Mapping[str, Prices] = PRICES
) -> Portability:
    return Portability(tuple(score_answers(answers, tasks)), prices, draws=DRAWS)


RESULT = measured(ANSWERS)


USAGE = {"big": Usage(12, 1000, 30, 0.25)}


def page_of(answers: Sequence[Answer] = ANSWERS, result: Portability = RESULT) -> str:
    return portability_page(
        result, answers, title="Portable", when="2 May", settings={"seed": 1, "budget": None}, usage=USAGE
    )


@cache
def plain() -> str:
    """The page of the answers above, made once."""
    return page_of()


# What it says ---------------------------------------------------------------------------------------------------------


def test_the_first_screen_says_what_translation_is_worth() -> None:
    found = summary(RESULT, "big")
    mean = RESULT.metrics("big", TRANSLATED)["rouge_l"]
    assert found.headline.startswith(f"big: translated prompts reach task ROUGE-L {mean:.2f} (")
    words = [point for _, point in found.points]
    assert re.match(r"Ahead of no prompt by \+.*better in 2, equal in 0 and worse in 0 of 2 tasks", words[0])
    # 3 examples win on the free task, the translation on the moods: nothing is clear.
    assert words[1].startswith("No clear difference from 3 examples: ")
    assert words[2].startswith("No clear difference from soft prompt: 0.00")
    assert "1 of 18 answers are missing; they are in no mean." in words
    assert "2 of 18 answers are empty or refusals, which scores 0." in words
    assert "1 of 18 answers ran on to the length limit." in words
    assert words[-1].startswith("Only 2 tasks")


def test_the_better_translation_is_the_one_set_against_the_others() -> None:
    said = {**SAID, TRANSLATED_VERIFIED: SAID[FEW_SHOT_3], TRANSLATED: SAID[NO_PROMPT], FEW_SHOT_5: SAID[NO_PROMPT]}
    found = summary(measured(answers_of(said)), "big")
    assert found.headline.startswith("big: translated, verified prompts reach")
    assert any(point.startswith("Ahead of 5 examples by") for _, point in found.points)
    assert any(re.match(r"Takes \d+ % fewer tokens than 5 examples: \d+ for each answer\.", p) for _, p in found.points)
    none = summary(measured(answers_of({NO_PROMPT: SAID[NO_PROMPT]})), "big")
    assert none.headline == "big: no answer under a translated prompt."


def test_the_table_has_a_row_for_each_condition_with_what_its_numbers_rest_on() -> None:
    rows = rows_of(plain())
    assert rows[0][:3] == ["Prompt", "task ROUGE-L", "label accuracy"]
    without_prices = measured(ANSWERS, prices={})
    assert "cost" in rows[0] and "cost" not in rows_of(page_of(result=without_prices))[0]
    no_prompt = next(row for row in rows if row[0] == "no prompt")
    assert no_prompt[-4:] == ["4 of 5, 2 tasks", "1", "1", "1"]
    translated = next(row for row in rows if row[0] == "translated")
    lenient, strict = translated[2], translated[3]
    assert (lenient, strict) == ("1.00 1.00 to 1.00", "0.67")
    soft = next(row for row in rows if row[0] == "soft prompt on small $x$")
    assert soft[2].startswith("1.00") and "–" in soft
    page = flat(Page(plain()).text)
    assert "big · 12 requests, 1,000 prompt and 30 completion tokens · cost 0.25" in page
    assert "2 May · 2 tasks · 1 target LLM · 18 questions" in page
    assert "<dt>budget</dt><dd>off</dd>" in plain()


def test_wins_over_few_shot_are_listed_and_lead_to_their_tasks() -> None:
    html = plain()
    assert "1 of 2 tasks: translated ahead of 3 examples on big" in flat(Page(html).text)
    links = re.findall(r'<a href="#(.*?)">(.*?)</a>', html)
    assert links == [("task-1", "moods")] and 'id="task-1"' in html
    assert "translation beats examples on 1 of 1" in html


def test_every_pair_of_conditions_has_a_row_with_the_better_one_first() -> None:
    rows = rows_of(plain())
    pairs = [row for row in rows if " − " in row[0]]
    assert len(pairs) == 6 and all(not row[1].startswith("−") for row in pairs)
    assert "translated − no prompt" in [row[0] for row in pairs]
    assert next(row for row in pairs if row[0] == "translated − no prompt")[1].endswith("2 / 0 / 0")


def test_a_task_shows_prompts_examples_and_answers_side_by_side() -> None:
    moods, free = articles_of(plain())
    prompts = rows_of(moods)[:5]
    assert prompts[2] == ["translated", "Say joy or fear.", "1.00"]
    assert prompts[1] == ["no prompt", "–", "0.00"]
    assert rows_of(free)[2][1] == "(empty)"
    assert "Whole prompt of the first input: 3 examples" in moods
    assert "Input: an example\nOutput: its answer\n\nInput: I won\nOutput:" in Page(moods).text
    assert "Input 1 of 3" in moods and "Input 3 of 3" in moods
    cells = re.findall(r'<td class="(\w+)"[^>]*>(.*?)</td>', moods, flags=re.DOTALL)
    said = [(mark, flat(Page(text).text)) for mark, text in cells if mark != "score"]
    assert said == [
        ("wrong", "✗ green cut at the length limit"),
        ("right", "✓ Joy."),
        ("right", "✓ joy"),
        ("right", "✓ joy"),
        ("empty", "∅ empty"),
        ("right", "✓ fear"),
        ("wrong", "✗ joy"),
        ("right", "✓ fear"),
        ("missing", "? missing: server error 500"),
        ("right", "✓ joy"),
        ("wrong", "✗ fear"),
        ("right", "✓ joy"),
    ]
    cells = re.findall(r'<td class="(\w+)"[^>]*>(.*?)</td>', free, flags=re.DOTALL)
    said = [(mark, flat(Page(text).text)) for mark, text in cells if mark != "score"]
    assert said[:3] == [
        ("refused", "⊘ refused: I cannot answer this"),
        # "the red": 2 of 3 words on both sides.
        ("partly", "≈ the red car ROUGE-L 0.67"),
        ("right", "✓ the red house"),
    ]


def test_what_one_target_was_not_asked_is_said() -> None:
    answers = [*ANSWERS, *answers_of({TRANSLATED: SAID[TRANSLATED]}, "other")]
    html = page_of(answers, measured(answers))
    assert "not asked" in articles_of(html)[0]
    assert "not asked" not in articles_of(plain())[0]


# Size -----------------------------------------------------------------------------------------------------------------


def test_shown_inputs_are_the_first_ones_and_long_texts_are_cut() -> None:
    many = Task("many", "generation", tuple(Pair(f"input {n} " + "x" * 5000, "y" * 5000, "test") for n in range(8)))
    answers = answers_of({TRANSLATED: {"many": ["z" * 5000] * 8}}, tasks={"many": many})
    (task,) = shown_tasks(measured(answers[::-1], {"many": many}), answers[::-1])
    assert [item.input[:8] for item in task.inputs] == [f"input {n} " for n in range(MAX_INPUTS)]
    assert task.num_inputs == 8
    assert task.inputs[0].expected == "y" * 600 + "… (4,400 more letters)"
    assert task.inputs[0].rows[TRANSLATED]["big"].text == "z" * 300 + "… (4,700 more letters)"
    html = portability_page(measured(answers, {"many": many}), answers, title="x")
    assert "Of each task the first 5 test inputs" in flat(Page(html).text)


def test_a_page_of_a_hundred_tasks_twelve_conditions_and_three_targets_is_small() -> None:
    text = " ".join(f"{number:03x}" for number in range(120))  # too short to be stemmed, which takes the most time
    pairs = tuple(Pair(f"{item} {text}", text[:40], "test") for item in range(3))
    tasks = {f"task{n:03d}": Task(f"task{n:03d}", "generation", pairs) for n in range(100)}
    places = [(target, name) for target in ("one", "two", "three") for name in CONDITIONS if name != SOFT_PROMPT]
    answers = []
    for task in tasks:
        for target, condition in (*places, ("small", SOFT_PROMPT)):
            for item, pair in enumerate(pairs):
                prompt = f"{text[:320]} {'example ' * 200} {pair.input}"
                question = Question(task, condition, target, item, pair.input, pair.output, None, prompt, text[:320])
                answers.append(Answer(question, text[: 100 - item], "stop", 100, 12))
    page = portability_page(measured(answers, tasks), answers, title="Large")
    assert len(articles_of(page)) == 100
    assert "Of each task the first 2 test inputs" in page
    assert len(page.encode()) < 5_000_000


# That it believes nothing ---------------------------------------------------------------------------------------------


def hostile_page() -> str:
    """The same hostile text in every place that takes one."""
    task = Task(
        f"t {HOSTILE}", "classification", (Pair(HOSTILE, HOSTILE, "test"), Pair("x", "y", "test")), (HOSTILE, "y")
    )
    tasks = {task.name: task}
    answers = []
    for target in (f"big {HOSTILE}", f"other {HOSTILE}"):
        for condition in (TRANSLATED, FEW_SHOT_3, FEW_SHOT_5):
            prompt = HOSTILE + condition
            question = Question(task.name, condition, target, 0, HOSTILE, HOSTILE, HOSTILE, prompt, HOSTILE)
            text = UNPRINTABLE if condition == TRANSLATED else HOSTILE
            answers.append(Answer(question, text, "stop", 5, 5))
            second = Question(task.name, condition, target, 1, "x", "y", HOSTILE, prompt, HOSTILE)
            answers.append(Answer(second, None, error=HOSTILE))
    soft = Question(task.name, SOFT_PROMPT, f"small {HOSTILE}", 0, HOSTILE, HOSTILE, None, HOSTILE, None)
    answers.append(Answer(soft, HOSTILE, "stop", 5, 5))
    return portability_page(measured(answers, tasks), answers, title=HOSTILE, when=HOSTILE, settings={HOSTILE: HOSTILE})


# Pictures -------------------------------------------------------------------------------------------------------------


def test_pictures_are_drawn_from_the_numbers() -> None:
    drawn = {figure.name: figure for figure in portability_figures(RESULT)}
    assert list(drawn) == ["scores_0", "costs_0", "differences_0"]
    scores = drawn["scores_0"]
    # A panel per measure, a bar per condition.
    panels = scores.figure.axes
    assert [panel.get_xlabel() for panel in panels] == ["task ROUGE-L", "label accuracy", "task ROUGE-L, generation"]
    shown = [bar.get_width() for bar in panels[0].patches if isinstance(bar, Rectangle)]
    conditions = [NO_PROMPT, TRANSLATED, FEW_SHOT_3, SOFT_PROMPT]
    assert shown == pytest.approx([RESULT.metrics("big", name)["rouge_l"] for name in conditions])
    assert "label accuracy: no prompt 0.00, translated 1.00, 3 examples 0.33, soft prompt 1.00." in scores.alt
    assert "The soft prompt works on small $x$." in scores.caption
    # The soft prompt's tokens are another model's.
    points = {
        line.get_label(): np.asarray(line.get_xydata()).tolist() for line in drawn["costs_0"].figure.axes[0].lines
    }
    assert points.keys() == {"no prompt", "translated", "3 examples"}
    tokens, score = RESULT.tokens_per_answer("big", TRANSLATED), RESULT.metrics("big", TRANSLATED)["rouge_l"]
    assert points["translated"] == [[tokens, score]]
    cells = [text.get_text() for text in drawn["differences_0"].figure.axes[0].texts]
    assert len(cells) == 4 * 3
    found = RESULT.comparison("big", NO_PROMPT, TRANSLATED)
    assert found is not None and cells[0] == f"\N{MINUS SIGN}{-found.difference:.2f}"
    assert f"translated is ahead of no prompt by {-found.difference:.2f}." in drawn["differences_0"].alt


def test_pictures_of_a_target_that_counts_no_tokens_leave_costs_out() -> None:
    question = Question("moods", TRANSLATED, "big", 0, "I won", "joy", None, "I won", None)
    result = measured([Answer(question, "joy")])
    assert [figure.name for figure in portability_figures(result)] == ["scores_0"]


def test_a_name_with_dollars_is_no_formula() -> None:
    result = measured(answers_of(SAID, "big $\\frac{1$"))
    for drawn in portability_figures(result):
        assert "<svg" in inline_svg(drawn)


# In a browser ---------------------------------------------------------------------------------------------------------


@in_browser
def test_a_link_to_a_task_opens_it(tmp_path: Path) -> None:
    def opened(html: str) -> list[str]:
        return re.findall(r'<details open="">\s*<summary>(moods|free)', html)

    assert opened(plain()) == []
    assert opened(browsed(tmp_path, plain(), "#task-1")[0]) == ["moods"]
