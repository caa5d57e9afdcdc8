"""Train 140 M parameters on FineWeb-Edu, 20 tokens per parameter, on one GPU.

    python training/140m_fine_web_edu.py --dry-run
    python training/140m_fine_web_edu.py

The small variant with GPT-2's vocabulary of 50,304.
"""

import sys

from open_mythos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "140m_fine_web_edu", *sys.argv[1:]]))
