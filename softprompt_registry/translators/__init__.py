"""Translators: the LoRA adapter that reads soft prompts, and how it is trained."""
