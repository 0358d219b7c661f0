"""A stand-in for an LLM that writes label sets and sentences: it reads our prompts and answers the same request alike.

Set as `reply_to_body` of an `LlmServer`, it lets whole builds run through the real client.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_server import LlmServer, Reply, chat

from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig

SEED_WORDS = tuple("river stone garden market winter letter bridge mountain teacher morning harbour forest".split())
LABELS = tuple(
    "lion tiger bear wolf horse sheep goat donkey camel violin piano trumpet flute drum harp guitar hammer chisel pliers "
    "wrench apple banana cherry grape lemon mango peach plum bread cheese butter yogurt soup salad".split()
)
"""Words of the lexicon, no two of one root, and none in a sentence below."""
_PARTS = tuple(
    line.split("|")
    for line in """\
Every morning|Late at night|After the long storm|Before dinner|During the holidays|On a quiet Sunday|Last year
my older brother|the tired nurse|a young student|our new neighbour|the village doctor|her best friend
often|sometimes|rarely|happily|calmly|secretly|proudly|usually
walks slowly|waits patiently|sings loudly|writes letters|tells stories|laughs with strangers|reads books
for an hour|with a smile|in a hurry|for no reason|in the dark|with old friends|for the first time
beside the window|under the bridge|near the station|behind the school|in the garden|at the corner
until the rain stops|because nobody is home|while the children sleep|without saying a word""".splitlines()
)
NUM_SENTENCES = 7 * 6 * 8 * 7 * 7 * 6 * 4  # so many that two requests hardly ever get the same


@dataclass(frozen=True)
class Asked:
    """What a request of ours wants."""

    count: int
    label: str | None
    """Whose sentences; None for a label set."""
    call: int
    """How many requests for the same label, or for label sets, came before it."""


Answer = Reply | str | Sequence[str]
"""A whole reply, the text of one, or the strings that one lists."""


class WritingLlm:
    """Writes what it is asked for; `edit` may put something else in the place of each answer."""

    def __init__(self, edit: Callable[[Asked, list[str]], Answer] | None = None, *, delay_s: float = 0.0) -> None:
        self.edit = edit or (lambda asked, answer: answer)
        self.delay_s = delay_s
        self.requests: Counter[str] = Counter()
        """Request → times that it came."""
        self.answered: Counter[str] = Counter()
        """Request → times that it got a whole reply with status 200."""
        self._calls: Counter[str | None] = Counter()

    def __call__(self, body: dict[str, Any]) -> Reply:
        key = json.dumps(body, sort_keys=True)
        self.requests[key] += 1
        prompt = body["messages"][-1]["content"]
        label_set = re.search(r'"labels": \[(\d+) words\]', prompt)
        if label_set:
            asked = Asked(int(label_set[1]), None, self._calls[None])
        else:
            [count] = re.findall(r'"sentences": \[(\d+) sentences\]', prompt)
            [label] = re.findall(r'category "(\w+)"', prompt)
            asked = Asked(int(count), label, self._calls[label])
        self._calls[asked.label] += 1
        answer = self.edit(asked, good_answer(asked, key))
        if isinstance(answer, Reply):
            reply = answer
        elif isinstance(answer, str):
            reply = Reply(body=chat(answer))
        else:
            text = json.dumps({"sentences" if asked.label else "labels": list(answer)})
            reply = Reply(body=chat(text), delay_s=self.delay_s)
        self.answered[key] += reply.status == 200 and not reply.cut
        return reply


def good_answer(asked: Asked, key: str) -> list[str]:
    """What a request gets, from its content alone."""
    draw = random.Random(key)
    if asked.label is None:
        return draw.sample(LABELS, asked.count)
    return [sentence(number) for number in draw.sample(range(NUM_SENTENCES), asked.count)]


def sentence(number: int) -> str:
    """One of `NUM_SENTENCES` different English sentences without a label word."""
    words = []
    for part in _PARTS:
        number, place = divmod(number, len(part))
        words.append(part[place])
    return " ".join(words) + "."


def client_of(server: LlmServer, **settings: Any) -> OpenAICompatible:
    """The real client, with short waits."""
    defaults: dict[str, Any] = {"model": "writer", "base_url": server.url, "timeout_s": 20.0}
    waits = {"initial_backoff_s": 0.01, "max_backoff_s": 0.02}
    return OpenAICompatible(OpenAICompatibleConfig(**(defaults | waits | settings)), jitter=random.Random(0))
