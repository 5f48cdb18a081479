# make report, make test: each works from a bare clone, with nothing but Python 3.11 or newer.
#
#   make report                                       train, compare and time on every device here, then the report
#   make report DATA=folder:/some/images DEVICE=cpu   on other images, on one device
#   make study                                        the same with a closer look: 20 seeds, other libraries, cost over size
#   make report SECONDS=300                           more rounds, so narrower intervals
#   make report TITLE="My title" AUTHOR="My name"     as something to hand in
#
# Options of `make report` and `make study`; they are those of `transformnet report --help`. DEVICE, PRESET and RUN may name
# several; HFLIP=0, VFLIP=0 and FORCE=1 are switches.
OPTIONS := DATA DATA_PATH DEVICE FIT IMAGE_SIZE OUTPUT_SIZE HFLIP VFLIP LIMIT PRESET SEED EPOCHS ROUNDS SECONDS PRECISION TITLE AUTHOR RUN \
  RUNS_DIR OUT FORCE

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install report study test soak notebooks lab tensorboard clean
.DEFAULT_GOAL := report

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.12")'
	@echo "Installing into .venv, some minutes: PyTorch's Linux build takes 5.6 GB."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

# Only what was given on make's own command line counts: the shell's environment may hold a DATA of its own.
given = $(findstring command line,$(origin $(1)))
unknown := $(strip $(foreach name,$(filter-out $(OPTIONS) PYTHON,$(.VARIABLES)),$(if $(call given,$(name)),$(name))))
$(if $(unknown),$(error $(unknown): no such option; there are $(OPTIONS) PYTHON))

# Values reach the command as they were typed, whatever signs are in them.
quoted = '$(subst ','\'',$(1))'
flag = $(if $(call given,$(1)),--$(2) $(call quoted,$(value $(1))))
# A switch is 0 or 1: with "no" for neither, the opposite of what was meant would be done.
truth = $(if $(filter 0 1,$(value $(1))),$(filter 1,$(value $(1))),$(error $(1): expected 0 or 1, got $(value $(1))))
checked := $(foreach name,HFLIP VFLIP FORCE,$(if $(call given,$(name)),$(call truth,$(name))))
switch = $(if $(call given,$(1)),--$(if $(call truth,$(1)),,no-)$(2))
flags = $(if $(call given,$(1)),$(foreach word,$(value $(1)),--$(2) $(call quoted,$(word))))

report study: install
	@$(BIN)/transformnet report $(if $(filter study,$@),--study) $(call flags,RUN,run) $(call flags,DEVICE,device) \
	  $(call flags,PRESET,preset) $(call flag,DATA,data) \
	  $(call flag,DATA_PATH,data-path) $(call flag,FIT,fit) $(call flag,IMAGE_SIZE,image-size) \
	  $(call flag,OUTPUT_SIZE,output-size) $(call switch,HFLIP,hflip) $(call switch,VFLIP,vflip) $(call flag,LIMIT,limit) $(call flag,SEED,seed) $(call flag,EPOCHS,epochs) \
	  $(call flag,ROUNDS,rounds) $(call flag,SECONDS,seconds) $(call flag,PRECISION,precision) $(call flag,TITLE,title) $(call flag,AUTHOR,author) \
	  $(call flag,RUNS_DIR,runs-dir) $(call flag,OUT,out) $(if $(call given,FORCE),$(if $(call truth,FORCE),--force))

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
