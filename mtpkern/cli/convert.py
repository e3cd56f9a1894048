"""mtpkern convert: published files that are not safetensors, to directories that load."""

import argparse
from pathlib import Path
from typing import Any

from mtpkern.outputs import FORCE


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="convert pickled heads, a pickled model or a GGUF to safetensors",
        description="Convert published weights to a new directory of safetensors, for --heads or "
        "--model: medusa_lm_head.pt, hydra_lm_head.pt, the pytorch_model.bin of an EAGLE-3 head or "
        "of a model (sharded too), Meta's consolidated.pth, or a .gguf file.",
        epilog="examples:\n"
        "  mtpkern convert medusa_lm_head.pt heads\n"
        "  mtpkern convert path/to/pickled-model model",
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="the file, beside its configuration, or the directory that holds both",
    )
    command.add_argument(
        "target", type=Path, metavar="DST", help="a directory that is new or empty"
    )
    command.add_argument("--force", action="store_true", help=FORCE)
    command.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    with args.status.phase("starting"):  # importing torch takes a second or two
        from mtpkern.convert import convert

    convert(args.source, args.target, force=args.force)
    print(args.target)
    return 0
