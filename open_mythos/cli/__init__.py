"""The command line: ``open-mythos COMMAND ...``; ``open-mythos COMMAND --help`` explains each.

Parsing does not import torch, so help and usage errors appear immediately.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from open_mythos.errors import MythosError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process.

    0 on success; 2 to 5 for a :class:`~open_mythos.errors.MythosError`, printed to standard error;
    75 if training was interrupted and saved its state; 130 if interrupted otherwise.
    """
    from open_mythos.cli.parser import parse

    try:
        run, arguments = parse(list(sys.argv[1:] if argv is None else argv))
        return run(**arguments)
    except MythosError as error:
        print(f"open-mythos: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # stdout was closed (`| head`): leave nothing for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
