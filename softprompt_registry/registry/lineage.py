"""What a model came from and what came from it, read from what MLflow keeps.

MLflow has no edge from model to model. The way up goes through the params of a LoggedModel and the inputs of the run that
made it; the way down goes through searches for models whose params, and versions whose tags, name this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion

from softprompt_registry.errors import RegistryError
from softprompt_registry.fingerprints import SHORT
from softprompt_registry.registry.conventions import (
    BASE_MODEL,
    DOD_SOURCE_TYPE,
    EVALUATION_PREFIX,
    MODEL_WORDS,
    PARAM_BASE_FINGERPRINT,
    PARAM_BASE_MODEL,
    PARAM_DOD_DIGEST,
    PARAM_DOD_NAME,
    REQUIRED_UPSTREAM,
    STAGE_EVALUATE_METHOD,
    STAGE_TAG,
    TAG_MODEL_ID,
    TAG_MODEL_TYPE,
    TAG_OF_PARAM,
    TAG_PREFIX,
    TAG_RUN_ID,
    UPSTREAM_PARAMS,
    dataset_digest,
)
from softprompt_registry.registry.lookup import (
    aliases_of,
    evaluation_metrics,
    find_by_uri,
    find_logged_model,
    find_run,
    model_id_of,
    parse_model_uri,
    quoted,
    run_by_id,
    search_logged_models,
    search_versions,
    version_by_uri,
)

UNKNOWN = "(unknown)"
_PARENT_RUN_TAG = "mlflow.parentRunId"


@dataclass(frozen=True)
class LineageNode:
    kind: str
    """`DoD`, `dataset`, `base model`, `run`, `bank`, `soft prompt`, `translator`, `portable prompt`, `model` or `version`."""
    id: str
    """Unique in the graph: a LoggedModel's id, `run:…`, `version:<name>/<number>`, `dod:…`, `base:<fingerprint>`."""
    title: str
    facts: dict[str, str]


@dataclass(frozen=True)
class LineageEdge:
    source: str
    target: str
    how: str
    """What the target did with the source, or the source with the target: `input`, `made`, `evaluated`, `registered`."""


@dataclass(frozen=True)
class LineageGraph:
    uri: str
    focus: str
    """Id of the node that was asked for."""
    nodes: tuple[LineageNode, ...]
    edges: tuple[LineageEdge, ...]
    """Each points in the direction of the data."""


def lineage(uri: str) -> LineageGraph:
    """The lineage of `models:/<name>@<alias>`, `models:/<name>/<version>`, `models:/m-<id>`, `runs:/<run>[/<name>]`.

    Up to DoDs and base models, down to registered versions. A link that cannot be followed ends in an `(unknown)` node.

    Raises:
        RegistryError: there is no such model, version or run.
    """
    walk = _Walk()
    focus = walk.start(uri)
    return LineageGraph(uri, focus, tuple(walk.nodes.values()), tuple(walk.edges.values()))


class _Walk:
    """The graph while it is read."""

    def __init__(self) -> None:
        self.nodes: dict[str, LineageNode] = {}
        self.edges: dict[tuple[str, str], LineageEdge] = {}

    def start(self, uri: str) -> str:
        parts = parse_model_uri(uri)
        if parts is None:
            raise RegistryError(
                f"tracing {uri!r}: expected 'models:/<name>@<alias>', 'models:/<name>/<version>', 'models:/m-<id>', "
                "'runs:/<run id>' or 'runs:/<run id>/<name>'. `softprompt list` shows the registered versions."
            )
        if parts.name is not None:
            version = version_by_uri(uri, parts)
            model_id = model_id_of(version)
            model = find_logged_model(model_id) if model_id else None
            self._add_downstream([] if model is None else [model])
            return self._add_version(version)
        if parts.run_id is not None and parts.logged_name is None:
            run = run_by_id(parts.run_id, f"tracing {uri!r}")
            focus = self._add_run(run)
            self._add_downstream(self._products(run))
            return focus
        model = find_by_uri(uri)
        self._add_downstream([model])
        return _node_id(model)

    def _add_downstream(self, models: list[LoggedModel]) -> None:
        waiting, seen = list(models), set[str]()
        while waiting:
            model = waiting.pop(0)
            if model.model_id in seen:
                continue
            seen.add(model.model_id)
            self._add_model(model)
            for version in self._versions_of(model):
                self._add_version(version)
            waiting += self._made_from(model)

    def _made_from(self, model: LoggedModel) -> list[LoggedModel]:
        if model.model_type == BASE_MODEL:
            param, value = PARAM_BASE_FINGERPRINT, model.params.get(PARAM_BASE_FINGERPRINT)
            found = search_logged_models(f"params.{param} = {quoted(value)}") if value else []
            return [other for other in found if other.model_type != BASE_MODEL]
        found = []
        for param, model_type in UPSTREAM_PARAMS.items():
            if model.model_type == model_type:
                found += search_logged_models(f"params.{param} = {quoted(model.model_id)}")
        return found

    def _versions_of(self, model: LoggedModel) -> list[ModelVersion]:
        # By tag: `register`'s versions and their copies. By source: what someone registered with MLflow alone.
        by_tag = search_versions(f"tags.`{TAG_MODEL_ID}` = {quoted(model.model_id)}")
        by_source = search_versions(f"source_path = {quoted(model.model_uri)}")
        versions = {(version.name, int(version.version)): version for version in by_tag + by_source}
        return [versions[key] for key in sorted(versions)]

    def _products(self, run: Run) -> list[LoggedModel]:
        """What a run made, oldest first; a base model that it was the first to need is not made by it."""
        made = search_logged_models(f"source_run_id = {quoted(run.info.run_id)}")
        return [model for model in made if model.model_type != BASE_MODEL]

    # --- nodes ---

    def _add(self, kind: str, node_id: str, title: str, facts: Mapping[str, str]) -> str:
        self.nodes[node_id] = LineageNode(kind, node_id, title, dict(facts))
        return node_id

    def _link(self, source: str, target: str, how: str) -> None:
        if source != target and (target, source) not in self.edges:
            self.edges.setdefault((source, target), LineageEdge(source, target, how))

    def _add_model(self, model: LoggedModel) -> str:
        """A LoggedModel with the run that made it and all that is upstream, and the runs that evaluated it."""
        node_id, kind = _node_id(model), _kind_of(model.model_type)
        if node_id in self.nodes:
            return node_id
        facts = {"name": model.name, "model_id": model.model_id, **model.params}
        if model.model_type == BASE_MODEL:
            return self._add_base(model.params, facts)
        metrics = evaluation_metrics(model)
        facts.update({EVALUATION_PREFIX + metric: repr(value) for metric, value in metrics.items()})
        self._add(kind, node_id, f"{kind} {model.name!r} {model.model_id}", facts)

        target = node_id
        run = find_run(model.source_run_id) if model.source_run_id else None
        if run is not None:
            target = self._add_run(run)
            self._link(target, node_id, "made")
        self._add_sources(target, node_id, model.params, model.model_type)
        for run_id in dict.fromkeys(
            metric.run_id for metric in model.metrics or [] if metric.key.startswith(EVALUATION_PREFIX)
        ):
            if run_id and run_id != model.source_run_id:
                self._add_evaluation(node_id, run_id)
        return node_id

    def _add_sources(self, target: str, node_id: str, params: Mapping[str, str], model_type: str | None) -> None:
        """What `params` name as upstream of a model, linked to `target`: the run that made it, or itself."""
        for param, upstream_type in UPSTREAM_PARAMS.items():
            if params.get(param):
                self._link(self._add_upstream(params[param], upstream_type), target, "input")
        if params.get(PARAM_DOD_DIGEST):
            digest, name = params[PARAM_DOD_DIGEST], params.get(PARAM_DOD_NAME, UNKNOWN)
            self._link(self._add_dod(name, dataset_digest(digest), {"digest": digest}), target, "input")
        if params.get(PARAM_BASE_FINGERPRINT):
            self._link(self._add_base(params, {}), target, "input")

        kinds = {self.nodes[source].kind for source, other in self.edges if other == target}
        required = MODEL_WORDS.get(REQUIRED_UPSTREAM.get(model_type or "", ""))
        if required and required not in kinds:
            self._link(
                self._add(required, f"unknown:{required}:{node_id}", f"{required} {UNKNOWN}", {}), target, "input"
            )
        # What came from a known model leaves it to that model to name its DoD and base model.
        if not any(self.nodes[source].facts for source, other in self.edges if other == target and _is_model(source)):
            for kind in ("DoD", "base model"):
                if kind not in kinds:
                    self._link(self._add(kind, f"unknown:{kind}", f"{kind} {UNKNOWN}", {}), target, "input")

    def _add_upstream(self, model_id: str, model_type: str) -> str:
        model = find_logged_model(model_id)
        if model is not None:
            return self._add_model(model)
        kind = _kind_of(model_type)
        return self._add(kind, model_id, f"{kind} {model_id} {UNKNOWN}", {})

    def _add_run(self, run: Run) -> str:
        """A run with its inputs. MLflow counts a model that a run logs metrics of as an input, its own products too."""
        node_id = f"run:{run.info.run_id}"
        if node_id in self.nodes:
            return node_id
        stage = run.data.tags.get(STAGE_TAG)
        facts = {"run_id": run.info.run_id, "name": run.info.run_name or "", "stage": stage or ""}
        words = ["run", stage, repr(run.info.run_name) if run.info.run_name != stage else None, run.info.run_id]
        self._add("run", node_id, " ".join(word for word in words if word), {**facts, "status": run.info.status})
        self._add_datasets(run, node_id)
        products = {model.model_id for model in self._products(run)}
        for item in (run.inputs.model_inputs if run.inputs else None) or []:
            if item.model_id in products:
                continue
            model = find_logged_model(item.model_id)
            if model is not None:
                self._link(self._add_model(model), node_id, "input")
                continue
            if item.model_id not in self.nodes:
                self._add("model", item.model_id, f"model {item.model_id} {UNKNOWN}", {})
            self._link(item.model_id, node_id, "input")
        return node_id

    def _add_datasets(self, run: Run, node_id: str) -> None:
        for item in run.inputs.dataset_inputs if run.inputs else []:
            name, digest, source_type = item.dataset.name, item.dataset.digest, item.dataset.source_type
            if source_type == DOD_SOURCE_TYPE:
                source = self._add_dod(name, digest, {})
            else:
                facts = {"name": name, "digest": digest, "source_type": source_type}
                source = self._add("dataset", f"dataset:{name}:{digest}", f"dataset {name!r} {digest[:SHORT]}", facts)
            self._link(source, node_id, "input")

    def _add_evaluation(self, model_node: str, run_id: str) -> None:
        """An evaluation with its datasets; not with its other models, which are only what this one is compared with."""
        run = find_run(run_id)
        if run is not None and run.data.tags.get(STAGE_TAG) == STAGE_EVALUATE_METHOD:
            run = find_run(run.data.tags.get(_PARENT_RUN_TAG, "")) or run
        if run is None:
            node_id = self._add("run", f"run:{run_id}", f"run {run_id} {UNKNOWN}", {"run_id": run_id})
        else:
            node_id, stage = f"run:{run.info.run_id}", run.data.tags.get(STAGE_TAG, "")
            if node_id not in self.nodes:
                facts = {"run_id": run.info.run_id, "name": run.info.run_name or "", "stage": stage}
                self._add("run", node_id, " ".join(f"run {stage} {run.info.run_id}".split()), facts)
            self._add_datasets(run, node_id)
        self._link(model_node, node_id, "evaluated")

    def _add_dod(self, name: str, digest: str, facts: Mapping[str, str]) -> str:
        node_id = f"dod:{digest}"
        known = self.nodes[node_id].facts if node_id in self.nodes else {}
        facts = {"name": name, "digest": digest, **known, **facts}
        return self._add("DoD", node_id, f"DoD {_name(facts['name'])} {digest[:SHORT]}", facts)

    def _add_base(self, params: Mapping[str, str], facts: Mapping[str, str]) -> str:
        """One node per fingerprint, though each experiment has its own LoggedModel of it."""
        fingerprint = params.get(PARAM_BASE_FINGERPRINT, UNKNOWN)
        node_id = f"base:{fingerprint}"
        known = self.nodes[node_id].facts if node_id in self.nodes else {}
        facts = {
            PARAM_BASE_FINGERPRINT: fingerprint,
            PARAM_BASE_MODEL: params.get(PARAM_BASE_MODEL, UNKNOWN),
            **facts,
            **known,
        }
        title = f"base model {_name(facts[PARAM_BASE_MODEL])} {fingerprint[:SHORT]}"
        return self._add("base model", node_id, title, facts)

    def _add_version(self, version: ModelVersion) -> str:
        """A registered version, below its LoggedModel or, when that is gone, below what the version's tags say of it."""
        node_id = f"version:{version.name}/{version.version}"
        if node_id in self.nodes:
            return node_id
        aliases = [
            f"@{alias}" for alias, number in (aliases_of(version.name) or {}).items() if number == int(version.version)
        ]
        facts = {"name": version.name, "version": str(version.version), "aliases": " ".join(aliases)}
        facts.update({key: value for key, value in version.tags.items() if key.startswith(TAG_PREFIX)})
        title = " ".join([f"version {version.name}/{version.version}", *aliases])
        self._add("version", node_id, title, facts)

        model_id = model_id_of(version)
        model = find_logged_model(model_id) if model_id else None
        if model is not None:
            self._link(self._add_model(model), node_id, "registered")
            return node_id
        model_type = version.tags.get(TAG_MODEL_TYPE)
        kind = _kind_of(model_type)
        gone = self._add(
            kind, model_id or f"unknown:model:{node_id}", f"{kind} {model_id or ''} {UNKNOWN}".replace("  ", " "), {}
        )
        self._link(gone, node_id, "registered")
        params = {param: version.tags[tag] for param, tag in TAG_OF_PARAM.items() if tag in version.tags}
        run_id = version.tags.get(TAG_RUN_ID) or version.run_id
        run = find_run(run_id) if run_id else None
        target = gone
        if run is not None:
            # First, because MLflow lists the gone model among the run's inputs (see `_add_run`).
            self._link(f"run:{run_id}", gone, "made")
            target = self._add_run(run)
        self._add_sources(target, gone, params, model_type)
        return node_id


def _name(name: str) -> str:
    return name if name == UNKNOWN else repr(name)


def _kind_of(model_type: str | None) -> str:
    return MODEL_WORDS.get(model_type or "", "model")


def _node_id(model: LoggedModel) -> str:
    if model.model_type == BASE_MODEL:
        return f"base:{model.params.get(PARAM_BASE_FINGERPRINT, UNKNOWN)}"
    return str(model.model_id)


def _is_model(node_id: str) -> bool:
    return node_id.startswith("m-")


_ROOTS_FIRST = ("DoD", "dataset", "base model")


def to_text(graph: LineageGraph) -> str:
    """A tree from the DoD and the base model down to the registered versions with their aliases.

    A node with several parents is drawn in full once and as `(above)` after that; a link that a longer way implies is left
    out (a translator stands below its bank, not below the base model too).
    """
    nodes = {node.id: node for node in graph.nodes}
    children = _children_without_shortcuts(graph)
    below = {child for found in children.values() for child in found}
    roots = [node for node in graph.nodes if node.id not in below] or [nodes[graph.focus]]
    roots.sort(key=lambda node: _ROOTS_FIRST.index(node.kind) if node.kind in _ROOTS_FIRST else len(_ROOTS_FIRST))
    drawn: set[str] = set()
    lines: list[str] = []

    def draw(node: LineageNode, first: str, rest: str) -> None:
        again = node.id in drawn and bool(children[node.id])
        mark = "  <- asked for" if node.id == graph.focus and not again else ""
        lines.append(f"{first}{node.title}{_scores(node)}{'  (above)' if again else ''}{mark}")
        if again:
            return
        drawn.add(node.id)
        for position, child in enumerate(children[node.id]):
            last = position == len(children[node.id]) - 1
            draw(nodes[child], rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    for root in roots:
        draw(root, "", "")
    return "\n".join(lines)


_SHOWN_SCORES = ("label_recall", "label_f1", "rouge_l", "cosine", "mpr_midrank")
"""The tree shows these; the JSON has all."""


def _scores(node: LineageNode) -> str:
    if node.kind == "version":
        # A version below its LoggedModel would only repeat that model's scores.
        return ""
    scores = [
        f"{key.removeprefix(EVALUATION_PREFIX)} {float(value):.3g}"
        for key, value in node.facts.items()
        if key.removeprefix(EVALUATION_PREFIX) in _SHOWN_SCORES and key.startswith(EVALUATION_PREFIX)
    ]
    return f"  ({', '.join(scores)})" if scores else ""


def _children_without_shortcuts(graph: LineageGraph) -> dict[str, list[str]]:
    children: dict[str, list[str]] = {node.id: [] for node in graph.nodes}
    for edge in graph.edges:
        children[edge.source].append(edge.target)

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = list(children[start])
        while waiting:
            node_id = waiting.pop()
            if node_id not in found:
                found.add(node_id)
                waiting += children[node_id]
        return found

    reach = {node_id: reachable(node_id) for node_id in children}
    return {
        node_id: [child for child in found if not any(child in reach[other] for other in found if other != child)]
        for node_id, found in children.items()
    }
