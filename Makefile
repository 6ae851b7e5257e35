# make demo   train a small RWKV on this machine's Python library, then run it as an RNN
# make test   all tests but the slow ones      make test-slow   those
# make check  lint, format, types              make docs       the documentation as a site, in site/
#
# Variables are set on make's command line, as in `make demo RUN=runs/other`. Rules below delete the folders
# VENV and RUN, so these two ignore environment variables of the same name.
PYTHON ?= python3
MINUTES ?= 4
VENV := .venv
# What is installed: this folder, or a wheel that was built from it.
PACKAGE := .
RUN := runs/demo
# What the demo does not read: packages, tests, and tables of characters and help texts.
NOT_READ := site-packages test tests idlelib lib2to3 encodings pydoc_data ensurepip msilib turtledemo
# How a model shows there what it has learned.
WRITE := 'class Error(Exception):\n    """' --escapes --max-tokens 150 --top-p 0.6

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find src -type f ! -name '*.pyc' ! -name '*.so')
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

.PHONY: demo test test-slow check docs format clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; use make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '$(PACKAGE)[plot]'
	touch $@

# Each of these builds the package, kernels included; what tests need has the other two in it.
$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '$(PACKAGE)[test]'
	touch $(VENV)/.installed $(VENV)/.installed-docs $@

$(VENV)/.installed-docs: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '$(PACKAGE)[docs]'
	touch $@

demo: $(VENV)/.installed
	$(call remove,$(RUN),metrics.jsonl .lock)
	@echo "A small model that comes with the package writes a class:"
	$(BIN)/receptance generate tiny-python $(WRITE) --seed 2
	@echo "Now one is trained for $(MINUTES) minutes on this machine's Python library:"
	$(BIN)/receptance train \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
		$(foreach name,$(NOT_READ),--exclude $(name)) --out '$(RUN)' \
		--minutes $(MINUTES) --tokenizer bpe:1024 --width 128 --layers 3 \
		--batch 4 --context 256 --learning-rate 6e-3 --final-learning-rate 1e-4 \
		--warmup-steps 50 --validation 0.02 --reports 5 --sample-prompt 'def '
	$(BIN)/receptance generate '$(RUN)' $(WRITE)
	$(BIN)/python benchmarks/demo.py '$(RUN)'

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	$(call remove,$(VENV),pyvenv.cfg)
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
