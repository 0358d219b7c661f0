"""What an LLM is asked to write a classification DoD, and how much of it there is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from softprompt_registry.config import flatten
from softprompt_registry.dod.answer_checks import label_set_schema, sentences_schema
from softprompt_registry.dod.prompt_files import read_prompt, read_styles
from softprompt_registry.dod.task import seed_of
from softprompt_registry.errors import ConfigError
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.language_models.protocol import CompletionRequest

if TYPE_CHECKING:
    from softprompt_registry.dod.classification import ClassificationConfig


class ClassificationRequests:
    """The requests of one build; each follows from the settings and its place alone."""

    def __init__(self, seed_words: Sequence[str], config: ClassificationConfig) -> None:
        if len(seed_words) < config.seed_words:
            raise ConfigError(
                f"building a classification DoD: there are {len(seed_words)} seed words; expected at least "
                f"{config.seed_words}. Give a longer list."
            )
        self._words, self._config = seed_words, config
        name = "label_set" if config.related_labels else "unrelated_label_set"
        self._label_prompt = read_prompt(name, config.prompts_folder, ("count", "words"))
        self._sentence_prompt = read_prompt("sentences", config.prompts_folder, ("count", "label"))
        self._styles = read_styles("styles", config.prompts_folder)
        self.prompts_digest = digest_of_json(
            [astuple(self._label_prompt), astuple(self._sentence_prompt), self._styles]
        )
        """Tells which prompts wrote a DoD."""
        self.seed_words_digest = digest_of_json(list(seed_words))

    def label_set(self, number: int, attempt: int) -> CompletionRequest:
        config = self._config
        seed = seed_of("label set", config.seed, f"{number}/{attempt}")
        words = random.Random(seed).sample(self._words, config.seed_words)
        values = {"count": config.labels_per_task, "words": ", ".join(words)}
        return CompletionRequest(
            self._label_prompt.fill(values),
            system=self._label_prompt.system,
            max_tokens=20 + 12 * config.labels_per_task,
            temperature=config.label_temperature,
            seed=seed % 2**31,
            json_schema=label_set_schema(config.labels_per_task),
        )

    def sentences(self, name: str, labels: tuple[str, ...], label: str, call: int) -> CompletionRequest:
        config = self._config
        seed = seed_of("sentences", config.seed, f"{name}/{label}/{call}")
        values = {
            "count": config.sentences_per_call,
            "label": label,
            "other_labels": ", ".join(other for other in labels if other != label),
            # All labels of a task go through the same styles: a style must not tell the label.
            "style": self._styles[(seed_of("style", config.seed, name) + call) % len(self._styles)],
        }
        return CompletionRequest(
            self._sentence_prompt.fill(values),
            system=self._sentence_prompt.system,
            max_tokens=20 + config.max_tokens_per_sentence * config.sentences_per_call,
            temperature=config.sentence_temperature,
            presence_penalty=config.presence_penalty,
            seed=seed % 2**31,
            json_schema=sentences_schema(config.sentences_per_call),
        )


@dataclass(frozen=True)
class Estimate:
    """What a build asks for if no answer is refused."""

    label_requests: int
    sentence_requests: int
    prompt_tokens: int
    """About: a token is taken as four characters."""
    completion_tokens: int
    """About: a sentence is taken as 22 tokens with its quotes."""
    max_completion_tokens: int
    """No answer can be longer."""


def estimate(config: ClassificationConfig) -> Estimate:
    """How many requests and tokens a build takes."""
    requests_of = ClassificationRequests([f"word{number}" for number in range(config.seed_words)], config)
    labels = tuple(f"label{number}" for number in range(config.labels_per_task))
    label_request, sentence_request = requests_of.label_set(0, 0), requests_of.sentences("task", labels, labels[0], 0)
    calls = -(-config.sentences_per_label // config.sentences_per_call)
    sentence_requests = config.num_tasks * config.labels_per_task * calls
    requests = ((label_request, config.num_tasks), (sentence_request, sentence_requests))
    return Estimate(
        label_requests=config.num_tasks,
        sentence_requests=sentence_requests,
        prompt_tokens=sum((len(r.prompt) + len(r.system or "")) // 4 * count for r, count in requests),
        completion_tokens=config.num_tasks * 4 * config.labels_per_task
        + sentence_requests * (8 + 22 * config.sentences_per_call),
        max_completion_tokens=sum(r.max_tokens * count for r, count in requests),
    )


def recorded_settings(config: Any) -> dict[str, Any]:
    """The settings of a build that its DoD keeps: without folders and addresses of the machine it was made on."""
    return {
        key: value
        for key, value in flatten(config).items()
        if key != "prompts_folder" and not key.startswith("generator.")
    }
