"""Where to run: the CPU or a GPU, the operations of each, and the constants that differ."""

from dataclasses import dataclass

import torch

from mtpkern.errors import UserError
from mtpkern.kernels._launch import HAS_TRITON
from mtpkern.ops.base import Ops
from mtpkern.ops.cpu import CpuOps
from mtpkern.ops.gpu import GpuOps
from mtpkern.status import Status
from mtpkern.validation import choice


@dataclass(frozen=True)
class DeviceSettings:
    """The constants of the engine that depend on the device."""

    page_size: int | None  # slots per page; None: one page holds a whole sequence
    chunk: int  # prompt tokens per prefill pass, enough to saturate the device
    row_multiple: int  # the rows of a prefill pass are padded to a multiple of this
    steps_ahead: int  # steps in flight, so that the device never waits for the host
    uses_graphs: bool  # steps are captured as CUDA graphs, one per shape; memory is pinned
    # A step is captured for each of these context lengths, and for the full one: an attention's
    # grid spans the page table, and launching blocks without keys takes longer than reading keys.
    graph_contexts: tuple[int, ...] = ()
    graph_memory: int = 0  # the most that all graphs may take of the device's memory, in bytes

    def batch_size(self, sequences: int, most: int) -> int:
        """Slots for a batch of `sequences`: with graphs a power of two, to bound their number."""
        return min(most, 1 << (sequences - 1).bit_length()) if self.uses_graphs else sequences


CPU = DeviceSettings(page_size=None, chunk=128, row_multiple=1, steps_ahead=1, uses_graphs=False)
GPU = DeviceSettings(
    page_size=64,
    chunk=512,
    row_multiple=64,
    steps_ahead=4,
    uses_graphs=True,
    graph_contexts=(8192, 32768),
    graph_memory=2 << 30,
)


def settings_for(device: torch.device) -> DeviceSettings:
    return CPU if device.type == "cpu" else GPU


def resolve_device(device: str | torch.device) -> tuple[torch.device, Ops]:
    """The device to run on and its operations; "auto" is a GPU that can run the kernels, if there
    is one, else the CPU. Raises UserError for a device that cannot be used.

    Nothing is compiled yet: see `compile_kernels`.
    """
    if isinstance(device, torch.device):
        device = _current(device)
    name = choice("device", device, ("auto", "cpu", "cuda"))
    usable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if name == "cpu" or (name == "auto" and not (usable and HAS_TRITON)):
        return torch.device("cpu"), CpuOps()
    if not usable:
        raise UserError("device cuda needs an NVIDIA GPU of compute capability 8.0 or newer")
    if not HAS_TRITON:
        raise UserError(
            "device cuda needs Triton, which is not installed (it has wheels for Linux)"
        )
    return torch.device("cuda"), GpuOps(pdl=torch.cuda.get_device_capability() >= (9, 0))


def compile_kernels(ops: Ops, status: Status) -> None:
    """Compile what a first run on a machine lacks. Call it after all that a user may have mistaken
    is checked, since it takes several seconds."""
    with status.phase("compiling kernels for this CPU, which happens once"):
        ops.compile()


def _current(device: torch.device) -> str:
    """The type of a device; UserError for another GPU than torch's current one."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise UserError(
            f"device {device} is not the current one: call torch.cuda.set_device({device.index}) "
            "first, or set CUDA_VISIBLE_DEVICES"
        )
    return device.type
