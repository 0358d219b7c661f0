"""Registering as an MLflow run; a translator becomes a servable model first."""

from __future__ import annotations

from typing import Any

import mlflow
from mlflow.entities import LoggedModelInput, LoggedModelStatus

from mlflow_plugins import portable_prompt as portable_prompt_flavor
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.registry import conventions, registration
from softprompt_registry.registry.artifacts import find_artifact
from softprompt_registry.registry.lookup import evaluation_metrics, find_by_uri, quoted, search_logged_models
from softprompt_registry.stages.running import stage_run


def register(model_uri: str, name: str, model_config: dict[str, Any] | None = None) -> registration.RegisteredVersion:
    """Register an evaluated artifact. A translator is wrapped as the servable portable prompt model first."""
    with stage_run(conventions.STAGE_REGISTER):
        model = find_by_uri(model_uri)
        model_id = str(model.model_id)
        if model.model_type == conventions.TRANSLATOR:
            registration.require_complete_lineage(model)
            model_id = _wrap_as_portable_prompt(model, model_config)
        registered = registration.register(f"models:/{model_id}", name)
        mlflow.log_params({"register.model": registered.uri, "register.from": model_uri})
    return registered


def _wrap_as_portable_prompt(translator: Any, model_config: dict[str, Any] | None) -> str:
    """Id of the servable model of a translator, with its lineage and its evaluation; logged on first use.

    A translator with the same settings and the same evaluation is wrapped once: registering it again gives the same
    model, evaluating it anew gives a new one.
    """
    settings = digest_of_json(model_config or {})
    wrapped = search_logged_models(
        f"params.translator_model_id = {quoted(translator.model_id)} AND params.model_config_digest = {quoted(settings)}",
    )
    for model in wrapped:
        if model.status == LoggedModelStatus.READY and evaluation_metrics(model) == evaluation_metrics(translator):
            return str(model.model_id)
    folder = find_artifact(f"models:/{translator.model_id}", "translator").folder
    kept = {key: value for key, value in translator.params.items() if key in conventions.LINEAGE_PARAMS}
    mlflow.log_input(model=LoggedModelInput(model_id=translator.model_id))
    info = portable_prompt_flavor.log_model(
        folder,
        name="portable_prompt",
        params=kept | {"translator_model_id": translator.model_id, "model_config_digest": settings},
        model_config=model_config,
    )
    client = mlflow.MlflowClient()
    run = mlflow.active_run()
    assert run is not None
    for metric in translator.metrics or []:
        if metric.key.startswith(conventions.EVALUATION_PREFIX):
            client.log_metric(
                run.info.run_id,
                metric.key,
                metric.value,
                timestamp=metric.timestamp,  # the newest value stays the newest
                step=metric.step,
                model_id=info.model_id,
                dataset_name=metric.dataset_name,
                dataset_digest=metric.dataset_digest,
            )
    return str(info.model_id)
