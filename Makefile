# Two targets carry a newcomer; both set up .venv first (about three minutes, once).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo-run
KERNELS := spikingformer/native/libspikingformer_native.so

.PHONY: demo test setup clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.ready $(KERNELS)

# The marker is written last: an interrupted set-up is never taken for whole.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

# Installing builds them too. Without a compiler the plain forms serve, but a stale library never does.
$(KERNELS): $(wildcard spikingformer/native/src/*) spikingformer/native/build.py | $(VENV)/.ready
	$(BIN)/python -m spikingformer.native.build || test ! -e $@

demo: setup
	rm -rf $(DEMO)
	$(BIN)/spikingformer train recipes/digits/spikingformer_cml.yaml --output $(DEMO)
	$(BIN)/spikingformer evaluate $(DEMO)/best.safetensors
	$(BIN)/spikingformer predict $(DEMO)/best.safetensors --samples 5 --top 2
	$(BIN)/spikingformer energy $(DEMO)/best.safetensors --data digits
	$(BIN)/spikingformer report $(DEMO)
	@echo; echo "The run's files are in $(DEMO)/; open $(DEMO)/report.html in a browser."

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf build dist *.egg-info $(KERNELS) spikingformer/native/build.json
