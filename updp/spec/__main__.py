"""``python -m updp.spec FILE...``: check spec files; the exit status is 2 if any is wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from updp.errors import UpdpError
from updp.spec.files import load_spec

_USAGE = """usage: python -m updp.spec FILE...

Check spec files against the schema and against themselves.
"""


def main(arguments: Sequence[str]) -> int:
    """Check the files and print every problem of every file."""
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(_USAGE)
        return 0 if arguments else 2
    status = 0
    for argument in arguments:
        try:
            load_spec(Path(argument))
        except UpdpError as error:
            print(error, file=sys.stderr)
            status = max(status, error.exit_status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
