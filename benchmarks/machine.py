"""The machine that figures are of."""

import os
import pathlib
import platform


def cpu_name() -> str:
    """Returns the name of this machine's processor, as it tells it."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
