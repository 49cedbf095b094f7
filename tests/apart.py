"""Python in a process of its own: where signatures are not checked, which torch.compile cannot look into, or modules are missing."""

import subprocess
import sys


def apart(code: str, folder=None) -> list[str]:
    """The lines that the code prints; an AssertionError with what it said where it ends in an error."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
