"""What writes candidates: beams and prefills of the translator, behaviour, instruction induction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from small_prompts import tiny_translator, translated
from tiny_llm import HIDDEN_SIZE, tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import BaseModelMismatch, ConfigError, DataError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.translators.translator import Translator, TranslatorRecord, add_adapter
from softprompt_registry.verbalization.proposers.behaviour import (
    MAX_ANSWER_TOKENS,
    MAX_INPUT_TOKENS,
    BehaviourProposer,
    instruction_to_answer,
    training_inputs,
)
from softprompt_registry.verbalization.proposers.instruction_induction import (
    InductionConfig,
    InstructionInductionProposer,
    first_line,
)
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer, beam_search
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig, rank


@cache
def tiny() -> BaseModel:
    return tiny_base_model()


def soft_prompt(task: str, embeddings: torch.Tensor, base: BaseModel | None = None) -> SoftPrompt:
    record = SoftPromptRecord(task, "classification", (base or tiny()).ref, "Sentence: {x} Label:")
    return SoftPrompt(embeddings, None, record)


def random_prompt(task: str, seed: int, num_virtual_tokens: int = 4) -> SoftPrompt:
    generator = torch.Generator().manual_seed(seed)
    return soft_prompt(task, torch.randn(num_virtual_tokens, HIDDEN_SIZE, generator=generator))


# Beams and prefills of the translator ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def translator() -> Translator:
    return tiny_translator()


def mean_by_hand(
    translator: Translator, prompt: SoftPrompt, head: Sequence[int], row: Sequence[int], cap: int | None = None
) -> float:
    """Log-likelihood per token of the row after [soft tokens][head], and of EOS unless the cap ended the row."""
    target = row if len(row) == cap else [*row, 1]
    with translator.reading(), torch.no_grad():
        scores = translator.base_model.score_targets(prompt.embeddings[None], [head], [target])
    return float(scores.log_likelihood[0]) / len(target)


def test_beams_hold_the_greedy_text_or_a_likelier_one(translator: Translator) -> None:
    base, cap = translator.base_model, 5
    better = 0
    for seed in range(6):
        prompt = random_prompt(str(seed), seed)
        with translator.reading():
            (greedy,) = base.generate(prompt.embeddings[None], [[0]], max_new_tokens=cap)
            (beams,) = beam_search(base, prompt.embeddings[None], [0], num_beams=4, max_new_tokens=cap)
        assert len({tuple(row) for row in beams}) == 4
        best = max(mean_by_hand(translator, prompt, [0], row, cap) for row in beams)
        plain = mean_by_hand(translator, prompt, [0], greedy, cap)
        assert best >= plain - 1e-4
        better += best > plain + 1e-3
    assert better, "a search that only ever finds the greedy text is none"


def test_beams_end_at_any_end_token_of_the_model() -> None:
    base = tiny_base_model()
    soft = random_prompt("a", seed=1).embeddings[None]
    (free,) = beam_search(base, soft, [0], num_beams=4, max_new_tokens=1)
    likeliest = free[0][0]
    base.model.generation_config.eos_token_id = [1, likeliest]
    (ended,) = beam_search(base, soft, [0], num_beams=4, max_new_tokens=1)
    assert ended == [[], *free[1:]], "the likeliest text is now the one that ends at once"


def test_beams_follow_the_other_candidates_best_first(translator: Translator) -> None:
    base, prompt = translator.base_model, random_prompt("a", 2)
    config = VerbalizationConfig(num_candidates=2, max_new_tokens=6)
    (found,) = TranslatorProposer(translator, num_beams=3).propose([prompt], config)
    assert found[:2] == TranslatorProposer(translator).propose([prompt], config)[0]
    beams = found[2:]
    assert 1 <= len(beams) <= 3 and {beam.proposer for beam in beams} == {"translator:beam"}
    assert beams == rank(beams)
    # Scored like any other text of the translator: with its end, whether or not the cap was reached.
    with translator.reading():
        (rows,) = beam_search(base, prompt.embeddings[None], [0], num_beams=3, max_new_tokens=6)
    assert {beam.text for beam in beams} == {base.decode(row).strip() for row in rows}
    scores = [mean_by_hand(translator, prompt, [0], row) for row in rows]
    assert all(any(beam.score == pytest.approx(score, rel=1e-4) for score in scores) for beam in beams)


def test_a_wide_search_finds_the_likeliest_texts_of_all(translator: Translator) -> None:
    """Of one token: all 258 texts can be scored, the empty one (EOS at once) among them."""
    base, prompt = translator.base_model, random_prompt("a", 1)
    with translator.reading(), torch.no_grad():
        soft = prompt.embeddings[None]
        (found,) = beam_search(base, soft, [0], num_beams=5, max_new_tokens=1)
        texts = [[], *([token] for token in range(base.ref.vocab_size) if token != 1)]
        first = torch.log_softmax(base.logits_at(base.join(soft, [[0]], pad_side="right"), *_at(4)), dim=1)[0]
    # At the cap a text ends without EOS having been written: transformers compares by the tokens that were.
    likeliest = sorted(texts, key=lambda ids: -float(first[ids[0] if ids else 1]))[:5]
    assert sorted(found) == sorted(likeliest)


def _at(column: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0]), torch.tensor([column])


def test_beams_do_not_depend_on_the_batch(translator: Translator) -> None:
    prompts = [random_prompt(str(seed), seed, size) for seed, size in enumerate([4, 2, 4, 4, 2])]
    config = VerbalizationConfig(max_new_tokens=6, prefill="One of: ")
    together = TranslatorProposer(translator, rows_per_batch=16, num_beams=3).propose(prompts, config)
    for prompt, expected in zip(prompts, together, strict=True):
        (alone,) = TranslatorProposer(translator, rows_per_batch=1, num_beams=3).propose([prompt], config)
        assert [candidate.text for candidate in alone] == [candidate.text for candidate in expected]
        assert all(candidate.text.startswith("One of:") for candidate in alone)
        assert [candidate.score for candidate in alone] == pytest.approx([c.score for c in expected], rel=1e-4)


def test_each_prefill_makes_its_own_candidates_and_is_kept(translator: Translator) -> None:
    prompts = [random_prompt("a", 0), random_prompt("b", 1)]
    config = VerbalizationConfig(num_candidates=2, max_new_tokens=5, seed=3)
    prefills = ["Classify: ", "Rate the input as "]
    found = TranslatorProposer(translator, prefills=prefills).propose(prompts, config)
    plain = TranslatorProposer(translator).propose(prompts, config)
    for candidates, without in zip(found, plain, strict=True):
        assert candidates[:2] == without, "texts without a prefill are there as ever"
        assert [candidate.proposer for candidate in candidates[2:]] == ["translator:prefill"] * 4
        for number, candidate in enumerate(candidates[2:]):
            assert candidate.text.startswith(prefills[number // 2].strip())
    greedy = translated(translator, prompts, prefill="Classify: ", max_new_tokens=5)
    assert [each[2].text for each in found] == [translation.text for translation in greedy]


def test_a_prefill_of_its_own_is_scored_as_part_of_its_text(translator: Translator) -> None:
    base, prompt = translator.base_model, random_prompt("a", 0)
    proposer = TranslatorProposer(translator, prefills=["Classify: "])
    (found,) = proposer.propose([prompt], VerbalizationConfig(max_new_tokens=5))
    beginning = base.tokenize("Classify: ")
    with translator.reading():
        (row,) = base.generate(prompt.embeddings[None], [[0, *beginning]], max_new_tokens=5)
    assert found[1].score == pytest.approx(mean_by_hand(translator, prompt, [0], [*beginning, *row]), rel=1e-4)
    # The settings' prefill is common to all texts and costs none of them anything.
    (given,) = TranslatorProposer(translator).propose(
        [prompt], VerbalizationConfig(max_new_tokens=5, prefill="Classify: ")
    )
    assert given[0].text == found[1].text
    assert given[0].score == pytest.approx(mean_by_hand(translator, prompt, [0, *beginning], row), rel=1e-4)


def test_ways_of_writing_that_cannot_work_are_refused(translator: Translator) -> None:
    with pytest.raises(ConfigError, match="num_beams is 1; expected 2 or more"):
        TranslatorProposer(translator, num_beams=1)
    with pytest.raises(ConfigError, match=r"the prefills are \['a', ' '\]; expected none that is blank"):
        TranslatorProposer(translator, prefills=["a", " "])
    both = TranslatorProposer(translator, prefills=["a"])
    with pytest.raises(ConfigError, match="found the prefill 'b' in the settings.*expected one or the other"):
        both.propose([random_prompt("a", 0)], VerbalizationConfig(prefill="b"))
    other = tiny_base_model(seed=1, name="elsewhere")
    stranger = soft_prompt("a", torch.ones(4, HIDDEN_SIZE), other)
    with pytest.raises(BaseModelMismatch, match="translating: soft prompt 'a' belongs to base model elsewhere@"):
        TranslatorProposer(translator).propose([stranger], VerbalizationConfig())


# Label lists that repeat labels ---------------------------------------------------------------------------------------


def tuned_to_say(text: str, heads: Sequence[Sequence[int]] = ((0,),)) -> SoftPrompt:
    """A soft prompt tuned until the greedy text after each head is `text`."""
    base = tiny()
    targets = [[*base.tokenize(text), 1]] * len(heads)
    soft = torch.nn.Parameter(0.1 * torch.randn(8, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam([soft], lr=5e-2)
    for _ in range(400):
        scores = base.score_targets(soft.expand(len(heads), -1, -1), heads, targets)
        if float(scores.log_likelihood.detach().min()) > -0.1:
            break
        optimizer.zero_grad()
        (-scores.log_likelihood.sum()).backward()
        optimizer.step()
    return soft_prompt("tuned", soft.detach())


@pytest.fixture(scope="module")
def adds_nothing() -> Translator:
    """A new adapter changes nothing: what it writes is what the base model writes."""
    base = tiny_base_model()
    add_adapter(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "new")
    return Translator(base, TranslatorRecord(base.ref, 8), "new")


@pytest.fixture(scope="module")
def goes_round() -> SoftPrompt:
    return tuned_to_say("up, no, up")


def test_a_label_list_is_given_once_and_scored_as_it_was_written(
    adds_nothing: Translator, goes_round: SoftPrompt
) -> None:
    base, prompt = tiny(), goes_round
    written = base.tokenize("up, no, up")
    (row,) = base.generate(prompt.embeddings[None], [[0]], max_new_tokens=20)
    assert row == written, "the base model repeats a label"
    (found,) = TranslatorProposer(adds_nothing, num_beams=4).propose([prompt], VerbalizationConfig(max_new_tokens=20))
    assert found[0].text == "up, no"
    with torch.no_grad():
        scores = base.score_targets(prompt.embeddings[None], [[0]], [[*written, 1]])
    assert found[0].score == pytest.approx(float(scores.log_likelihood[0]) / (len(written) + 1), rel=1e-3)
    beams = found[1:]
    assert beams[0] == replace(found[0], proposer="translator:beam", score=beams[0].score)
    assert len({beam.text for beam in beams}) == len(beams) and "up, no, up" not in {c.text for c in found}
    assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)  # type: ignore[type-var]


def test_half_a_label_at_the_cap_goes_where_labels_repeat(adds_nothing: Translator) -> None:
    prompt = tuned_to_say("up, up, ok")
    for cap, expected in ((5, "up, u"), (6, "up"), (9, "up"), (20, "up, ok")):
        (found,) = TranslatorProposer(adds_nothing).propose([prompt], VerbalizationConfig(max_new_tokens=cap))
        assert found[0].text == expected, cap


def test_texts_for_generation_tasks_stay_as_they_were_written(adds_nothing: Translator, goes_round: SoftPrompt) -> None:
    free, imported = (
        replace(goes_round, record=replace(goes_round.record, kind=kind)) for kind in ("generation", "unknown")
    )
    found = TranslatorProposer(adds_nothing).propose([free, imported], VerbalizationConfig(max_new_tokens=20))
    assert [candidates[0].text for candidates in found] == ["up, no, up", "up, no"]


# Behaviour ------------------------------------------------------------------------------------------------------------


INPUTS = ["one day", "two cats", "three", "all four of them"]


@pytest.fixture(scope="module")
def always_x() -> SoftPrompt:
    return tuned_to_say(" x", [[0, *tiny().tokenize(f"Sentence: {text} Label:")] for text in INPUTS])


def behaviour(*prompts: SoftPrompt, inputs: Sequence[str] = INPUTS) -> list[list[Candidate]]:
    by_task = {prompt.record.task: inputs for prompt in prompts}
    return BehaviourProposer(tiny(), by_task).propose(prompts, VerbalizationConfig())


def test_behaviour_is_made_of_the_greedy_answers_in_the_template(always_x: SoftPrompt) -> None:
    assert behaviour(always_x) == [[Candidate("Always answer: x", "behaviour")]]
    base, prompt = tiny(), random_prompt("a", 0)
    answers = []
    for text in INPUTS:
        head = [0, *base.tokenize(f"Sentence: {text} Label:")]
        (row,) = base.generate(prompt.embeddings[None], [head], max_new_tokens=MAX_ANSWER_TOKENS)
        answers.append(base.decode(row).strip())
    assert behaviour(prompt) == [[Candidate(instruction_to_answer(answers), "behaviour")]] and len(set(answers)) > 1


def test_behaviour_of_many_prompts_is_that_of_each_alone(always_x: SoftPrompt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt_registry.verbalization.proposers.behaviour._PROMPTS_PER_PASS", 4)
    prompts = [random_prompt("a", 0, 3), always_x, *(random_prompt(str(seed), seed, 8) for seed in range(1, 10))]
    found = behaviour(*prompts)
    assert found[1] == [Candidate("Always answer: x", "behaviour")] and len(found) == 11
    for row in (0, 2, 6, 10):
        assert behaviour(prompts[row]) == [found[row]]
    assert len({str(each) for each in found}) > 5 and behaviour() == []


def test_no_label_is_looked_up() -> None:
    """Inputs are drawn alike whatever the outputs, and none of them is held out."""
    task = _task("t", ["joy", "fear"] * 10)
    other = replace(task, pairs=tuple(pair._replace(output="fear") for pair in task.pairs))
    inputs = training_inputs(task, 6)
    assert inputs == training_inputs(other, 6) and len(set(inputs)) == 6
    more = training_inputs(task, 50)
    assert sorted(more) == sorted({pair.input for pair in task.pairs if pair.split == "train"})
    assert training_inputs(task, 6, seed=1) != inputs
    assert training_inputs(replace(task, pairs=tuple(task.pairs_of("test")))) == []
    held_out_too = (*task.pairs, Pair(more[0], "joy", "test"))
    assert more[0] not in training_inputs(replace(task, pairs=held_out_too), 50)


def _task(name: str, outputs: Sequence[str]) -> Task:
    pairs = [
        Pair(f"{split} input {number}", output, split)  # type: ignore[arg-type]
        for split in ("train", "validation", "test")
        for number, output in enumerate(outputs)
    ]
    return Task(name, "classification", tuple(pairs), tuple(dict.fromkeys(outputs)))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["b", "a", "b"], "Answer with one of: b, a."),
        (["a", "b", "b", "a"], "Answer with one of: a, b."),
        (["Joy", "fear", "joy", " joy "], "Answer with one of: Joy, fear."),
        (["x", "x"], "Always answer: x"),
        (["x"], "Always answer: x"),
        (["a", "b"], "Answer like this: a; b"),
        (["a long answer of words", "b", "b"], "Answer like this: b; a long answer of words"),
        (["two\nlines", "two lines"], "Always answer: two lines"),
        (["", " ", "x"], "Always answer: x"),
        (["", "\n"], ""),
        ([], ""),
        (list("abcdefghijj"), "Answer like this: j; a; b; c; d; e; f; g"),
        (list("abcdefgha"), "Answer with one of: a, b, c, d, e, f, g, h."),
    ],
)
def test_answers_become_an_instruction(answers: list[str], expected: str) -> None:
    assert instruction_to_answer(answers) == expected


def test_behaviour_needs_inputs_a_template_and_its_base_model(always_x: SoftPrompt) -> None:
    with pytest.raises(DataError, match="soft prompt 'tuned' answers: there are no inputs for it"):
        behaviour(always_x, inputs=[])
    bare = replace(always_x, record=replace(always_x.record, template=""))
    with pytest.raises(DataError, match="the template of its record is ''; expected a text with {x}"):
        behaviour(bare)
    with pytest.raises(BaseModelMismatch, match="watching what a soft prompt answers: soft prompt 'tuned' belongs"):
        BehaviourProposer(tiny_base_model(seed=1), {}).propose([always_x], VerbalizationConfig())


def test_long_inputs_are_cut_to_the_limit(always_x: SoftPrompt) -> None:
    # "Sentence:" and " Label:" are 16 of the tokens with BOS, 2 are kept for a target.
    fits = MAX_INPUT_TOKENS - 20
    assert behaviour(always_x, inputs=["z" * 5000]) == behaviour(always_x, inputs=["z" * fits])


# Instruction induction ------------------------------------------------------------------------------------------------


SHORT_PROMPT = "Pairs:\n{pairs}\n\nWhich instruction?"
PLAIN = VerbalizationConfig(max_new_tokens=6)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "instruction_induction.txt").write_text(SHORT_PROMPT)
    return str(tmp_path)


def free_task(name: str, count: int = 3, length: int = 1) -> Task:
    pairs = [Pair(f"in{number} " * length, f"out{number}") for number in range(count)]
    return Task(name, "generation", (*pairs, Pair("held", "back", "test")))


@pytest.fixture
def proposer(folder: str) -> InstructionInductionProposer:
    return InstructionInductionProposer(tiny(), {"t": free_task("t")}, InductionConfig(prompts_folder=folder))


def test_the_base_model_sees_training_pairs_and_goes_on(proposer: InstructionInductionProposer) -> None:
    ids = proposer.prompt_of("t", PLAIN)
    assert ids[0] == 0 and tiny().decode(ids) == (
        "Pairs:\nInput: in0\nOutput: out0\n\nInput: in1\nOutput: out1\n\nInput: in2\nOutput: out2\n\n"
        "Which instruction?\n\nThe instruction was:"
    )


def test_the_chat_template_is_used_where_there_is_one(folder: str) -> None:
    base = tiny_base_model()
    base.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    Path(folder, "instruction_induction.txt").write_text("Be brief.\n---\n" + SHORT_PROMPT)
    tasks = {"t": free_task("t", count=1)}
    proposer = InstructionInductionProposer(base, tasks, InductionConfig(prompts_folder=folder))
    ids = proposer.prompt_of("t", replace(PLAIN, prefill="Write"))
    assert ids[0] == 0 and base.decode(ids) == (
        "[system] Be brief.\n[user] Pairs:\nInput: in0\nOutput: out0\n\nWhich instruction?\n"
        "[assistant] The instruction was: Write"
    )


def test_the_packages_own_prompt_shows_pairs_of_all_labels() -> None:
    task = _task("t", ["joy", "fear", "calm"] * 4)
    settings = InductionConfig(num_pairs=3, seed=2)
    proposer = InstructionInductionProposer(tiny(), {"t": task}, settings)
    text = tiny().decode(proposer.prompt_of("t", VerbalizationConfig(max_new_tokens=3)))
    assert all(f"Output: {label}" in text for label in ("joy", "fear", "calm")), "in turn from each label"
    assert "test input" not in text and "validation input" not in text
    assert text.endswith("The instruction was:") and "{pairs}" not in text


def test_it_never_sees_the_soft_prompt(proposer: InstructionInductionProposer) -> None:
    found = proposer.propose([random_prompt("t", 0), random_prompt("t", 1, 7)], PLAIN)
    assert found[0] == found[1]


def test_the_greedy_text_comes_first_then_sampled_ones_by_seed(folder: str) -> None:
    base = tiny()
    tasks = {name: free_task(name, count) for name, count in (("a", 2), ("b", 4))}
    proposer = InstructionInductionProposer(base, tasks, InductionConfig(prompts_folder=folder))
    config = VerbalizationConfig(num_candidates=3, max_new_tokens=8, temperature=2.0, seed=5)
    prompts = [random_prompt("b", 0), random_prompt("a", 1)]
    found = proposer.propose(prompts, config)
    for prompt, candidates in zip(prompts, found, strict=True):
        assert [candidate.proposer.partition(":")[2] for candidate in candidates] == ["greedy", "sampled", "sampled"]
        assert len({candidate.text for candidate in candidates}) == 3
        head = proposer.prompt_of(prompt.record.task, config)
        (row,) = base.generate(None, [head], max_new_tokens=8)
        kept = first_line(base, row)
        assert candidates[0].text == base.decode(row).strip().partition("\n")[0].strip()
        with torch.no_grad():
            score = base.score_targets(None, [head], [kept]).log_likelihood
        assert candidates[0].score == pytest.approx(float(score[0]) / len(kept), rel=1e-4)
    assert proposer.propose(prompts, config) == found
    other = proposer.propose(prompts, replace(config, seed=50))
    assert [each[0] for each in other] == [each[0] for each in found]
    assert [each[1:] for each in other] != [each[1:] for each in found]
    assert proposer.propose([], config) == []


def test_the_settings_prefill_begins_the_text(proposer: InstructionInductionProposer) -> None:
    config = replace(PLAIN, prefill="Write the")
    (found,) = proposer.propose([random_prompt("t", 0)], config)
    ids = proposer.prompt_of("t", config)
    assert tiny().decode(ids).endswith("was: Write the")
    (row,) = tiny().generate(None, [ids], max_new_tokens=6)
    assert found[0].text == f"Write the{tiny().decode(row)}".strip().partition("\n")[0].strip()


def test_pairs_that_do_not_fit_are_left_out(folder: str) -> None:
    task = Task("t", "generation", (Pair("short", "one"), Pair("x", "long " * 60), Pair("last", "two")))
    settings = InductionConfig(prompts_folder=folder, max_prompt_tokens=150)
    ids = InstructionInductionProposer(tiny(), {"t": task}, settings).prompt_of("t", PLAIN)
    text = tiny().decode(ids)
    assert "one" in text and "two" in text and "long" not in text and len(ids) <= 150
    with pytest.raises(ConfigError, match="not one of its 3 pairs fits into a prompt of 40 tokens, with 6 kept"):
        InstructionInductionProposer(tiny(), {"t": task}, replace(settings, max_prompt_tokens=40)).prompt_of("t", PLAIN)
    # The base model's context counts as well: 512 tokens, of which 400 are kept for the text.
    wide = InductionConfig(prompts_folder=folder, max_prompt_tokens=10_000)
    large = VerbalizationConfig(max_new_tokens=400)
    proposer = InstructionInductionProposer(tiny(), {"t": free_task("t", 8)}, wide)
    assert len(proposer.prompt_of("t", large)) <= 112 < len(proposer.prompt_of("t", PLAIN))


def test_long_inputs_are_cut_and_outputs_are_not(folder: str) -> None:
    task = Task("t", "generation", (Pair("héé" * 20, "o" * 30),))
    settings = InductionConfig(prompts_folder=folder, max_input_tokens=7)
    text = tiny().decode(InstructionInductionProposer(tiny(), {"t": task}, settings).prompt_of("t", PLAIN))
    # "héé" is five bytes; the seventh byte is half of an é.
    assert f"Input: hééh\nOutput: {'o' * 30}" in text


def test_a_model_without_a_chat_template_ends_with_its_first_line() -> None:
    base = tiny()
    ids = base.tokenize("\n say it\nInput: more")
    assert base.decode(first_line(base, ids)) == "\n say it\n"
    assert first_line(base, base.tokenize("one line")) == base.tokenize("one line")
    assert first_line(base, []) == []
    assert base.decode(first_line(base, base.tokenize("\nmore"), "Say")) == "\n"


def test_instruction_induction_needs_pairs_and_its_place_for_them(tmp_path: Path) -> None:
    proposer = InstructionInductionProposer(tiny(), {"t": replace(free_task("t"), pairs=(Pair("a", "b", "test"),))})
    with pytest.raises(DataError, match="the instruction of task 'u': it is not among the tasks handed in"):
        proposer.propose([random_prompt("u", 0)], PLAIN)
    with pytest.raises(DataError, match="the instruction of task 't': it has no training pairs"):
        proposer.propose([random_prompt("t", 0)], PLAIN)
    with pytest.raises(ConfigError, match="there is no instruction_induction.txt in"):
        InstructionInductionProposer(tiny(), {}, InductionConfig(prompts_folder=str(tmp_path)))
    (tmp_path / "instruction_induction.txt").write_text("Guess.")
    with pytest.raises(ConfigError, match="it has no {pairs} below its '---' line"):
        InstructionInductionProposer(tiny(), {}, InductionConfig(prompts_folder=str(tmp_path)))
    with pytest.raises(ConfigError, match="there is no folder"):
        InstructionInductionProposer(tiny(), {}, InductionConfig(prompts_folder=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="num_pairs is 0, expected above 0"):
        InductionConfig(num_pairs=0)
