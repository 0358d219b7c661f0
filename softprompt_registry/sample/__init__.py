"""The sample DoD, written for this project: small classification and generation tasks that a 135M model can learn.

`dod/` holds one JSON Lines file per task and `tasks.jsonl` with the tasks' records, all under the project's licence.
"""

from __future__ import annotations

from pathlib import Path

from softprompt_registry.dod.files import FilesConfig, build_dod_from_files

SAMPLE_FOLDER = Path(__file__).parent / "dod"
DEMO_CONFIG = Path(__file__).parent / "demo.yaml"
"""Settings of `softprompt demo`."""


def build_sample_dod(out: Path) -> Path:
    """Write the sample DoD to `out`, which must not exist yet, and return `out`.

    Every pair and every task has its split in the files, so the digest is the same on every machine.
    """
    return build_dod_from_files(SAMPLE_FOLDER, out, config=FilesConfig()).path
