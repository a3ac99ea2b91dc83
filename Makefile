# `make demo` and `make test` are all that a fresh machine needs; each first makes .venv where it is missing or stale.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

# No window is opened, and small networks are faster on one thread: several only wait for each other.
export SDL_VIDEODRIVER ?= dummy
export MPLBACKEND ?= Agg
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow check docs bench study study-smoke clean

demo: $(VENV)/.installed
	$(BIN)/python examples/lunar_lander.py $(ARGS)

# A file stays on one worker, so that what its tests share is made once.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# What some of them need is large, and so is installed for these alone: the study's environments, rl_zoo3, a browser's driver, TorchRL,
# Weights & Biases, and imitation, which asks for older versions of Gymnasium and SB3 than it works with here.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,study,browser,zoo,torchrl,wandb]'
	$(BIN)/python -m pip install -qq -c constraints.txt --no-deps gym-microrts==0.4.3 imitation==1.0.1
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)
	$(BIN)/python -m pytest tests/test_study_tasks.py tests/test_torchrl.py tests/test_reward_fn.py $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Cells of the study that have no result yet; hours. `make study ARGS="--task lander --ray auto"` runs some, on a cluster.
study: $(VENV)/.installed
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,study]'
	$(BIN)/python -m sb3_qa study $(ARGS)

# One tiny cell of every arm, and the report of it: shows that the machinery works and nothing else.
study-smoke: $(VENV)/.installed
	$(BIN)/python -m sb3_qa study --quick --task cliff --seed 0 --out outputs/study-smoke --models outputs/study-smoke/models

# The site, in build/docs; a warning is an error.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs $(ARGS)

# Rows with their targets, the history beside the scripts, and both plots of growth; over an hour.
bench: $(VENV)/.installed
	$(BIN)/python tests/bench/overhead.py $(ARGS)
	$(BIN)/python tests/bench/overhead.py --threads 2 --only ppo dqn sac td3 $(ARGS)
	$(BIN)/python tests/bench/pieces.py --plot docs/images/trunk.png
	$(BIN)/python tests/bench/scale.py --plot docs/images/scale.png

# Leaves .venv, which is slow to make again, and runs/ and outputs/, which are somebody's results.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch goes first and alone: a build that is already at hand (CPU only, say) then satisfies everything that follows.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt pins versions for Python 3.11 and later; give one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq -c constraints.txt torch
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	touch $@
