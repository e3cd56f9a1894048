"""What a training run is asked for."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """What to train, on what; the options of `mtpkern train --help`.

    Zeros are replaced by what is measured to fit `minutes`.
    """

    out: Path
    model: str | None = None
    prompts: tuple[Path, ...] = ()
    answers: tuple[Path, ...] = ()  # recorded earlier, instead of prompts
    init: Path | None = None  # heads to continue from: a name or a directory
    family: str = "mtp"
    draft_vocab_size: int = 16384
    round_prompts: int = 1024  # prompts answered between two rounds of learning
    window: int = 4  # rounds whose answers are kept
    held_out: int = 0  # prompts to measure on, answered greedily
    temperature: float = 0.6  # of every other prompt's answer; 0: all are greedy
    max_new: int = 192
    slots: int = 0  # answers written at a time
    device: str = "auto"
    minutes: float = 0.0  # of a run without a number of steps; 0: DEFAULT_MINUTES
    force: bool = False  # replace finished heads, or what another run left in `out`
