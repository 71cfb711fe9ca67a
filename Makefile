# Everything starts here: each target does its own set-up in .venv. Needed on the machine: Python >= 3.11, a C++
# compiler and make. pip's own environment variables (PIP_INDEX_URL and others) choose where packages come from.

PYTHON ?= python3
VENV   ?= .venv
# make demo DEMO=convnext | deit
DEMO   ?= convnext
# Test processes. Each computes on one thread: several threads in several processes get in each other's way.
WORKERS ?= 2
# make soak KILLS=N
KILLS  ?= 40
# make fuzz SPECS=N SUBNETS=N ARTEFACTS=N NPZ=N RUNS=N SEED=N
SPECS     ?= 20000
SUBNETS   ?= 5000
ARTEFACTS ?= 5000
NPZ       ?= 5000
RUNS      ?= 2000
SEED      ?= 0

SHELL := /bin/bash
BIN   := $(VENV)/bin

# The small network of each demo, and half of its blocks. On one thread: so small, they gain nothing from a second one,
# and lose much where another process wants it.
DEMO_SPEC_convnext  := convnext_digits
DEMO_PRUNE_convnext := 5
DEMO_SPEC_deit      := deit_digits
DEMO_PRUNE_deit     := 3
ifeq ($(DEMO_SPEC_$(DEMO)),)
$(error got DEMO=$(DEMO), allowed: convnext, deit)
endif

# make demo-imagenet IMAGES=FOLDER: photographs of yours, no labels needed. Without it, the few that scikit-image and
# scikit-learn come with: those of everyday things, half of them grey.
IMAGES      ?=
PHOTOGRAPHS := $(addprefix skimage/data/,astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png \
               gravel.png moon.png motorcycle_left.png rocket.jpg) \
               $(addprefix sklearn/datasets/images/,china.jpg flower.jpg)
IMAGES_FROM := $(or $(IMAGES),build/photographs)
IMAGES_RUN  := runs/demo-imagenet$(if $(IMAGES),,-smoke)

INSTALL_SOURCES := pyproject.toml constraints.txt CMakeLists.txt updp/__init__.py $(wildcard csrc/*)
CXX_SOURCES     := $(wildcard csrc/*.cpp csrc/*.h)

.DEFAULT_GOAL := help
.PHONY: help demo demo-imagenet test test-all soak fuzz bench lint format docs native clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: $(VENV)/installed-export  ## Train, prune, merge and measure a small network on real digits (DEMO=convnext or deit)
	$(BIN)/updp run $(DEMO_SPEC_$(DEMO)) --data digits --prune $(DEMO_PRUNE_$(DEMO)) --threads 1 --out runs/demo-$(DEMO)

demo-imagenet: $(VENV)/installed-imagenet $(if $(IMAGES),,build/photographs)  ## Prune a trained ImageNet network in minutes (IMAGES=FOLDER: your photographs)
ifeq ($(IMAGES),)
	@echo "A smoke run: $(words $(PHOTOGRAPHS)) photographs show that everything works, and the network is only as good as so few"
	@echo "can make it. With some hundreds of your own it is worth looking at: make demo-imagenet IMAGES=FOLDER"
endif
	$(BIN)/updp calibrate tf_efficientnet_lite0 --weights package --data "folder:$(IMAGES_FROM)" --recipe full --prune 2 --out $(IMAGES_RUN)

test: lint  ## Check style and types, run the tests (some 15 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

test-all: lint  ## As test, with the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

soak: $(VENV)/installed-dev  ## Kill small runs 40 times at random moments: they must end with the same bits (KILLS=40)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --kills $(KILLS)

fuzz: $(VENV)/installed-dev  ## Read 37,000 files made wrong on purpose: each is answered by one message at most (SPECS=N ...)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --specs $(SPECS) --subnets $(SUBNETS) --artefacts $(ARTEFACTS) \
	    --npz $(NPZ) --runs $(RUNS) --seed $(SEED)

bench: $(VENV)/installed-dev  ## Time the kernels against torch, figures also in build/bench.json; fails if a guard does
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/bench -rP --benchmark-enable --benchmark-json=build/bench.json \
	    --benchmark-columns=mean,median,iqr,rounds --benchmark-sort=mean --benchmark-group-by=group

lint: $(VENV)/installed-dev  ## Check style, types, C++ format and the specs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m updp.spec specs/*.yaml

format: $(VENV)/installed-dev  ## Rewrite Python and C++ in the house format
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

docs: $(VENV)/installed-dev  ## Write docs/spec.md from its template, the schema and the code
	$(BIN)/python -m docs.generate

native: $(VENV)/installed-dev  ## Build updp._C in place, for use of the source tree without an install
	$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/native
	$(BIN)/cmake --install build/native --prefix .

clean:  ## Remove what was built and installed; runs/ stays
	rm -rf $(VENV) build dist updp/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "updp needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-export: $(INSTALL_SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[export]'
	@touch $@

$(VENV)/installed-imagenet: $(INSTALL_SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[export,imagenet]' scikit-image
	@touch $(VENV)/installed-export $@

# Copied from the installed packages, which are not imported.
build/photographs: $(VENV)/installed-imagenet
	@rm -rf $@ && mkdir -p $@
	@cd "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" && cp $(PHOTOGRAPHS) "$(CURDIR)/$@"

# dev contains export.
$(VENV)/installed-dev: $(INSTALL_SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(VENV)/installed-export $@
