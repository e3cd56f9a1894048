"""Multi-token prediction from the start: train a tiny Llama of bytes together with its heads.

    python -m mtpkern.train.joint --out tiny

It learns Python from the standard library's sources in a few minutes on a CPU, and is written as an
mtp_llama checkpoint with its tokenizer. The last lines say how much of its answers was drafted, and
how to ask it more.
"""

import argparse
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from mtpkern.arguments import Parser, at_least, run
from mtpkern.outputs import FORCE, output_directory, writing

QUESTION = "def main(argv=None):"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit code, as `mtpkern.arguments.run` has it."""
    p = Parser(
        prog="python -m mtpkern.train.joint",
        description="Train a tiny Llama together with its heads",
    )
    p.set_defaults(run=_train)
    add = p.add_argument
    add("--out", type=Path, required=True, help="directory of the checkpoint")
    add("--force", action="store_true", help=FORCE)
    add("--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="Python files")
    add("--steps", type=at_least(1), default=600)
    add("--batch", type=at_least(1), default=8)
    add("--lr", type=at_least(0.0), default=5e-3)
    add("--seed", type=at_least(0), default=0)
    return run(p, argv)


def _train(a: argparse.Namespace) -> int:
    # torch is imported here, so that --help answers at once and Ctrl-C is handled by `run`.
    import torch

    from mtpkern import LLM, SamplingParams
    from mtpkern.train import joint_model

    torch.manual_seed(a.seed)
    with output_directory(a.out, FILES, force=a.force, sources=[a.text]) as directory:
        with a.status.phase("reading Python files"):
            learned, asked = joint_model.read_sources(a.text, a.seed)
        model = joint_model.JointLlama(joint_model.Sizes())
        joint_model.learn(model, learned, a.steps, a.batch, a.lr, a.status)
        with writing(a.out):
            model.save(directory)

    K = model.sizes.heads - 1
    llm = LLM(a.out, ngram=False, num_speculative_tokens=K, status=a.status)
    prompts = [asked[at : at + 200].tolist() for at in range(0, len(asked) - 200, len(asked) // 20)]
    params = SamplingParams(max_tokens=200)
    with a.status.phase("answering with drafts"):
        drafted = llm.generate(prompts, params)
    with a.status.phase("answering without"):
        plain = llm.generate(prompts, params, speculate=False)
    same = sum(d.token_ids == p.token_ids for d, p in zip(drafted, plain, strict=True))
    tokens, steps = (sum(getattr(d.stats, n) for d in drafted) for n in ("new_tokens", "steps"))
    print(bytes(prompts[0][-80:]).decode(errors="replace"), end="")
    print(bytes(drafted[0].token_ids).decode(errors="replace"))
    print(
        f"{tokens / steps:.2f} tokens per step, K = {K}; tokens identical on {same} of "
        f"{len(prompts)}"
    )
    print("To ask it more, give it the beginning of a Python file:")
    command = ["python", "-m", "mtpkern", "generate", "--model", str(a.out), QUESTION]
    print(f"  {shlex.join(command)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
