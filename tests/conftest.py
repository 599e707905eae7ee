"""Runs every test that takes `device` on the CPU and, marked gpu, on CUDA; poisons memory that is not written yet."""

import os

# Before torch starts its threads: idle ones that spin would take the processor from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch.compile keeps compiled calls on disk by the operators' names, so those of an older schema would be called.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import hypothesis
import pytest
import torch

from mesa_ext import _C

# torch.empty and at::empty hand out NaN (largest integers), so that an element left unwritten cannot pass for a result.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

hypothesis.settings.register_profile(
    "mesa", deadline=None, max_examples=40, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("mesa")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:Deterministic behavior was enabled:UserWarning")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not (torch.cuda.is_available() and _C.build_info()["cuda"]):
        pytest.skip("needs a CUDA device and a CUDA build of mesa_ext")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
