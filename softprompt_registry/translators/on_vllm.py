"""A translator in vLLM, in this process: the texts and scores that it has in transformers. Needs `vllm` installed.

vLLM reads the base model's own files, lays the adapter over them (LoRA) and takes the soft tokens as prompt embeddings. Both
together were tried with vLLM 0.32, on a CPU and in float32: the greedy texts are those of transformers, so no merged copy of
the weights is made. Only layers that the adapter changes are opened to LoRA. vLLM would open the output layer too, and there
a CPU's engine dies when a text is scored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from softprompt_registry.base_models.frozen import BaseModel, TargetScores
from softprompt_registry.base_models.reference import BaseModelRef, require_same_base
from softprompt_registry.config import PositiveShare, settings
from softprompt_registry.errors import ArtifactError, BaseModelError, ConfigError
from softprompt_registry.fingerprints import SHORT, digest_of_file, digest_of_json
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.translators.translator import ADAPTER_FILE, TranslatorRecord, read_record, stacked

if TYPE_CHECKING:
    import torch

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for; an adapter takes the next one."""
_EXTRA_POSITIONS = 2
"""A text is scored with its end token behind it, as a prompt, and vLLM wants room for one token after each prompt."""
_PLACEHOLDER = 0
"""Token id that stands where a soft token is; vLLM looks at the embedding instead."""


@settings
class VllmTranslatorConfig:
    max_model_len: PositiveInt = 4096
    """Longest sequence in tokens, soft tokens included; the base model's own limit where that is lower."""
    max_num_seqs: PositiveInt = 64
    """Texts that are written together."""
    gpu_memory_utilization: PositiveShare = 0.6
    """Share of a GPU's memory that vLLM may take. It must leave room for the base model in transformers beside it."""
    enforce_eager: bool = False
    """Skip CUDA graphs: a quicker start, slower afterwards."""


def require_vllm() -> None:
    """Raises `ConfigError` where vLLM is not installed, or is one that takes no soft tokens beside token ids."""
    try:
        import vllm
        from vllm.inputs import EmbedsPrompt
    except ImportError as error:
        raise ConfigError(
            f"loading a translator with engine 'vllm': the package vllm cannot be imported ({error}), expected it to be "
            "installed. Install softprompt-registry[vllm] on a GPU machine, run `make vllm` for one on a CPU, or set engine "
            "to 'transformers'."
        ) from error
    if "prompt_is_token_ids" not in EmbedsPrompt.__annotations__:
        raise ConfigError(
            f"loading a translator with engine 'vllm': found vLLM {vllm.__version__}, expected one that takes token ids "
            "and embeddings in one prompt, as 0.32 does. Install that, or set engine to 'transformers'."
        )


class TranslatorOnVllm:
    """A translator whose base model runs in vLLM with the adapter laid over it; a `SoftPromptReader`.

    Greedy texts are those of `Translator`, but that rounding may decide between two tokens that are nearly equally likely;
    sampled ones are others, since vLLM draws in its own way. A bfloat16 base model takes the adapter in bfloat16 here, in
    float32 there. Not to be used from several threads at a time.
    """

    def __init__(self, base_model: VllmTextModel, record: TranslatorRecord, adapter_name: str) -> None:
        self.base_model = base_model
        self.record = record
        self.id = adapter_name

    @classmethod
    def load(cls, folder: Path, base_model: BaseModel, config: VllmTranslatorConfig | None = None) -> TranslatorOnVllm:
        """Start vLLM with the adapter in `folder` on the files that `base_model` was loaded from.

        Args:
            base_model: in transformers, where its fingerprint and its tokenizer come from. It stays as it is, so that a
                verifier can use it; the weights are in memory twice.

        Raises:
            ConfigError: vLLM cannot be imported.
            BaseModelMismatch: the translator belongs to another base model.
            BaseModelError: vLLM cannot load the base model.
            ArtifactError: the adapter is damaged, or vLLM cannot lay it over the base model.
        """
        require_vllm()
        record = read_record(folder)
        require_same_base(
            "loading a translator", "the translator", record.base_model, "the loaded model", base_model.ref
        )
        adapter = _read_adapter(folder)
        return cls(VllmTextModel(base_model, adapter, config or VllmTranslatorConfig()), record, adapter.name)

    @contextlib.contextmanager
    def soft_tokens(self, soft_prompts: Sequence[SoftPrompt]) -> Iterator[torch.Tensor]:
        """As `Translator.soft_tokens`; the adapter is always on."""
        yield stacked(soft_prompts, self.record.base_model)

    def close(self) -> None:
        """End vLLM's worker process and free its memory."""
        self.base_model.close()


@dataclass(frozen=True)
class _Adapter:
    folder: Path
    name: str
    layers: tuple[str, ...]
    """Last parts of the names of the layers that it changes, such as `q_proj`."""
    rank: int


def _read_adapter(folder: Path) -> _Adapter:
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_FILE
    try:
        with safe_open(path, "pt") as file:
            ranks = {
                key.partition(".lora_A.")[0].rpartition(".")[2]: int(file.get_slice(key).get_shape()[0])
                for key in file.keys()
                if ".lora_A." in key
            }
        name = f"translator_{digest_of_file(path)[:SHORT]}"
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"reading translator {str(folder)!r}: its adapter cannot be read ({error}). Train it again."
        ) from error
    if not ranks:
        raise ArtifactError(f"reading translator {str(folder)!r}: its adapter has no LoRA weights. Train it again.")
    return _Adapter(folder, name, tuple(sorted(ranks)), max(ranks.values()))


class VllmTextModel:
    """A base model in vLLM with an adapter on it: a `TextModel`.

    Tokenizer, ids and fingerprint are those of the base model in transformers, whose weights are not used here.
    """

    def __init__(self, base_model: BaseModel, adapter: _Adapter, config: VllmTranslatorConfig) -> None:
        self._base_model = base_model
        self._max_model_len = min(config.max_model_len, base_model.max_positions)
        self._llm: Any = self._start(config, adapter)
        try:
            self._lora = self._lay_over(adapter)
        except BaseException:
            self.close()
            raise

    @property
    def ref(self) -> BaseModelRef:
        return self._base_model.ref

    @property
    def bos(self) -> list[int]:
        return self._base_model.bos

    @property
    def eos_id(self) -> int:
        return self._base_model.eos_id

    def tokenize(self, text: str) -> list[int]:
        return self._base_model.tokenize(text)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        return self._base_model.decode(ids, after)

    def _start(self, config: VllmTranslatorConfig, adapter: _Adapter) -> Any:
        import vllm

        try:
            return vllm.LLM(
                model=str(self._base_model.model.config.name_or_path),
                revision=self.ref.revision,
                dtype=str(self._base_model.dtype).removeprefix("torch."),
                # Token ids go in and come out.
                skip_tokenizer_init=True,
                enable_prompt_embeds=True,
                enable_lora=True,
                lora_target_modules=list(adapter.layers),
                max_lora_rank=next((rank for rank in LORA_RANKS if rank >= adapter.rank), adapter.rank),
                max_model_len=self._max_model_len,
                max_num_seqs=config.max_num_seqs,
                gpu_memory_utilization=config.gpu_memory_utilization,
                enforce_eager=config.enforce_eager,
                # A checkpoint's own generation settings must not bend what is measured.
                generation_config="vllm",
                logprobs_mode="raw_logprobs",
                disable_log_stats=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise BaseModelError(
                f"loading base model {self.ref} with vLLM: it could not ({_one_line(error)}). Check that vLLM knows the "
                "architecture and that there is memory for its weights, or set engine to 'transformers'."
            ) from error

    def _lay_over(self, adapter: _Adapter) -> Any:
        """The adapter, already loaded: one that does not fit is found here and not with the first text."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(adapter.name, 1, str(adapter.folder))
        try:
            self._llm.llm_engine.add_lora(request)
        except Exception as error:  # which class says so differs between versions
            raise ArtifactError(
                f"reading translator {str(adapter.folder)!r}: vLLM cannot lay its adapter over {self.ref} "
                f"({_one_line(error)}). Set engine to 'transformers'."
            ) from error
        return request

    def close(self) -> None:
        """End vLLM's worker process and free its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    @property
    def max_positions(self) -> int:
        """The longest sequence, soft tokens included, that is written and scored."""
        return self._max_model_len - _EXTRA_POSITIONS

    def generate(
        self,
        soft_prompts: torch.Tensor,
        prompt_ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """As `BaseModel.generate`, but that a sampled row depends on its place in the batch and not on the other rows.

        Raises:
            ArtifactError: a row with its new tokens is longer than `max_positions`.
        """
        from vllm import SamplingParams

        prompts = self._prompts(soft_prompts, prompt_ids, max_new_tokens)
        sampling = [
            SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                top_p=0.95 if temperature > 0 else 1.0,
                # Of 32 bits, as torch's generator on a CPU looks at no more of them.
                seed=int(digest_of_json([seed, row])[:8], 16),
                # By these ids alone: without a tokenizer vLLM does not know all of them.
                ignore_eos=True,
                stop_token_ids=list(self._base_model.end_ids),
                detokenize=False,
            )
            for row in range(len(prompts))
        ]
        rows = [list(output.outputs[0].token_ids) for output in self._ask(prompts, sampling)]
        return [self._base_model.until_end(row) for row in rows]

    def score_targets(
        self, soft_prompts: torch.Tensor, prompt_ids: Sequence[Sequence[int]], target_ids: Sequence[Sequence[int]]
    ) -> TargetScores:
        """As `BaseModel.score_targets`, without gradients.

        Raises:
            ArtifactError: a row is longer than `max_positions` and one token for EOS.
        """
        import torch
        from vllm import SamplingParams

        whole = [[*prompt, *target] for prompt, target in zip(prompt_ids, target_ids, strict=True)]
        prompts = self._prompts(soft_prompts, whole, -1)
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        sums = []
        for output, target in zip(self._ask(prompts, sampling), target_ids, strict=True):
            behind = output.prompt_logprobs[-len(target) :]  # of the last tokens, which are the target's
            sums.append(sum(found[token].logprob for found, token in zip(behind, target, strict=True)))
        return TargetScores(
            torch.tensor(sums, dtype=torch.float32),
            torch.tensor([len(target) for target in target_ids]),
        )

    def _prompts(
        self, soft_prompts: torch.Tensor, token_ids: Sequence[Sequence[int]], more: int
    ) -> list[dict[str, Any]]:
        """Prompts of vLLM: [soft tokens][ids], each of which must have room for `more` tokens.

        vLLM looks the embeddings of the ids up in the base model's own matrix, which the adapter leaves alone.
        """
        import torch

        num_soft = soft_prompts.shape[1]
        longest = num_soft + max(len(ids) for ids in token_ids)
        if longest + more > self.max_positions:
            raise ArtifactError(
                f"reading soft prompts in vLLM: {num_soft} virtual tokens and the text before the answer are {longest} "
                f"tokens, which leaves room for {max(self.max_positions - longest, 0)} new ones within {self.max_positions}, "
                f"but {more} were asked for. Lower max_new_tokens, or raise max_model_len."
            )
        prompts = []
        for soft, ids in zip(soft_prompts.detach().to("cpu", self._base_model.dtype), token_ids, strict=True):
            prompts.append(
                {
                    # (K + T, D); only the first K rows are looked at
                    "prompt_embeds": torch.cat([soft, soft.new_zeros(len(ids), soft.shape[1])]),
                    "prompt_token_ids": [_PLACEHOLDER] * num_soft + list(ids),
                    "prompt_is_token_ids": [False] * num_soft + [True] * len(ids),
                }
            )
        return prompts

    def _ask(self, prompts: list[dict[str, Any]], sampling: Any) -> list[Any]:
        if self._llm is None:
            raise RuntimeError("this translator is closed")
        return list(self._llm.generate(prompts, sampling, lora_request=self._lora, use_tqdm=False))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
