"""mtpkern profile and doctor: this machine and what it does."""

import argparse
from typing import Any

from mtpkern.cli.tables import print_table
from mtpkern.outputs import FORCE


def add_commands(commands: Any) -> None:
    profile = commands.add_parser(
        "profile",
        help="profile an answer with Nsight",
        description="Print the profiler's command for `mtpkern generate ARGUMENTS`, and run it.",
        epilog='example:\n  mtpkern profile nsys "Why is the sky blue?" --max-tokens 32',
    )
    profile.add_argument("-o", "--output", default="mtpkern", help="the report")
    profile.add_argument("--force", action="store_true", help=FORCE)
    profile.add_argument("tool", choices=("nsys", "ncu"), help="Nsight Systems or Nsight Compute")
    profile.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS")
    profile.set_defaults(run=_profile)
    doctor = commands.add_parser(
        "doctor",
        help="versions, this machine, what runs where",
        epilog="example:\n  mtpkern doctor",
    )
    doctor.set_defaults(run=_doctor)


def _profile(args: argparse.Namespace) -> int:
    from mtpkern.profile import run_profiler

    prompt = args.arguments or ["Why is the sky blue?"]
    return run_profiler(args.tool, prompt, args.output, force=args.force)


def _doctor(args: argparse.Namespace) -> int:
    from mtpkern.diagnose import describe_machine

    print_table(describe_machine())
    return 0
