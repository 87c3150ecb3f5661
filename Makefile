# Two commands for a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PARALLEL := --numprocesses=2 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0
RESULTS := results/Dhkd/Quickstart/brick/latest
CHANGED := results/changed_light
RESULTS_OF_BENCHMARK ?= results/benchmark/quickstart

.PHONY: quickstart test coverage lint hooks test-slow test-mvtec test-commands test-kill test-load test-lowest test-wheel test-sdist browser site pictures notebooks format

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Train on images made on the spot, test under another light, export to OpenVINO, say where things are.
quickstart: $(VENV)/installed
	$(BIN)/anomalib train --config configs/model/quickstart.yaml
	@echo "The same model on test images under changed light:"
	$(BIN)/anomalib test --config configs/model/quickstart.yaml --data.changed_light true \
		--ckpt_path $(RESULTS)/weights/lightning/model.ckpt --default_root_dir $(CHANGED)
	@$(BIN)/anomalib export --model anomalib_dhkd.Dhkd --export_type openvino \
		--ckpt_path $(RESULTS)/weights/lightning/model.ckpt --export_root $(RESULTS) \
		> $(RESULTS)/export.log 2>&1 || { cat $(RESULTS)/export.log; exit 1; }
	@echo
	@echo "Scores:         the two tables above"
	@echo "Report:         $(RESULTS)/report.html"
	@echo "Heat maps:      $(RESULTS)/images/test"
	@echo "Checkpoint:     $(RESULTS)/weights/lightning/model.ckpt"
	@echo "OpenVINO model: $(RESULTS)/weights/openvino/model.xml"

# The pictures in docs/pictures: the architecture from the model, the others from a benchmark's results. Those are there
# after `python -m anomalib_dhkd benchmark --config configs/benchmark/quickstart.yaml`, which needs no download.
pictures: $(VENV)/installed
	$(BIN)/python docs/pictures.py --results $(RESULTS_OF_BENCHMARK)

# Linter, type checker, tests. Two processes share the files, the long integration tests first; should one crash, the
# other would wait for its tests without end, so that ends the run.
test: lint
	$(BIN)/pytest $(PARALLEL)

# The same tests, and how much of the package they run; tracing takes nearly half as long again.
coverage: $(VENV)/installed
	$(BIN)/pytest $(PARALLEL) --cov=anomalib_dhkd --cov-report=term

# The documentation as a site, in site/.
site: $(VENV)/installed
	$(BIN)/mkdocs build --strict

# What is checked before each commit, too, once `make hooks` was called.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

hooks: $(VENV)/installed
	$(BIN)/pre-commit install

# Run the notebooks and write their outputs into them. They run in a folder that is deleted, so nothing else is left.
notebooks: $(VENV)/installed
	scratch=$$(mktemp -d) && trap "rm -r $$scratch" EXIT && cp notebooks/*.ipynb $$scratch && \
	$(BIN)/jupyter nbconvert --to notebook --inplace --execute --ExecutePreprocessor.record_timing=False \
		--ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec \
		$$scratch/*.ipynb && \
	cp $$scratch/*.ipynb notebooks

# Chromium, which opens pages in tests that are skipped without it (Debian and Ubuntu, as root).
browser:
	apt-get update --quiet=2
	apt-get install --quiet=2 --no-install-recommends chromium chromium-driver > /dev/null

# What takes minutes and is left out of `make test`: random arguments exported, several devices, a wheel installed, the
# longer notebooks; half an hour.
test-slow: $(VENV)/installed
	$(BIN)/pytest $(PARALLEL) -m slow

# Train on real MVTec AD images (MVTEC_ROOT, default ../shared/data/mvtec_ad); a quarter of an hour on two cores.
test-mvtec: $(VENV)/installed
	$(BIN)/pytest -m mvtec -s

# Run the shell blocks of README and docs one after the other, on real MVTec AD images where they ask for them. It
# trains six times.
test-commands: $(VENV)/installed
	$(BIN)/pytest -m commands -s

# Kill a training at twenty moments and resume it: weights and thresholds must be the same; twenty minutes.
test-kill: $(VENV)/installed
	$(BIN)/pytest -m kill -s

# Twenty thousand training images, large validation images, a week of `watch` in small: time and memory; fifty minutes.
test-load: $(VENV)/installed
	$(BIN)/pytest -m load -s

# The tests with the lowest versions that pyproject.toml allows; with PYTHON=python3.10 on the oldest Python, too.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable ".[dev]"
	.venv-lowest/bin/pytest $(PARALLEL)

# The wheel in an environment with nothing else; it trains two steps there.
test-wheel: $(VENV)/installed
	rm -rf .venv-wheel
	$(BIN)/python -m build --outdir .venv-wheel/dist
	$(PYTHON) -m venv .venv-wheel/environment
	.venv-wheel/environment/bin/pip install --quiet --constraint constraints.txt .venv-wheel/dist/*.whl
	cd .venv-wheel && environment/bin/dhkd config quickstart > quickstart.yaml
	cd .venv-wheel && environment/bin/dhkd train --config quickstart.yaml --trainer.max_steps 2

# The tests of the sdist, unpacked, in an environment of its own.
test-sdist: $(VENV)/installed
	rm -rf .venv-sdist
	$(BIN)/python -m build --sdist --outdir .venv-sdist
	tar --extract --gzip --file .venv-sdist/*.tar.gz --directory .venv-sdist --strip-components 1
	$(MAKE) --directory .venv-sdist test

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
