"""`python -m softprompt_registry.cli` is `softprompt`."""

from softprompt_registry.cli import main

main(prog_name="softprompt")
