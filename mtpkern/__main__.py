"""`python -m mtpkern` is the command mtpkern."""

import sys

from mtpkern.cli import main

sys.exit(main())
