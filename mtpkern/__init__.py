"""mtpkern: Llama-style language models decoded several tokens per step, with the same tokens."""

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtpkern.config import SamplingParams
    from mtpkern.engine import LLM
    from mtpkern.errors import ModelLoadError, UserError
    from mtpkern.request import Completion, Event, Stats

__version__ = "0.1.0"

__all__ = ["LLM", "Completion", "Event", "ModelLoadError", "SamplingParams", "Stats", "UserError"]

# A library prints nothing: log records are discarded unless the application adds a handler.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# In a checkout the folder kernels/ is beside this package, and in an installed copy inside it
# (setup.py maps it): `mtpkern.kernels` works in both.
_package = Path(__file__).resolve().parent
if not (_package / "kernels").is_dir():
    __path__.append(str(_package.parent))


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import mtpkern` and `mtpkern --help` do not import torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = {"SamplingParams": "config", "ModelLoadError": "errors", "UserError": "errors"}
    home = homes.get(name, "engine")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
