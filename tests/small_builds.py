"""Small classification DoDs that `writing_llm` writes through the real client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_server import LlmServer
from writing_llm import SEED_WORDS, WritingLlm, client_of

from softprompt_registry.dod.classification import ClassificationConfig, ClassificationReport, build_dod_classification
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task

SMALL = ClassificationConfig(num_tasks=6, labels_per_task=3, sentences_per_label=10, sentences_per_call=5)
"""6 requests for label sets, 6 · 3 · 2 = 36 for sentences."""


def build(
    server: LlmServer, out: Path, config: ClassificationConfig = SMALL, *, overwrite: bool = False, **client: Any
) -> ClassificationReport:
    with client_of(server, **client) as model:
        return build_dod_classification(SEED_WORDS, out, model, config=config, overwrite=overwrite)


def tasks_of(path: Path) -> list[Task]:
    with DodStore.open(path) as store:
        return list(store.tasks())


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def build_undisturbed(server: LlmServer, folder: Path) -> ClassificationReport:
    """A build of `SMALL` in peace; afterwards the server has forgotten it."""
    server.reply_to_body = WritingLlm()
    report = build(server, folder / "a.dod")
    server.received.clear()
    return report
