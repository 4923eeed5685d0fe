# Two commands matter: `make demo` shows real work done, `make test` passes every test.
# Each first installs what this machine lacks (.ci/provision, .ci/venv).

.PHONY: demo test test-booted soak lint bench clean provision-demo provision-test provision-booted
.NOTPARALLEL:

# Measures how long work takes, so nothing runs beside it.
ALONE := tests/hosts/test_scaling.py
# Two workers a processor, since tests wait more than they compute.
PYTEST := -m pytest -n $(shell expr 2 '*' $$(nproc)) --ignore=tests/systemd --ignore=$(ALONE)

demo: .venv/installed
	packaging/examples/demo

test: lint .venv-floor/installed
	.venv/bin/python $(PYTEST) --rabbitmq-of trixie
	.venv-floor/bin/python $(PYTEST) --debian
	.venv/bin/python -m pytest $(ALONE)
	$(MAKE) --no-print-directory test-booted

# The .deb on booted Debian 12 and 13, one process each. Needs root, and says so.
test-booted: .venv/installed-test | provision-booted
	.venv/bin/python -m pytest -n 2 tests/systemd

# Ten minutes of jobs and faults; `make test` has one. SEED=... fires the same faults again.
soak: .venv/installed-test
	.venv/bin/python -m tests.faults.soak $(if $(SEED),--seed $(SEED))

lint: .venv/installed-test
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: .venv/installed-test
	.venv/bin/python -m bench

clean:
	rm -rf .venv .venv-floor .cache .pytest_cache .mypy_cache .ruff_cache build dist var
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

provision-demo:
	.ci/provision demo

provision-test:
	.ci/provision demo test

provision-booted:
	.ci/provision demo test booted

.venv/installed: pyproject.toml | provision-demo
	.ci/venv newest .venv
	touch $@

.venv/installed-test: pyproject.toml | provision-test
	.ci/venv newest .venv test
	touch $@ .venv/installed

.venv-floor/installed: pyproject.toml | provision-test
	.ci/venv debian .venv-floor test
	touch $@
