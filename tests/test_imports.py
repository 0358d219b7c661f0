"""The science loads no MLflow, the plugins load no torch, and the command line answers without either."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
KNOW_MLFLOW = ("registry", "stages", "pipeline", "cli", "__main__")


def science_modules() -> list[str]:
    files = (ROOT / "softprompt_registry").rglob("*.py")
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return sorted(name for name in names if not any(part in KNOW_MLFLOW for part in name.split(".")))


def loaded_by(code: str, suspects: list[str]) -> list[str]:
    """Which of the suspects a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint([name for name in {suspects!r} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded: list[str] = ast.literal_eval(finished.stdout.strip().splitlines()[-1])
    return loaded


def test_science_loads_neither_mlflow_nor_vllm_nor_openai() -> None:
    code = "\n".join(f"import {name}" for name in science_modules())
    assert loaded_by(code, ["mlflow", "vllm", "openai"]) == []


def test_that_check_can_fail() -> None:
    assert loaded_by("import softprompt_registry.registry.promotion", ["mlflow", "vllm", "openai"]) == ["mlflow"]


def test_importing_the_package_loads_no_torch() -> None:
    assert loaded_by("import softprompt_registry", ["torch", "transformers", "mlflow"]) == []


def test_the_command_line_helps_without_heavy_imports() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom softprompt_registry.cli import main\n"
        "for args in (['--help'], ['tune', '--help'], ['demo', '--help']):\n"
        "    assert CliRunner().invoke(main, args).exit_code == 0"
    )
    assert (
        loaded_by(code, ["torch", "transformers", "mlflow", "peft", "openai", "matplotlib", "pandas", "pydantic"]) == []
    )
