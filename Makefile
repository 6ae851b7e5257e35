# make demo   train a small RWKV on this machine's Python library, then run it as an RNN
# make test   all tests but the slow ones      make test-slow   those
# make check  lint, format, types
#
# Variables are set on make's command line, as in `make demo RUN=runs/other`. Rules below delete the folders
# VENV and RUN, so these two ignore environment variables of the same name.
PYTHON ?= python3
MINUTES ?= 4
VENV := .venv
RUN := runs/demo

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find src -name '*.py' -o -name '*.cpp' -o -name '*.h')
BIN := $(VENV)/bin

# $(call remove,FOLDER,FILES) deletes a folder that is empty or holds one of the files, which show that
# the folder is what it is taken for.
define remove
	@if [ -n "$$(ls -A '$(1)' 2>/dev/null)" ]$(foreach file,$(2), && [ ! -e '$(1)/$(file)' ]); then \
		echo "make does not delete $(1), which holds no $(firstword $(2)): name another folder" >&2; \
		exit 1; \
	fi
	rm -rf -- '$(1)'
endef

.PHONY: demo test test-slow check format clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; use make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[plot]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/receptance doctor
	$(call remove,$(RUN),metrics.jsonl .lock)
	$(BIN)/receptance train \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
		--exclude site-packages --exclude test --exclude tests --exclude idlelib \
		--exclude lib2to3 --out '$(RUN)' \
		--minutes $(MINUTES) --tokenizer bpe:2048 --width 256 --layers 4 \
		--batch 4 --context 256 --learning-rate 4e-3 --final-learning-rate 1e-4 \
		--warmup-steps 50 --validation 0.02 --reports 5 --sample-prompt 'def '
	$(BIN)/receptance generate '$(RUN)' 'class Queue:' --max-tokens 200 --top-p 0.8
	$(BIN)/python benchmarks/demo.py '$(RUN)'

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	$(call remove,$(VENV),pyvenv.cfg)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
