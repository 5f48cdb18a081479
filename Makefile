# make report, make test: each works from a bare clone, with nothing but Python 3.11 or newer.
#
#   make report                                       train, compare and time on every device here, then the report
#   make report DATA=folder:/some/images DEVICE=cpu   on other images, on one device
#   make study                                        the same with a closer look: 20 seeds, other libraries, cost over size
#   make report SECONDS=300                           more rounds, so narrower intervals
#   make report TITLE="My title" AUTHOR="My name"     as something to hand in
#   make report ARGS="--hflip --limit 2000"           the options as the command has them
#
# Whatever is given in capitals is an option of `transformnet report`, whose --help lists them: IMAGE_SIZE=96 is
# --image-size 96. HFLIP=0, VFLIP=0 and FORCE=1 are switches; DEVICE, PRESET and RUN may name several.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install report study test soak notebooks lab tensorboard clean
.DEFAULT_GOAL := report

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.12")'
	@echo "Installing into .venv, some minutes: PyTorch's Linux build takes 5.6 GB."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[test]'
	@touch $@

# Only what was given on make's own command line counts: the shell's environment may hold a DATA of its own.
given := $(sort $(foreach name,$(filter-out PYTHON ARGS,$(.VARIABLES)),$(if $(findstring command line,$(origin $(name))),$(name))))
# Values reach the command as they were typed, whatever signs are in them.
quoted = '$(subst ','\'',$(1))'
option = $(shell echo $(1) | tr A-Z_ a-z-)
# A switch is 0 or 1: with "no" for neither, the opposite of what was meant would be done.
switch = $(if $(filter 1,$(value $(1))),--$(option),$(if $(filter 0,$(value $(1))),$(if $(filter-out FORCE,$(1)),--no-$(option)),$(error $(1): expected 0 or 1, got $(value $(1)))))
several = $(foreach word,$(value $(1)),--$(option) $(call quoted,$(word)))
single = --$(option) $(call quoted,$(value $(1)))
as_option = $(call $(or $(if $(filter HFLIP VFLIP FORCE,$(1)),switch),$(if $(filter DEVICE PRESET RUN,$(1)),several),single),$(1))
options := $(foreach name,$(given),$(call as_option,$(name)))

report study: install
	@$(BIN)/transformnet report $(if $(filter study,$@),--study) $(options) $(ARGS)

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --nbval --nbval-current-env notebooks

soak: install
	$(BIN)/python tests/soak.py

notebooks: install
	$(BIN)/python tests/refresh.py

# By itself JupyterLab asks PyPI for a newer version, GitHub for news, and PyPI for extensions.
LAB_OFFLINE := --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.news_url=None \
  --LabApp.extension_manager=readonly

# Trusted, since JupyterLab shows no pictures of notebooks that somebody else executed.
lab: install
	$(BIN)/jupyter trust notebooks/*.ipynb
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab $(LAB_OFFLINE) notebooks

tensorboard: install
	$(BIN)/tensorboard --logdir runs

clean:
	rm -rf .venv report/build .pytest_cache .ruff_cache .hypothesis
