"""When two answers count as the same text."""

from __future__ import annotations

import string

_PUNCTUATION_TO_NOTHING = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both texts are equal once lower-cased, without ASCII punctuation and with single spaces.

    Articles are kept: "the cat" is not "cat". Punctuation is removed, not replaced by a space: "e-mail" equals "email".
    If nothing is left of either text ("+" and "-", or an empty prediction and "?"), they are compared with their
    punctuation, for otherwise any two of them would be equal.
    """
    left, right = _plain(prediction), _plain(reference)
    if not left and not right:
        return prediction.split() == reference.split()
    return left == right


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION_TO_NOTHING).split())
