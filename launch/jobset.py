"""Prints the manifest of a JobSet that runs one command in every pod: on GKE's TPU slices, or on nodes with GPUs.

    python -m launch.jobset --name run1 --image IMAGE --accelerator tpu-v6e-slice --topology 4x4 [--slices 2] \\
        -- medglip train --config medglip_t --workdir gs://BUCKET/run1 ... | kubectl apply -f -
    python -m launch.jobset --name run1 --image IMAGE --accelerator nvidia-h100-80gb --nodes 4 --chips 8 -- medglip ...

One pod a host, with all its chips. JobSet (jobset.x-k8s.io/v1alpha2) must be installed in the cluster. medglip finds
the other pods by the variables set here (GPUs), or by those that GKE sets (TPUs). With --dry-run one line a pod is
printed, "HOST<tab>command"; nothing here needs kubectl or the network.
"""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import yaml

JOB = "host"  # the name of the replicated job
TPU_CHIPS = 4  # of a host of a slice of several hosts: all of GKE's TPU machines for these have four
PORT = 8476  # of the coordinator: medglip_jax/parallel/distributed.py
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035 label
_POD_SUFFIX = 6  # characters that Kubernetes appends to the name of a pod


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; adds `command`, `pods` (of a slice) and `chips` (of a pod) to the options."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.jobset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet: lower-case letters, digits and -")
    add("--image", required=True, help="container image with medglip_jax")
    add("--accelerator", required=True, help="label of the nodes, as tpu-v6e-slice, tpu-v5-lite-podslice, nvidia-l4")
    add("--topology", help="of a TPU slice, as 4x4")
    add("--slices", type=int, default=1, help="TPU slices; default: %(default)s")
    add("--nodes", type=int, help="nodes with GPUs")
    add("--chips", type=int, help="GPUs of a node; TPU chips of a host, if not 4")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="for the command; may be repeated")
    add("--namespace", help="default: the one kubectl is set to")
    add("--service-account", help="that may read and write the bucket")
    add("--queue", help="of Kueue")
    add("--spot", action="store_true", help="run on spot nodes")
    add("--max-restarts", type=int, default=10, help="of all pods, after a failure; default: %(default)s")
    add("--grace", type=int, default=120, help="seconds to save in after SIGTERM; default: %(default)s")
    add("--dry-run", action="store_true", help="print the command of every pod instead of the manifest")
    add("command", nargs="*", metavar="-- COMMAND", help="what every pod runs")
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    options.command = [*options.command, *arguments[split + 1 :]]
    try:
        _complete(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _complete(options: argparse.Namespace) -> None:
    if not options.command:
        raise ValueError("no command: write it after --")
    if not _NAME.fullmatch(options.name):
        raise ValueError(f"--name {options.name}: expected lower-case letters, digits and -, a letter first")
    for pair in options.env:
        if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", pair):
            raise ValueError(f"--env {pair}: expected NAME=VALUE")
    for field in ("slices", "nodes", "chips"):
        if getattr(options, field) is not None and getattr(options, field) < 1:
            raise ValueError(f"--{field} {getattr(options, field)}: at least 1")
    if is_tpu(options):
        if not re.fullmatch(r"\d+x\d+(x\d+)?", options.topology or "") or options.nodes:
            raise ValueError(f"{options.accelerator} needs --topology, as 4x4 or 2x2x4, and no --nodes")
        chips = math.prod(int(size) for size in options.topology.split("x"))
        options.chips = options.chips or min(TPU_CHIPS, chips)
        if not chips or chips % options.chips:
            raise ValueError(f"--topology {options.topology}: {chips} chips are no hosts of {options.chips}")
        options.pods = chips // options.chips
    else:
        if not options.nodes or not options.chips or options.topology or options.slices > 1:
            raise ValueError(f"{options.accelerator} needs --nodes and --chips, and no --topology or --slices")
        options.pods = options.nodes
    longest = len(host_name(options, options.slices - 1, options.pods - 1)) + _POD_SUFFIX
    if longest > 63:
        raise ValueError(f"--name {options.name}: names of pods would have {longest} characters, and may have 63")


def is_tpu(options: argparse.Namespace) -> bool:
    """Returns whether the accelerator is a TPU: GKE's labels for these begin with tpu."""
    return options.accelerator.startswith("tpu")


def host_name(options: argparse.Namespace, job: int, pod: int) -> str:
    """Returns the host name that JobSet gives a pod."""
    return f"{options.name}-{JOB}-{job}-{pod}"


def _variable(name: str, label: str) -> dict[str, Any]:
    path = f"metadata.labels['jobset.sigs.k8s.io/{label}']"
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _unexpanded(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and values; $$ stands for a dollar."""
    return text.replace("$", "$$")


def _environment(options: argparse.Namespace) -> list[dict[str, Any]]:
    # JOB_COMPLETION_INDEX is set by Kubernetes. How many pods a job has is on no label.
    variables = [
        _variable("JOBSET_NAME", "jobset-name"),
        _variable("REPLICATED_JOB_NAME", "replicatedjob-name"),
        _variable("JOBSET_REPLICAS", "replicatedjob-replicas"),
        _variable("JOB_INDEX", "job-index"),
        {"name": "JOB_PODS", "value": str(options.pods)},
    ]
    pairs = (pair.partition("=") for pair in options.env)
    return variables + [{"name": name, "value": _unexpanded(value)} for name, _, value in pairs]


def manifest(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the JobSet, as `kubectl apply` takes it."""
    resource = "google.com/tpu" if is_tpu(options) else "nvidia.com/gpu"
    container: dict[str, Any] = {
        "name": "medglip",
        "image": options.image,
        "command": [_unexpanded(argument) for argument in options.command],
        "env": _environment(options),
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": {resource: options.chips}},
        # Workers of the loader and NCCL need more than the 64 MB that containers get.
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        "nodeSelector": {},
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    metadata: dict[str, Any] = {"name": options.name}
    if is_tpu(options):
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": options.accelerator,
            "cloud.google.com/gke-tpu-topology": options.topology,
        }
        # All pods of a job, and of no other one, on the node pool of a slice.
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    else:
        pod["nodeSelector"] = {"cloud.google.com/gke-accelerator": options.accelerator}
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if options.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod.setdefault("tolerations", []).append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.namespace:
        metadata["namespace"] = options.namespace
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    job = {
        "backoffLimit": 0,  # one failed pod fails its job, and with it the JobSet, which starts all again
        "completionMode": "Indexed",
        "completions": options.pods,
        "parallelism": options.pods,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": options.max_restarts},
            "replicatedJobs": [{"name": JOB, "replicas": options.slices, "template": {"spec": job}}],
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the manifest, or the command of every pod."""
    options = parse(argv)
    if options.dry_run:
        command = shlex.join([*(["env", *options.env] if options.env else []), *options.command])
        for job in range(options.slices):
            for pod in range(options.pods):
                print(f"{host_name(options, job, pod)}\t{command}")
    else:
        print(yaml.safe_dump(manifest(options), sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
