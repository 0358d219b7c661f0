"""The command line: parses, calls one library function, prints. Heavy libraries are imported inside the commands."""

# Each module adds its commands to `main`.
from softprompt_registry.cli import demo, dods, registry, soft_prompts, translators
from softprompt_registry.cli.options import main

__all__ = ["demo", "dods", "main", "registry", "soft_prompts", "translators"]
