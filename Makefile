# Two commands set up everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo

# The kernels' checks: a second environment on top of the first for the sanitizers, and another machine's compiler.
SANITIZED := build/sanitized
SANITIZERS = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
ARM_CXX := aarch64-linux-gnu-g++
ARM_RUN := qemu-aarch64
DOCS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

.PHONY: help demo test test-slow lint docs sanitize check-arm clean

help:
	@echo "make demo       train a 2-bit language model next to full precision, QuEST and LSQ (about 10 minutes on 2 cores)"
	@echo "make test       run the test suite"
	@echo "make test-slow  run the slow checks"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation as a site, in site/; any warning is an error"
	@echo "make sanitize   the tests of the C++ kernels under AddressSanitizer and UBSan (needs g++)"
	@echo "make check-arm  the C++ kernels on 64-bit ARM, emulated, against plain loops and this machine's results"

# Torch first and by its exact version: a range may resolve to another build, with gigabytes of GPU libraries.
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bitbell needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/bitbell demo --out $(OUT)

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site's builder announces other products on every run: NO_MKDOCS_2_WARNING.
docs: $(VENV)/installed
	$(BIN)/python -c '$(DOCS)' > $(VENV)/docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(VENV)/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

sanitize: $(VENV)/installed
	$(BIN)/python -m venv $(SANITIZED)
	$(BIN)/python -c '$(SITE)' > "$$($(SANITIZED)/bin/python -c '$(SITE)')/base.pth"
	CXX=g++ $(SANITIZED)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall . \
	  -C build-dir=build/sanitized-objects -C cmake.define.BITBELL_SANITIZE=ON -C install.strip=false
	$(SANITIZERS) BITBELL_KERNELS=portable $(SANITIZED)/bin/python -m bitbell info
	$(SANITIZERS) $(SANITIZED)/bin/python -m pytest tests/kernels/test_native.py tests/kernels/test_native_convolution.py tests/kernels/test_native_images.py tests/kernels/test_training_kernels.py tests/packing/test_native_layers.py

check-arm:
	@command -v cmake >/dev/null && command -v $(ARM_CXX) >/dev/null && command -v $(ARM_RUN) >/dev/null || \
	  { echo "make check-arm needs cmake, $(ARM_CXX) and $(ARM_RUN); on Debian: apt-get install cmake g++-aarch64-linux-gnu qemu-user"; exit 1; }
	cmake -S csrc -B build/check -DBITBELL_CHECK=ON
	cmake --build build/check
	cmake -S csrc -B build/check-arm -DBITBELL_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(ARM_CXX) -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build build/check-arm
	build/check/portable_check > build/check/results || { cat build/check/results; exit 1; }
	$(ARM_RUN) build/check-arm/portable_check > build/check-arm/results || { cat build/check-arm/results; exit 1; }
	cat build/check/results build/check-arm/results
	test "$$(grep checksum build/check/results)" = "$$(grep checksum build/check-arm/results)"

clean:
	rm -rf $(VENV)
