"""The command line: parses, calls one library function, prints. Heavy libraries are imported inside the commands."""

# Each module adds its commands to `main`.
from softprompt_registry.cli import (
    demo,
    dods,
    evaluating,
    portability,
    publishing,
    registry,
    soft_prompts,
    studies,
    translators,
)
from softprompt_registry.cli.options import main

__all__ = [
    "demo",
    "dods",
    "evaluating",
    "main",
    "portability",
    "publishing",
    "registry",
    "soft_prompts",
    "studies",
    "translators",
]
