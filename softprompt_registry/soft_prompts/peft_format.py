"""Soft prompts as PEFT adapters of type PROMPT_TUNING, both ways and without loss.

An exported folder is a soft prompt folder of ours and a PEFT adapter at once: PEFT reads `adapter_config.json` and
`adapter_model.safetensors`, we read `soft_prompt.json` and `soft_prompt.safetensors` beside them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_registry.base_models.frozen import LAYOUT_WITHOUT_BOS, SEQUENCE_LAYOUT, BaseModel
from softprompt_registry.base_models.loading import load_base_model, model_location
from softprompt_registry.base_models.reference import BaseModelRef, digest_of_tensor, require_same_base
from softprompt_registry.errors import ArtifactError, BaseModelMismatch
from softprompt_registry.soft_prompts.encoding import encoding_for
from softprompt_registry.soft_prompts.soft_prompt import RECORD_FILE, SoftPrompt, SoftPromptRecord
from softprompt_registry.storage import folder_written_whole, read_json, require_free_folder, write_json

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
TENSOR_NAME = "prompt_embeddings"


def export_peft(soft_prompt: SoftPrompt, folder: Path, *, base_model_path: str | None = None) -> None:
    """Write a soft prompt as a PEFT adapter.

    PEFT puts the soft tokens before all that its tokenizer makes of a text; `what_peft_does_otherwise` says where that is
    not the soft prompt's layout.

    Args:
        base_model_path: where PEFT's Auto classes will find the base model: a folder, a Hub name or `packaged:NAME`. None:
            its Hub name, and nothing for a packaged or local base model, whose folder is not recorded (see `how_to_load`).

    Raises:
        ArtifactError: `folder` exists.
        BaseModelMismatch: `base_model_path` leads to another base model.
    """
    import peft
    from safetensors.torch import save_file

    require_free_folder(folder, f"exporting soft prompt {soft_prompt.record.task!r}")
    base = soft_prompt.record.base_model
    place, revision = _place_of_base_model(base, base_model_path)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=place,
        revision=revision,
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


def _place_of_base_model(base: BaseModelRef, path: str | None) -> tuple[str | None, str | None]:
    """(what transformers' from_pretrained takes, revision)"""
    if path is not None:
        load_base_model(path, expected=base)
        return model_location(path)[:2]
    return (None, None) if base.name.startswith(("packaged:", "local:")) else (base.name, base.revision)


def how_to_load(folder: Path, base: BaseModelRef) -> str:
    """The Python expression that opens an exported adapter in PEFT; FOLDER is that of a local base model."""
    if read_json(folder / CONFIG_FILE, f"PEFT adapter {str(folder)!r}")["base_model_name_or_path"] is not None:
        return f"peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})"
    if base.name.startswith("packaged:"):
        model = f"softprompt_registry.base_models.loading.load_base_model({base.name!r}).model"
    else:
        model = "transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"
    return f"peft.PeftModel.from_pretrained({model}, {str(folder)!r})"


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
    """A soft prompt from a PEFT adapter.

    Args:
        folder: that of the adapter, or one that holds the folder of a single adapter with a name.
        base_model: what the adapter was trained on; an adapter only has a name for it, which says nothing of the weights.
        task, kind, template, labels, ground_truth: what is known about its task. For a folder that `export_peft` wrote, and
            whose adapter was not changed since, its own record counts instead, down to where tuning started.
        layout: one of `LAYOUTS`, that it was trained in; None takes the one that PEFT gives with this tokenizer.

    Raises:
        ArtifactError: not a prompt-tuning adapter for a causal LLM in safetensors, or of another hidden size.
        BaseModelMismatch: the folder names another base model by its fingerprint, or has embedding layers of another.
    """
    import torch

    folder = _adapter_folder(folder)
    what = f"PEFT adapter {str(folder)!r}"
    config = read_json(folder / CONFIG_FILE, what)
    _check_config(config, what)
    tensors = _read_tensors(folder, what)
    embeddings = tensors.pop(TENSOR_NAME).to(torch.float32)
    _check_size(config, embeddings, what)
    _check_embedding_layers(tensors, base_model.ref, what)
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


def _adapter_folder(folder: Path) -> Path:
    """`folder`, or the one folder in it that holds an adapter: PEFT makes one for each adapter not called `default`."""
    if (folder / CONFIG_FILE).is_file():
        return folder
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if len(found) == 1:
        return found[0]
    raise ArtifactError(
        f"reading PEFT adapter {str(folder)!r}: "
        + (
            f"it holds the adapters {[path.name for path in found]}; expected one. Name the folder of one of them."
            if found
            else f"there is no {CONFIG_FILE!r}; expected the folder that PEFT's `save_pretrained` wrote. Check the path, and "
            "download an adapter of the Hub first (`hf download NAME --local-dir FOLDER`)."
        )
    )


def _read_tensors(folder: Path, what: str) -> dict[str, torch.Tensor]:
    """The soft prompt under `TENSOR_NAME`, with the embedding layers where they were saved too."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / TENSORS_FILE).is_file():
        # Neither with torch's `weights_only`, whose safety was broken more than once.
        pickled = (folder / PICKLED_FILE).is_file()
        found = f"it has pickled weights, {PICKLED_FILE!r}, which are not opened" if pickled else "it has no weights"
        raise ArtifactError(
            f"reading {what}: {found}; expected {TENSORS_FILE!r}, which PEFT writes by default. "
            "Save it again in PEFT: `PeftModel.from_pretrained(base_model, folder).save_pretrained(new_folder)`."
        )
    try:
        tensors = load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"reading {what}: {TENSORS_FILE} cannot be read ({error}). Save it again.") from error
    foreign = [name for name in tensors if name != TENSOR_NAME and not name.startswith("base_model.")]
    if TENSOR_NAME not in tensors or foreign:
        raise ArtifactError(
            f"reading {what}: found the tensors {sorted(tensors)[:5]}, expected {TENSOR_NAME!r}, and beside it at most the "
            "base model's embedding layers. It may be an adapter of another type."
        )
    return tensors


def _check_size(config: dict[str, Any], embeddings: torch.Tensor, what: str) -> None:
    found = {"num_virtual_tokens": config.get("num_virtual_tokens"), "token_dim": config.get("token_dim")}
    actual = dict(zip(found, embeddings.shape, strict=False))
    if embeddings.ndim != 2 or any(found[key] not in (None, size) for key, size in actual.items()):
        raise ArtifactError(
            f"reading {what}: its configuration has {found}, but {TENSOR_NAME!r} has shape {tuple(embeddings.shape)}; "
            "expected (num_virtual_tokens, token_dim). The two files belong to different adapters; save it again in PEFT."
        )


def _check_embedding_layers(layers: dict[str, torch.Tensor], base_model: BaseModelRef, what: str) -> None:
    """Refuse the embedding layers of another base model than `base_model`.

    Beside a soft prompt PEFT saves the layers that `get_input_embeddings` and `get_output_embeddings` give, whole: on
    request, and by itself where the vocabulary has grown (or shrunk) since the base model was loaded.
    """
    rows = {name: len(tensor) for name, tensor in layers.items()}
    doing = f"reading {what}: it holds embedding layers of its base model too"
    todo = "Save the model that it was trained on, with its tokenizer, and name that folder with --base-model."
    if any(count != base_model.vocab_size for count in rows.values()):
        raise BaseModelMismatch(
            f"{doing}, with {rows} tokens; expected the {base_model.vocab_size} of {base_model}. Its vocabulary was resized "
            f"before training. {todo}"
        )
    if layers and not any(digest_of_tensor(tensor) == base_model.embedding_sha256 for tensor in layers.values()):
        raise BaseModelMismatch(
            f"{doing} ({', '.join(layers)}), whose numbers are not those of {base_model}; expected the same. {todo}"
        )


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
