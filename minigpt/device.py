"""Which device to compute on, and in which dtype."""

import argparse
import importlib.metadata
import importlib.util
import platform

import torch

from minigpt.errors import UserError


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --device, which defaults to the GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu, cuda or cuda:N (default here: {default})")


def check_device(name: str) -> str:
    """Returns `name`; raises UserError unless it is a device that can be used here."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.zeros(1, device=name)
        if torch.device(name).index is not None and name.startswith("cuda"):
            torch.cuda.set_device(name)  # Triton launches on the current device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); use cpu or leave it out") from None
    return name


def arithmetic_dtype(device: str) -> torch.dtype:
    """What models compute in: fp16 on a GPU; fp32 on a CPU, which has no fp16 matrix units and would emulate them."""
    return torch.float16 if device.startswith("cuda") else torch.float32


def describe_device(device: str) -> str:
    """The GPU's name, or the kind of CPU and how many threads torch uses of it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str | None]:
    """Of what a measurement depends on."""
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if has_triton else None,
    }
