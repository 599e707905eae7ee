"""Runs fla's own test file of its Mesa op with mesa_ext's functions in the place of fla's (needs a GPU and fla-core).

    python bench/run_fla_tests.py path/to/flash-linear-attention/tests/ops/test_mesa.py --json fla_tests.json

The file is not part of this project; take it from the release that matches the installed fla-core.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch


class Recorder:
    """Pytest plugin that keeps the outcome of every test."""

    def __init__(self):
        self.outcomes = {}
        self.messages = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid.split("::", 1)[-1]] = report.outcome
        if report.failed:
            self.messages[report.nodeid.split("::", 1)[-1]] = report.longreprtext.strip().splitlines()[-1]


def substitute():
    """Puts our functions into every module of fla that holds its own; returns the counter of their calls."""
    import fla.ops.mesa_net

    import mesa_ext.fla

    calls = Counter()

    def counted(name):
        function = getattr(mesa_ext.fla, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("chunk_mesa_net", "mesa_net_decoding_one_step"):
        theirs, ours = getattr(fla.ops.mesa_net, name), counted(name)
        for module in [m for key, m in sys.modules.items() if key.split(".")[0] == "fla"]:
            if module.__dict__.get(name) is theirs:
                setattr(module, name, ours)
    return calls


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="fla's tests/ops/test_mesa.py")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--theirs", action="store_true", help="run fla's own functions, for comparison")
    args = parser.parse_args()

    import fla

    calls = Counter() if args.theirs else substitute()
    recorder = Recorder()
    code = pytest.main(
        [str(args.file), "-q", "-p", "no:cacheprovider", "--tb=short", "--noconftest"], plugins=[recorder]
    )
    counts = Counter(recorder.outcomes.values())
    summary = {
        "functions": "fla" if args.theirs else "mesa_ext",
        "fla": fla.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "passed": counts["passed"],
        "failed": counts["failed"],
        "skipped": counts["skipped"],
        "failures": recorder.messages,
        "calls": dict(calls),
        "exit_code": int(code),
    }
    print(json.dumps(summary, indent=1))
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
