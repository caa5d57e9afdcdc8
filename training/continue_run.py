"""Continue training a model on other text, with a new schedule.

    python training/continue_run.py --checkpoint runs/140m_fine_web_edu --source my_texts/ \\
        --tokens 200000000 --dry-run

Weights, architecture and tokenizer are those of the checkpoint; optimizer state, data position and
step start fresh. The learning rate warms up to a lower peak than in pre-training and decays
linearly to zero over the last steps. To resume the same run, use its own recipe with
--resume latest.
"""

import sys

from open_mythos.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--recipe", "continue_run", *sys.argv[1:]]))
