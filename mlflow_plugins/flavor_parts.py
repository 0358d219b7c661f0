"""What our flavors share: writing and reading the MLflow model around an artifact, and answering with a base model.

A flavor keeps the artifact's own folder as it is, under `data/`; MLflow only adds MLmodel and the environment files.
"""

from __future__ import annotations

import base64
import importlib.metadata
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.models import Model
from mlflow.models.model import ModelInfo
from mlflow.models.signature import ModelSignature
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

from softprompt_registry import __version__
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model_for
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.dod.task import fill_template
from softprompt_registry.errors import ArtifactError, ConfigError, DataError, RegistryError
from softprompt_registry.soft_prompts.encoding import RowEncoder

if TYPE_CHECKING:
    from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt

DISTRIBUTION = "softprompt-registry"
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "platformdirs", "pyyaml")

MODEL_CONFIG: dict[str, Any] = {"base_model": None, "max_new_tokens": 64}
"""Settings of a loaded pyfunc. MLflow lets a server override only keys that were logged, so all of them are."""

ROWS_PER_BATCH = 16


def default_pip_requirements(libraries: Sequence[str] = LIBRARIES) -> list[str]:
    """What our artifacts need where they are loaded, pinned; our own distribution first, if an index has it.

    Local labels (`+cpu`) are left out: no index serves them, and the machine that serves may have a GPU.
    """
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in libraries}
    own = [] if own_source() else [f"{DISTRIBUTION}=={__version__}"]
    return [*own, *(f"{name}=={version}" for name, version in versions.items())]


def own_source() -> list[str] | None:
    """Folders of our packages, to travel inside a model (`code_paths`); None where an index can give them.

    An installation from a folder or a repository (PEP 610) is a version that no index has, so an environment that is
    rebuilt from the model's requirements could not get it.
    """
    root = Path(__file__).resolve().parent.parent
    # Metadata is looked for beside this package only: `importlib.metadata` also finds what a build left in a source tree.
    record = root / f"{DISTRIBUTION.replace('-', '_')}-{__version__}.dist-info"
    if record.is_dir() and not (record / "direct_url.json").exists():
        return None
    return [str(root / "softprompt_registry"), str(root / "mlflow_plugins")]


def signature_of(inputs: Sequence[str], outputs: Sequence[str]) -> ModelSignature:
    """Text columns in, text columns out, and the parameter `max_new_tokens`; null leaves the model's setting."""
    return ModelSignature(
        inputs=Schema([ColSpec("string", name) for name in inputs]),
        outputs=Schema([ColSpec("string", name) for name in outputs]),
        params=ParamSchema([ParamSpec("max_new_tokens", "long", None)]),
    )


def facts_of(base_model: BaseModelRef, num_virtual_tokens: int, digest: str, format_version: int) -> dict[str, Any]:
    """Facts about an artifact for MLmodel."""
    return {
        "base_fingerprint": base_model.fingerprint,
        "base_model": base_model.name,
        "K": num_virtual_tokens,
        "D": base_model.hidden_size,
        "digest": digest,
        "format_version": format_version,
        "softprompt_version": __version__,
    }


def require_files(source: Path, names: Sequence[str]) -> None:
    """Refuse a folder that lacks a file of its artifact."""
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise ArtifactError(
            f"saving {str(source)!r} as an MLflow model: {missing} are missing; expected a folder with {list(names)}. "
            "Check the path, or make the artifact again."
        )


def copy_files(source: Path, destination: Path, names: Sequence[str]) -> None:
    """Copy exactly the files of an artifact; whatever else lies in its folder stays behind."""
    require_files(source, names)
    destination.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, destination / name)


def save(
    flavor_name: str,
    loader_module: str,
    write_artifact: Callable[[Path], None],
    path: str | Path,
    *,
    folder_name: str,
    facts: Mapping[str, Any],
    default_signature: ModelSignature,
    default_libraries: Sequence[str] = LIBRARIES,
    default_model_config: Mapping[str, Any] = MODEL_CONFIG,
    mlflow_model: Model | None = None,
    signature: ModelSignature | None = None,
    pip_requirements: Sequence[str] | str | None = None,
    extra_pip_requirements: Sequence[str] | str | None = None,
    model_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Write an MLflow model whose data is what `write_artifact` puts into the folder it is handed.

    Args:
        loader_module: the flavor's module, whose `_load_pyfunc` reads the folder.
        model_config: overrides settings of the flavor's own.
        options: arguments of `mlflow.pyfunc.save_model`.
    """
    # `Model.log` passes this on to the flavor although it is its own argument.
    options.pop("validate_serving_input", None)
    model_config = {**default_model_config, **(model_config or {})}
    unknown = sorted(set(model_config) - set(default_model_config))
    if unknown:
        raise ConfigError(
            f"saving a {flavor_name} model: unknown model_config {unknown}; known are {list(default_model_config)}."
        )
    mlflow_model = mlflow_model or Model()
    # Set here: handed to pyfunc without an input example it brings a warning that asks for one.
    mlflow_model.signature = signature or default_signature
    mlflow_model.add_flavor(flavor_name, data=f"data/{folder_name}", **facts)
    if pip_requirements is None and options.get("conda_env") is None:
        # Without requirements of ours MLflow would load the model, base model included, to find out what it imports.
        extra = extra_pip_requirements or []
        extra_lines = [f"-r {Path(extra).resolve()}"] if isinstance(extra, str) else list(extra)
        pip_requirements = [*default_pip_requirements(default_libraries), *extra_lines]
        extra_pip_requirements = None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / folder_name
        write_artifact(folder)
        mlflow.pyfunc.save_model(
            path=str(path),
            loader_module=loader_module,
            data_path=str(folder),
            mlflow_model=mlflow_model,
            pip_requirements=pip_requirements,
            extra_pip_requirements=extra_pip_requirements,
            model_config=model_config,
            **{"code_paths": own_source(), **options},
        )


def log(
    module_name: str,
    artifact: Any,
    *,
    name: str,
    model_id: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    **options: Any,
) -> ModelInfo:
    """Log an artifact through the flavor in `module_name`, as a new LoggedModel or into the one that `model_id` names.

    MLflow takes `params` and `tags` for a new model only; here an existing one gets them as well. An input example is
    kept but, unless `validate_serving_input=True`, not predicted on: that would load the base model.

    Args:
        options: arguments of `mlflow.models.Model.log`, such as `registered_model_name`, and of the flavor's `save_model`.
    """
    if model_id is not None:
        add_model_params(model_id, params or {})
        mlflow.set_logged_model_tags(model_id, dict(tags or {}))
    flavor = sys.modules[module_name]
    info: ModelInfo = Model.log(
        artifact_path=None,
        flavor=flavor,
        artifact=artifact,
        name=name,
        model_id=model_id,
        params=dict(params or {}),
        tags=dict(tags or {}),
        # MLflow copies the run's metrics of this step onto the LoggedModel, where ours already are: name a step without any.
        step=-1,
        **{"model_type": flavor.FLAVOR_NAME, "validate_serving_input": False, **options},
    )
    return info


def add_model_params(model_id: str, params: Mapping[str, Any]) -> None:
    """Log params to a LoggedModel, skipping those it has with the same value.

    Raises:
        RegistryError: it has one of them with another value; a LoggedModel's params cannot be changed.
    """
    client = mlflow.MlflowClient()
    texts = {key: str(value) for key, value in params.items()}
    known = client.get_logged_model(model_id).params if texts else {}
    for key, text in texts.items():
        if known.get(key, text) != text:
            raise RegistryError(
                f"logging params to model {model_id!r}: {key!r} is {known[key]!r} already and would become {text!r}; "
                "params of a logged model cannot be changed. Use another name, or log a new model."
            )
    new = {key: text for key, text in texts.items() if key not in known}
    if new:
        client.log_model_params(model_id, new)


def artifact_folder(model_uri: str, flavor_name: str, dst_path: str | None = None) -> Path:
    """The artifact's folder inside a logged or saved model, downloaded where needed.

    Raises:
        ArtifactError: the model is of another flavor.
    """
    root = Path(mlflow.artifacts.download_artifacts(artifact_uri=str(model_uri), dst_path=dst_path))
    flavors = Model.load(str(root)).flavors
    if flavor_name not in flavors:
        found = sorted(set(flavors) - {"python_function"})
        raise ArtifactError(
            f"loading {str(model_uri)!r}: its flavor is {found}, expected {flavor_name!r}. Load it with its own flavor, "
            "or name another model."
        )
    return root / str(flavors[flavor_name]["data"])


class ServedBaseModel:
    """The base model behind a pyfunc: loaded by its first request and used by one request at a time.

    MLflow's server answers in several threads, while a translator switches its adapter on in the one shared model.
    """

    def __init__(self, ref: BaseModelRef, model_config: Mapping[str, Any] | None) -> None:
        self.ref = ref
        self._settings = {**MODEL_CONFIG, **(model_config or {})}
        self._lock = threading.Lock()
        self._loaded: BaseModel | None = None

    @contextmanager
    def in_use(self) -> Iterator[BaseModel]:
        """The base model, held for the block.

        Raises:
            BaseModelMismatch: what was found under its name is another base model than the artifact's.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = load_base_model_for(self.ref, override=self._settings["base_model"])
            yield self._loaded

    def max_new_tokens(self, params: Mapping[str, Any] | None) -> int:
        """The request's length cap, else the model's."""
        found = (params or {}).get("max_new_tokens")
        value = self._settings["max_new_tokens"] if found is None else found
        # Values from a DataFrame or a served request can be numpy's.
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ConfigError(f"predicting: max_new_tokens is {value!r}, expected a whole number of at least 1.")
        return int(value)

    def answer(
        self, soft_prompts: Sequence[SoftPrompt], texts: Sequence[str], params: Mapping[str, Any] | None
    ) -> list[str]:
        """What the base model says, greedily, to each text in the frame and under the soft prompt of its row."""
        import torch

        limit = self.max_new_tokens(params)
        answers = [""] * len(texts)
        with self.in_use() as base:
            prompts = [
                _prompt_ids(base, soft_prompt, text, row, limit)
                for row, (soft_prompt, text) in enumerate(zip(soft_prompts, texts, strict=True))
            ]
            # Rows of like length share a batch, so that little is lost to padding.
            order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
            for start in range(0, len(order), ROWS_PER_BATCH):
                rows = order[start : start + ROWS_PER_BATCH]
                soft = torch.stack([soft_prompts[row].embeddings for row in rows]).to(base.device)  # (B, K, D)
                generated = base.generate(soft, [prompts[row] for row in rows], max_new_tokens=limit)
                for row, ids in zip(rows, generated, strict=True):
                    answers[row] = base.decode(ids).strip()
        return answers


def soft_prompt_from_base64(text: str, row: int, base_model: BaseModelRef) -> SoftPrompt:
    """The soft prompt in a request's cell. The payload is never repeated in an error."""
    from softprompt_registry.soft_prompts.soft_prompt import soft_prompt_from_bytes

    try:
        payload = base64.b64decode(text, validate=True)
    except ValueError:
        raise ArtifactError(
            f"reading the soft prompt of row {row}: its {len(text)} characters are not base64; expected a "
            "soft_prompt.safetensors file, base64-encoded. Encode the file's bytes."
        ) from None
    return soft_prompt_from_bytes(payload, base_model)


def _prompt_ids(base: BaseModel, soft_prompt: SoftPrompt, text: str, row: int, max_new_tokens: int) -> list[int]:
    """The filled template, encoded as in tuning. An input that is too long is refused, not cut: its end may matter."""
    filled = fill_template(soft_prompt.record.template or "{x}", text)
    ids = RowEncoder.of(base, soft_prompt.record).text(filled)
    room = base.max_positions - soft_prompt.num_virtual_tokens - max_new_tokens
    if len(ids) > room:
        raise DataError(
            f"predicting row {row}: its input has {len(ids)} tokens with the template; base model {base.ref} has room for "
            f"{max(room, 0)} beside {soft_prompt.num_virtual_tokens} soft tokens and {max_new_tokens} new ones. "
            "Shorten the input or lower max_new_tokens."
        )
    return ids
