"""``python -m open_mythos``: what launchers such as ``torchrun -m`` start."""

import sys

from open_mythos.cli import main

sys.exit(main())
