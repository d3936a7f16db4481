# A fresh machine needs git, make and Python 3.11 or later. Everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Whole files go to a process, since the tests of a file share what takes long to make: trainings, environments.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help try demo test test-slow test-all vllm-newest quality dist docs clean

help:
	@echo "make try       ask a trained model about a picture, see where it looked (seconds, after installing)"
	@echo "make demo      teach a trained model from answers alone which patches to keep (minutes)"
	@echo "make test      the quick tests (minutes; WORKERS=1 for one process, 2 by default)"
	@echo "make test-slow the slow tests: real processes, longer trainings"
	@echo "make test-all  all tests, with those that only a release needs"
	@echo "make vllm-newest the plugin's tests with the newest vLLM for CPUs (many minutes)"
	@echo "make quality   ruff, mlinter and mypy"
	@echo "make dist      a wheel of the package, in dist"
	@echo "make docs      the documentation as a site, in build/docs"
	@echo "make clean     remove the environment and what the demo wrote"

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or later is needed, this is ' + sys.version) if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV) || (echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1)
	$(BIN)/python -m pip install --upgrade pip

# Fails unless each package of the extra `examples` is installed, as after `pip install -e ".[examples]"`.
HAS_EXAMPLES = import re; from importlib.metadata import requires, version; \
	[version(re.match(r"[\w.-]+", need)[0]) for need in requires("trips-transformers") if "examples" in need.partition(";")[2]]

$(VENV)/.examples: pyproject.toml | $(BIN)/python
	$(BIN)/python -c '$(HAS_EXAMPLES)' 2> /dev/null || $(BIN)/python -m pip install -e ".[examples]"
	touch $@

# $(VENV)/.dev: the project with its extra `dev`, and so on.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e ".[$*]"
	touch $@

try: $(VENV)/.examples
	$(BIN)/python examples/ask.py

demo: $(VENV)/.examples
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(PYTEST) -m "not slow and not release"

test-slow: $(VENV)/.dev
	$(PYTEST) -m "slow and not release" --durations 20

test-all: $(VENV)/.dev
	$(PYTEST) --durations 20

vllm-newest: $(VENV)/.dev
	$(BIN)/python .ci/newest_vllm.py

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter --no-progress modeling_trips
	mkdir -p build/types && ln -sfn ../../examples build/types/trips_examples && ln -sfn ../../serving build/types/trips_serving
	$(BIN)/mypy

dist: | $(BIN)/python
	$(BIN)/python -m pip wheel --no-deps -w dist .

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -E -W --keep-going -b html docs build/docs

clean:
	rm -rf $(VENV) demo build *.egg-info
