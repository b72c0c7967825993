"""How the processes of a run find each other: from what their launcher left in the environment."""

import dataclasses
import importlib.util
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from medglip_jax.parallel.roll_call import call_roll

logger = logging.getLogger(__name__)

_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_JOIN_SECONDS = 300.0  # JAX's own limit
_BARRIER_MILLISECONDS = 3_600_000  # compilation of one process may come from a cache; a hung one ends by the watchdog
_PORT = "8476"  # of the coordinator in a JobSet, unless JAX_COORDINATOR_PORT is another one

# What launch/jobset.py sets in every pod, and Kubernetes itself (the last one).
_JOBSET = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOBSET_REPLICAS", "JOB_INDEX", "JOB_PODS", "JOB_COMPLETION_INDEX")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A run of several processes.

    Attributes:
        launcher: what started it.
        arguments: of `jax.distributed.initialize`; those that are missing JAX detects.
        certain: whether there are several processes for sure. Where not, JAX asks, and may find one machine.
        hosts: names of the hosts of the processes, for messages; empty where they are not known.
    """

    launcher: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    certain: bool = True
    hosts: Sequence[str] = ()


def find_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """Returns the run that this process belongs to, or None if it is alone.

    Launchers that start others come last: Open MPI may run inside Slurm, and both inside a pod.

    Args:
        environment: of the process.

    Raises:
        ValueError: the environment says that there are several processes, but not all that is needed to connect them.
    """
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return _explicit(environment)
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environment:
            raise ValueError(
                "Open MPI 5 does not tell where its first process runs: start it with "
                "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT, the host of rank 0 and a free port there"
            )
        alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        return Cluster("Open MPI", _own_devices(environment, alone))
    # SLURM_NTASKS does not tell: a batch script has it too, where the processes it asks for are not started yet.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        counts = re.sub(r"\(x\d+\)", "", environment.get("SLURM_STEP_TASKS_PER_NODE", "")).split(",")
        return Cluster("Slurm", _own_devices(environment, set(counts) == {"1"}))
    hosts = next((environment[name] for name in _TPU_HOSTS if name in environment), None)
    if hosts is not None:
        several = len(hosts.split(",")) > 1 or int(environment.get("MEGASCALE_NUM_SLICES") or "1") > 1
        return Cluster("TPU", hosts=hosts.split(",")) if several else None
    if any(os.path.exists(path) for path in _TPU_DEVICES):
        return Cluster("TPU", certain=False)  # a TPU VM, whose metadata JAX asks for the other hosts
    if "JOBSET_NAME" in environment:
        return _jobset(environment)
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is not None:
            return Cluster("Kubernetes")
        logger.warning(
            "this is a pod of an indexed Job, but not which one of how many: it trains alone. Start the job with "
            "launch/jobset.py, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    return None


def _explicit(environment: Mapping[str, str]) -> Cluster:
    """Reads JAX_COORDINATOR_ADDRESS with its two companions, which Open MPI tells too."""
    names = {
        "num_processes": ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE"),
        "process_id": ("JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK"),
    }
    arguments: dict[str, Any] = {"coordinator_address": environment["JAX_COORDINATOR_ADDRESS"]}
    for argument, variables in names.items():
        found = next((environment[name] for name in variables if name in environment), None)
        if found is not None:
            arguments[argument] = int(found)
    missing = [variables[0] for argument, variables in names.items() if argument not in arguments]
    if missing:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is set but {' and '.join(missing)} not: set all three")
    return Cluster("JAX_COORDINATOR_ADDRESS", arguments)


def _own_devices(environment: Mapping[str, str], alone: bool) -> dict[str, Any]:
    """Returns which GPUs a process takes, where JAX would take the wrong one.

    JAX gives the i-th process of a node the i-th visible GPU. That leaves all but one idle where a process is alone on
    its node, and names one that is not there where the launcher shows each process its own GPU only.

    Args:
        environment: of the process.
        alone: whether no other process of the run is on this node.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return {}
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if environment.get(name):
            visible = len(environment[name].split(","))
            break
    else:
        visible = int(environment.get("SLURM_GPUS_ON_NODE", "0")) if alone else 0
    return {"local_device_ids": list(range(visible))} if visible and (alone or visible == 1) else {}


def _jobset(environment: Mapping[str, str]) -> Cluster | None:
    """Reads the variables of a JobSet's pod; JAX itself would need the package kubernetes and rights in the cluster."""
    missing = [name for name in _JOBSET if name not in environment]
    if missing:
        raise ValueError(
            f"JOBSET_NAME is set but {', '.join(missing)} not: take the env of the manifest that launch/jobset.py "
            "prints, and keep completionMode: Indexed"
        )
    name, job, *numbers = (environment[variable] for variable in _JOBSET)
    replicas, index, pods, pod = map(int, numbers)
    if replicas * pods == 1:
        return None
    subdomain = environment.get("JOBSET_SUBDOMAIN", name)
    port = environment.get("JAX_COORDINATOR_PORT", _PORT)
    arguments = {
        "coordinator_address": f"{name}-{job}-0-0.{subdomain}:{port}",
        "num_processes": replicas * pods,
        "process_id": index * pods + pod,
        "cluster_detection_method": "deactivate",  # all is known; JAX would ask for the package kubernetes
    }
    hosts = [f"{name}-{job}-{i}-{k}" for i in range(replicas) for k in range(pods)]
    return Cluster("JobSet", arguments, hosts=hosts)


def _meet(cluster: Cluster) -> None:
    """Waits for all processes of a run, to name those that do not come."""
    text = os.environ.get("MEDGLIP_JOIN_SECONDS", str(_JOIN_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"MEDGLIP_JOIN_SECONDS is {text!r}: expected seconds") from None
    if seconds <= 0:
        return
    names = ("coordinator_address", "num_processes", "process_id")
    address, count, process = (cluster.arguments.get(name) for name in names)
    if None in (address, count, process):
        try:
            from jax._src.clusters import ClusterEnv

            address, count, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
                address, count, process, [], None, int(seconds)
            )
        except (ImportError, AttributeError, TypeError):  # no public interface: another version may have another one
            logger.info("this version of JAX does not tell where the processes meet; it names none that is missing")
            return
    if address is None or count is None or process is None or count < 2:
        return
    hosts = cluster.hosts if len(cluster.hosts) == count else ()
    call_roll(address, process, count, seconds=seconds, names=hosts)


def initialize_distributed() -> None:
    """Connects the processes of a run; does nothing in a run of one process, or when they are connected already.

    Call it before anything else touches a device. Cloud TPU, Slurm, Open MPI and the JobSet of launch/jobset.py are
    detected. Anywhere else set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    in each process.

    The processes wait MEDGLIP_JOIN_SECONDS for each other, 300 if that is not set; with 0 they leave it to JAX, which
    does not tell who is missing.

    Raises:
        ValueError: the environment says that there are several processes, but not all that is needed to connect them.
        HostMissing: some did not come.
    """
    if jax.distributed.is_initialized():
        return
    cluster = find_cluster(os.environ)
    if cluster is None:
        return
    try:
        _meet(cluster)
        jax.distributed.initialize(**cluster.arguments)
    except ValueError as error:
        if "coordinator_address" not in str(error):  # JAX's word for: this machine is in no cluster
            raise
        if cluster.certain:
            raise ValueError(
                f"{cluster.launcher} started several processes, but JAX does not find the first of them"
                + (": libtpu or the TPU is missing (pip install 'jax[tpu]')" if cluster.launcher == "TPU" else "")
                + "; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process"
            ) from error


def wait_for_processes(what: str) -> None:
    """Returns when all processes of the run are there; does nothing in a run of one process.

    Without a collective: those of CPUs and GPUs give up after seconds or minutes where a process comes late, as after
    compilation on a busy machine.

    Args:
        what: they all have done, another for each place in the program.
    """
    barrier = ocp.multihost.get_barrier_sync_fn()
    barrier(key=f"medglip {what}", timeout_ms=_BARRIER_MILLISECONDS)
