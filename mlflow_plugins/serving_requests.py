"""What a request to the servable model must look like: its settings, parameters and rows.

A request that is unusable as a whole raises `RequestRefused`, which becomes a 4xx. A fault of one row raises a
`SoftPromptError` where that row is read, and becomes that row's own `error`.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from pydantic import Field, PositiveInt

from softprompt_registry.config import PositiveShare, build_config, settings
from softprompt_registry.dod.task import Pair
from softprompt_registry.errors import ArtifactError, ConfigError, DataError
from softprompt_registry.verbalization.abstention import DEFAULT_MIN_FAITHFULNESS

_log = logging.getLogger(__name__)

COLUMNS = ("soft_prompt", "inputs", "task_pairs")
REGISTRY_SCHEMES = ("models:/", "runs:/")
MAX_PREFILL_CHARACTERS = 1000
MAX_TEMPERATURE = 5.0
MAX_SEED = 2**32 - 1
_MAX_SENTENCE = 700  # characters: some of what a sentence quotes was sent by the client


class RequestRefused(MlflowException):
    """A refusal in one sentence. `mlflow models serve` answers with its error code as HTTP status and this as body.

    The scoring server writes "Failed to predict data '<the whole request>'" in front of `message` of whatever
    `MlflowException` passes through it. The body is therefore made from the sentence as it was raised.
    """

    def __init__(self, sentence: str, error_code: int = INVALID_PARAMETER_VALUE) -> None:
        self.sentence = shortened(sentence)
        super().__init__(self.sentence, error_code=error_code)

    def serialize_as_json(self) -> str:
        return json.dumps({"error_code": self.error_code, "message": self.sentence})


def internal_error() -> RequestRefused:
    """The refusal for a fault of our own. Call it where the exception is being handled: it goes to the log only."""
    entry = uuid.uuid4().hex[:12]
    _log.exception("log entry %s: a request failed", entry)
    return RequestRefused(
        f"answering the request: an unexpected error occurred, which is no fault of the request; the server's log "
        f"has it under entry {entry}. Try again, and report the entry if it stays.",
        INTERNAL_ERROR,
    )


def shortened(sentence: str, limit: int = _MAX_SENTENCE) -> str:
    """One printable line of at most `limit` characters."""
    line = "".join(character if character.isprintable() else " " for character in sentence)
    return line if len(line) <= limit else line[: limit - 1] + "…"


@settings
class ServingConfig:
    """Settings of the servable model, logged with it as its `model_config`; the environment can change each one when
    serving starts (`SERVING_MODEL_CONFIG='{"max_rows": 4}' mlflow models serve …`)."""

    base_model: str | None = None
    """Name or folder of the base model. None: `SOFTPROMPT_BASE_MODEL`, else the name that the translator records."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format of the base model in memory. None: as the translator records it."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What writes the texts. `vllm` needs the package on the server, and memory for the weights twice: the verifier and the
    check of the base model's fingerprint use them in transformers."""
    vllm_gpu_memory_utilization: PositiveShare = 0.6
    """Share of a GPU's memory that vLLM may take, above 0 up to 1; the rest is for the weights in transformers."""
    allow_registry_references: bool = False
    """Whether `soft_prompt` may be `models:/…` or `runs:/…`: the server then reads with its own rights."""
    max_rows: PositiveInt = 16
    """Rows of one request."""
    max_payload_bytes: PositiveInt = 4 * 1024 * 1024
    """Largest soft prompt, after base64 decoding."""
    max_virtual_tokens: PositiveInt = 256
    """K of one soft prompt."""
    max_new_tokens_limit: PositiveInt = 512
    """What the parameter max_new_tokens may ask for."""
    max_candidates: PositiveInt = 16
    """What the parameter num_candidates may ask for."""
    max_inputs: PositiveInt = 64
    """Inputs of one row."""
    max_input_characters: PositiveInt = 20_000
    """Longest input, and longest input or output in task_pairs."""
    max_task_pairs: PositiveInt = 64
    """Pairs of one row; all of them are used."""
    min_faithfulness: float = DEFAULT_MIN_FAITHFULNESS
    """A row abstains below it. A text that keeps half of the soft prompt's gain is nearer to it than to no prompt; that is no
    measured number. Set the one that `softprompt evaluate` chose on training tasks (rule.json of its run)."""
    trace: bool = False
    """Record an MLflow trace per request: digests, texts made and tokens used, never payloads or inputs. Off, because
    without `MLFLOW_TRACKING_URI` MLflow starts a database in the server's current folder."""
    trace_target_calls: bool = False
    """Record an MLflow trace of each request to the target LLM, below that of `trace` where both are on: tokens, duration and
    digests. Off for the same reason."""
    prompt_template: str = "{hard_prompt} Input: {input}\nOutput:"
    """What the target LLM is asked."""
    system_prompt: str | None = "You are a helpful assistant. Follow the task exactly."
    """Sent to the target LLM beside it. None: nothing."""
    target_model: str | None = None
    """The target LLM. None: `SOFTPROMPT_TARGET_MODEL`, else there is none and `answer` is refused."""
    target_base_url: str | None = None
    """None: `OPENAI_BASE_URL` if set, else OpenAI itself."""
    target_api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    target_endpoint: Literal["chat", "completions"] = "chat"
    target_timeout_s: float = 20.0
    """Longest silence of the target LLM within one try, in seconds."""
    target_deadline_s: float = 40.0
    """For all answers of one request, in seconds. `mlflow models serve` gives up after 60 (its `--timeout`)."""
    target_max_attempts: PositiveInt = 3
    """Tries per input."""
    target_max_concurrency: PositiveInt = 8
    """Requests to the target LLM in flight at the same time, over all requests to this server."""
    target_max_tokens: PositiveInt = 256
    """Longest answer, in the target LLM's tokens."""
    target_max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the target LLM calls that limit; OpenAI's reasoning models take the second only."""
    target_send_temperature: bool = True
    """Whether to ask for temperature 0; OpenAI's reasoning models refuse it."""
    target_price_per_million_prompt_tokens: float | None = None
    """Price in any currency. None: unknown, and so is the cost."""
    target_price_per_million_completion_tokens: float | None = None
    """Price in the same currency."""

    def __post_init__(self) -> None:
        for part in ("{hard_prompt}", "{input}"):
            if part not in self.prompt_template:
                raise ValueError(f"prompt_template has no {part!r}, expected both '{{hard_prompt}}' and '{{input}}'")

    @classmethod
    def from_model_config(cls, model_config: Mapping[str, Any] | None) -> ServingConfig:
        return build_config(cls, model_config or {}, "the serving settings")

    def to_model_config(self) -> dict[str, Any]:
        """With every key: MLflow lets the environment override only keys that were logged."""
        return asdict(self)


# --- Parameters ---


@settings
class RequestParams:
    """The parameters of a request; they hold for all of its rows."""

    num_candidates: PositiveInt = 1
    prefill: Annotated[str, Field(max_length=MAX_PREFILL_CHARACTERS)] = ""
    max_new_tokens: PositiveInt = 64
    temperature: Annotated[float, Field(gt=0, le=MAX_TEMPERATURE)] = 0.7
    """The first candidate is always greedy, the temperature is that of the others."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    verify: bool = True
    answer: bool = False


def read_params(params: object, config: ServingConfig) -> RequestParams:
    """Raises `RequestRefused` for an unknown parameter, a wrong type or a value out of range."""
    if not isinstance(params, Mapping | None):
        raise RequestRefused(
            f"reading params: found {kind_of(params)}, expected an object such as "
            '{"num_candidates": 4}. Correct params.'
        )
    try:
        request = build_config(RequestParams, params or {}, "params", quoted_characters=30)
    except ConfigError as error:
        raise RequestRefused(str(error)) from None
    for name, most in (("num_candidates", config.max_candidates), ("max_new_tokens", config.max_new_tokens_limit)):
        if getattr(request, name) > most:
            found = shortened(str(getattr(request, name)), 30)
            raise RequestRefused(f"reading params: {name} is {found}, expected {most} or less. Lower it.")
    return request


# --- Rows ---


@dataclass(frozen=True)
class Row:
    """One row, read but with its soft prompt still packed."""

    soft_prompt: bytes | str
    """A safetensors payload, or a registry reference."""
    inputs: tuple[str, ...] | None
    task_pairs: tuple[Pair, ...] | None


def check_rows(rows: Sequence[Mapping[Any, Any]], config: ServingConfig) -> None:
    """Raises `RequestRefused` for what makes all rows unusable: none, too many, or wrong columns."""
    if not rows:
        raise RequestRefused("reading the request: it has no rows, expected at least one with a soft_prompt. Add one.")
    if len(rows) > config.max_rows:
        raise RequestRefused(
            f"reading the request: it has {len(rows)} rows, expected at most {config.max_rows}. Send several requests."
        )
    found = list(dict.fromkeys(str(name) for row in rows for name in row))
    if unknown := [name for name in found if name not in COLUMNS]:
        raise RequestRefused(
            f"reading the request: {names_are(unknown)} unknown; the columns are {', '.join(COLUMNS)}. Correct the name, "
            "or leave it out."
        )
    if "soft_prompt" not in found:
        raise RequestRefused(
            "reading the request: there is no column soft_prompt, expected one with base64-encoded safetensors. Add it."
        )


def read_row(row: Mapping[Any, Any], params: RequestParams, config: ServingConfig) -> Row:
    """Raises `SoftPromptError` for what is wrong with this row."""
    soft_prompt = _read_soft_prompt(row.get("soft_prompt"), config)
    inputs = _read_inputs(row.get("inputs"), config)
    if params.answer and inputs is None:
        raise DataError("reading inputs: answer is true, but this row has none; expected a list of strings. Add it.")
    return Row(soft_prompt, inputs, _read_task_pairs(row.get("task_pairs"), config))


def _read_soft_prompt(value: object, config: ServingConfig) -> bytes | str:
    doing = "reading soft_prompt"
    if _is_missing(value) or value == "":
        raise ArtifactError(f"{doing}: it is empty, expected base64-encoded safetensors. Send the soft prompt.")
    if not isinstance(value, str):
        raise ArtifactError(f"{doing}: found {kind_of(value)}, expected a string of base64-encoded safetensors.")
    if value.startswith(REGISTRY_SCHEMES):
        if not config.allow_registry_references:
            raise ArtifactError(
                f"{doing}: found a registry reference, but this server takes none (allow_registry_references is "
                "false); expected base64-encoded safetensors. Send the soft prompt itself."
            )
        return value
    if value.startswith("data:"):
        head, _, value = value.partition(",")
        if not head.endswith(";base64"):
            raise ArtifactError(f"{doing}: found a data URI without ';base64,', expected 'data:;base64,<safetensors>'.")
    # Checked before decoding. base64 makes 4 characters of 3 bytes; the rest is room for line breaks.
    if len(value) > config.max_payload_bytes * 3 // 2 + 4:
        raise _too_large(f"about {len(value) * 3 // 4}", config)
    try:
        payload = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ArtifactError(
            f"{doing}: its {len(value)} characters are not base64; expected base64-encoded safetensors, as "
            "`base64 soft_prompt.safetensors` prints it. Encode the file again."
        ) from None
    if len(payload) > config.max_payload_bytes:
        raise _too_large(str(len(payload)), config)
    return payload


def _too_large(found: str, config: ServingConfig) -> ArtifactError:
    return ArtifactError(
        f"reading soft_prompt: it has {found} bytes, expected at most {config.max_payload_bytes}. Send the embeddings "
        "alone, in float16."
    )


def _read_inputs(value: Any, config: ServingConfig) -> tuple[str, ...] | None:
    doing = "reading inputs"
    if _is_missing(value):
        return None
    if hasattr(value, "tolist"):
        value = value.tolist()  # a numpy array
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        found = "a list with other values" if isinstance(value, (list, tuple)) else kind_of(value)
        raise DataError(f'{doing}: found {found}, expected a list of strings such as ["first", "second"]. Correct it.')
    if not 1 <= len(value) <= config.max_inputs:
        raise DataError(f"{doing}: found {len(value)} inputs, expected 1 to {config.max_inputs} per row.")
    _check_texts(value, doing, config)
    return tuple(value)


def _read_task_pairs(value: object, config: ServingConfig) -> tuple[Pair, ...] | None:
    doing = "reading task_pairs"
    if _is_missing(value):
        return None
    expected = 'expected a JSON list such as [{"input": "a text", "output": "a label"}]. Correct it, or leave it out.'
    if not isinstance(value, str):
        raise DataError(f"{doing}: found {kind_of(value)}, {expected}")
    try:
        pairs = json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{doing}: its {len(value)} characters are not JSON, {expected}") from None
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise DataError(f"{doing}: found JSON of another form, {expected}")
    if not 1 <= len(pairs) <= config.max_task_pairs:
        raise DataError(f"{doing}: found {len(pairs)} pairs, expected 1 to {config.max_task_pairs} per row.")
    _check_texts([pair[key] for pair in pairs for key in ("input", "output")], doing, config)
    return tuple(Pair(pair["input"], pair["output"]) for pair in pairs)


def _check_texts(texts: Sequence[str], doing: str, config: ServingConfig) -> None:
    longest = max(len(text) for text in texts)
    if longest > config.max_input_characters:
        raise DataError(
            f"{doing}: the longest has {longest} characters, expected at most {config.max_input_characters}. Shorten it."
        )
    if not all(map(_is_unicode, texts)):
        raise DataError(f"{doing}: a text has half of a surrogate pair in it, expected valid Unicode. Correct it.")


def _is_pair(pair: object) -> bool:
    return isinstance(pair, dict) and all(isinstance(pair.get(key), str) for key in ("input", "output"))


def _is_missing(value: object) -> bool:
    """None, or the NaN that pandas puts where a row has no value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def kind_of(value: object) -> str:
    """What a value is, without quoting it."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN or infinity"
    names = {
        bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list", dict: "an object"
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def names_are(names: Iterable[str]) -> str:
    """A few names for a message, each cut short: 'a', 'b', … are."""
    names = list(names)
    shown = ", ".join(repr(shortened(name, 40)) for name in names[:3])
    return f"{shown}{', …' if len(names) > 3 else ''} {'is' if len(names) == 1 else 'are'}"
