"""`python -m mesa_ext.selftest`: what is installed, what the binary was compiled for, whether its numbers are right.

Takes about ten seconds; exit status 1 if anything is wrong.
"""

from __future__ import annotations

import importlib.metadata
import platform
import struct
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from mesa_ext import MesaState, _C, mesa_attention, mesa_decode_step
from mesa_ext.reference import mesa_reference

# Largest relative errors allowed: of o and of every gradient, in well and in ill conditioned cases.
_BARS = {
    ("cpu", torch.float64): (1e-9, 1e-8, 1e-6),
    ("cpu", torch.float32): (1e-4, 1e-3, 2e-3),
    ("cpu", torch.bfloat16): (5e-3, 1e-2, 2e-2),
    ("cuda", torch.float32): (5e-4, 1e-3, 5e-3),
    ("cuda", torch.float16): (5e-3, 1e-2, 2e-2),
    ("cuda", torch.bfloat16): (5e-3, 1e-2, 2e-2),
}
_STEPS = 100  # the default of 30 would end some float64 solves before their tolerance
_NAMES = ("q", "k", "v", "g", "beta", "lamb", "h_kk", "h_kv")


def compiled_archs(library: Path) -> list[str]:
    """GPU architectures of the code embedded in a shared library, such as ``["80", "80-ptx", "90a"]``.

    Read from the headers of the CUDA "fat binaries" in the file: each starts with a magic number, its own header's size
    and its length, followed by one entry per architecture.
    """
    data, archs, start = library.read_bytes(), set(), -1
    while (start := data.find(b"\x50\xed\x55\xba", start + 1)) >= 0:
        if start + 16 > len(data):
            break
        header_size, size = struct.unpack_from("<HQ", data, start + 6)
        entry, end = start + header_size, start + header_size + size
        while entry < end <= len(data):
            kind, _, header_size, size = struct.unpack_from("<HHIQ", data, entry)
            arch, flags = struct.unpack_from("<I8xI", data, entry + 28)
            suffix = {1: "-ptx", 2: ""}.get(kind)
            if suffix is None or header_size == 0:
                break  # not a fat binary after all
            archs.add(f"{arch}{'a' if flags & 0x100000 else ''}{suffix}")
            entry += header_size + size
    return sorted(archs)


def runs_on(capability: tuple[int, int], archs: list[str]) -> str | None:
    """The entry of ``archs`` that a device of this compute capability would run, or None."""
    device = capability[0] * 10 + capability[1]
    if f"{device}a" in archs:
        return f"{device}a"
    plain = [int(arch) for arch in archs if arch.isdigit()]
    native = [arch for arch in plain if arch // 10 == capability[0] and arch <= device]
    if native:
        return str(max(native))
    ptx = [int(arch.removesuffix("-ptx")) for arch in archs if arch.endswith("-ptx")]
    usable = [arch for arch in ptx if arch <= device]
    return f"{max(usable)}-ptx" if usable else None


def _report_build() -> bool:
    """Prints versions, architectures and devices; False if the binary is not what it says or misses a device."""
    try:
        version = importlib.metadata.version("mesa_ext")
    except importlib.metadata.PackageNotFoundError:
        version = "(source tree, not installed)"
    info, ok = _C.build_info(), True
    print(f"mesa_ext {version}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"built with torch {info['torch_version']}, {info['compiler']}, CUDA {info['cuda_version'] or 'left out'}")
    if info["torch_version"] != torch.__version__.split("+")[0]:
        print("WRONG: built with another torch than this one: build again")
        ok = False

    found = compiled_archs(Path(_C.__file__))
    if found != sorted(info["archs"]):
        print(f"WRONG: built for {info['archs']}, but the binary holds code for {found}")
        ok = False
    elif found:
        print(f"GPU code in the binary: {', '.join(found)}")

    print(f"CPU: {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        code = runs_on(capability, found)
        print(
            f"cuda:{index}: {torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}: "
            + (f"runs the code for {code}" if code else "NO CODE for it in the binary")
        )
        ok = ok and (code is not None or not info["cuda"])
    if not torch.cuda.is_available():
        print("no CUDA device")
    return ok


def _problem(regime: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Inputs (named as in _NAMES; 150 tokens, two heads, K = 72, V = 40) with gradients enabled."""
    B, T, H, K, V = 1, 150, 2, 72, 40
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    random = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    correlation = {"random keys": 0.0, "correlated keys": 0.5, "ill conditioned": 0.9}[regime]
    q, k = normal(2, B, T, H, K)
    k = (1 - correlation) ** 0.5 * k + correlation**0.5 * normal(H, K)
    q, k = (torch.nn.functional.normalize(a, dim=-1) for a in (q, k))
    v, beta, lamb = k @ normal(K, V) + 0.1 * normal(B, T, H, V), uniform(B, T, H), 0.25 + uniform(H, K)
    g = torch.zeros(B, T, H) if correlation else (0.9 + 0.099 * uniform(B, T, H)).log()
    past = normal(B, H, 2 * K, K)
    h_kk, h_kv = past.mT @ past / K, normal(B, H, K, V)
    inputs = [a.to(device, dtype) for a in (q, k, v)] + [a.to(device, state_dtype) for a in (g, beta, lamb, h_kk, h_kv)]
    return [a.requires_grad_() for a in inputs]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected).norm() / expected.norm()
    return error.item() if error.isfinite() else float("inf")


def _gradients(attention, inputs: list[Tensor], weights: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Outputs (o and the final states) of ``attention`` and the gradients of their sum weighted with ``weights``."""
    o, state = attention(*inputs[:6], initial_state=MesaState(*inputs[6:]))
    outputs = [o, *state]
    loss = sum((a.double() * w).sum() for a, w in zip(outputs, weights))
    return outputs, torch.autograd.grad(loss, inputs)


def _check(regime: str, dtype: torch.dtype, device: str) -> bool:
    """Compares outputs and all gradients with the dense float64 reference; prints one line of the table."""

    def attention(*arguments, **keywords):
        return mesa_attention(*arguments, **keywords, output_final_state=True, max_cg_iterations=_STEPS)

    inputs = _problem(regime, dtype, device)
    exact = [a.detach().double().requires_grad_() for a in inputs]
    random = torch.Generator().manual_seed(8)
    shapes = [inputs[2].shape, inputs[6].shape, inputs[7].shape]
    weights = [torch.randn(shape, generator=random, dtype=torch.float64).to(device) for shape in shapes]
    expected, expected_grads = _gradients(mesa_reference, exact, weights)
    actual, grads = _gradients(attention, inputs, weights)

    bar_o, mild, severe = _BARS[device, dtype]
    bar_grad = severe if regime == "ill conditioned" else mild
    o_error = max(map(_relative_error, actual, expected))
    grad_error, worst = max(zip(map(_relative_error, grads, expected_grads), _NAMES))

    # The last token once more, as a decode step on the state before it.
    with torch.no_grad():
        *tokens, lamb, h_kk, h_kv = (a.detach() for a in inputs)
        before = (a[:, :-1] for a in tokens)
        _, state = attention(*before, lamb, initial_state=MesaState(h_kk, h_kv))
        last = mesa_decode_step(*(a[:, -1] for a in tokens), lamb, state, max_cg_iterations=_STEPS)
    decode_error = _relative_error(last, expected[0][:, -1])

    ok = o_error <= bar_o and decode_error <= bar_o and grad_error <= bar_grad
    print(
        f"{device:6}{str(dtype).removeprefix('torch.'):10}{regime:17}{o_error:9.1e}{decode_error:9.1e}{bar_o:9.0e}"
        f"{grad_error:10.1e} ({worst + ')':5}{bar_grad:9.0e}   {'ok' if ok else 'WRONG'}"
    )
    return ok


def main() -> int:
    start = time.perf_counter()
    ok = _report_build()
    print("\nrelative errors against the dense float64 reference")
    print(f"{'':6}{'':10}{'':17}{'outputs':>9}{'decode':>9}{'allowed':>9}{'worst gradient':>17}{'allowed':>9}")
    for device, dtype in _BARS:
        if device == "cpu" or (torch.cuda.is_available() and _C.build_info()["cuda"]):
            for regime in ("random keys", "correlated keys", "ill conditioned"):
                ok = _check(regime, dtype, device) and ok
    print(f"\n{'all well' if ok else 'SOMETHING IS WRONG (see above)'}, {time.perf_counter() - start:.0f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
