"""What ran on a GPU, and on which sources: writes and checks bench/gpu_report.json.

    python bench/gpu_report.py --check                         # is it about these sources? (exit status 0 always)
    python bench/gpu_report.py --run                           # everything, on a GPU machine
    python bench/gpu_report.py --run --parts tests,sanitizer   # some of it; the rest of the report stays

Parts: tests, sanitizer (of segments in turn too with --kernels-test path/to/CMake's/mesa_kernels_test), fla (with
--fla-tests path/to/fla's/tests/ops/test_mesa.py), accuracy, accuracy_long, and the benchmarks kernels, decode,
chunk_30_steps, little_memory, keep_states and chunk.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
SUFFIXES = {".cu", ".cuh", ".h", ".cpp", ".py"}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def source_hash():
    """sha256 over names and contents of the sources that a result can depend on."""
    digest = hashlib.sha256()
    files = [
        p for folder in ("csrc", "mesa_ext") for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES and p.is_file()
    ]
    for path in sorted(files, key=lambda p: p.relative_to(ROOT).as_posix()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def load(path):
    return json.loads(path.read_text()) if path.exists() else {}


def check(path):
    report = load(path)
    if not report:
        print(f"!!! GPU REPORT MISSING: {path.name} does not exist; run bench/gpu_report.py --run on a GPU machine")
    elif report["source_hash"] != source_hash():
        print(
            f"!!! GPU REPORT STALE: the sources changed since {report['environment']['date']}; "
            "run bench/gpu_report.py --run again"
        )
    elif missing := [part for part in PARTS if part not in report]:
        print(f"!!! GPU REPORT INCOMPLETE: {', '.join(missing)} not run on these sources")
    else:
        print(f"GPU report: fresh ({report['environment']['device']}, {report['environment']['date']})")


def script(name, *arguments, limit=None, **environment):
    """Runs one of the scripts here -> (exit status, seconds, output)."""
    return command([sys.executable, str(BENCH / name), *map(str, arguments)], limit, **environment)


def command(line, limit=None, **environment):
    """Exit status ("stopped" after `limit` seconds), seconds and output."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            line,
            cwd=ROOT,
            env={"PYTHONPATH": path, **os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        status, output = "stopped", (stopped.output or b"").decode(errors="replace")
    print(output, flush=True)
    return status, round(time.monotonic() - start, 1), output


def json_of(name, *arguments, **environment):
    """The figures that a script writes with --json, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "figures.json"
        status, seconds, output = script(name, *arguments, "--json", target, **environment)
        if not target.exists():
            return {"failed": output.strip().splitlines()[-1:], "status": status}
        return {**json.loads(target.read_text()), "status": status, "seconds": seconds}


def run_tests(args):
    """The whole suite with either set of kernels."""
    return {kernels: run_pytest(args, kernels) for kernels in ("portable", "hopper")}


def run_pytest(args, kernels):
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        line = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            f"--junitxml={xml}",
            "tests",
        ]
        status, seconds, _ = command(line + args.pytest, MESA_EXT_KERNELS=kernels)
        cases = list(ElementTree.parse(xml).iter("testcase")) if xml.exists() else []
    kinds = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    failures = [f"{case.get('classname')}::{case.get('name')}" for case in kinds["failure"] + kinds["error"]]
    passed = len(cases) - sum(map(len, kinds.values()))
    return {
        "passed": passed,
        "failed": len(failures),
        "skipped": len(kinds["skipped"]),
        "failures": failures,
        "status": status,
        "seconds": seconds,
    }


def run_sanitizer(args):
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    sanitizer = shutil.which("compute-sanitizer") or next(
        (str(p) for place in places if place and (p := Path(place) / "bin" / "compute-sanitizer").exists()), None
    )
    if sanitizer is None:
        return {"failed": "compute-sanitizer not found"}
    # Name of a target -> its command, and a line that it prints only when it has done what it is for.
    targets = {"": ([sys.executable, str(BENCH / "sanitize_target.py")], "sanitize_target: done")}
    if args.kernels_test:  # segments in turn, for which operators want many more heads than the tools have time for
        targets[", segments"] = ([str(args.kernels_test.resolve()), "segments"], "segments in turn  ok")
    results = {}
    for tool in args.tools.split(","):
        for name, (target, done) in targets.items():
            # Without torch's caching every tensor is an allocation of its own, whose bounds the tools can see.
            status, seconds, output = command(
                [sanitizer, "--tool", tool, "--error-exitcode", "9", *target],
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
            summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
            clean = status == 0 and done in output
            results[tool + name] = {"clean": clean, "summary": summary[-1:], "seconds": seconds}
    return results


def run_chunk(args):
    # Its figures are written shape by shape; compiling fla's kernels takes a good part of the time.
    return json_of("bench_chunk.py", *(["--sweep"] if args.sweep else []), limit=args.limit)


def run_chunk_30_steps(args):
    return json_of("bench_chunk.py", "--shapes", "8x2048x16x128", "--steps", 30, "--no-peers")


def run_little_memory(args):
    def of(mebibytes):
        return json_of(
            "bench_chunk.py", "--shapes", "8x2048x16x128", "--no-peers", MESA_EXT_STATE_MEMORY=str(mebibytes)
        )

    return {f"{mebibytes} MiB": of(mebibytes) for mebibytes in (256, 128)}


def run_keep_states(args):
    return json_of("bench_chunk.py", "--keep-states", "--no-peers")


def run_decode(args):
    return json_of("bench_decode.py")


def run_kernels(args):
    return {kernels: json_of("profile_kernels.py", MESA_EXT_KERNELS=kernels) for kernels in ("portable", "hopper")}


def run_accuracy(args):
    return json_of("accuracy.py", "--tokens", 512, limit=args.limit)


def run_accuracy_long(args):
    # The reference of a long text takes long: there only what a short one cannot show, the largest conditions.
    return json_of("accuracy.py", "--tokens", 4096, "--dtypes", "bf16", "--scales", 1e-6, limit=args.limit)


def run_fla(args):
    if args.fla_tests is None:
        return {"failed": "no --fla-tests given"}
    return json_of("run_fla_tests.py", args.fla_tests)


PARTS = {
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "fla": run_fla,
    "accuracy": run_accuracy,
    "kernels": run_kernels,
    "decode": run_decode,
    "chunk_30_steps": run_chunk_30_steps,
    "little_memory": run_little_memory,
    "keep_states": run_keep_states,
    "chunk": run_chunk,
    "accuracy_long": run_accuracy_long,
}


def run(args):
    sys.path.insert(0, str(BENCH))
    from common import environment

    for name in args.parts.split(","):
        print(f"=== {name}", flush=True)
        result = PARTS[name](args)
        report = load(args.report)
        current = source_hash()
        if report.get("source_hash") != current:  # parts about other sources are worth nothing
            report = {}
        report |= {"source_hash": current, "environment": environment(), name: result}
        args.report.write_text(json.dumps(report, indent=1) + "\n")


def plot(report, folder):
    """The pictures of the report's figures."""
    sys.path.insert(0, str(BENCH))
    from bench_chunk import plot_sweep
    from bench_decode import plot_batches

    if report.get("chunk", {}).get("sweep"):
        plot_sweep(folder / "chunk.png", report["chunk"]["sweep"])
    if report.get("decode", {}).get("decode"):
        plot_batches(folder / "decode.png", report["decode"]["decode"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare the report with the sources")
    action.add_argument("--run", action="store_true", help="run the parts and write the report")
    action.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the report's figures (needs matplotlib)")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--report", type=Path, default=BENCH / "gpu_report.json")
    parser.add_argument("--tools", default=",".join(TOOLS), help="compute-sanitizer's tools")
    parser.add_argument("--sweep", action="store_true", help="time against T as well")
    parser.add_argument("--limit", type=float, help="seconds for chunk and accuracy; what is done by then counts")
    parser.add_argument("--fla-tests", type=Path, help="fla's tests/ops/test_mesa.py")
    parser.add_argument("--kernels-test", type=Path, help="CMake's mesa_kernels_test, for the sanitizer")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="further arguments of pytest, last")
    args = parser.parse_args()
    unknown = set(args.parts.split(",")) - set(PARTS) | set(args.tools.split(",")) - set(TOOLS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.check:
        check(args.report)
    elif args.plot:
        plot(load(args.report), args.plot)
    else:
        run(args)


if __name__ == "__main__":
    main()
