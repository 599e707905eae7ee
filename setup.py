"""Builds mesa_ext._C: the CPU part always, the CUDA part when a CUDA toolkit and a CUDA build of torch are there.

Environment: MESA_EXT_CUDA=0 leaves the CUDA part out, =1 insists on it; TORCH_CUDA_ARCH_LIST ("8.0+PTX;9.0") chooses
the GPUs; MAX_JOBS limits the parallel compilations; CUDA_HOME, CXX as usual.
"""

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
OLDEST_ARCH = 80
DEFAULT_ARCHS = "8.0+PTX;9.0"


def say(message):
    print(f"mesa_ext: {message}", flush=True)


def fail(cause, cure):
    sys.exit(f"mesa_ext: {cause}: {cure}")


def output_of(*command):
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return run.stdout + run.stderr


def cuda_wheels(pattern):
    """Paths inside the `nvidia` namespace package, which pip-installed toolkits and torch's own CUDA wheels share."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else []
    return [path for place in places for path in sorted(Path(place).glob(pattern))]


def cuda_root():
    """The toolkit's directory, or None. The nvcc on PATH may be a script anywhere, so nvcc is asked where it lives."""

    def candidates():
        yield os.environ.get("CUDA_HOME")
        yield os.environ.get("CUDA_PATH")
        if shutil.which("nvcc"):
            top = re.search(r"^#\$ TOP=(.+)$", output_of("nvcc", "--dryrun", "-x", "cu", "-c", os.devnull), re.M)
            yield top and top[1].strip()
            yield Path(shutil.which("nvcc")).resolve().parents[1]
        yield from (nvcc.parents[1] for nvcc in cuda_wheels("*/bin/nvcc"))
        yield "/usr/local/cuda"

    return next((Path(root).resolve() for root in candidates() if root and Path(root, "bin/nvcc").is_file()), None)


def cuda_archs(nvcc):
    """What to compile for: ["80", "80-ptx", "90a"] means machine code for sm_80 and sm_90a, and PTX for compute_80."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    known = [n for n in re.findall(r"sm_(\d+)", output_of(nvcc, "--list-gpu-code")) if int(n) >= OLDEST_ARCH]
    archs = []
    for name in re.split(r"[;,\s]+", wanted.strip(" ;,")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not match:
            fail(f"TORCH_CUDA_ARCH_LIST has '{name}'", f"write numbers, for example '{DEFAULT_ARCHS}'")
        number = match[1] + match[2]
        if int(number) < OLDEST_ARCH:
            say(f"leaving out compute capability {match[1]}.{match[2]}: the kernels need 8.0 or newer")
            continue
        if number not in known:
            fail(f"TORCH_CUDA_ARCH_LIST has '{name}'", f"this nvcc compiles for {', '.join(known)}")
        # Only 9.0 itself runs sm_90 code, so that sm_90a, which has wgmma as well, loses no device.
        archs.append("90a" if number == "90" else number + match[3])
        if match[4]:
            archs.append(f"{number}-ptx")
    if not archs:
        fail(f"TORCH_CUDA_ARCH_LIST='{wanted}' names no GPU that the kernels run on", f"try '{DEFAULT_ARCHS}'")
    return list(dict.fromkeys(archs))


def gencode(arch):
    number, ptx = arch.removesuffix("-ptx"), arch.endswith("-ptx")
    return f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}"


def cuda_or_reason(torch):
    """(toolkit's root, None), or (None, why the CUDA part is left out); fails if it was insisted on."""
    choice = os.environ.get("MESA_EXT_CUDA", "")
    if choice not in ("", "0", "1"):
        fail(f"MESA_EXT_CUDA='{choice}'", "use 0 (leave the CUDA part out) or 1 (insist on it)")
    if choice == "0":
        return None, "MESA_EXT_CUDA=0"
    root = cuda_root()
    if not torch.version.cuda:
        reason, cure = f"torch {torch.__version__} has no CUDA", "install a CUDA build of torch (pytorch.org)"
    elif not root:
        reason, cure = "no nvcc found", f"install the CUDA {torch.version.cuda} toolkit or set CUDA_HOME"
    else:
        return root, None
    if choice == "1":
        fail(f"MESA_EXT_CUDA=1, but {reason}", cure)
    return None, f"{reason}; for the CUDA part, {cure}"


def nvcc_version(nvcc, torch):
    found = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if not found:
        fail(f"{nvcc} does not run", "repair the CUDA toolkit, or set MESA_EXT_CUDA=0 for the CPU part alone")
    version = f"{found[1]}.{found[2]}"
    if found[1] != torch.version.cuda.split(".")[0]:
        age = "older" if int(found[1]) < int(torch.version.cuda.split(".")[0]) else "newer"
        fail(
            f"nvcc {version} ({nvcc}) is {age} than the CUDA {torch.version.cuda} that torch was built with",
            f"set CUDA_HOME to a CUDA {torch.version.cuda} toolkit, or MESA_EXT_CUDA=0 for the CPU part alone",
        )
    return version


def extension():
    if importlib.util.find_spec("torch") is None:
        # pip's build isolation hides the environment's packages; the build needs the very torch that will load it.
        sys.path += site.getsitepackages()
    try:
        import torch
    except ImportError as error:
        fail(
            f"cannot import torch ({error})",
            "pip install torch, then pip install --no-build-isolation . (the build uses the torch that is installed)",
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        fail(f"no C++ compiler ('{compiler}')", "install g++, for example apt install g++, or set CXX")
    if importlib.util.find_spec("ninja"):  # from pip, beside an interpreter that need not be on PATH
        import ninja

        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR

    root, reason = cuda_or_reason(torch)
    sources = ["csrc/bindings.cpp", "csrc/cpu_backend.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    # -fopenmp for at::parallel_for; not linked, so that the threads are those of the libgomp that torch has loaded.
    cxx_flags = ["-O3", "-g0", "-fopenmp"]
    if root is None:
        say(f"building the CPU part only: {reason}")
        from torch.utils.cpp_extension import CppExtension

        return CppExtension(
            "mesa_ext._C", sources, include_dirs=[str(ROOT / "csrc")], extra_compile_args={"cxx": cxx_flags}
        )

    nvcc = str(root / "bin/nvcc")
    version, archs = nvcc_version(nvcc, torch), cuda_archs(nvcc)
    say(f"building the CPU and CUDA parts with nvcc {version} ({root}) for {', '.join(archs)}")
    os.environ["CUDA_HOME"] = str(root)  # read when cpp_extension is imported, whose own guess trusts `which nvcc`
    from torch.utils.cpp_extension import CUDAExtension

    cxx_flags += ["-DMESA_WITH_CUDA", f'-DMESA_CUDA_ARCHS="{",".join(archs)}"']
    nvcc_flags = Path("csrc/cuda/nvcc_flags.txt").read_text().split()
    module = CUDAExtension(
        "mesa_ext._C",
        [*sources, "csrc/cuda_backend.cpp", *sorted(glob("csrc/cuda/*.cu"))],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx_flags, "nvcc": [*nvcc_flags, "--threads=2", *map(gencode, archs)]},
    )
    # A toolkit without the maths libraries (their headers are in torch's) or from pip (no libcudart.so, only .so.N).
    module.include_dirs += map(str, cuda_wheels("*/include"))
    if not any(Path(path, "libcudart.so").exists() for path in module.library_dirs):
        runtime = cuda_wheels(f"*/lib/libcudart.so.{version.split('.')[0]}")
        module.extra_objects += map(str, runtime[:1])
        module.libraries.remove("cudart")
    return module


module = extension()
from torch.utils.cpp_extension import BuildExtension  # noqa: E402 (torch may only have been found just above)

setup(ext_modules=[module], cmdclass={"build_ext": BuildExtension})
