# Everything works from a clean clone with Python 3.11+, pip and make. Heavy steps run one at a time on purpose.
# FLAGS are added to the command of a target: make torture FLAGS="--kills 4".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SET ?= oldest
READY := $(VENV)/ready

# With two cores, spinning OpenMP threads of one process starve the other.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-versions test-oldest test-today learning slow torture conformance real-size docs bench gpu gpu-wheels scaling results check format emoji emoji-quality emoji-alignment clean

demo: $(READY)  ## the main job: DDPO on the embedded pipeline, results in outputs/demo
	TRANSFORMERS_VERBOSITY=error $(BIN)/ddpo-trl demo $(FLAGS)  # it warns of a missing torchvision, which nothing here needs

test: $(READY)  ## the test suite; 8 to 14 minutes on two cores, depending on the processor
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 3 --dist loadfile $(FLAGS)  # three, because some tests wait; fixtures of a file are made once

test-oldest:  ## the core of the suite with the oldest supported versions, in .venv-oldest
	$(MAKE) test-versions SET=oldest FLAGS="$(FLAGS)"

test-today:  ## the same with the versions of a GPU machine of today, in .venv-today
	$(MAKE) test-versions SET=today FLAGS="$(FLAGS)"

# Left out: the benchmarks and the docs, whose programs are pinned, and rewards whose packages only an extra needs.
NOT_CORE := benchmarks learning test_docs_site.py test_documentation.py test_examples.py test_packaging.py \
	rewards/test_rewards_ocr.py rewards/test_rewards_safety.py

test-versions: .venv-$(SET)/ready  ## the core of the suite with the versions in tests/versions/$(SET).txt
	TESTED_VERSIONS=$(SET) OMP_NUM_THREADS=1 .venv-$(SET)/bin/pytest -q -n 3 --dist loadfile -rs \
		tests $(NOT_CORE:%=--ignore tests/%) $(FLAGS)

learning: $(READY)  ## slow tests that the demo learns and that its control does not
	$(BIN)/pytest -q -m slow -s tests/learning $(FLAGS)

slow: $(READY)  ## all other slow tests: the wheel, FSDP2, two processes by accelerate, the notebook
	$(BIN)/pytest -q -m slow tests --ignore tests/learning --ignore tests/conformance $(FLAGS)

torture: $(READY)  ## kill runs, in one pass and in two, 30 times at random moments; last line is survived N/N
	TRANSFORMERS_VERBOSITY=error $(BIN)/python tests/torture.py $(FLAGS)

conformance: $(READY)  ## the table of pipelines and checks, into docs/conformance.md; last line is passed/total
	TRANSFORMERS_VERBOSITY=error $(BIN)/python tests/conformance/table.py

real-size: $(READY)  ## models of published size on a simulated GPU: devices, dtypes, waits, memory; last line is passed/total
	OMP_NUM_THREADS=1 $(BIN)/python tests/real_size/run.py -n 2 $(FLAGS)

docs: $(READY)  ## the documentation as a site, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet  # the notice is about the theme's successor

bench: $(READY)  ## compare a round with TRL 0.23.1's and with the denoiser alone, into outputs/bench.json; 20 minutes, with nothing else running
	TRANSFORMERS_VERBOSITY=error $(BIN)/python benchmarks/bench.py $(FLAGS)

scaling: $(READY)  ## cost of a round against its size, into outputs/scaling.json; 9 minutes, with nothing else running
	$(BIN)/python benchmarks/scaling.py $(FLAGS)

results: $(READY)  ## docs/results.md from 27 runs of the demo in outputs/results; two hours, resumable
	TRANSFORMERS_VERBOSITY=error $(BIN)/python benchmarks/results.py $(FLAGS)


# With WHEELS, the machine's own Python and packages are used, and .venv is not made.
gpu: $(if $(WHEELS),,$(READY))  ## measurements on a GPU, into docs/gpu.md; at most 8 minutes, resumable; DEVICE=cpu rehearses it
	$(if $(WHEELS),$(PYTHON),$(BIN)/python) benchmarks/gpu/run.py $(if $(WHEELS),--wheels $(WHEELS)) $(FLAGS)

gpu-wheels:  ## packages that a GPU machine without network lacks, into build/gpu-wheels, for make gpu WHEELS=build/gpu-wheels
	$(PYTHON) benchmarks/gpu/wheels.py build/gpu-wheels

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

emoji: $(READY)  ## rebuild the embedded pipeline from the npm packages; hours, resumable
	$(BIN)/python tools/emoji/build.py $(FLAGS)

emoji-quality: $(READY)  ## share of samples that show what their caption says; last line is the share
	$(BIN)/python tools/emoji/quality.py $(FLAGS)

emoji-alignment: $(READY)  ## train the small CLIP of the reward emoji_alignment, and measure it; 20 minutes
	$(BIN)/python tools/emoji/alignment.py $(FLAGS)
	$(BIN)/python tools/emoji/alignment.py --measure

clean:
	rm -rf $(VENV) .venv-* build dist outputs

# torch 2.13.0 by exact version: its CPU build is what a machine without GPU wants, and a range may fetch CUDA packages.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(READY)

# The real versions, torch included: for other versions than 2.13.0 its CUDA build of 3 GB, which runs on a CPU too.
.venv-%/ready: pyproject.toml tests/versions/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --upgrade pip
	.venv-$*/bin/pip install --quiet --no-cache-dir --constraint tests/versions/$*.txt --editable ".[test]"
	touch $@
