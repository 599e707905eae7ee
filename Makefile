# make demo | make test: from a fresh clone to a running demo or test run. Also: build, kernels, selftest, clean.
#
#   PYTHON=python3.11    interpreter to start from (default: one on PATH that is 3.10 or newer and has venv)
#   VENV=.venv           virtual environment to work in; the interpreter's own packages are never changed
#   TORCH=torch==2.13.0  what to ask pip for; a torch that PYTHON has already is used if it fits
#   ARGS='-k decode'     passed on to pytest or to the demo
# and setup.py's variables: MESA_EXT_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME, CXX.

is_usable := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))
where_is_torch := import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])
candidates := python3 python python3.14 python3.13 python3.12 python3.11 python3.10
PYTHON ?= $(firstword $(foreach p,$(candidates),$(shell $(p) -c '$(is_usable)' 2> /dev/null && echo $(p))))
VENV ?= .venv
TORCH ?= torch
TOOLS := setuptools wheel ninja numpy matplotlib pytest hypothesis

py := $(VENV)/bin/python
run := PYTHONPATH=. $(py)
say := @echo mesa_ext:

.PHONY: demo test selftest build environment kernels clean

demo: build
	$(say) running the demo
	@$(run) examples/demo.py $(ARGS)

test: build
	$(say) running the tests
	@$(run) -m pytest -q $(ARGS)

selftest: build
	@$(run) -m mesa_ext.selftest

# Python's own builder in place: unlike pip's it recompiles only what changed. Its log is long, so it goes to a file.
build: environment
	$(say) compiling "(log: build/build.log)"
	@mkdir -p build
	@$(py) setup.py build_ext --inplace > build/build.log 2>&1 || { tail -n 60 build/build.log; exit 1; }
	@grep '^mesa_ext:' build/build.log

environment: $(py)
	@$(py) -c 'import torch' 2> /dev/null || echo mesa_ext: installing $(TORCH) in $(VENV), a large download
	@$(py) -m pip install -qq --disable-pip-version-check '$(TORCH)' $(TOOLS)

# A torch that PYTHON has is seen from the new environment through a .pth file (system, venv and conda alike).
$(py):
	@test -n "$(PYTHON)" || { \
	  echo "mesa_ext: no Python 3.10 or newer with venv on PATH: apt install python3-venv or set PYTHON=..."; exit 1; }
	$(say) creating $(VENV) from $(PYTHON)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@if parent=$$($(PYTHON) -c '$(where_is_torch)' 2> /dev/null); then \
	  echo "mesa_ext: using the packages in $$parent"; \
	  echo "$$parent" > $$($(py) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth; fi

kernels:
	$(say) building the kernels without torch in build/kernels
	@cmake -S . -B build/kernels > /dev/null
	@cmake --build build/kernels --parallel

clean:
	rm -rf build dist *.egg-info mesa_ext/_C*.so $(VENV)
