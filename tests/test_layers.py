"""Imports point one way, in the order of the data: the order stands in `LAYERS` and in CONTRIBUTING.md."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent

LAYERS = [
    {
        "",
        "errors",
        "fingerprints",
        "storage",
        "config",
        "recording",
        "processes",
        "text_matching",
        "figures",
        "pages",
    },
    {"base_models", "language_models"},
    {"dod", "sample"},
    {"soft_prompts"},
    {"translators"},
    {"verbalization"},
    {"evaluation"},
    {"portability"},
    {"registry", "mlflow_plugins"},
    {"stages"},
    {"pipeline"},
    {"cli", "printing"},
]
"""A module may import from its own layer and from those above it in this list."""

KNOW_MLFLOW = {"registry", "mlflow_plugins", "stages", "pipeline", "cli"}


def layer_of(module: str) -> int:
    """Index of the layer that a module of ours belongs to."""
    top, _, rest = module.partition(".")
    name = "mlflow_plugins" if top == "mlflow_plugins" else rest.split(".")[0]
    return next(number for number, names in enumerate(LAYERS) if name in names)


def imports_of(source: str) -> list[str]:
    """Every module that a file imports, at its top or inside functions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module]
            # `from softprompt_registry import figures` names a module, not only its parent.
            found += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "softprompt_registry"]
    return found


def wrong_arrows(module: str, source: str) -> list[str]:
    """What a module imports and must not."""
    wrong = []
    own = layer_of(module)
    name = module.split(".")[1] if module.startswith("softprompt_registry.") else module.split(".")[0]
    for imported in imports_of(source):
        if imported.split(".")[0] == "mlflow" and name not in KNOW_MLFLOW:
            wrong.append(f"{module} imports {imported}, but its layer knows no MLflow")
        if imported.split(".")[0] not in ("softprompt_registry", "mlflow_plugins"):
            continue
        if imported.endswith(".__version__"):
            continue
        if layer_of(imported) > own:
            wrong.append(f"{module} imports {imported}, which lies below it")
    return wrong


def modules() -> list[tuple[str, Path]]:
    files = [*ROOT.glob("softprompt_registry/**/*.py"), *ROOT.glob("mlflow_plugins/**/*.py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return sorted(zip(names, files, strict=True))


def test_imports_point_one_way() -> None:
    assert [arrow for module, file in modules() for arrow in wrong_arrows(module, file.read_text())] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    # Imports inside functions count too: they hide a circle, they don't open it.
    names = {module for module, _ in modules()}
    graph = {module: names & set(imports_of(file.read_text())) - {module} for module, file in modules()}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_a_wrong_arrow_is_found() -> None:
    source = "def f():\n    from softprompt_registry.translators import training\n    import mlflow\n"
    assert wrong_arrows("softprompt_registry.dod.task", source) == [
        "softprompt_registry.dod.task imports softprompt_registry.translators, which lies below it",
        "softprompt_registry.dod.task imports mlflow, but its layer knows no MLflow",
    ]


def test_files_hold_one_idea() -> None:
    # Some 500 lines; past 540 a file holds two ideas.
    long = {name: len(file.read_text().splitlines()) for name, file in modules()}
    assert {name: lines for name, lines in long.items() if lines > 540} == {}
