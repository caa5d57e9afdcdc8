"""Try streaming, training, evaluation and checkpoints in a minute, without any download.

    python training/debug_cpu.py
    torchrun --nproc_per_node=2 training/debug_cpu.py

The text is the source of Python's standard library, as bytes.
"""

import sys

from open_mythos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "debug_cpu", *sys.argv[1:]]))
