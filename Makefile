# Everything a checkout can do; "make" alone lists it. All of it happens in .venv, which is made
# when it is missing and made anew when it does not work here.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python

# Which interpreter .venv is made with: 3.11 or newer.
PYTHON ?= python3

# Test processes at a time; each has a PostgreSQL of its own. auto: three for two cores.
JOBS ?= auto

# Debian keeps pgbouncer there, which is not on everybody's path.
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help
help: ## This list
	@echo 'usage: make TARGET [NAME=value ...]'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 15

.PHONY: run
run: install-demo ## The demo: PostgreSQL, the sidecar, a load, a live view. SECONDS=20 PORT=6432 HTTP_PORT=9632
	@exec $(PY) -m sidecar demo \
	  $(if $(SECONDS),--seconds $(SECONDS)) $(if $(PORT),--port $(PORT)) \
	  $(if $(HTTP_PORT),--http-port $(HTTP_PORT))

.PHONY: observe
observe: install-demo observe-packages ## Watch a page arrive: the demo with Prometheus and Alertmanager. SECONDS=60
	@exec $(PY) -m deploy.observe $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

.PHONY: test
test: lint debian-packages node-packages ## Style, types, then all tests. JOBS=4 TESTS=tests/test_config.py
	@echo 'tests ...'
	@$(PY) -m pytest -q --no-header -n $(JOBS) --maxprocesses 8 --dist worksteal $(TESTS); \
	status=$$?; [ $$status = 1 ] || exit $$status; \
	failed=$$($(PY) -c 'import json; print(len(json.load(open(".pytest_cache/v/cache/lastfailed"))))'); \
	[ "$$failed" -le $(AGAIN) ] || exit 1; \
	echo; echo "$$failed failed. Once more, alone: what passes now has missed its time on a busy machine, and wants mending:"; \
	exec $(PY) -m pytest -q --no-header --last-failed --last-failed-no-failures none $(TESTS)

# How many failed tests are tried once more, alone. Thousands of tests with real servers and real time share
# two cores, and one in some thousands misses its time; what is broken fails again. 0: none is.
AGAIN := 3

.PHONY: lint
lint: install-dev ## Style (ruff) and types (mypy) only
	@echo 'style and types ...'
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo 'to format: make format' >&2; exit 1; }
	@$(PY) -m mypy --no-error-summary

.PHONY: format
format: install-dev ## Format the code, and repair what ruff can repair
	@$(PY) -m ruff check --quiet --fix . ; $(PY) -m ruff format .

# Grafana's components take 600 MB; only who draws needs them.
PICTURES := dashboards/pictures
.PHONY: pictures
pictures: install-dev observe-packages ## Draw docs/images anew; six minutes, development only. ARGS="--prometheus URL"
	@command -v chromium >/dev/null || $(MAKE) debian-package-chromium || exit; \
	$(MAKE) node-packages-in FOLDER=$(PICTURES) || exit; \
	exec $(PY) -m dashboards.pictures $(ARGS)

.PHONY: dashboards
dashboards: install-dev ## Write dashboards/*.json, and the copies for Kubernetes, anew
	@$(PY) -m dashboards.build && $(PY) -m deploy.kubernetes.build

.PHONY: bench
bench: compiled ## What it costs, next to PgBouncer; a quarter of an hour. ARGS=--quick
	@command -v pgbouncer >/dev/null || $(MAKE) debian-package-pgbouncer
	@mkdir -p bench/results; results="$$(pwd)/bench/results/$$(date +%Y%m%d-%H%M%S).json"; \
	python="$$(pwd)/$(PY)"; cd build/compiled && exec "$$python" -m bench --json "$$results" $(ARGS)

.PHONY: test-compiled
test-compiled: node-packages compiled debian-packages ## The tests, on the compiled modules
	@python="$$(pwd)/$(PY)"; cd build/compiled && \
	exec "$$python" -m pytest -q --no-header -n $(JOBS) --maxprocesses 8 --dist worksteal $(TESTS)

# A copy: compiled modules beside their sources would be used in place of them, edited or not.
COPY := tar -cf - --exclude=./build --exclude=./.git --exclude=./.venv --exclude=./.hypothesis \
  --exclude='./.*_cache' --exclude=./dashboards/pictures/node_modules . | tar -xf - -C build/compiled
.PHONY: compiled
compiled: install-dev ## A copy in build/compiled with the hot modules compiled; needs a C compiler
	@mkdir -p build/compiled
	@if [ -z "$$(find build/compiled -maxdepth 1 -name '*.so')" ] || [ -n "$$(find setup.py sidecar \
	  -name '*.py' -newer build/compiled/.done 2>/dev/null)" ]; then \
	  echo 'compiling into build/compiled ...'; rm -rf build/compiled; mkdir -p build/compiled; \
	  $(COPY) || exit; python="$$(pwd)/$(PY)"; (cd build/compiled && \
	    PGSIDECAR_COMPILE=1 "$$python" setup.py -q build_ext --inplace) || exit; \
	  touch build/compiled/.done; \
	fi
	@$(COPY)

.PHONY: clean
clean: ## Remove .venv, caches and builds
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf tests/*/node_modules tests/*/*/node_modules dashboards/*/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- what the targets above need -------------------------------------------------------------------

# install-demo is what the demo needs, install-dev what tests and tools need, the demo included.
# A stamp holds the folder it was made for: a copy or a renamed folder gets a .venv of its own.
.PHONY: install-demo install-dev
install-demo install-dev: install-%: venv
	@if [ $(VENV)/.$* -nt pyproject.toml ]; then exit 0; fi; \
	echo 'installing pgsidecar into $(VENV) ...'; \
	$(PY) -m pip install -qq --disable-pip-version-check --editable '.[$*]' || exit; \
	pwd > $(VENV)/.folder; \
	if [ $* = dev ]; then touch $(VENV)/.demo; fi; \
	touch $(VENV)/.$*

.PHONY: venv
venv:
	@if [ "$$(cat $(VENV)/.folder 2>/dev/null)" = "$$(pwd)" ] && \
	  $(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then exit 0; fi; \
	if ! command -v "$(PYTHON)" >/dev/null; then \
	  echo 'There is no $(PYTHON) here. pgsidecar needs Python 3.11 or newer.' >&2; exit 1; \
	fi; \
	if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  echo "pgsidecar needs Python 3.11 or newer, $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." >&2; \
	  echo 'Name a newer one: make PYTHON=python3.13 ...' >&2; exit 1; \
	fi; \
	if ! "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then \
	  $(MAKE) debian-package-python3-venv || exit; \
	fi; \
	echo 'making $(VENV) with '"$$("$(PYTHON)" -V) ..."; \
	rm -rf $(VENV) && "$(PYTHON)" -m venv $(VENV) && pwd > $(VENV)/.folder

# Programs that tests run beside the sidecar, by the Debian package that has them.
.PHONY: observe-packages
observe-packages:
	@if ! command -v promtool >/dev/null || ! command -v prometheus >/dev/null; then \
	  $(MAKE) debian-package-prometheus || exit; fi; \
	if ! command -v prometheus-alertmanager >/dev/null || ! command -v amtool >/dev/null; then \
	  $(MAKE) debian-package-prometheus-alertmanager || exit; fi

.PHONY: debian-packages
debian-packages: observe-packages
	@if ! command -v pgbouncer >/dev/null; then $(MAKE) debian-package-pgbouncer || exit; fi; \
	if ! command -v prometheus-pgbouncer-exporter >/dev/null; then \
	  $(MAKE) debian-package-prometheus-pgbouncer-exporter || exit; fi; \
	if ! ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1; then \
	  $(MAKE) debian-postgresql || exit; fi; \
	if ! command -v node >/dev/null; then $(MAKE) debian-package-nodejs || exit; fi; \
	if ! command -v npm >/dev/null; then $(MAKE) debian-package-npm || exit; fi; \
	if ! command -v javac >/dev/null; then $(MAKE) debian-package-default-jdk-headless || exit; fi; \
	if [ ! -e /usr/share/java/postgresql.jar ]; then \
	  $(MAKE) debian-package-libpostgresql-jdbc-java || exit; fi

# A PostgreSQL with TLS, which the embedded one is built without. Debian would also make a cluster
# and start it on port 5432; while this file is there, it does not.
.PHONY: debian-postgresql
debian-postgresql: debian-package-postgresql-common
	@if [ "$$(id -u)" = 0 ]; then sudo=; else sudo='sudo -n'; fi; \
	folder=/etc/postgresql-common/createcluster.d; \
	$$sudo mkdir -p $$folder && \
	echo 'create_main_cluster = false' | $$sudo tee $$folder/pgsidecar.conf >/dev/null || exit; \
	$(MAKE) debian-package-postgresql; status=$$?; \
	$$sudo rm -f $$folder/pgsidecar.conf; exit $$status

# Packages of Node.js, as each lock file has them: the drivers beside the programs that use them, Grafana's
# types of dashboards beside the check.
NODE := tests/drivers/node tests/grafana
.PHONY: node-packages
node-packages: debian-packages
	@for folder in $(NODE); do $(MAKE) node-packages-in FOLDER=$$folder || exit; done

.PHONY: node-packages-in
node-packages-in:
	@if [ $(FOLDER)/node_modules/.done -nt $(FOLDER)/package-lock.json ]; then exit 0; fi; \
	echo 'installing packages of Node.js into $(FOLDER)/node_modules ...'; \
	(cd $(FOLDER) && npm ci --silent --no-audit --no-fund --ignore-scripts) && touch $(FOLDER)/node_modules/.done

# Some packages bring services, which Debian would start; not while this policy is there (deb-systemd-invoke(1)).
debian-package-%:
	@if ! command -v apt-get >/dev/null; then \
	  echo 'Please install what Debian calls $*; there is no apt-get here to do it.' >&2; exit 1; \
	elif [ "$$(id -u)" = 0 ]; then sudo=; \
	elif sudo -n true 2>/dev/null; then sudo='sudo -n'; \
	else echo 'Please install $*: sudo apt-get install $*' >&2; exit 1; fi; \
	echo 'installing the Debian package $* ...'; \
	policy=/usr/sbin/policy-rc.d; \
	if [ ! -e $$policy ]; then trap "$$sudo rm -f $$policy" EXIT INT TERM; \
	  printf '#!/bin/sh\nexit 101\n' | $$sudo tee $$policy >/dev/null; $$sudo chmod +x $$policy; fi; \
	install="$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $*"; \
	$$install >/dev/null 2>&1 || { $$sudo apt-get update -qq >/dev/null && $$install >/dev/null; }
