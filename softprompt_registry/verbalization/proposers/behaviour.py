"""What a soft prompt makes the base model answer, put as an instruction: a baseline that reads no soft prompt from within."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.dod.task import Pair, Task, text_key
from softprompt_registry.errors import DataError
from softprompt_registry.soft_prompts.encoding import RowEncoder
from softprompt_registry.soft_prompts.performance import Trial, generate_answers
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.soft_prompts.token_budget import tokens_that_fit
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig

MAX_OUTPUTS = 8
"""Different answers that a text names."""
MAX_ANSWER_TOKENS = 16
MAX_INPUT_TOKENS = 256
"""Of the template with an input; longer inputs are cut."""
_WORDS_OF_A_SHORT_ANSWER = 4
_PROMPTS_PER_PASS = 32


class BehaviourProposer:
    """One candidate: the greedy answers of the soft-prompted base model to a few inputs.

    The answers are the model's own; the outputs that a task has for these inputs are not looked at. A soft prompt that
    answers nothing at all gets no candidate. The settings' prefill and length cap play no part.

    Raises:
        DataError: there are no inputs for a soft prompt, or its record has no template.
        BaseModelMismatch: a soft prompt of another base model.
    """

    name = "behaviour"

    def __init__(self, base_model: BaseModel, inputs: Mapping[str, Sequence[str]]) -> None:
        """
        Args:
            inputs: by name of the task (`training_inputs` takes them from one).
        """
        self.base_model = base_model
        self.inputs = inputs

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        trials = [self._trial(soft_prompt) for soft_prompt in soft_prompts]
        proposals: list[list[Candidate]] = [[] for _ in soft_prompts]
        for size in sorted({soft_prompt.num_virtual_tokens for soft_prompt in soft_prompts}):
            rows = [row for row, prompt in enumerate(soft_prompts) if prompt.num_virtual_tokens == size]
            tokens = tokens_that_fit(self.base_model, size)
            for start in range(0, len(rows), _PROMPTS_PER_PASS):
                piece = rows[start : start + _PROMPTS_PER_PASS]
                answers = generate_answers(
                    self.base_model,
                    [trials[row] for row in piece],
                    max_new_tokens=MAX_ANSWER_TOKENS,
                    tokens_per_forward=tokens,
                )
                for row, texts in zip(piece, answers, strict=True):
                    text = instruction_to_answer(texts)
                    proposals[row] = [Candidate(text, self.name)] if text else []
        return proposals

    def _trial(self, soft_prompt: SoftPrompt) -> Trial:
        record = soft_prompt.record
        require_same_base(
            "watching what a soft prompt answers",
            f"soft prompt {record.task!r}",
            record.base_model,
            "the loaded model",
            self.base_model.ref,
        )
        inputs = self.inputs.get(record.task)
        if not inputs:
            raise DataError(
                f"watching what soft prompt {record.task!r} answers: there are no inputs for it; expected at least one. "
                "Hand some in under the task's name."
            )
        if "{x}" not in record.template:
            raise DataError(
                f"watching what soft prompt {record.task!r} answers: the template of its record is {record.template!r}; "
                "expected a text with {x}, the place of the input. Use the saved soft prompt, whose record has it."
            )
        room = self.base_model.max_positions - soft_prompt.num_virtual_tokens - MAX_ANSWER_TOKENS
        encoder = RowEncoder.of(self.base_model, record)
        prompts = [encoder.prompt(record.template, text, min(MAX_INPUT_TOKENS, room))[0] for text in inputs]
        # Of kind `generation`, since answers to a classification task would be cut by the length of its labels.
        task = Task("probe inputs", "generation", tuple(Pair(text, "") for text in inputs))
        return Trial(task, soft_prompt.embeddings.to(self.base_model.device), prompts, ())


def training_inputs(task: Task, limit: int = 16, *, seed: int = 0) -> list[str]:
    """At most `limit` different inputs of the task's `train` pairs, in an order drawn by `seed`.

    Not of held-out pairs: a text quotes the answers to these inputs, and would be scored on outputs that it gives away.
    Drawn without a look at the outputs, so labels may be unevenly met. Empty if the task has no such pairs.
    """
    held_out = {text_key(pair.input) for pair in task.pairs if pair.split != "train"}
    inputs = [pair.input for pair in task.pairs_of("train") if text_key(pair.input) not in held_out]
    inputs = list(dict.fromkeys(inputs))
    random.Random(f"{seed}/{task.name}/inputs").shuffle(inputs)
    return inputs[:limit]


def instruction_to_answer(answers: Sequence[str]) -> str:
    """An instruction to give such answers; empty if none of them says anything.

    Different answers, the most frequent first and of equally frequent ones the first, at most `MAX_OUTPUTS`; those that
    differ only in case or white space are one, in its first spelling. Few short answers of which some came more than once
    are taken for a list of all that can be answered, others for examples.
    """
    spelling: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for answer in answers:
        line = " ".join(answer.split())
        if line:
            spelling.setdefault(text_key(line), line)
            counts[text_key(line)] += 1
    different = [spelling[key] for key, _ in counts.most_common()]
    if not different:
        return ""
    if len(different) == 1:
        return f"Always answer: {different[0]}"
    repeated = len(different) < counts.total()
    short = all(len(answer.split()) <= _WORDS_OF_A_SHORT_ANSWER for answer in different)
    if repeated and short and len(different) <= MAX_OUTPUTS:
        return f"Answer with one of: {', '.join(different)}."
    return f"Answer like this: {'; '.join(different[:MAX_OUTPUTS])}"
