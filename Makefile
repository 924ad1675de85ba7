PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: train test test-slow test-long test-lowest lint format docs

# the marker is written last, so that an interrupted installation is made again
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,docs]'
	touch $@

# the lower bounds of pyproject.toml, to the letter
.venv-lowest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	grep -v '^requires' pyproject.toml | grep -oE '"[a-z0-9-]+>=[0-9.]+' \
	    | tr -d '"' | sed 's/>=/==/' >.venv-lowest/lowest.txt
	.venv-lowest/bin/pip install --quiet -c .venv-lowest/lowest.txt -e '.[test]'
	touch $@

train: .venv/installed
	$(BIN)/python scripts/train_las_at.py $(ARGS)

# two processes, a file each: a machine of 2 cores is what the 8 minutes are meant for
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

test-long: .venv/installed
	$(BIN)/python -m pytest -m long -n 2 --dist loadfile $(ARGS)

test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest --once -n 2 --dist loadfile $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# into build/site; its variable silences an advertisement
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
