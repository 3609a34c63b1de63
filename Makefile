# Both work from a fresh clone with make and Python 3.10 to 3.12:
#   make quickstart   install into .venv, make a corpus, train on two ranks, export, report (under ./quickstart, anew each time)
#   make test         everything that CI runs
# PYTHON=... chooses the interpreter, and TORCH_FLAGS=... is added to `pip install torch` alone (where torch comes from).

PYTHON ?= $(shell for name in python3 python3.12 python3.11 python3.10; do \
	"$$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null \
	&& echo "$$name" && break; done)
TORCH_FLAGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
Q := quickstart

.PHONY: test quickstart install
.DELETE_ON_ERROR:

# torch first and alone: see setup.py.
.venv/installed: setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "needs Python 3.10, 3.11 or 3.12 with venv (Debian: apt-get install python3-venv), or PYTHON=..." >&2; exit 2; }
	@echo "== installing into .venv (with $(PYTHON); a few minutes at most)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH_FLAGS) torch setuptools
	$(PIP) --no-build-isolation --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

install: .venv/installed

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

# Two ranks on the CPU, whatever the machine has; tp 2 cuts every layer in half.
quickstart: .venv/installed
	@rm -rf $(Q) && mkdir $(Q)
	@echo "== 1/6 corpus: five small artificial languages"
	@$(BIN)/python tools/build_corpus.py --made --output $(Q)/corpus
	@echo "== 2/6 vocabulary"
	@$(BIN)/python tools/train_vocabulary.py $(Q)/corpus/train --size 2048 --output $(Q)/vocabulary
	@echo "== 3/6 tokens"
	@$(BIN)/python tools/tokenize_corpus.py $(Q)/corpus/train --vocabulary $(Q)/vocabulary --output $(Q)/tokens
	@echo "== 4/6 training: recipe xlmega/recipes/quickstart.toml, 2 ranks, tp 2"
	@port=$$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'); \
	DS_ACCELERATOR=cpu $(BIN)/deepspeed --log_level error --num_gpus 2 --master_port $$port xlmega/pretrain.py \
		--ds_config ds_configs/cpu_debug.json --recipe quickstart --set data.root=$(Q)/tokens --tp 2 --output $(Q)/run
	@echo "== 5/6 export for transformers"
	@$(BIN)/python tools/convert_checkpoint.py $(Q)/run --to hf --output $(Q)/export
	@echo "== 6/6 report"
	@$(BIN)/python tools/report_run.py $(Q)/run --export $(Q)/export --output $(Q)/report
