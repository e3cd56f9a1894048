"""mtpkern: Llama-style language models decoded several tokens a step, with the same tokens."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the folder kernels/ stands beside this package, and installed it is inside it
# (setup.py maps it): make `mtpkern.kernels` the same thing in both.
_package = Path(__file__).resolve().parent
if not (_package / "kernels").is_dir():
    __path__.append(str(_package.parent))
