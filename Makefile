# One virtual environment per purpose: .venv/core is what `pip install gguf-run` gives a user, .venv/test has what all
# tests need, .venv/test-cpu is the same without torch and Triton. Each is renewed when pyproject.toml changes.
PYTHON   ?= python3
FOLDERS  := formats kernels_cpu kernels_gpu models runtime
# Files of tests are dealt out by name to processes, which take up to 1.5 GB each: by how many tests they have, the
# longest ones would come last, since these have few.
WORKERS  ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
QUESTION ?= What is the capital of Japan?

# PyPI's torch for Linux brings CUDA libraries (gigabytes) and another Triton. The tests want the CPU build: from pip's
# configured index where that has it, else from PyTorch's own.
TORCH       := torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test test-cpu check fuzz clean

demo: .venv/core/.installed
	.venv/core/bin/gguf-run --temperature 0 --prompt "$(QUESTION)"

# Checks, then tests: `make test` with torch and Triton, `make test-cpu` without.
test test-cpu: %: .venv/%/.installed build/typing/gguf_run
	$(call checks,.venv/$@/bin)
	.venv/$@/bin/python -m pytest $(WORKERS) $(PYTEST_ARGS)

check: .venv/test-cpu/.installed build/typing/gguf_run
	$(call checks,.venv/test-cpu/bin)

define checks
$(1)/ruff check .
$(1)/ruff format --check .
$(1)/mypy
$(1)/lint-imports --no-logo
endef

# Damaged files for so many minutes: what no reader refuses in one line is kept in build/fuzz.
MINUTES ?= 5
fuzz: .venv/test-cpu/.installed
	.venv/test-cpu/bin/python tests/fuzz/fuzz.py --minutes $(MINUTES)

# The package as a folder of links, which mypy reads. An editable install makes the same, see setup.py.
build/typing/gguf_run: Makefile
	@mkdir -p $@
	@for entry in __init__.py __main__.py compat.py py.typed $(FOLDERS); do ln -sfn ../../../$$entry $@/$$entry; done
	@touch $@

.venv/%/.installed: pyproject.toml setup.py
	@echo "Installing packages into .venv/$*; this takes a minute or more the first time."
	@$(PYTHON) -m venv .venv/$*
	@$(if $(filter test,$*),$(call install,.venv/$*,$(TORCH)) 2>/dev/null || \
	$(call install,.venv/$*,--extra-index-url $(TORCH_INDEX) $(TORCH)))
	@$(call install,.venv/$*,--editable '.$(if $(filter core,$*),,[$*])')
	@touch $@

install = $(1)/bin/python -m pip install -qq --disable-pip-version-check $(2)

clean:
	rm -rf .venv build .*_cache *.egg-info .hypothesis
	find $(FOLDERS) tests benchmarks -name __pycache__ -exec rm -rf {} +
