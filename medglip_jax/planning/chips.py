"""What a TPU chip can do: numbers of its maker, each with its source."""

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, which is one device of JAX here.

    Attributes:
        name: as topologies write it.
        flops: bfloat16 FLOPs per second.
        hbm: bytes of main memory.
        hbm_bandwidth: bytes per second.
        link: bytes per second that a link to a neighbour carries in one direction.
        dimensions: of the torus; a chip has two links in each.
        dcn: bytes per second that a chip sends over the data-center network, its share of the host's.
        host: chips of a host along each dimension, in slices of several hosts.
        pod: most chips of a slice.
        options: what libtpu needs to know to take a chip for one device.
        sources: of flops, hbm, hbm_bandwidth and dimensions.
    """

    name: str
    flops: float
    hbm: int
    hbm_bandwidth: float
    link: float
    dimensions: int
    dcn: float
    host: tuple[int, int, int]
    pod: int
    options: tuple[tuple[str, str], ...]
    sources: str

    @property
    def ici_bandwidth(self) -> float:
        """Bytes per second that a chip sends to its neighbours, over all its links at once."""
        return 2 * self.dimensions * self.link


# Google publishes no rate of a single link; these are of "How To Scale Your Model" by people of its TPU team. The pages
# of v5e, v5p and v6e give 400, 1200 and 800 GB/s for all links of a chip and both directions, 10 % more than these.
LINKS_SOURCE = "https://jax-ml.github.io/scaling-book/tpus/"
# There as well: 6.25e9 a chip, 12.5e9 for v6e, 3.125e9 for v5e. The pages of v5e (two cards of 100 Gbit/s for eight
# chips) and v5p (50 Gbit/s a chip) say the same.
DCN_SOURCE = LINKS_SOURCE

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            flops=275e12,
            hbm=32 * GIB,
            hbm_bandwidth=1200e9,
            link=4.5e10,
            dimensions=3,
            dcn=6.25e9,
            host=(2, 2, 1),
            pod=4096,
            options=(("chip_config_name", "megacore"),),
            sources="https://docs.cloud.google.com/tpu/docs/v4",
        ),
        Chip(
            name="v5e",
            flops=197e12,
            hbm=16 * GIB,
            hbm_bandwidth=819e9,
            link=4.5e10,
            dimensions=2,
            dcn=3.125e9,
            host=(2, 2, 1),
            pod=256,
            options=(),
            sources="https://docs.cloud.google.com/tpu/docs/v5e",
        ),
        Chip(
            name="v5p",
            flops=459e12,
            hbm=95 * GIB,
            hbm_bandwidth=2765e9,
            link=9e10,
            dimensions=3,
            dcn=6.25e9,
            host=(2, 2, 1),
            pod=8960,
            options=(),
            sources="https://docs.cloud.google.com/tpu/docs/v5p",
        ),
        Chip(
            name="v6e",
            flops=918e12,
            hbm=32 * GIB,
            hbm_bandwidth=1638e9,
            link=9e10,
            dimensions=2,
            dcn=12.5e9,
            host=(2, 2, 1),
            pod=256,
            options=(),
            sources="https://docs.cloud.google.com/tpu/docs/v6e",
        ),
    )
}
