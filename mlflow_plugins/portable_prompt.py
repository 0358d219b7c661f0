"""The servable model: a soft prompt in, a hard prompt that any LLM can read out. Contract: docs/serving.md.

The model holds a translator; its base model is loaded when the server starts, so that a wrong one fails the start.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.models.model import ModelInfo
from mlflow.models.signature import ModelSignature
from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Object, ParamSchema, ParamSpec, Property, Schema

from mlflow_plugins import flavor_parts
from mlflow_plugins.scoring_server import guard_scoring_server
from mlflow_plugins.serving_requests import (
    MAX_PREFILL_CHARACTERS,
    RequestParams,
    RequestRefused,
    Row,
    ServingConfig,
    check_rows,
    internal_error,
    read_params,
    read_row,
    shortened,
)
from mlflow_plugins.serving_soft_prompts import soft_prompt_from_payload, soft_prompt_from_registry
from mlflow_plugins.serving_target import TargetModel
from mlflow_plugins.translator import StoredTranslator, save_translator
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model_for
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.errors import ArtifactError, SoftPromptError
from softprompt_registry.fingerprints import SHORT, digest_of_json
from softprompt_registry.language_models.protocol import Completion, Usage, usage_of
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.translators.on_vllm import TranslatorOnVllm, VllmTranslatorConfig, require_vllm
from softprompt_registry.translators.translator import Translator, read_record
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.evidence import TriedOn
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import Verbalization, VerbalizationConfig, verbalize
from softprompt_registry.verbalization.verifier import Verifier, VerifierConfig

if TYPE_CHECKING:
    import pandas as pd

FLAVOR_NAME = "softprompt_portable_prompt"
DEFAULT_MODEL_CONFIG: dict[str, Any] = ServingConfig().to_model_config()

NOT_ASKED = "not asked: this row abstained, so there is no hard prompt to ask with"


# --- The flavor ---


def default_signature() -> ModelSignature:
    """Columns, outputs and parameters by name.

    `inputs` is typed as anything although it must be a list of strings: MLflow refuses a whole request, quoting it, when
    one row of a typed list is not one. The text columns let any object through, so a bad row gets its own error.
    """
    defaults = RequestParams()
    types = {int: "long", float: "double", str: "string", bool: "boolean"}
    candidate = [
        *(Property(name, "string") for name in ("text", "proposer")),
        *(Property(name, "double", False) for name in ("score", "verified_score")),
    ]
    answer = [Property("input", "string"), Property("answer", "string", False), Property("error", "string", False)]
    usage = [
        *(Property(name, "long") for name in ("requests", "prompt_tokens", "completion_tokens")),
        Property("cost", "double", False),
    ]
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec("string", "soft_prompt"),
                ColSpec(AnyType(), "inputs", required=False),  # type: ignore[no-untyped-call]
                ColSpec("string", "task_pairs", required=False),
            ]
        ),
        outputs=Schema(
            [
                ColSpec("string", "hard_prompt", required=False),
                ColSpec("double", "faithfulness", required=False),
                ColSpec(Array(DataType.double), "faithfulness_interval", required=False),
                ColSpec("string", "evidence", required=False),
                ColSpec("boolean", "abstained", required=False),
                ColSpec("string", "reason", required=False),
                ColSpec(Array(Object(candidate)), "candidates"),
                ColSpec(Array(Object(answer)), "answers", required=False),
                ColSpec(Object(usage), "usage"),
                ColSpec(DataType.string, "base_fingerprint"),
                ColSpec(DataType.string, "translator"),
                ColSpec("string", "error", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec(field.name, types[type(getattr(defaults, field.name))], getattr(defaults, field.name))
                for field in fields(RequestParams)
            ]
        ),
    )


def save_model(
    artifact: str | Path, path: str | Path, model_config: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Write the translator folder `artifact` as a servable MLflow model; no base model is loaded or stored.

    Args:
        model_config: overrides settings of `DEFAULT_MODEL_CONFIG`.
        options: see `flavor_parts.save`.
    """
    # A wrong setting fails here, not where the model is served.
    config = ServingConfig.from_model_config(model_config)
    save_translator(
        FLAVOR_NAME,
        __name__,
        Path(artifact),
        path,
        default_signature=default_signature(),
        default_libraries=(*flavor_parts.LIBRARIES, "openai"),
        default_model_config=DEFAULT_MODEL_CONFIG,
        model_config=config.to_model_config(),
        **options,
    )


def log_model(translator_folder: str | Path, *, name: str, **options: Any) -> ModelInfo:
    """Log a translator folder as a servable LoggedModel; see `flavor_parts.log` for the options."""
    return flavor_parts.log(__name__, translator_folder, name=name, **options)


def load_model(model_uri: str, dst_path: str | None = None) -> StoredTranslator:
    """The translator in a logged or saved model, its base model not loaded yet."""
    return StoredTranslator(flavor_parts.artifact_folder(model_uri, FLAVOR_NAME, dst_path))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> _ServedTranslator:
    config = ServingConfig.from_model_config(model_config)
    served = _ServedTranslator(Path(path), config)
    guard_scoring_server(__name__, config)
    return served


# --- The served model ---


class _ServedTranslator:
    """Columns and parameters of `default_signature`. Safe to call from several threads."""

    def __init__(self, folder: Path, config: ServingConfig) -> None:
        self._config = config
        self._target = TargetModel(config)
        record = read_record(folder)
        if config.engine == "vllm":
            require_vllm()
        base_model = load_base_model_for(record.base_model, override=config.base_model, dtype=config.dtype)
        self._translator = _load_translator(folder, base_model, config)
        if isinstance(self._translator, TranslatorOnVllm):
            weakref.finalize(self, self._translator.close)
        # One row at a time: a text then depends on its own row alone, whoever shares the request.
        self._proposer = TranslatorProposer(self._translator, rows_per_batch=1)
        # On the same base model, which is itself again when the translator has read.
        self._verifier = Verifier(base_model, VerifierConfig(max_pairs=config.max_task_pairs))
        self._rule = AbstentionRule(config.min_faithfulness)
        # The server answers in threads, while reading switches the adapter on in the one shared model.
        self._lock = threading.Lock()

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One result per row, in order.

        Raises:
            RequestRefused: the request, or every row of it, is unusable; or an unexpected error occurred.
        """
        import pandas as pd

        try:
            records = model_input.to_dict(orient="records")
            check_rows(records, self._config)
            request = read_params(params, self._config)
            if request.answer:
                self._target.require()
            with self._trace(records, request) as results:
                unexpected: list[RequestRefused] = []
                results += [self._verbalize_or_error(record, request, unexpected) for record in records]
                errors = [str(result["error"]) for result in results if result["error"] is not None]
                if len(errors) == len(results):
                    if unexpected:
                        raise unexpected[0]
                    many = "" if len(errors) == 1 else f"none of the {len(errors)} rows can be used; the first: "
                    raise RequestRefused(many + errors[0])
                if request.answer:
                    self._answer(records, results)
        except RequestRefused:
            raise
        except Exception:
            raise internal_error() from None
        # As objects: pandas would turn the null of a column of texts or numbers into NaN, which is not JSON.
        return pd.DataFrame(results, index=model_input.index, dtype=object)

    @contextlib.contextmanager
    def _trace(self, records: Sequence[Mapping[Any, Any]], request: RequestParams) -> Iterator[list[dict[str, Any]]]:
        """A list to put the results in; they are recorded as a span where the setting `trace` is on."""
        results: list[dict[str, Any]] = []
        if not self._config.trace:
            yield results
            return
        # By hand, not with `mlflow.trace`: that would record every payload.
        with mlflow.start_span("portable_prompt", span_type="CHAIN") as span:
            digests = [digest_of_json(str(record.get("soft_prompt")))[:SHORT] for record in records]
            span.set_inputs({"soft_prompt_digests": digests, "params": asdict(request)})
            yield results
            shown = ("hard_prompt", "faithfulness", "abstained", "usage", "error")
            span.set_outputs([{key: result[key] for key in shown} for result in results])

    def _verbalize_or_error(
        self, record: Mapping[Any, Any], request: RequestParams, unexpected: list[RequestRefused]
    ) -> dict[str, Any]:
        """A row's result; faults of our own are added to `unexpected`, so that they spoil no other row either."""
        result: dict[str, Any] = {
            "hard_prompt": None,
            "faithfulness": None,
            "faithfulness_interval": None,
            "evidence": None,
            "abstained": None,
            "reason": None,
            "candidates": [],
            "answers": None,
            "usage": asdict(Usage()),
            "base_fingerprint": self._translator.record.base_model.fingerprint,
            "translator": self._translator.id,
            "error": None,
        }
        try:
            row = read_row(record, request, self._config)
            made = self._verbalize(self._load(row), row, request)
        except SoftPromptError as error:
            result["error"] = shortened(str(error))
        except Exception:
            unexpected.append(internal_error())
            result["error"] = unexpected[-1].sentence
        else:
            result |= _shown(made)
        return result

    def _load(self, row: Row) -> SoftPrompt:
        """The soft prompt of a row, checked against this translator's base model."""
        record = self._translator.record
        if isinstance(row.soft_prompt, str):
            loaded = soft_prompt_from_registry(row.soft_prompt)
            reference = repr(shortened(row.soft_prompt, 100))
            require_same_base(
                "reading soft_prompt", reference, loaded.record.base_model, "this translator", record.base_model
            )
        else:
            loaded = soft_prompt_from_payload(row.soft_prompt, record.base_model)
        if loaded.num_virtual_tokens > self._config.max_virtual_tokens:
            raise ArtifactError(
                f"reading soft_prompt: it has K={loaded.num_virtual_tokens} virtual tokens, expected at most "
                f"{self._config.max_virtual_tokens}. Send a shorter one."
            )
        return loaded

    def _verbalize(self, loaded: SoftPrompt, row: Row, request: RequestParams) -> Verbalization:
        base = self._translator.base_model
        config = VerbalizationConfig(
            num_candidates=request.num_candidates,
            prefill=request.prefill,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )
        tried_on = TriedOn(row.task_pairs or (), row.inputs or ()) if request.verify else TriedOn()
        # Errors quote the task's name, which came from the client.
        loaded = replace(loaded, record=replace(loaded.record, task="soft_prompt"))
        with self._lock:
            length = loaded.num_virtual_tokens + len(base.bos) + len(base.tokenize(request.prefill))
            if length + request.max_new_tokens > base.max_positions:
                raise ArtifactError(
                    f"reading soft_prompt: its {loaded.num_virtual_tokens} virtual tokens and the prefill leave room for "
                    f"{max(base.max_positions - length, 0)} new tokens of base model {base.ref}, but max_new_tokens is "
                    f"{request.max_new_tokens}. Lower it."
                )
            (made,) = verbalize(
                [loaded],
                [self._proposer],
                config,
                verifier=self._verifier,
                evidence=[tried_on],
                rule=self._rule,
                translator_id=self._translator.id,
            )
        return made

    def _answer(self, records: Sequence[Mapping[Any, Any]], results: Sequence[dict[str, Any]]) -> None:
        """Write `answers` and `usage` into the good rows; all their questions share one deadline."""
        request = RequestParams(answer=True)
        good = [
            (result, read_row(record, request, self._config).inputs or ())
            for record, result in zip(records, results, strict=True)
            if result["error"] is None
        ]
        for result, inputs in good:
            if result["abstained"]:
                result["answers"] = [{"input": text, "answer": None, "error": NOT_ASKED} for text in inputs]
        asked = [(result, inputs) for result, inputs in good if not result["abstained"]]
        questions = [(str(result["hard_prompt"]), text) for result, inputs in asked for text in inputs]
        if not questions:
            return
        replies = iter(self._target.ask(questions))
        for result, inputs in asked:
            own = [next(replies) for _ in inputs]
            result["answers"] = [
                {"input": text, "answer": reply.text, "error": None}
                if isinstance(reply, Completion)
                else {"input": text, "answer": None, "error": shortened(str(reply))}
                for text, reply in zip(inputs, own, strict=True)
            ]
            result["usage"] = asdict(usage_of(own, self._target.config.prices if self._target.config else None))


def _load_translator(folder: Path, base_model: BaseModel, config: ServingConfig) -> Translator | TranslatorOnVllm:
    if config.engine == "transformers":
        return Translator.load(folder, base_model)
    # A character is at most four tokens, its bytes.
    longest = config.max_virtual_tokens + 4 * MAX_PREFILL_CHARACTERS + config.max_new_tokens_limit
    settings = VllmTranslatorConfig(max_model_len=longest, gpu_memory_utilization=config.vllm_gpu_memory_utilization)
    return TranslatorOnVllm.load(folder, base_model, settings)


def _shown(made: Verbalization) -> dict[str, Any]:
    """The columns that a verbalization fills. An abstention is no answer: its texts stand among the candidates only."""
    interval = made.faithfulness_interval
    return {
        "hard_prompt": None if made.abstained else made.text,
        "faithfulness": _finite(made.faithfulness),
        "faithfulness_interval": None if interval is None else [_finite(end) for end in interval],
        "evidence": made.evidence,
        "abstained": made.abstained,
        "reason": made.reason,
        "candidates": [
            {
                "text": one.text,
                "proposer": one.proposer,
                "score": _finite(one.score),
                "verified_score": _finite(one.verified_score),
            }
            for one in made.candidates
        ],
    }


def _finite(number: float | None) -> float | None:
    """NaN and infinity are not JSON."""
    return number if number is not None and math.isfinite(number) else None
