"""Candidates from a learned scale and bias: all is written as with a translator, by the bare base model."""

from __future__ import annotations

from softprompt_registry.verbalization.proposers.translator import TranslatorProposer


class ScaleAndBiasProposer(TranslatorProposer):
    """Reads soft prompts with a `ScaleAndBias`; the candidates are those of `TranslatorProposer`, under this name."""

    name = "scale_and_bias"
