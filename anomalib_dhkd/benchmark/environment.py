# SPDX-License-Identifier: Apache-2.0

"""What a job ran on, and the memory that it took."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .inference import openvino_core

PACKAGES = ("anomalib-dhkd", "anomalib", "torch", "torchvision", "lightning", "timm", "openvino")


def peak_memory() -> float:
    """Return the largest resident memory of this process so far in GiB (Linux).

    ``getrusage`` would include what the parent process had when it started this one.
    """
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) / 1024**2


def environment() -> dict[str, Any]:
    """Return versions, hardware and the revision of this package's repository."""
    folder = Path(__file__).parent
    described = subprocess.run(  # noqa: S603
        ["git", "-C", folder, "describe", "--always", "--dirty"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": platform.platform(terse=True),
        "CPU": openvino_core().get_property("CPU", "FULL_DEVICE_NAME"),
        "cores": os.cpu_count(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git revision": described.stdout.strip() or None,  # None outside of a repository
    }
