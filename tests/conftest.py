"""Runs every test that takes `device` on the CPU and, marked gpu, on CUDA; poisons memory that is not written yet.

With --emulated LIBRARY (CMake's target mesa_ext_emulated) tests on the CPU, but those in float64, call the operators for
CUDA on the emulator, and CUDA's bars hold.
"""

import os
import warnings

# Before torch starts its threads: idle ones that spin would take the processor from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch.compile keeps compiled calls on disk by the operators' names, so those of an older schema would be called.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import hypothesis
import pytest
import torch

from mesa_ext import _C
from tests import regimes

# torch.empty and at::empty hand out NaN (largest integers), so that an element left unwritten cannot pass for a result.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

hypothesis.settings.register_profile(
    "mesa", deadline=None, max_examples=40, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("mesa")


def pytest_addoption(parser):
    parser.addoption("--emulated", metavar="LIBRARY", help="run CUDA's kernels on the emulator instead of the CPU's")


def pytest_configure(config):
    if config.getoption("--emulated"):
        config.emulated = _emulate(config.getoption("--emulated"))
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:Deterministic behavior was enabled:UserWarning")


def _emulate(path):
    """Puts the emulator's operators in the place of the CPU's; they stay there as long as what is returned."""
    torch.ops.load_library(path)
    overrides = torch.library.Library("mesa_ext", "IMPL")
    for name in ("chunk_forward", "chunk_backward", "decode_step"):
        cpu = torch.library.get_kernel(f"mesa_ext::{name}", "CPU")
        emulated = getattr(torch.ops.mesa_ext_emulated, name).default

        def call(keys, *inputs, cpu=cpu, emulated=emulated):
            wide = any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in inputs)
            return cpu.call_boxed(keys, *inputs) if wide else emulated(*inputs)

        with warnings.catch_warnings():  # that something is overridden
            warnings.simplefilter("ignore")
            overrides.impl(name, call, "CPU", with_keyset=True, allow_override=True)
    regimes.BARS.update({("cpu", dtype): bars for (device, dtype), bars in regimes.BARS.items() if device == "cuda"})
    regimes.CUDA_KERNELS_ON.add("cpu")
    return overrides


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not (torch.cuda.is_available() and _C.build_info()["cuda"]):
        pytest.skip("needs a CUDA device and a CUDA build of mesa_ext")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
