"""How a process learns of the others, from the environments that launchers leave."""

import importlib.util
import logging

import jax
import pytest

from launch import jobset
from medglip_jax.parallel import distributed
from medglip_jax.parallel.distributed import find_cluster, initialize_distributed

ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[01-04]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
TPU = {"TPU_WORKER_HOSTNAMES": "host-0,host-1", "TPU_WORKER_ID": "1"}
JOBSET = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOBSET_NAME": "run1",
    "REPLICATED_JOB_NAME": "host",
    "JOBSET_REPLICAS": "2",
    "JOB_INDEX": "1",
    "JOB_PODS": "4",
    "JOB_COMPLETION_INDEX": "3",
}


@pytest.fixture(autouse=True)
def no_tpu_in_this_machine(monkeypatch):
    monkeypatch.setattr(distributed, "_TPU_DEVICES", ())


@pytest.fixture
def initialized(monkeypatch):
    """A start in an environment: the arguments that JAX got, after it detected what was not given."""
    from jax._src.clusters import ClusterEnv

    calls = []

    def initialize(coordinator_address=None, num_processes=None, process_id=None, local_device_ids=None, **others):
        if others.get("cluster_detection_method") != "deactivate":
            found = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator_address, num_processes, process_id, local_device_ids, None, 300
            )
            coordinator_address, num_processes, process_id, local_device_ids = found
        if coordinator_address is None:
            raise ValueError("coordinator_address should be defined.")
        calls.append((coordinator_address, num_processes, process_id, local_device_ids))

    def call_roll(address, process, count, *, seconds, names):
        assert seconds == 300 and len(names) in (0, count)
        met.append((address, count, process))

    met = []
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "call_roll", call_roll)

    def start(environment):
        for name in {*ORTE, *OPEN_MPI, *SLURM, *TPU, *JOBSET, "JAX_COORDINATOR_ADDRESS", "CUDA_VISIBLE_DEVICES"}:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        initialize_distributed()
        assert len(calls) <= 1
        assert [call[:3] for call in calls] == met  # they meet where JAX connects them
        return calls[0] if calls else None

    return start


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "8"},  # inside a batch script, whose processes are not started yet
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        JOBSET | {"JOBSET_REPLICAS": "1", "JOB_INDEX": "0", "JOB_PODS": "1", "JOB_COMPLETION_INDEX": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
    ids=["nothing", "batch script", "one Slurm task", "one rank", "one TPU host", "one pod", "plain pod"],
)
def test_one_host_is_not_connected_to_anything(initialized, environment):
    assert initialized(environment) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SLURM, ("node01:61517", 4, 2, [0])),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ("node01:61517", 4, 2, [0, 1, 2, 3])),
        (SLURM | {"SLURM_GPUS_ON_NODE": "8"}, ("node01:61517", 4, 2, [*range(8)])),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1"},
            ("node01:61517", 4, 2, [1]),
        ),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0"},
            ("node01:61517", 4, 2, [0]),
        ),
        (OPEN_MPI | ORTE, ("10.96.0.1:62624", 4, 3, [1])),
        (SLURM | OPEN_MPI | ORTE, ("10.96.0.1:62624", 4, 3, [1])),  # mpirun in a Slurm job starts its daemons with srun
        (JOBSET, ("run1-host-0-0.run1:8476", 8, 7, None)),
        (
            JOBSET | {"JOBSET_SUBDOMAIN": "net", "JAX_COORDINATOR_PORT": "99"},
            ("run1-host-0-0.net:99", 8, 7, None),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            ("a:1", 2, 1, None),
        ),
        (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "a:1"}, ("a:1", 4, 3, None)),
    ],
)
def test_launchers_are_recognised(initialized, environment, expected):
    assert initialized(environment) == expected


def test_tpu_slice_is_left_to_jax(initialized, monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    # In a JobSet too: the order of the hosts is the TPU's.
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "first", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    for name in slices:
        monkeypatch.delenv(name, raising=False)
    assert initialized(TPU | slices | JOBSET) == ("first:8482", 4, 3, None)


def test_tpu_slice_without_libtpu_is_an_error_and_not_a_run_of_each_host(initialized):
    with pytest.raises(ValueError, match=r"TPU started several processes.*jax\[tpu\]"):
        initialized(TPU)


def test_machine_that_only_looks_like_a_tpu_trains_alone(initialized, monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "_TPU_DEVICES", (str(tmp_path),))
    assert find_cluster({}) is not None and initialized({}) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (OPEN_MPI, "mpirun -x JAX_COORDINATOR_ADDRESS"),
        ({k: v for k, v in JOBSET.items() if k not in ("JOB_PODS", "JOB_COMPLETION_INDEX")}, "JOB_PODS, JOB_COMPL"),
    ],
)
def test_half_of_an_environment_is_an_error_that_names_the_rest(environment, message):
    with pytest.raises(ValueError, match=message):
        find_cluster(environment)


def test_pods_that_cannot_find_each_other_are_told_of(caplog, monkeypatch):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert find_cluster(pod) is None
    assert "trains alone" in caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert find_cluster(pod) == distributed.Cluster("Kubernetes")


def test_every_pod_of_our_manifest_finds_its_place(monkeypatch):
    """As Kubernetes and JobSet fill the variables of the manifest in."""
    command = [
        "--name",
        "run1",
        "--image",
        "i",
        "--accelerator",
        "tpu-v6e-slice",
        "--topology",
        "4x4",
        "--slices",
        "2",
        "--",
        "medglip",
        "train",
    ]
    options = jobset.parse(command)
    spec = jobset.manifest(options)["spec"]["replicatedJobs"][0]
    template = spec["template"]["spec"]
    found = []
    for job in range(spec["replicas"]):
        for pod in range(template["completions"]):
            labels = {
                "jobset-name": "run1",
                "replicatedjob-name": spec["name"],
                "replicatedjob-replicas": str(spec["replicas"]),
                "job-index": str(job),
            }
            environment = {"JOB_COMPLETION_INDEX": str(pod)}
            for variable in template["template"]["spec"]["containers"][0]["env"]:
                path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
                environment[variable["name"]] = labels[path.split("/")[1][:-2]] if path else variable["value"]
            found.append(find_cluster(environment).arguments)
    assert [arguments["process_id"] for arguments in found] == list(range(8))
    assert {arguments["num_processes"] for arguments in found} == {8}
    first = f"{jobset.host_name(options, 0, 0)}.run1:{jobset.PORT}"
    assert {arguments["coordinator_address"] for arguments in found} == {first}
