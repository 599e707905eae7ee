"""A progress bar without a dependency."""

import sys
import time


class Progress:
    """One line that rewrites itself on a terminal; about ten plain lines otherwise."""

    def __init__(self, label, total):
        self.label, self.total = label, total
        self.start = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.shown = -1

    def update(self, done, text=""):
        fraction = done / self.total
        tick = int(fraction * (200 if self.terminal else 10))
        if tick == self.shown and done < self.total:
            return
        self.shown = tick
        elapsed = time.monotonic() - self.start
        left = elapsed * (1 / fraction - 1) if fraction > 0 else float("nan")
        bar = ("#" * int(24 * fraction)).ljust(24, ".")
        line = f"{self.label} [{bar}] {done}/{self.total} {elapsed:4.0f} s, {left:.0f} s left  {text}"
        print(f"\r{line}\x1b[K" if self.terminal else line, end="" if self.terminal else "\n", flush=True)
        if self.terminal and done == self.total:
            print()
