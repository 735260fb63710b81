# Each target does all its own set-up: it needs cargo, CPython 3.11 or newer with pip and venv, gcc (or clang) and make.
# The work is in scripts/: dev.py the targets, environment.py what they prepare in .venv and when that is stale.
#
# PYTHON=...  the interpreter to build .venv on       ARGS=...  handed on to the demo, to pytest, to the benchmark
# ONCE=1      the demo ends by itself, with exit status 0 or 1

.DEFAULT_GOAL := help
.PHONY: help build demo test test-clients check bench bench-report bench-check clean

export PYTHON
ONCE ?=
ARGS ?=

# The recipe's shell: find an interpreter, then become it, so that Ctrl-C and the exit status are the target's own.
dev = @python=$$(sh scripts/find-python.sh) && exec "$$python" -B scripts/dev.py

help:
	@echo "make demo     one chat, answered end to end by real parts, then served until Ctrl-C (ONCE=1: ends by itself)"
	@echo "make test     the whole test suite, Rust and Python (ARGS=... goes to pytest)"
	@echo "make test-clients  openai-python 2.x and 3.x, langchain-openai and litellm against the front-end"
	@echo "make check    every linter: rustfmt, clippy, cargo-deny, ruff, mypy, stubtest"
	@echo "make bench    the benchmark (ARGS=... goes to it)"
	@echo "make bench-report  one page of the latest figures, with plots"
	@echo "make bench-check   instructions of the hot paths beside the committed figures (ARGS=--update writes them anew)"
	@echo "make build    .venv with the package and all development tools"
	@echo "make clean    removes .venv and everything that was built"

build:
	$(dev) build

demo:
	$(dev) demo $(if $(filter-out 0,$(ONCE)),--once) $(ARGS)

test:
	$(dev) test $(ARGS)

test-clients:
	$(dev) test-clients $(ARGS)

check:
	$(dev) check

bench:
	$(dev) bench $(ARGS)

bench-report:
	$(dev) bench-report $(ARGS)

bench-check:
	$(dev) bench-check $(ARGS)

clean:
	rm -rf .venv target .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f python/mlx_serving_router/_native*.so
	find python scripts tests examples benches -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
