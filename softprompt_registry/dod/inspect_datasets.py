"""The five classification sets that InSPEcT and the paper evaluate on, and two sets from outside their domain."""

from __future__ import annotations

EVALUATION_LABELS: dict[str, tuple[str, ...]] = {
    "sst2": ("positive", "negative"),
    "sst5": ("terrible", "bad", "neutral", "good", "great"),
    "trec": ("description", "entity", "abbreviation", "human", "location", "number"),
    "subj": ("objective", "subjective"),
    "agnews": ("world", "sports", "business", "technology"),
}
"""Set → the paper's label words (section 5.1.2)."""
