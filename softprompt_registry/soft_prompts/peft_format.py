"""Soft prompts as PEFT adapters of type PROMPT_TUNING, both ways and without loss.

An exported folder is a soft prompt folder of ours and a PEFT adapter at once: PEFT reads `adapter_config.json` and
`adapter_model.safetensors`, we read `soft_prompt.json` and `soft_prompt.safetensors` beside them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from softprompt_registry.base_models.frozen import LAYOUT_WITHOUT_BOS, SEQUENCE_LAYOUT, BaseModel
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.errors import ArtifactError
from softprompt_registry.soft_prompts.encoding import encoding_for
from softprompt_registry.soft_prompts.soft_prompt import RECORD_FILE, SoftPrompt, SoftPromptRecord
from softprompt_registry.storage import folder_written_whole, read_json, require_free_folder, write_json

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
TENSOR_NAME = "prompt_embeddings"


def export_peft(soft_prompt: SoftPrompt, folder: Path) -> None:
    """Write a soft prompt as a PEFT adapter.

    PEFT puts the soft tokens before all that its tokenizer makes of a text; `what_peft_does_otherwise` says where that is
    not the soft prompt's layout.

    Raises:
        ArtifactError: `folder` exists.
    """
    import peft
    from safetensors.torch import save_file

    require_free_folder(folder, f"exporting soft prompt {soft_prompt.record.task!r}")
    base = soft_prompt.record.base_model
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name,
        revision=base.revision,
        inference_mode=True,
        num_virtual_tokens=soft_prompt.num_virtual_tokens,
        token_dim=base.hidden_size,
        num_layers=base.num_layers,
        num_transformer_submodules=1,
    )
    record = {key: _plain(value) for key, value in config.to_dict().items()}
    with folder_written_whole(folder) as partial:
        soft_prompt.save(partial)
        save_file({TENSOR_NAME: soft_prompt.embeddings.contiguous()}, partial / TENSORS_FILE, metadata={"format": "pt"})
        write_json(partial / CONFIG_FILE, record)


def import_peft(
    folder: Path,
    base_model: BaseModel,
    *,
    task: str,
    kind: str = "generation",
    template: str = "{x}",
    labels: tuple[str, ...] = (),
    ground_truth: str = "",
    layout: str | None = None,
) -> SoftPrompt:
    """A soft prompt from a PEFT adapter folder.

    Args:
        base_model: what the adapter was trained on; an adapter only has a name for it, which says nothing of the weights.
        task, kind, template, labels, ground_truth: what is known about its task. For a folder that `export_peft` wrote, and
            whose adapter was not changed since, its own record counts instead, down to where tuning started.
        layout: one of `LAYOUTS`, that it was trained in; None takes the one that PEFT gives with this tokenizer.

    Raises:
        ArtifactError: not a prompt-tuning adapter for a causal LLM in safetensors, or of another hidden size.
        BaseModelMismatch: the folder names another base model by its fingerprint.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    what = f"PEFT adapter {str(folder)!r}"
    config = read_json(folder / CONFIG_FILE, what)
    _check_config(config, what)
    if not (folder / TENSORS_FILE).is_file():
        raise ArtifactError(
            f"reading {what}: there is no {TENSORS_FILE!r}; expected the safetensors file that PEFT writes. Pickled adapters "
            "(adapter_model.bin) are not opened: load it in PEFT and save it again."
        )
    try:
        tensors = load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"reading {what}: {TENSORS_FILE} cannot be read ({error}). Save it again.") from error
    if list(tensors) != [TENSOR_NAME]:
        raise ArtifactError(
            f"reading {what}: found the tensors {sorted(tensors)[:5]}, expected {TENSOR_NAME!r} alone. It may be an adapter "
            "of another type."
        )
    embeddings = tensors[TENSOR_NAME].to(torch.float32)
    if (folder / RECORD_FILE).is_file():
        own = SoftPrompt.load(folder)
        require_same_base(f"importing {what}", "the adapter", own.record.base_model, "the base model", base_model.ref)
        if torch.equal(own.embeddings, embeddings):
            return own
        # Trained further elsewhere: the record's numbers are those of before.
        known = replace(own.record, metrics={}, tuning={"imported_from": "PEFT"})
        return SoftPrompt(embeddings, None, _as_trained_by_peft(known, base_model, layout))
    record = SoftPromptRecord(
        task=task,
        kind=kind,
        base_model=base_model.ref,
        template=template,
        labels=labels,
        ground_truth=ground_truth or ", ".join(labels),
        tuning={
            "imported_from": "PEFT",
            "peft_base_model": str(config.get("base_model_name_or_path") or "").rsplit("/", 1)[-1],
        },
    )
    return SoftPrompt(embeddings, None, _as_trained_by_peft(record, base_model, layout))


def peft_layout(tokenizer: Any) -> str | None:
    """The layout of rows in PEFT with this tokenizer; None where it is none of ours.

    PEFT puts the soft tokens before all that the tokenizer makes of a text, and some tokenizers write a BOS and some do not.
    """
    text: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("x")["input_ids"]
    before = whole[: whole.index(text[0])]
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    if before == bos:  # without a BOS both are one
        return SEQUENCE_LAYOUT
    return None if before else LAYOUT_WITHOUT_BOS


def what_peft_does_otherwise(record: SoftPromptRecord, tokenizer: Any) -> str | None:
    """What PEFT with this tokenizer puts behind a soft prompt, if not what it was tuned with, and what to do."""
    found = peft_layout(tokenizer)
    if found == record.layout:
        return None
    if record.layout == LAYOUT_WITHOUT_BOS:
        advice = "tokenize with add_special_tokens=False"
    elif found is None:
        advice = "tokenize with add_special_tokens=False and put the BOS before each text"
    else:
        advice = f"put the BOS ({tokenizer.bos_token!r}) before each text"
    does = "writes other special tokens before a text" if found is None else f"gives {found}"
    return (
        f"soft prompt {record.task!r} was tuned in the layout {record.layout}, but PEFT with this tokenizer {does}: "
        f"in PEFT, {advice}."
    )


def _as_trained_by_peft(record: SoftPromptRecord, base_model: BaseModel, layout: str | None) -> SoftPromptRecord:
    """A record with the layout and the encoding of rows that PEFT made."""
    layout = layout or peft_layout(base_model.tokenizer)
    if layout is None:
        raise ArtifactError(
            f"importing soft prompt {record.task!r} from PEFT: the tokenizer of {base_model.ref} writes other special tokens "
            f"than the BOS before a text; expected none, or the BOS alone. Name the layout that it was trained in (--layout)."
        )
    return replace(record, layout=layout, encoding=encoding_for(base_model.tokenizer))


def _check_config(config: dict[str, Any], what: str) -> None:
    found = {key: config.get(key) for key in ("peft_type", "task_type", "num_transformer_submodules")}
    if (
        found["peft_type"] != "PROMPT_TUNING"
        or found["task_type"] != "CAUSAL_LM"
        or found["num_transformer_submodules"] not in (None, 1)
    ):
        raise ArtifactError(
            f"reading {what}: found {found}; expected peft_type 'PROMPT_TUNING', task_type 'CAUSAL_LM' and one submodule. "
            "Other adapters are no soft prompts."
        )


def _plain(value: Any) -> Any:
    """A config value as JSON has it: enums by their value, sets as lists."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
