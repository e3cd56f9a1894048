"""Imported first by what measures this checkout, so that it is not an installed copy's code."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
