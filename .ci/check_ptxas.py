"""Reads the output of `nvcc -Xptxas -v` (stdin), prints what every kernel uses and fails on what makes it slow.

A register spill or a stack frame means traffic to local memory, in the solver in every step of every token. Where ptxas
serializes wgmma, every product is waited for before the next begins; it says so in a line of information only.
"""

import re
import subprocess
import sys

REQUIRED = "solve_kernel"  # a log without it is not a log of the kernels
# Bytes of stack that these kernels may use, and no more; the others, the other solvers before all, may use none.
TOLERATED = {
    "grad_kernel": 208,
    "chunk_states_kernel": 64,
    "decode_kernel<64, 64": 32,
    "narrow_decode_kernel": 8,
}


def kernels(log):
    """(mangled name, architecture, stack frame, spilled bytes, registers, static shared memory) of every kernel."""
    for line in log:
        if match := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            name, arch = match.groups()
            frame = spills = 0
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            frame = max(frame, int(match[1]))  # a function that was not inlined counts for its kernel
            spills = max(spills, int(match[2]) + int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            yield name, arch, frame, spills, int(match[1]), int(shared[1]) if shared else 0
        elif "wgmma" in line and "serialized" in line:
            sys.exit(f"check_ptxas: products wait for one another: {line.rstrip()}")
        elif "warning" in line:
            print(line.rstrip())


def demangled(names):
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |\(anonymous namespace\)::|mesa::", "", name) for name in text.splitlines()]


def main():
    found = list(kernels(sys.stdin))
    bad = []
    print(f"{'kernel':64} {'arch':8} {'registers':>9} {'stack':>6} {'spills':>6} {'shared':>7}")
    for short, (_, arch, frame, spills, registers, shared) in zip(demangled([f[0] for f in found]), found):
        tolerated = max((size for part, size in TOLERATED.items() if part in short), default=0)
        mark = "" if frame == spills == 0 else "  (tolerated)" if frame <= tolerated else "  <--"
        print(f"{short:64} {arch:8} {registers:9} {frame:6} {spills:6} {shared:7}{mark}")
        if "<" in mark:
            bad.append(f"{short} ({arch})")
    if not any(REQUIRED in name for name, *_ in found):
        sys.exit(f"check_ptxas: no kernel named *{REQUIRED}* in the compiler's output")
    if bad:
        sys.exit(f"check_ptxas: stack frames or register spills in {', '.join(bad)}")
    print(f"check_ptxas: {len(found)} kernels, no stack frames or spills but those tolerated")


if __name__ == "__main__":
    main()
