"""A machine for the tests of this directory. They run in the process that has its library: scripts/conformance."""

import os
import subprocess
import sys
import traceback

DIR = os.environ["SIM_MACHINE"]


def sim(command, *words):
    """`nvml-sim COMMAND MACHINE WORDS...`: what it prints."""
    words = [os.environ["SIM"], command, DIR, *map(str, words)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def raises(error, call, *args, **options):
    """The error of this type that a call raises."""
    try:
        answer = call(*args, **options)
    except error as raised:
        return raised
    raise AssertionError(f"{call.__name__} answers {answer!r}")


def same(found, wanted):
    assert found == wanted, f"{found!r} instead of {wanted!r}"


def run(tests, before):
    """Runs functions called test_..., `before` ahead of each, and prints a line for each as Rust's harness does."""
    failed = 0
    for name, test in tests.items():
        if not name.startswith("test_"):
            continue
        try:
            before()
            test()
            print("test", name.removeprefix("test_"), "... ok", flush=True)
        except Exception:
            failed += 1
            traceback.print_exc()
            print("test", name.removeprefix("test_"), "... FAILED", flush=True)
    sys.exit(failed > 0)
