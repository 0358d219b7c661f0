"""A causal LLM in this process through vLLM, which keeps thousands of requests in flight. Needs `vllm` installed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from softprompt_registry.config import Name, settings
from softprompt_registry.errors import ConfigError, LanguageModelError
from softprompt_registry.fingerprints import SHORT, digest_of_json
from softprompt_registry.language_models.local_prompts import LocalPrompts
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, Finished, LanguageModel
from softprompt_registry.language_models.replies import read_answer


@settings
class VllmConfig:
    model: Name
    """`packaged:NAME`, a local folder, or a Hub name with an optional `@revision`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights in memory; `auto` takes the checkpoint's."""
    prompt_format: Literal["chat", "plain"] = "chat"
    """`chat` uses the tokenizer's chat template; `plain` sends system and prompt as plain text, for base models."""
    chat_template: str | None = None
    """File with a Jinja chat template, for a checkpoint whose tokenizer has none; null takes the tokenizer's."""
    tokenizer_mode: str = "auto"
    """As in vLLM; Mistral's checkpoints with `tekken.json` bring a tokenizer of their own, `mistral`."""
    max_model_len: int | None = 4096
    """Longest prompt and answer together, in tokens; null for the model's own limit, which costs memory."""
    max_in_flight: PositiveInt = 4096
    """Requests handed to vLLM at the same time; it runs `max_num_seqs` of them together and queues the rest."""
    max_num_seqs: PositiveInt = 256
    """Sequences in one batch of vLLM."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that share one copy of the model."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that vLLM may take."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: a quicker start, slower afterwards."""


class OnVllm(LanguageModel):
    """Answers requests with vLLM's own scheduler; each result comes as soon as its request is done."""

    def __init__(self, config: VllmConfig) -> None:
        try:
            import vllm
        except ImportError as error:
            raise LanguageModelError(
                f"loading model {config.model!r} with vLLM: the package cannot be imported ({error}).",
                retryable=False,
                hint="Install softprompt-registry[vllm] on a GPU machine, or run `make vllm` for vLLM on a CPU.",
            ) from error
        from softprompt_registry.base_models.loading import model_location

        self.config = config
        location, revision, self.name = model_location(config.model)
        self._llm: Any = None
        try:
            self._llm = vllm.LLM(**self._engine_settings(location, revision))
        except (OSError, ValueError, RuntimeError) as error:
            raise LanguageModelError(
                f"loading model {self.name!r} with vLLM: it could not ({_one_line(error)}).",
                retryable=False,
                hint="Check the name and the memory: lower max_model_len or max_num_seqs, or raise tensor_parallel_size.",
            ) from error
        tokenizer = self._llm.get_tokenizer()
        if config.chat_template is not None:
            tokenizer.chat_template = _read_template(config.chat_template)
        try:
            self._prompts = LocalPrompts(tokenizer, config.prompt_format, self.name)
        except ConfigError:
            self.close()
            raise
        self.identity = f"{self.name} {revision or _folder_mark(location)} {config.dtype} {self._prompts.identity}"
        # vLLM looks for stop strings in thoughts too; the answers of such a model are cut when they are there.
        self._sends_stop = not self._prompts.writes_thoughts
        self._number = 0

    def _engine_settings(self, location: str, revision: str | None) -> dict[str, Any]:
        config = self.config
        return dict(
            model=location,
            tokenizer_mode=config.tokenizer_mode,
            revision=revision,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enforce_eager=config.enforce_eager,
            # A checkpoint's own generation settings must not bend what is asked for; vLLM still reads its end tokens there.
            generation_config="vllm",
            # Free white space would let a small model fill the whole answer with it.
            structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
            disable_log_stats=True,
        )

    def close(self) -> None:
        """End vLLM's worker process and free its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def stream(self, requests: Iterable[CompletionRequest]) -> Iterator[Finished]:
        if self._llm is None:
            raise RuntimeError("this language model is closed")
        engine = self._llm.llm_engine
        waiting = iter(enumerate(requests))
        # vLLM's id → position, start, request, the tag of thoughts that its prompt ends with
        in_flight: dict[str, tuple[int, float, CompletionRequest, str]] = {}
        try:
            while True:
                while len(in_flight) < self.config.max_in_flight and (drawn := next(waiting, None)):
                    index, request = drawn
                    request_id = f"request-{self._number}"
                    self._number += 1
                    try:
                        ids = self._prompts.ids(request)
                        sampling = _sampling(request, request.stop if self._sends_stop else ())
                        engine.add_request(request_id, {"prompt_token_ids": ids}, sampling)
                    except Exception as error:  # a prompt beyond the context, a schema that cannot be followed: the
                        # classes differ between versions. An engine that is dead says so again in `step`.
                        yield Finished(index, self._refused(error))
                        continue
                    in_flight[request_id] = (index, time.monotonic(), request, self._prompts.opened_thoughts(ids))
                if not in_flight:
                    return
                for output in self._step():
                    if output.finished and output.request_id in in_flight:
                        index, started, request, opened = in_flight.pop(output.request_id)
                        yield Finished(index, self._completion(output, time.monotonic() - started, request, opened))
        finally:
            if in_flight:
                with contextlib.suppress(Exception):  # the engine may be what failed
                    engine.abort_request(list(in_flight))

    def _step(self) -> list[Any]:
        try:
            return list(self._llm.llm_engine.step())
        except Exception as error:  # an engine that has died: which class says so differs between versions
            raise LanguageModelError(
                f"asking model {self.name!r} in vLLM: its engine stopped ({_one_line(error)}).",
                retryable=True,
                hint="Run the same command again; answers that were finished are kept. Look at vLLM's log for the cause.",
            ) from error

    def _completion(self, output: Any, latency_s: float, request: CompletionRequest, opened: str) -> Completion:
        answer = output.outputs[0]
        stop = () if self._sends_stop else request.stop
        text, finish_reason, raw = read_answer(opened + answer.text, answer.finish_reason, stop)
        return Completion(
            text=text,
            prompt_tokens=len(output.prompt_token_ids),
            completion_tokens=len(answer.token_ids),
            latency_s=latency_s,
            finish_reason=finish_reason,
            attempts=1,
            raw=raw,
            adapted=self._prompts.adapted(request),
        )

    def _refused(self, error: Exception) -> LanguageModelError:
        return LanguageModelError(
            f"asking model {self.name!r} in vLLM: it refused the request ({_one_line(error)}).",
            retryable=False,
            about_request=True,
            hint="Shorten the prompt or raise max_model_len; correct the JSON schema if it is about that.",
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"reading the chat template {path!r}: {error.strerror}. Correct chat_template.") from error


def _folder_mark(location: str) -> str:
    """What tells two folders of the same name apart without reading their weights; "" for a Hub name."""
    folder = Path(location)
    if not folder.is_dir():
        return ""
    files = sorted((path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file())
    config = folder / "config.json"
    return digest_of_json([files, config.read_text(encoding="utf-8") if config.is_file() else ""])[:SHORT]


def _sampling(request: CompletionRequest, stop: tuple[str, ...]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    structured = None
    if request.json_schema is not None:
        structured = StructuredOutputsParams(json=json.loads(request.json_schema))
    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        presence_penalty=request.presence_penalty,
        seed=request.seed,
        stop=list(stop) or None,
        structured_outputs=structured,
    )
