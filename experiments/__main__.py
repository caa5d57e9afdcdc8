"""``python -m experiments``: run the claims, list their verdicts, run the demo.

Run it from a source checkout; the wheel holds the library only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from open_mythos.errors import ConfigError, MythosError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError on invalid arguments."""

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as a ConfigError."""
        raise ConfigError(message, where=self.prog, fix=f"see {self.prog} --help")


def build_parser() -> Parser:
    """Build the parser for all commands."""
    parser = Parser(
        prog="python -m experiments",
        description="Reproduce published claims about looped transformers.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="print every claim with its recorded verdict")
    commands.add_parser("report", help="regenerate docs/claims.md from the recorded results")
    run = commands.add_parser("run", help="run one claim and print its verdict")
    run.add_argument("claim", help="claim id, such as c1; see `list`")
    run.add_argument("--scale", default="cpu", help="cpu (default) or gpu")
    run.add_argument("--quick", action="store_true", help="smoke test: one or two cells, seconds")
    run.add_argument(
        "--record", action="store_true", help="save results to experiments/ and update docs/"
    )
    run.add_argument(
        "--workers", type=int, default=0, help="parallel cells (default: one per core)"
    )
    run.add_argument("--out", default="",
                     help="results folder (default: runs/experiments/CLAIM/SCALE)")  # fmt: skip
    run.add_argument("--fresh", action="store_true", help="discard finished cells and start over")
    run.add_argument("--quiet", action="store_true", help="hide the progress bar and the table")
    trace = commands.add_parser(
        "trace", help="write an HTML trace of a chain, a Sudoku, a graph or a maze, loop by loop"
    )
    trace.add_argument("folder", type=Path, help="model folder, such as runs/demo/chains/looped")
    trace.add_argument(
        "prompt",
        help='a chain: "e3 r1 r4"; the cells of a Sudoku, . if empty; a graph: "0: 0>3 3>5"; the '
        'rounds that a maze needs; "" chooses a hard one of the last three',
    )
    trace.add_argument(
        "--n-loops",
        type=int,
        help="number of loops (default: max_loop_iters; Sudoku: twice, maze: four times that)",
    )
    trace.add_argument("--exit", default="", help="early-exit rule to mark, such as kl:0.01,1.0")
    trace.add_argument(
        "--out",
        type=Path,
        default=Path("trace.html"),
        help="output HTML file (default: %(default)s)",
    )
    demo = commands.add_parser(
        "demo", help="train looped and dense models and compare them across depths"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"),
        help="output folder; replaces an earlier demo (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument("--seed", type=int, default=0, help="seed of weights, data order and depths")
    demo.add_argument("--quick", action="store_true", help="smoke test: a few training steps")
    demo.add_argument("--quiet", action="store_true", help="print only the results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, that of a MythosError, or 130 on Ctrl-C."""
    try:
        arguments = vars(build_parser().parse_args(argv))
        _run(arguments.pop("command"), arguments)
    except MythosError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # stdout was closed (`| head`): keep the interpreter from failing when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def _run(command: str, arguments: dict[str, Any]) -> None:
    """Dispatch a command; imports are local so that ``--help`` does not load torch."""
    if command == "demo":
        from experiments.demo.run import run_demo

        run_demo(arguments.pop("out"), **arguments)
    elif command == "run":
        from experiments.run import run_claim

        run_claim(**arguments)
    elif command == "trace":
        from experiments.trace import write_trace

        write_trace(**arguments)
    elif command == "list":
        from experiments.listing import print_claims

        print_claims()
    else:
        from experiments.report import update

        update()


if __name__ == "__main__":
    sys.exit(main())
