# Everything a newcomer, a contributor and CI type. Needs GNU make and Python 3.11+, nothing else.
#
#   make run                      a real model answering on this machine
#   make run CONFIG=file.yaml     the gateway alone, in front of your own backends
#   make test                     all tests
#
# Variables: PYTHON (interpreter), VENV (default .venv), PORT and ADMIN_PORT (default 7400 and 7401),
#            CONFIG (a configuration file), REPLICAS (of the demo, default 2), ARGS (handed to pytest, the benchmark or the load test),
#            JOBS (processes of `make test`, default 4).

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

VENV ?= .venv
AUDIT_VENV ?= .venv-audit
PYTHON ?=
PORT ?=
ADMIN_PORT ?=
REPLICAS ?=
CONFIG ?=
ARGS ?=
JOBS ?= 4

py := $(VENV)/bin/python
setup := PYTHON='$(PYTHON)' VENV='$(VENV)' scripts/setup.sh
# Ports travel as the environment overrides that every Tidegate command reads.
ports := $(if $(PORT),TIDEGATE_SERVER__PORT='$(PORT)') $(if $(ADMIN_PORT),TIDEGATE_ADMIN__PORT='$(ADMIN_PORT)')

.PHONY: help run test test-compiled check bench load faults soak fuzz screenshots audit sbom test-engines lock clean format

help: ## this list
	@echo 'Targets:'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
	    printf '%-20s %s\n' "$$name" "$$text"; done
	@echo 'Variables: CONFIG=file.yaml PORT=7400 ADMIN_PORT=7401 REPLICAS=2 PYTHON=python3 VENV=.venv ARGS=...'

# A profile is set up again when its lock or the package's own description changed.
$(VENV)/.ready-app: requirements/app.txt requirements/build.txt pyproject.toml
	@$(setup) app
$(VENV)/.ready-demo: requirements/demo.txt requirements/build.txt pyproject.toml
	@$(setup) demo
$(VENV)/.ready-dev: requirements/dev.txt requirements/build.txt pyproject.toml
	@$(setup) dev

# The auditing tools' environment is their own: nothing of theirs belongs where the gateway or its tests run.
$(AUDIT_VENV)/.ready-audit: requirements/audit.txt requirements/build.txt
	@PYTHON='$(PYTHON)' VENV='$(AUDIT_VENV)' scripts/setup.sh audit

# `exec`, so that Ctrl-C and SIGTERM meet the command itself and its exit code is what make reports.
ifneq ($(CONFIG),)
run: $(VENV)/.ready-app ## the demo: two replicas of a small real model and the gateway (CONFIG=... for your own backends)
	@exec env $(ports) $(py) -m gateway serve --config '$(CONFIG)'
else
run: $(VENV)/.ready-demo
	@exec env $(ports) $(py) -m gateway demo $(if $(REPLICAS),--replicas '$(REPLICAS)')
endif

test: $(VENV)/.ready-dev ## every test, a short one on a real engine included (ARGS='-k name')
	@PYTHON='$(py)' JOBS='$(JOBS)' scripts/test.sh $(ARGS)

# Apart from the sources, in .compiled: docs/adr/0014. Needs a C compiler.
test-compiled: $(VENV)/.ready-dev ## compile the routing with mypyc, and run its tests and the gateway's on that (5 minutes)
	@$(py) scripts/compiled.py
	@cd .compiled && '$(abspath $(py))' -m pytest -q tests/compiled
	@cd .compiled && '$(abspath $(py))' -m pytest -m 'not slow and not alone and not quiet and not engine' -n '$(JOBS)' \
	    --dist loadfile --max-worker-restart 0 tests/routing tests/backends tests/gateway/test_*.py $(ARGS)

screenshots: $(VENV)/.ready-dev ## the pictures of the dashboard in docs/images, from the tests that look at every page
	@CHROMIUM="$$(PYTHON='$(py)' scripts/browser.sh)" SCREENSHOTS=docs/images $(py) -m pytest -q tests/dashboard/test_every_page.py

check: $(VENV)/.ready-dev ## formatting, lint, types, import direction
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.ready-dev ## rewrite the files the way `make check` wants them
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# One short round writes nothing: make bench ARGS=--quick
bench: $(VENV)/.ready-dev ## CPU per request, chunk and decision, added latency, the choices of the ADRs: into docs/ (16 minutes)
	@$(py) -m loadtests.bench $(ARGS)
ifeq ($(filter --quick,$(ARGS)),)
	@$(py) -m loadtests.decide_router --write
	@$(py) -m loadtests.choices --json docs/choices.json --write docs/adr/0004-server-client-and-parser.md
	@$(py) -m loadtests.phases --write docs/request-path.md
endif

load: $(VENV)/.ready-dev ## replay a trace through real sockets, policy by policy (ARGS='--url http://gateway:7400 --model m')
	@$(py) -m loadtests.replay $(ARGS)

# The short form writes nothing: make faults ARGS=--short
faults: $(VENV)/.ready-dev ## forty experiments with replicas, Redis, clients and gateways that fail or attack: into docs/reliability.md (half an hour)
	@$(py) -m tests.faults.report $(ARGS)

soak: $(VENV)/.ready-dev ## ten minutes of everything that goes wrong at once, and what is left of it: into docs/reliability.md (ARGS='--seconds 3600')
	@$(py) -m loadtests.soak --write docs/reliability.md $(ARGS)

fuzz: $(VENV)/.ready-dev ## every parser fuzzed for a minute, and thousands of requests from the OpenAPI document (20 minutes; SECONDS=60)
	@set -e; for name in $$($(py) -c 'from tests.fuzz.run import NAMES; print(*NAMES)'); do \
	    echo "== $$name"; $(py) -m tests.fuzz.run $$name --seconds $(or $(SECONDS),60) --corpus .fuzz/$$name; done
	@TESTS_LONG=1 $(py) -m pytest tests/security/test_openapi_fuzz.py -o faulthandler_timeout=900 $(ARGS)

audit: $(AUDIT_VENV)/.ready-audit ## known vulnerabilities in everything that is locked (asks the package index)
	@$(AUDIT_VENV)/bin/python scripts/audit.py $(ARGS)

sbom: $(AUDIT_VENV)/.ready-audit ## what a release contains, as CycloneDX JSON: dist/tidegate.cdx.json
	@scripts/sbom.sh $(AUDIT_VENV)/bin/python

test-engines: $(VENV)/.ready-dev ## the tests on real engines, SGLang and vLLM on the CPU included (a large install, minutes)
	@$(py) -m tests.engines.install
	@$(py) -m pytest tests/engines -m engine -o faulthandler_timeout=900 $(ARGS)

lock: $(VENV)/.ready-dev ## rewrite requirements/*.txt (ARGS='--upgrade' moves to the newest versions)
	@$(py) -m pip --disable-pip-version-check install --quiet 'uv==0.13.9'
	@scripts/lock.sh '$(VENV)' $(ARGS)

clean: ## remove the virtual environment and all caches
	rm -rf '$(VENV)' '$(AUDIT_VENV)' .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .compiled dist build
