import platform
import subprocess
import sys

import pytest

PAGES_OF_BLOCKS = """
import resource, sys
import numpy as np
from data_pipelines.building.running import prepare_process
prepare_process(keep_memory=sys.argv[1] == "keep")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(4_000_000, 5_000_000, 10_000):
    np.ones(size, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_of_one_picture_is_used_for_the_next():
    faults = {}
    for mode in ("keep", "return"):
        command = [sys.executable, "-c", PAGES_OF_BLOCKS, mode]
        faults[mode] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert faults["keep"] < 0.2 * faults["return"]
