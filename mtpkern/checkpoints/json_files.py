"""JSON objects in files: read with one-line errors, written the same way everywhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtpkern.errors import ModelLoadError, printable, reason


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelLoadError if the file is missing or holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{printable(path)}: {reason(error, path)}") from None
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{printable(path)} is not valid JSON: {printable(error)}") from None
    if not isinstance(content, dict):
        raise ModelLoadError(f"{printable(path)} must hold a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
