"""The frozen LLM that soft prompts are tuned on: what identifies it, loading it, and how soft tokens and text are joined.

Shape letters used in the whole project: B batch, K virtual tokens, T text tokens, D hidden size, V vocabulary, L layers.
Sequence layout used everywhere: [soft tokens][BOS][text][EOS]; tools differ in where the BOS goes, so artifacts record it.
"""
