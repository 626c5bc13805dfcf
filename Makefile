# Everything a user does with this repository. `make help` lists the targets.

PYTHON ?= python3
VENV    = .venv
PY      = $(VENV)/bin/python
STAMP   = $(VENV)/.installed

# What may be given on the command line.
PROFILE = quick
# Empty: reproduce trains into results/own, and report renders the committed records in results.
RESULTS =
PARAMS  =
ONLY    =
TESTS   = tests
WORKERS = auto
KNOBS   = PYTHON PROFILE RESULTS PARAMS ONLY TESTS WORKERS

# A misspelt variable would otherwise be ignored, and hours later turn out not to have been set.
GIVEN = $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(v)))),$(v)))
$(foreach v,$(filter-out $(KNOBS),$(GIVEN)),$(error there is no variable $(v); the variables are: $(KNOBS)))

STUDY = $(PY) -m apbm_core.study.pages.runner
# PARAMS is read by the shell: a value with spaces is quoted, PARAMS="epochs=3 'targets={vgg16: [0.9]}'".
OPTIONS = --profile '$(PROFILE)' $(if $(RESULTS),--results '$(RESULTS)') \
          $(foreach n,$(ONLY),--only '$(n)') $(PARAMS)
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

# Imports from bytecode are several times faster, so it is written even where the caller's environment forbids it.
unexport PYTHONDONTWRITEBYTECODE
# Packages of another environment must not leak into this one.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
.PHONY: help setup reproduce report test test-slow lint format bench setup-cluster docs lab lock clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create .venv with the locked packages and the notebooks' kernel

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d, but 3.11 or newer is \
	needed: make setup PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(PY) -m ipykernel install --sys-prefix --name apbm --display-name "Python (apbm)" > /dev/null
	@touch $@

reproduce: setup ## Train and render into results/own: PROFILE=quick PARAMS="epochs=3 seeds=[0,1]" ONLY=02_train
	@$(STUDY) calibrate $(OPTIONS)
	@$(STUDY) run $(OPTIONS) || { code=$$?; [ $$code -ne 75 ] || \
	echo 'GO ON: give the same command again. (make says Error 75 and ends with 2; docs/clusters.md, for scripts)' >&2; exit $$code; }

report: setup ## Render the recorded runs again, without training: PROFILE=quick RESULTS=results/own
	@$(STUDY) report $(OPTIONS)

test: setup ## Run the tests: TESTS=tests/test_fusion.py WORKERS=2
	$(PYTEST) $(TESTS)

test-slow: setup ## Run the tests that take minutes
	$(PYTEST) -m slow $(TESTS)

lint: setup ## Check style and format, and that the notebooks' sources carry no outputs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(STUDY) check

format: setup ## Format the sources, and repair what the style check can repair
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup ## Measure the throughput of training and the latency of the networks on this machine
	$(PY) -m apbm_core.study.bench

setup-cluster: setup ## Add Ray to .venv, for PARAMS="engine=ray" (docs/clusters.md)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --no-build-isolation \
	--editable '.[cluster]'

docs: setup ## Render the API's pages and the texts of docs/ into results/api
	$(PY) docs/build.py results/api

lab: export APBM_DATA ?= $(CURDIR)/data
lab: setup ## Open JupyterLab on a welcome page, with copies of the notebooks in my/
	$(PY) -m apbm_core.study.pages.lab

lock: setup ## Take the newest packages that pyproject.toml allows and pin them in requirements.lock
	$(PY) -m pip install --quiet --upgrade --upgrade-strategy eager --no-build-isolation --editable '.[bench,dev,notebooks,onnx]'
	@{ echo '# Every package of .venv, pinned. Written by `make lock`; environment.yml repeats the direct ones.'; \
	   $(PY) -m pip freeze --all --exclude-editable --exclude pip | sed -E \
	   's/^((cuda|nvidia|triton)[^ ]*)$$/\1 ; platform_system == "Linux" and platform_machine == "x86_64"/'; \
	 } > requirements.lock.tmp
	@mv requirements.lock.tmp requirements.lock

clean: ## Remove caches and scratch (work/); results and .venv stay
	rm -rf work build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o -name .executing \) \
	-type d -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV)
