"""The flavors of soft prompt, bank and translator: what they write, what they leave out, and the way back."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from small_prompts import K, make, tiny_translator, translated
from tiny_llm import save_tiny_model, tiny_base_model

from mlflow_plugins import flavor_parts
from mlflow_plugins import soft_prompt as soft_prompt_flavor
from mlflow_plugins import soft_prompt_bank as bank_flavor
from mlflow_plugins import translator as translator_flavor
from softprompt_registry import __version__
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model, load_base_model_for
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.dod.task import fill_template
from softprompt_registry.errors import ArtifactError, BaseModelMismatch, ConfigError, DataError, RegistryError
from softprompt_registry.fingerprints import digest_of_directory, digest_of_file
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.translators.translator import Translator, TranslatorRecord

TEXT = "a warm and funny film"


@pytest.fixture(scope="module")
def base_model() -> BaseModel:
    return tiny_base_model()


@pytest.fixture(scope="module")
def soft_prompts() -> list[SoftPrompt]:
    return [make(task, seed) for seed, task in enumerate(("mood", "topic", "length"))]


@pytest.fixture
def bank(soft_prompts: list[SoftPrompt], tmp_path: Path) -> SoftPromptBank:
    return SoftPromptBank.save(soft_prompts, tmp_path / "made" / "bank")


@pytest.fixture(scope="module")
def translator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base_model = tiny_base_model()
    tiny_translator(base_model)
    folder = tmp_path_factory.mktemp("made") / "translator"
    Translator(base_model, TranslatorRecord(base_model.ref, K, train_tasks=("mood",)), "made").save(folder)
    return folder


def answer_alone(base_model: BaseModel, soft_prompt: SoftPrompt, text: str, max_new_tokens: int) -> str:
    ids = base_model.bos + base_model.tokenize(fill_template(soft_prompt.record.template, text))
    rows = base_model.generate(soft_prompt.embeddings[None], [ids], max_new_tokens=max_new_tokens)
    return base_model.decode(rows[0]).strip()


def encoded(soft_prompt: SoftPrompt) -> str:
    return base64.b64encode(soft_prompt.to_bytes()).decode()


def conf_of(uri: str, flavor_name: str) -> dict[str, Any]:
    conf: dict[str, Any] = mlflow.models.Model.load(uri).flavors[flavor_name]
    return conf


# --- Round trips ---


def test_soft_prompt_round_trip(
    mlflow_store: str, tiny_folder: Path, base_model: BaseModel, soft_prompts: list[SoftPrompt]
) -> None:
    info = soft_prompt_flavor.log_model(soft_prompts[0], name="mood", params={"lr": 0.1}, tags={"stage": "tune"})

    back = soft_prompt_flavor.load_model(info.model_uri)
    assert torch.equal(back.embeddings, soft_prompts[0].embeddings)
    assert back.initial_embeddings is not None and back.id == soft_prompts[0].id
    assert back.record == soft_prompts[0].record

    model = mlflow.pyfunc.load_model(info.model_uri)
    texts = [TEXT, "bad", "no plot, no point, no end in sight"]
    frame = pd.DataFrame({"input": texts}, index=[7, 8, 9])
    answers = model.predict(frame, params={"max_new_tokens": 6})
    assert list(answers["output"]) == [answer_alone(base_model, soft_prompts[0], text, 6) for text in texts]
    assert list(answers.index) == [7, 8, 9]

    logged = mlflow.get_logged_model(info.model_id)
    assert logged.params["lr"] == "0.1" and logged.tags["stage"] == "tune"
    assert logged.model_type == "softprompt_soft_prompt"


def test_bank_round_trip(
    mlflow_store: str,
    tiny_folder: Path,
    base_model: BaseModel,
    soft_prompts: list[SoftPrompt],
    bank: SoftPromptBank,
) -> None:
    info = bank_flavor.log_model(bank, name="bank", registered_model_name="demo-bank")

    back = bank_flavor.load_model("models:/demo-bank/1")
    assert back.digest == bank.digest and list(back.records()) == list(bank.records())
    assert [member.id for member in back] == [member.id for member in soft_prompts]

    model = mlflow.pyfunc.load_model(info.model_uri)
    # More rows than one batch takes, of several tasks and lengths: each answer stays with its row.
    rows = [(soft_prompts[i % 3], "word " * (i % 5) + str(i)) for i in range(flavor_parts.ROWS_PER_BATCH + 3)]
    frame = pd.DataFrame({"task": [sp.record.task for sp, _ in rows], "input": [text for _, text in rows]})
    answers = model.predict(frame, params={"max_new_tokens": 3})
    assert list(answers["output"]) == [answer_alone(base_model, sp, text, 3) for sp, text in rows]

    with pytest.raises(ArtifactError, match="'colour' of bank .*(mood, topic, length)"):
        model.predict(pd.DataFrame({"task": ["mood", "colour"], "input": ["a", "b"]}))


def test_translator_round_trip(
    mlflow_store: str, tiny_folder: Path, translator_folder: Path, soft_prompts: list[SoftPrompt]
) -> None:
    info = translator_flavor.log_model(translator_folder, name="translator")
    fresh = tiny_base_model()
    expected = [item.text for item in translated(Translator.load(translator_folder, fresh), soft_prompts)]
    assert len(set(expected)) == 3  # texts that differ, or the comparison below proves nothing

    stored = translator_flavor.load_model(info.model_uri)
    assert stored.record.train_tasks == ("mood",)
    assert digest_of_directory(stored.folder) == digest_of_directory(translator_folder)
    for base in (None, str(tiny_folder), tiny_base_model()):
        assert [item.text for item in translated(stored.load(base), soft_prompts)] == expected

    model = mlflow.pyfunc.load_model(info.model_uri)
    frame = pd.DataFrame({"soft_prompt": [encoded(item) for item in soft_prompts]})
    first = model.predict(frame)
    assert list(first["hard_prompt"]) == expected
    assert model.predict(frame).equals(first)
    short = model.predict(frame, params={"max_new_tokens": 2})
    assert all(len(text) < len(whole) for text, whole in zip(short["hard_prompt"], expected, strict=True))


def test_pyfunc_settings(
    mlflow_store: str, tiny_folder: Path, base_model: BaseModel, soft_prompts: list[SoftPrompt], tmp_path: Path
) -> None:
    soft_prompt_flavor.save_model(soft_prompts[0], tmp_path / "model")
    conf = conf_of(str(tmp_path / "model"), "python_function")
    assert conf["config"] == {"base_model": None, "max_new_tokens": 64}

    config = {"base_model": str(tiny_folder), "max_new_tokens": 2}
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=config)
    frame = pd.DataFrame({"input": [TEXT]})
    assert model.predict(frame)["output"][0] == answer_alone(base_model, soft_prompts[0], TEXT, 2)
    assert model.predict(frame, params={"max_new_tokens": 5})["output"][0] == answer_alone(
        base_model, soft_prompts[0], TEXT, 5
    )
    with pytest.raises(ConfigError, match="max_new_tokens is 0, expected a whole number of at least 1"):
        model.predict(frame, params={"max_new_tokens": 0})
    with pytest.raises(
        DataError, match=r"row 0: its input has \d+ tokens .* room for 443 beside 4 soft tokens and 65 new"
    ):
        model.predict(pd.DataFrame({"input": ["x" * 500]}), params={"max_new_tokens": 65})
    assert list(model.predict(frame.iloc[:0])["output"]) == []


def test_existing_logged_model_gets_the_artifact(mlflow_store: str, translator_folder: Path) -> None:
    with mlflow.start_run():
        started = mlflow.initialize_logged_model(name="translator", params={"base": "tiny"})
        info = translator_flavor.log_model(
            translator_folder,
            name="translator",
            model_id=started.model_id,
            params={"base": "tiny", "rank": 2},
            tags={"kind": "demo"},
        )
    logged = mlflow.get_logged_model(started.model_id)
    assert info.model_id == started.model_id
    assert str(logged.status) == "READY"
    assert logged.params == {"base": "tiny", "rank": "2"}
    assert logged.tags["kind"] == "demo"
    with pytest.raises(RegistryError, match="'rank' is '2' already and would become '4'"):
        flavor_parts.add_model_params(started.model_id, {"rank": 4})


# --- What is written, and what is not ---


@pytest.fixture
def saved(soft_prompts: list[SoftPrompt], bank: SoftPromptBank, translator_folder: Path, tmp_path: Path) -> Path:
    """One saved model of each flavor; strangers that lie beside the artifacts must stay behind."""
    for folder in (bank.folder, translator_folder):
        (folder / "optimizer.pt").write_bytes(b"\x80\x02}q\x00.")
    root = tmp_path / "saved"
    soft_prompt_flavor.save_model(soft_prompts[0], root / "soft_prompt", metadata={"team": "demo"})
    bank_flavor.save_model(bank, root / "bank")
    translator_flavor.save_model(translator_folder, root / "translator")
    return root


def test_files(saved: Path) -> None:
    around = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
    expected = {
        "soft_prompt": {"soft_prompt.json", "soft_prompt.safetensors"},
        "bank": {"bank.json", "bank.sqlite", "embeddings-00000.safetensors", "initial_embeddings-00000.safetensors"},
        "translator": {"adapter_config.json", "adapter_model.safetensors", "translator.json"},
    }
    for name, files in expected.items():
        paths = [path.relative_to(saved / name) for path in (saved / name).rglob("*") if path.is_file()]
        found = {str(path) for path in paths if path.parts[0] != "code"}
        assert found == around | {f"data/{name}/{file}" for file in files}


def test_absent_things(saved: Path, base_model: BaseModel) -> None:
    """No absolute path, no pickle, no weight of the base model, in any file."""
    base_shapes = {tuple(tensor.shape) for tensor in base_model.model.state_dict().values()}
    for path in (item for item in saved.rglob("*") if item.is_file() and "code" not in item.parts):
        content = path.read_bytes()
        assert not re.search(rb"(^|[\s\"':=]|file://)/(tmp|home|root|work|usr|var|private)", content), path
        assert not content.startswith((b"\x80", b"PK")), path
        if path.suffix == ".safetensors":
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            shapes = {tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
            assert not shapes & base_shapes
            assert len(content) < 100_000


def test_flavor_configuration_and_signature(
    saved: Path, base_model: BaseModel, soft_prompts: list[SoftPrompt], bank: SoftPromptBank, translator_folder: Path
) -> None:
    common = {
        "base_fingerprint": base_model.ref.fingerprint,
        "base_model": "tiny",
        "K": K,
        "D": 64,
        "format_version": 1,
        "softprompt_version": __version__,
    }
    assert conf_of(str(saved / "soft_prompt"), "softprompt_soft_prompt") == common | {
        "digest": soft_prompts[0].id,
        "task": "mood",
        "data": "data/soft_prompt",
    }
    assert conf_of(str(saved / "bank"), "softprompt_bank") == common | {
        "format_version": 2,
        "digest": bank.digest,
        "num_soft_prompts": 3,
        "data": "data/bank",
    }
    assert conf_of(str(saved / "translator"), "softprompt_translator") == common | {
        "digest": digest_of_file(translator_folder / "adapter_model.safetensors"),
        "data": "data/translator",
    }
    assert mlflow.models.Model.load(str(saved / "soft_prompt")).metadata == {"team": "demo"}

    columns = {"soft_prompt": ["input"], "bank": ["task", "input"], "translator": ["soft_prompt"]}
    outputs = {"soft_prompt": ["output"], "bank": ["output"], "translator": ["hard_prompt"]}
    for name, expected in columns.items():
        signature = mlflow.models.Model.load(str(saved / name)).signature
        assert signature.inputs.input_names() == expected
        assert signature.outputs.input_names() == outputs[name]
        assert [(param.name, param.default) for param in signature.params] == [("max_new_tokens", None)]


@pytest.mark.parametrize("on_an_index", [True, False])
def test_requirements(
    translator_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_an_index: bool
) -> None:
    """Our own distribution is pinned where an index has it; otherwise its source travels with the model."""
    source = [str(Path(flavor_parts.__file__).parent)]
    monkeypatch.setattr(flavor_parts, "own_source", lambda: None if on_an_index else source)

    def requirements(folder: str, **kwargs: Any) -> list[str]:
        translator_flavor.save_model(translator_folder, tmp_path / folder, **kwargs)
        return (tmp_path / folder / "requirements.txt").read_text().splitlines()

    first, *lines = requirements("plain")
    assert first == f"mlflow=={mlflow.__version__}"
    assert lines == flavor_parts.default_pip_requirements()
    assert (lines[0] == f"softprompt-registry=={__version__}") is on_an_index
    assert (tmp_path / "plain" / "code" / "mlflow_plugins" / "translator.py").is_file() is not on_an_index
    assert {"torch", "transformers", "peft", "safetensors"} <= {line.split("==")[0] for line in lines}
    assert not any("+" in line for line in lines)
    assert requirements("more", extra_pip_requirements=["sentencepiece"]) == [first, *lines, "sentencepiece"]
    (tmp_path / "extra.txt").write_text("sentencepiece\n")
    monkeypatch.chdir(tmp_path)
    assert requirements("file", extra_pip_requirements="extra.txt") == [first, *lines, "sentencepiece"]
    assert requirements("other", pip_requirements=["softprompt-registry"]) == [first, "softprompt-registry"]


def test_input_example_is_kept_and_not_predicted_on(
    mlflow_store: str, tiny_folder: Path, soft_prompts: list[SoftPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(ref: BaseModelRef, override: str | None = None) -> BaseModel:
        loaded.append(ref.name)
        return load_base_model_for(ref, override=override)

    monkeypatch.setattr(flavor_parts, "load_base_model_for", load)
    example = pd.DataFrame({"input": [TEXT]})
    info = soft_prompt_flavor.log_model(soft_prompts[0], name="mood", input_example=example)
    assert list(mlflow.pyfunc.load_model(info.model_uri).input_example["input"]) == [TEXT]
    assert loaded == []
    soft_prompt_flavor.log_model(soft_prompts[0], name="mood", input_example=example, validate_serving_input=True)
    assert loaded == ["tiny"]


# --- What is refused ---


def test_other_base_is_refused_with_both_names(
    mlflow_store: str,
    translator_folder: Path,
    soft_prompts: list[SoftPrompt],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other_folder = save_tiny_model(tmp_path / "other", seed=1)
    other = load_base_model(str(other_folder))
    both = rf"tiny@{soft_prompts[0].record.base_model.fingerprint[:12]}.*local:other@{other.ref.fingerprint[:12]}"
    translator = translator_flavor.log_model(translator_folder, name="translator").model_uri
    with pytest.raises(BaseModelMismatch, match=both):
        translator_flavor.load_model(translator).load(other)
    monkeypatch.setenv("SOFTPROMPT_BASE_MODEL", str(other_folder))
    with pytest.raises(BaseModelMismatch, match=both):
        mlflow.pyfunc.load_model(translator).predict(pd.DataFrame({"soft_prompt": [encoded(soft_prompts[0])]}))


def test_bad_payloads_are_refused_without_repeating_them(translator_folder: Path, tmp_path: Path) -> None:
    translator_flavor.save_model(translator_folder, tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    for payload, reason in (("§§secret§§", "not base64"), ("c2VjcmV0c2VjcmV0", "not safetensors")):
        with pytest.raises(ArtifactError, match=reason) as caught:
            model.predict(pd.DataFrame({"soft_prompt": [payload]}))
        assert payload not in str(caught.value) and "secret" not in str(caught.value)


def test_wrong_flavor_and_damaged_folder(saved: Path, translator_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"its flavor is \['softprompt_bank'\], expected 'softprompt_translator'"):
        translator_flavor.load_model(str(saved / "bank"))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "translator.json").write_bytes((translator_folder / "translator.json").read_bytes())
    with pytest.raises(ArtifactError, match=r"\['adapter_model.safetensors', 'adapter_config.json'\] are missing"):
        translator_flavor.save_model(damaged, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"unknown model_config \['device'\]; known are \['base_model'"):
        translator_flavor.save_model(translator_folder, tmp_path / "model", model_config={"device": "cpu"})


# --- Import-light ---


def test_every_plugin_module_is_light() -> None:
    code = """
import importlib, pkgutil, sys
import mlflow
def heavy():
    return sorted({'torch', 'transformers', 'vllm', 'peft', 'openai', 'sentence_transformers'} & set(sys.modules))
print(heavy(), sorted(name for name in sys.modules if name.startswith('softprompt_registry.')))
import mlflow_plugins
for module in pkgutil.iter_modules(mlflow_plugins.__path__):
    importlib.import_module(f'mlflow_plugins.{module.name}')
    print(module.name, heavy())
"""
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "[] []"  # MLflow has loaded our entry points, and nothing behind them
    assert {line.split()[0] for line in lines} >= {"dod_dataset", "recording", "run_context", "translator"}
    assert all(line.endswith(" []") for line in lines), lines
