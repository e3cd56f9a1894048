"""mtpkern fetch: the default model, and the cache of models."""

import argparse
from typing import Any

from mtpkern.arguments import UsageError


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "fetch",
        help="download and convert the default model, once",
        description="Download and convert the default model, or check the copy in the cache, and "
        "print its directory. A hub id fetches that model from the Hugging Face hub.",
        epilog="examples:\n"
        "  mtpkern fetch            the default model\n"
        "  mtpkern fetch --list     what is in the cache",
    )
    command.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="a model's name or hub id (default: the default model)",
    )
    instead = command.add_mutually_exclusive_group()
    instead.add_argument(
        "--list", action="store_true", help="list the models in the cache and their sizes instead"
    )
    instead.add_argument("--remove", metavar="NAME", help="remove a model from the cache instead")
    command.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> int:
    if args.name is not None and (args.list or args.remove is not None):
        raise UsageError("--list and --remove do not go with the NAME of a model to fetch")
    with args.status.phase("starting"):  # importing torch takes a second or two
        from mtpkern.checkpoints.model_cache import (
            cache_directory,
            list_cached,
            megabytes,
            remove_cached,
        )
        from mtpkern.checkpoints.resolve import fetch_model

    if args.list:
        cached = list_cached()
        print(f"{cache_directory()}:{'' if cached else ' no models'}")
        for model in cached:
            print(f"{model.name:<28} {megabytes(model.size):>8}  {model.state}")
        return 0
    if args.remove is not None:
        removed = remove_cached(args.remove, args.status)
        print(f"removed {removed.name}, {megabytes(removed.size)}")
        return 0
    print(fetch_model(args.name, status=args.status))
    return 0
