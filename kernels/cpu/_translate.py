"""Python that Numba translates to LLVM IR without a trace of its runtime."""

from __future__ import annotations

import re
from typing import Any

from numba import config, types


def function_ir(function: Any) -> str:
    """IR, not yet optimised, of a `compiled` function (int64, int64, int64) -> int64, under the
    function's own name."""
    kinds = (types.int64,) * 3
    level = config.OPT
    # Numba would optimise every function again each time one is linked into its callers.
    config.OPT = 0
    try:
        function.compile(kinds)
    finally:
        config.OPT = level
    text: str = function.inspect_llvm(function.signatures[0])
    mangled = function.overloads[function.signatures[0]].fndesc.mangled_name
    lines: list[Any] = [line for line in text.splitlines() if "@_ZN08NumbaEnv" not in line[:16]]
    name = rf'@"?{re.escape(mangled)}"?(?=[\s(])'
    return re.sub(name, f"@{function.__name__}", "\n".join(lines))
