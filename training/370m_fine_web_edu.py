"""Train 370 M parameters on FineWeb-Edu, 20 tokens per parameter, on one node.

    python training/370m_fine_web_edu.py --dry-run
    torchrun --nproc_per_node=8 training/370m_fine_web_edu.py

GPT-2's vocabulary of 50,304; 64 experts, of which a token uses 4 and the shared one.
"""

import sys

from open_mythos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "370m_fine_web_edu", *sys.argv[1:]]))
