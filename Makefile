# Two commands on a fresh machine: `make demo` and `make test`. Each installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/installed
DEVSTAMP := $(VENV)/installed-dev

.PHONY: demo test test-portable check setup clean

demo: $(STAMP)  ## compress the embedded language model at 4, 3 and 2 bits with three schemes and compare them
	$(RUN)/laconic demo --out laconic-demo

test: $(DEVSTAMP) check  ## linters, types and all tests
	$(RUN)/python -m pytest -n 2 --durations=20

test-portable: $(DEVSTAMP)  ## the tests that compute, as other machines would run them: 2 threads, an instruction set without vector units
	$(RUN)/python tools/portable.py

check: $(DEVSTAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

setup: $(DEVSTAMP)

# torch comes first and exactly: another spec would fetch gigabytes of CUDA
$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(DEVSTAMP): $(STAMP)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,eval,search,surgery]"
	touch $@

clean:
	rm -rf $(VENV) laconic-demo
