"""Puts this checkout first on sys.path, so that an installed mtpkern is not measured instead."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
