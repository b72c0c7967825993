"""The least time of a step: each resource of the chip used at its full rate, and nothing else in the way."""

import dataclasses
import math

FORMULA = (
    "compute = FLOPs / peak; memory = bytes / HBM bandwidth; ICI = bytes sent / (links x rate); "
    "DCN = bytes sent / rate; of n bytes over d devices an all-reduce sends 2 (d - 1) / d n, "
    "a gather, scatter or all-to-all (d - 1) / d n; step >= the largest (all overlap) or their sum (none does); "
    "MFU = model FLOPs / (step x peak); model FLOPs = products and convolutions of the forward pass, x 3 in training"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a step and what follows from it.

    Attributes:
        compute, memory, ici, dcn: seconds that each resource is busy.
        images: of a step, on all devices.
        model_flops: of a step on all devices, without recomputation and padding.
        peak: FLOPs per second of all devices.
    """

    compute: float
    memory: float
    ici: float
    dcn: float
    images: int
    model_flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """Of a step, if everything overlaps."""
        return max(self.compute, self.memory, self.ici, self.dcn)

    @property
    def seconds_serial(self) -> float:
        """Of a step, if nothing overlaps."""
        return math.fsum((self.compute, self.memory, self.ici, self.dcn))

    @property
    def bound_by(self) -> str:
        """What takes longest."""
        times = {"compute": self.compute, "memory": self.memory, "ici": self.ici, "dcn": self.dcn}
        return max(times, key=lambda name: times[name])

    def mfu(self, seconds: float) -> float:
        """Returns the share of the peak that the model's own FLOPs use in a step of so many seconds."""
        return self.model_flops / (seconds * self.peak)
