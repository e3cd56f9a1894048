"""mtpkern fetch, inspect and convert: checkpoints on disk."""

import argparse
from pathlib import Path
from typing import Any

from mtpkern.arguments import UsageError
from mtpkern.cli.tables import print_table
from mtpkern.outputs import FORCE


def add_commands(commands: Any) -> None:
    fetch = commands.add_parser(
        "fetch",
        help="get and convert the default model, once",
        description="Get and convert the default model, or check the one that is there, and print "
        "its directory.",
        epilog="example:\n  mtpkern fetch",
    )
    fetch.add_argument("name", nargs="?", metavar="NAME", help="a model's name or hub id")
    instead = fetch.add_mutually_exclusive_group()
    instead.add_argument(
        "--list", action="store_true", help="list what is in the cache instead, with its size"
    )
    instead.add_argument("--remove", metavar="NAME", help="remove a model from the cache instead")
    fetch.set_defaults(run=_fetch)
    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint is, whether it runs, and how fast it can at most",
        epilog="example:\n  mtpkern inspect path/to/model",
    )
    inspect.add_argument("model", metavar="DIR", help="a model's directory, name or hub id")
    inspect.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    inspect.set_defaults(run=_inspect)
    convert = commands.add_parser(
        "convert",
        help="make pickled heads, a pickled model or a GGUF loadable",
        description="Convert medusa_lm_head.pt, hydra_lm_head.pt, an EAGLE-3 head's or a model's "
        "pytorch_model.bin, sharded too, or Meta's consolidated.pth (each a file, or the directory "
        "that holds it beside its configuration), or a .gguf file, into a new directory that "
        "--heads or --model takes.",
        epilog="example:\n  mtpkern convert medusa_lm_head.pt heads",
    )
    convert.add_argument("source", type=Path, metavar="SRC")
    convert.add_argument(
        "target", type=Path, metavar="DST", help="a new directory, or an empty one"
    )
    convert.add_argument("--force", action="store_true", help=FORCE)
    convert.set_defaults(run=_convert)


def _fetch(args: argparse.Namespace) -> int:
    from mtpkern.checkpoints.model_cache import (
        cache_directory,
        list_cached,
        megabytes,
        remove_cached,
    )
    from mtpkern.checkpoints.resolve import fetch_model

    if args.name is not None and (args.list or args.remove is not None):
        raise UsageError("NAME is fetched, and goes with neither --list nor --remove")
    if args.list:
        print(f"{cache_directory()}:")
        for model in list_cached():
            print(f"{model.name:<28} {megabytes(model.size):>8}  {model.state}")
        return 0
    if args.remove is not None:
        removed = remove_cached(args.remove, args.status)
        print(f"removed {removed.name}, {megabytes(removed.size)}")
        return 0
    print(fetch_model(args.name, status=args.status))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from mtpkern.checkpoints.resolve import resolve_model
    from mtpkern.diagnose import describe_checkpoint

    print_table(describe_checkpoint(resolve_model(args.model, status=args.status), args.dtype))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from mtpkern.convert import convert

    convert(args.source, args.target, force=args.force)
    print(args.target)
    return 0
