"""Reads request bodies before `mlflow models serve` does: the one place that touches MLflow's scoring server."""

from __future__ import annotations

import functools
import json
import logging
import sys
from dataclasses import asdict
from typing import Any

from mlflow_plugins.serving_requests import (
    RequestRefused,
    ServingConfig,
    check_rows,
    internal_error,
    kind_of,
    names_are,
    read_params,
    shortened,
)

_log = logging.getLogger(__name__)

FORMATS = ("dataframe_records", "dataframe_split", "inputs", "instances")


def guard_scoring_server(loader_module: str, config: ServingConfig) -> None:
    """In a process of `mlflow models serve`: read request bodies of our model here, before the scoring server does.

    Permissive columns and `RequestRefused` keep most of the contract by public API alone, wherever the model runs. But
    some requests never reach a model's `predict`: the scoring server (3.17 and 3.18 alike) answers a body that is not
    JSON with that body, drops unknown columns, parameters and keys, folds `instances` of different keys into one row,
    quotes parameters of a wrong type, and fails with a bare 500 without a content type. It has no hook for any of this,
    so its function `invocations` is wrapped. Elsewhere (no scoring server in this process, or another one) nothing is
    changed.
    """
    server: Any = sys.modules.get("mlflow.pyfunc.scoring_server")
    if "mlflow.pyfunc.scoring_server.app" not in sys.modules or server is None:
        return
    if not hasattr(server, "invocations"):
        _log.warning("this MLflow's scoring server is not known: malformed requests get its own error texts")
        return
    server.invocations = _guarded(getattr(server.invocations, "__wrapped__", server.invocations), loader_module, config)


def _guarded(invocations: Any, loader_module: str, config: ServingConfig) -> Any:
    @functools.wraps(invocations)
    def guarded(data: Any, content_type: Any, model: Any, input_schema: Any) -> Any:
        if model.loader_module != loader_module:
            return invocations(data, content_type, model, input_schema)
        try:
            rows, params = read_body(data, content_type, config)
            check_rows(rows, config)
            body = {"dataframe_records": rows, "params": asdict(read_params(params, config))}
            return invocations(body, "application/json", model, input_schema)
        except RequestRefused:
            raise
        except Exception:
            raise internal_error() from None

    return guarded


def read_body(body: bytes, content_type: str | None, config: ServingConfig) -> tuple[list[dict[str, Any]], object]:
    """(rows, params) of a request body; the four JSON forms of MLflow all become a list of rows.

    Raises:
        RequestRefused: it is not JSON of one of these forms, or larger than `max_rows` of the largest soft prompts.
    """
    doing = "reading the request"
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestRefused(
            f"{doing}: its Content-Type is {shortened(repr(media_type), 40)}, expected 'application/json'. Send that "
            "header, and the rows as JSON."
        )
    texts = config.max_inputs + 2 * config.max_task_pairs
    limit = config.max_rows * (config.max_payload_bytes * 3 // 2 + texts * config.max_input_characters)
    if len(body) > limit:
        raise RequestRefused(f"{doing}: it has {len(body)} bytes, expected at most {limit}. Send fewer rows.")
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestRefused(
            f"{doing}: its {len(body)} bytes are not JSON; expected an object such as "
            '{"dataframe_records": [{"soft_prompt": "<base64>"}]}. Correct the body.'
        ) from None
    if not isinstance(request, dict):
        raise RequestRefused(f"{doing}: found {kind_of(request)}, expected an object with one of {', '.join(FORMATS)}.")
    if unknown := [name for name in request if name not in (*FORMATS, "params")]:
        raise RequestRefused(
            f"{doing}: {names_are(unknown)} unknown; expected one of {', '.join(FORMATS)}, and params beside it. Correct "
            "the name."
        )
    forms = [name for name in request if name in FORMATS]
    if len(forms) != 1:
        raise RequestRefused(f"{doing}: found {len(forms)} of {', '.join(FORMATS)}; expected exactly one. Send one.")
    form = forms[0]
    content = request[form]
    if form == "dataframe_split":
        rows = _rows_of_split(content)
    else:
        # A list of rows means the same in the other three forms.
        rows = _rows_of_columns(content) if isinstance(content, dict) and form != "dataframe_records" else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RequestRefused(
            f'{doing}: {form} does not hold rows, expected a list of objects such as [{{"soft_prompt": "<base64>"}}]. '
            "Correct it."
        )
    return rows, request.get("params")


def _rows_of_split(content: object) -> list[dict[str, Any]]:
    columns = content.get("columns") if isinstance(content, dict) else None
    data = content.get("data") if isinstance(content, dict) else None
    if (
        not isinstance(columns, list)
        or not all(isinstance(name, str) for name in columns)
        or len(set(columns)) != len(columns)
        or not isinstance(data, list)
        or not all(isinstance(values, list) and len(values) == len(columns) for values in data)
    ):
        raise RequestRefused(
            "reading the request: dataframe_split does not hold rows, expected different names in columns and as many "
            'values in each row of data, such as {"columns": ["soft_prompt"], "data": [["<base64>"]]}. Correct it.'
        )
    return [dict(zip(columns, values, strict=True)) for values in data]


def _rows_of_columns(content: dict[str, Any]) -> list[dict[str, Any]]:
    """An object is one row; with a list as soft_prompt it is whole columns."""
    soft_prompts = content.get("soft_prompt")
    if not isinstance(soft_prompts, list):
        return [content]
    if not all(isinstance(values, list) and len(values) == len(soft_prompts) for values in content.values()):
        raise RequestRefused(
            f"reading the request: soft_prompt has {len(soft_prompts)} values, expected a list of as many in every "
            "column. Correct the lists, or send a list of rows."
        )
    return [dict(zip(content, values, strict=True)) for values in zip(*content.values(), strict=True)]
