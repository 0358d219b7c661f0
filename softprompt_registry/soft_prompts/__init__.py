"""Soft prompts: the artifact, banks of many, and how they are tuned."""
