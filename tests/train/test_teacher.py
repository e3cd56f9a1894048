"""The trainer's model on the kernels of a GPU, which ttsem shows on a CPU."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_checkpoint

from mtpkern.ops.gpu import TRITON
from mtpkern.train import distill, teacher
from mtpkern.train.dataset import Dataset
from mtpkern.train.teacher import Teacher


def test_a_gpu_records_the_answers_that_a_cpu_records(
    gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts over two slots, greedy and sampled, one longer than a page of the cache."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": None}
    model = tiny_checkpoint(tmp_path / "model", **sizes)
    prompts = [[5, 9, 33, 7], [11, 4], [40 + i % 60 for i in range(70)]]
    resolve = teacher.resolve_device
    if torch.version.cuda is None:  # ttsem does not support dependent launches
        monkeypatch.setattr(
            teacher,
            "resolve_device",
            lambda device: (torch.device(gpu), TRITON) if device == gpu else resolve(device),
        )
    answers = []
    for device in ("cpu", gpu):
        jobs = [distill.Job(prompt, "a", n) for n, prompt in enumerate(prompts)]
        distill.record(
            Teacher(model, 80, device, taps=(1,)),
            jobs,
            tmp_path / device,
            slots=2,
            max_new=4,
            temperature=0.8,
        )
        answers.append(Dataset([tmp_path / device], (1, 2)))
    theirs, mine = answers
    assert len(mine) == len(theirs) == 3
    for i in range(3):
        assert mine.answer_length(i) == 4
        for name in ("tokens", "top_ids"):
            torch.testing.assert_close(mine.read(i, name), theirs.read(i, name), rtol=0, atol=0)
        for name in ("features", "top_logits"):
            torch.testing.assert_close(
                mine.read(i, name), theirs.read(i, name), rtol=0.02, atol=0.02
            )
