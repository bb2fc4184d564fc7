# Everything that is installed goes into .venv and tests/node_modules, and a Debian for tests/hostbox.py into /var/cache;
# `make clean` takes it away again.
# As root on Debian, missing system packages are installed too: python3-venv, and what the tests run.

PYTHON ?= python3
# Programs that the tests run, and after = the Debian package where its name is another.
TOOLS  := chromium debootstrap git nix-instantiate=nix-bin npm strace systemd-nspawn=systemd-container

PIP  := .venv/bin/python -m pip --disable-pip-version-check --quiet install
# The pins of pyproject.toml: those of the run time, or with the word `test` those of the tests.
PINS := .venv/bin/python -c 'import sys, tomllib; it = tomllib.load(open("pyproject.toml", "rb")); \
	print(*it["dependency-groups"]["test"] if sys.argv[1:] else it["project"]["dependencies"])'

# `apt NAME` installs a Debian package where that is ours to do, and fetches the lists only if it must.
APT := apt() { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1; echo "installing $$1"; \
	get="env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0"; \
	$$get install --no-install-recommends "$$1" >/dev/null 2>&1 || \
	{ $$get update && $$get install --no-install-recommends "$$1" >/dev/null; }; };

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test bench lint clean system

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile
	@echo '  ARGS="…" is passed on by demo and test: make test ARGS="-k broker"'

demo: .venv/run ## a hive to try, in a folder of its own: no NixOS, no account, no network
	@.venv/bin/python hyperhive.py demo $(ARGS)

test: system lint tests/node_modules/.package-lock.json ## everything: what it needs, the linters, the tests
	@.venv/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)  # they wait more than they compute

bench: system .venv/test tests/node_modules/.package-lock.json ## how fast messages, pages and streams are
	@.venv/bin/python tests/bench.py

lint: .venv/test ## ruff and mypy
	@.venv/bin/python -m ruff check
	@.venv/bin/python -m mypy

clean: ## removes all that these commands made
	rm -rf .venv tests/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis /var/cache/hyperhive-hostbox
	find . -name __pycache__ -prune -exec rm -rf {} +

# Three stamps. `made` is missing while something is being installed, so that what breaks off is begun afresh:
# an installation that was killed halfway can look whole to pip. A .venv whose Python has gone is made anew, too.
.venv/made: .venv/bin/python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hyperhive needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@$(APT) $(PYTHON) -c 'import ensurepip' 2>/dev/null || apt python3-venv || \
		{ echo "$(PYTHON) can't make a virtual environment: on Debian, install python3-venv"; exit 1; }
	@echo 'making .venv'
	@$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/bin/python: ;

.venv/run: pyproject.toml .venv/made
	@rm .venv/made
	@echo 'installing bottle and waitress into .venv'
	@$(PIP) $$($(PINS))
	@touch .venv/made $@

.venv/test: tests/constraints.txt .venv/run
	@rm .venv/made
	@echo 'installing the packages of the tests into .venv'
	@$(PIP) --constraint tests/constraints.txt $$($(PINS) test)
	@touch .venv/made .venv/run $@

# npm writes this file last.
tests/node_modules/.package-lock.json: tests/package.json tests/package-lock.json
	@if command -v npm >/dev/null; then echo 'npm ci'; cd tests && npm ci; fi

system:
	@$(APT) missing=; for tool in $(TOOLS); do \
		command -v $${tool%=*} >/dev/null || apt $${tool#*=} || missing="$$missing $${tool#*=}"; \
	done; [ -z "$$missing" ] || echo "not installed:$$missing (the tests that need it are skipped)"
