# make demo   sets up .venv and draws three prompts with the embedded checkpoints, side by side
# make test   the same set-up, then the whole test suite
# make test-browser   the page's tests in Debian's chromium
# make gallery   draws the pictures of docs/gallery.md with the examples
# make lint   ruff        make types   mypy --strict                    make clean   removes .venv

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo gallery test test-browser lint types mutants clean

demo: .venv/ready
	$(BIN)/python examples/side_by_side.py

gallery: .venv/ready-dev
	$(BIN)/python scripts/gallery.py

test: .venv/ready-dev
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready-dev
	$(BIN)/mypy

# The page in a real browser, Debian's chromium, which this installs where it is missing; needs root.
test-browser: .venv/ready-dev
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }
	$(BIN)/python -m pytest tests/plugins/test_studio_browser.py

mutants: .venv/ready-dev
	$(BIN)/python tests/mutants.py

clean:
	rm -rf .venv

# The two stamps: a set-up runs again only when what it installs has changed.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
