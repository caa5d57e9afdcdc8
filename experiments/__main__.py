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
    """A parser that raises its errors as ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Raise ``message``.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(message, where=self.prog, fix=f"see {self.prog} --help")


def build_parser() -> Parser:
    """Build the parser of all commands."""
    parser = Parser(
        prog="python -m experiments",
        description="Claims about looped transformers as experiments with recorded results.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="print every claim with its recorded verdict")
    commands.add_parser("report", help="rewrite docs/claims.md from the recorded results")
    run = commands.add_parser("run", help="run one claim and print its verdict")
    run.add_argument("claim", help="id of the claim, such as c1; see `list`")
    run.add_argument("--scale", default="cpu", help="cpu (default) or gpu")
    run.add_argument(
        "--quick", action="store_true", help="smoke test: run a cell or two in seconds"
    )
    run.add_argument(
        "--record", action="store_true",
        help="write the results to experiments/, and update docs/claims.md and the plot",
    )  # fmt: skip
    run.add_argument(
        "--workers", type=int, default=0, help="cells run in parallel; 0 (default): one per core"
    )
    run.add_argument(
        "--out", default="", help="folder of the results (default: runs/experiments/CLAIM/SCALE)"
    )
    run.add_argument("--fresh", action="store_true", help="discard finished cells first")
    run.add_argument("--quiet", action="store_true", help="no progress and no tables")
    trace = commands.add_parser(
        "trace", help="write a page that follows a chain through the loops of a model"
    )
    trace.add_argument("folder", type=Path, help="model folder, such as runs/demo/chains/looped")
    trace.add_argument("prompt", help='an entity and relations: "e3 r1 r4"')
    trace.add_argument("--n-loops", type=int, help="loops (default: max_loop_iters of the model)")
    trace.add_argument("--exit", default="", help="exit rule whose exits are marked: kl:0.01,1.0")
    trace.add_argument("--out", type=Path, default=Path("trace.html"), help="the HTML file")
    demo = commands.add_parser(
        "demo", help="train a looped and a dense model on real text and compare them over depth"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"),
        help="folder of the picture, the report and the models; replaced (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument("--seed", type=int, default=0, help="of weights, data order and depths")
    demo.add_argument("--quick", action="store_true", help="smoke test: a few training steps")
    demo.add_argument("--quiet", action="store_true", help="print the results only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process.

    0: done. 2 to 5: a :class:`~open_mythos.errors.MythosError` of that code, explained on standard
    error. 130: interrupted.
    """
    try:
        arguments = vars(build_parser().parse_args(argv))
        _run(arguments.pop("command"), arguments)
    except MythosError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # the reader of our output has gone (`| head`); leave nothing for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def _run(command: str, arguments: dict[str, Any]) -> None:
    """Import and call the command; heavy imports stay out of ``--help``."""
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
        from experiments.report import renew

        renew()


if __name__ == "__main__":
    sys.exit(main())
