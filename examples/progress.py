"""A progress bar without a dependency."""

import sys
import time


class Progress:
    """One line that rewrites itself on a terminal; ten plain lines otherwise."""

    def __init__(self, label):
        self.label, self.start, self.shown = label, time.monotonic(), -1
        self.terminal = sys.stdout.isatty()

    def update(self, fraction, text=""):
        """`fraction` of the work is done, from 0 to 1."""
        tick = int(fraction * (500 if self.terminal else 10))
        if tick == self.shown:
            return
        self.shown = tick
        elapsed = time.monotonic() - self.start
        left = f", {elapsed * (1 / fraction - 1):.0f} s left" if fraction > 0 else ""
        bar = ("#" * int(24 * fraction)).ljust(24, ".")
        line = f"{self.label} [{bar}] {elapsed:.0f} s{left}  {text}"
        print(f"\r{line}\x1b[K" if self.terminal else line, end="" if self.terminal else "\n", flush=True)
        if self.terminal and fraction >= 1:
            print()
