"""Plans GLIP-T and GLIP-L for one TPU chip and for pods, one after another; prints a table and keeps every plan.

python -m benchmarks.plans [--only GLIP-T] [--folder benchmarks/results]

Each plan is a call of `medglip plan`, whose results go to FOLDER/plan_NAME.json; one that is there is not made again.
libtpu must be importable; a plan takes minutes and up to 10 GB, so one runs at a time.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

GIB = 1 << 30
GROUPS = ("bfloat16", "blocks")  # of config.model: dtype, remat


@dataclasses.dataclass(frozen=True)
class Row:
    """A plan: recipe, slice, how many, mesh, preset, images of a device, and whether blocks are loops.

    With loops the compiler needs half of the memory or less: of GLIP-T on v5p:8x8x8 it took more than 13 GB without.
    """

    name: str
    config: str
    topology: str
    slices: int
    mesh: str
    sharding: str
    images: int
    scan: bool = False

    def command(self, output: pathlib.Path, options: Sequence[str]) -> list[str]:
        """Returns the call of `medglip plan`."""
        dtype, remat = GROUPS
        sizes = [f"--config.mesh.{part}" for part in ("data=1", *self.mesh.split(","))]
        return [
            *(sys.executable, "-m", "medglip_jax.plan", "--config", f"configs/{self.config}.py"),
            *("--topology", self.topology, "--slices", str(self.slices), "--batch", str(self.images)),
            *(f"--config.sharding={self.sharding}", f"--config.model.dtype={dtype}", f"--config.model.remat={remat}"),
            *(*sizes, f"--config.model.scan={self.scan}", "--json", str(output), *options),
        ]


ROWS = (
    Row("GLIP-T, 1 chip", "medglip_t", "v5e:1x1", 1, "data=1", "ddp", 4, scan=True),
    Row("all parts, 1 chip", "all_parts", "v5e:1x1", 1, "data=1", "ddp", 4, scan=True),
    Row("GLIP-T, 8 chips", "medglip_t", "v5e:2x4", 1, "fsdp=8", "fsdp", 4, scan=True),
    Row("GLIP-T, 256 chips", "medglip_t", "v5e:16x16", 1, "data=32,fsdp=8", "fsdp", 4),
    Row("GLIP-T, 512 chips", "medglip_t", "v5p:8x8x8", 1, "data=64,fsdp=8", "fsdp", 4, scan=True),
    Row("GLIP-T, 4096 chips", "medglip_t", "v5e:16x16", 16, "replica=16,data=32,fsdp=8", "hsdp", 4, scan=True),
    Row("GLIP-L, 1 chip", "medglip_l", "v5p:1x1x1", 1, "data=1", "ddp", 1, scan=True),
    Row("GLIP-L, 8 chips", "medglip_l", "v5p:2x2x2", 1, "fsdp=8", "fsdp", 1, scan=True),
    Row("GLIP-L, 256 chips", "medglip_l", "v5e:16x16", 1, "data=8,fsdp=32", "fsdp", 1, scan=True),
    Row("GLIP-L, 512 chips", "medglip_l", "v5p:8x8x8", 1, "data=64,fsdp=8", "fsdp", 1, scan=True),
    Row("GLIP-L, 4096 chips", "medglip_l", "v5p:16x16x16", 1, "data=512,fsdp=8", "fsdp", 1, scan=True),
)


def table(rows: Sequence[Row], folder: pathlib.Path) -> str:
    """Returns the plans that are there as a table in Markdown."""
    lines = [
        "| plan | topology | mesh | memory, GiB | fits | TFLOP | HBM, GB | collectives, MB | least step, ms | bound by "
        "| MFU at most | images/s at most |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        path = _file(row, folder)
        if not path.exists():
            continue
        plan = json.loads(path.read_text(encoding="utf-8"))
        bound = plan["bound"]
        cells = [
            row.name + ", scan" * row.scan,
            plan["topology"],
            row.mesh,
            f"{plan['bytes_per_device']['total'] / GIB:.1f}",
        ]
        cells.append("yes" if plan["fits"] else "no")
        if bound:
            moved = sum(plan["collectives"].values()) / 1e6
            cells += [f"{plan['flops'] / 1e12:.2f}", f"{plan['hbm_bytes'] / 1e9:.0f}", f"{moved:,.0f}"]
            cells += [f"{bound['seconds'] * 1e3:.0f} to {bound['seconds_serial'] * 1e3:.0f}", bound["bound_by"]]
            cells += [f"{bound['mfu']:.1%}", f"{bound['images_per_second']:,.0f}"]
        else:
            cells += [""] * 7
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _file(row: Row, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"plan_{row.name.lower().replace(', ', '_').replace(' ', '_').replace('-', '_')}.json"


def main() -> None:
    """Makes the plans that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="plans whose name contains this")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), help="for the plans")
    options, rest = parser.parse_known_args()
    rows = [row for row in ROWS if options.only in row.name]
    for row in rows:
        path = _file(row, options.folder)
        if path.exists() and "bound" in json.loads(path.read_text(encoding="utf-8")):
            continue
        print(f"{row.name}: {row.topology} x {row.slices}", file=sys.stderr, flush=True)
        subprocess.run(row.command(path, rest), check=True, stdout=sys.stderr)
    print(table(rows, options.folder))


if __name__ == "__main__":
    main()
