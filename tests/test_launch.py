"""Launch scripts: every host gets exactly the command that was asked for, and the manifest is one that JobSet takes."""

import json
import os
import pathlib
import re
import shlex
import stat
import subprocess

import pytest
import yaml

from launch import jobset

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRICKY = [
    "medglip",
    "train",
    "--config",
    "a recipe.py",
    "--config.x='1'",
    "$HOME",
    "$(id)",
    "*",
    'say "hi"',
    "",
    "ß;&|",
    "\\",
]
TPU = ["--name", "run1", "--image", "eu.gcr.io/p/i:1", "--accelerator", "tpu-v6e-slice", "--topology", "4x4"]
GPU = ["--name", "run1", "--image", "i", "--accelerator", "nvidia-h100-80gb", "--nodes", "3", "--chips", "8"]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Programs that write down how they were called, in front of the real ones; and a reader of that."""
    folder = tmp_path / "tools"
    folder.mkdir()
    record = "import json,os,sys; json.dump([sys.argv[1:],os.getcwd(),dict(os.environ)],open(sys.argv[0]+'.json','w'))"
    for name in ("medglip", "apptainer", "gcloud", "srun"):
        program = folder / name
        program.write_text(f"#!/usr/bin/env python3\n{record}\n")
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)

    def called(name: str) -> tuple[list[str], str, dict[str, str]]:
        return tuple(json.loads((folder / f"{name}.json").read_text()))

    return called


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(ROOT / "launch" / name), *arguments], capture_output=True, text=True)


def lines_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The command of each host."""
    assert done.returncode == 0, done.stderr
    return dict(line.split("\t") for line in done.stdout.splitlines())


def assert_runs(line: str, called, program: str = "medglip", arguments=TRICKY[1:], **environment: str) -> None:
    """A shell that gets the line, as that of a host does, starts the program with exactly these arguments."""
    subprocess.run(["bash", "-c", line], check=True)
    found, _, variables = called(program)
    assert found == list(arguments)
    assert {name: variables[name] for name in environment} == environment


def test_tpu_vm_dry_run_has_a_line_for_each_host(tools):
    done = script(
        "tpu_vm.sh", "--name", "pod", "--zone", "z", "--hosts", "3", "--env", "A=b c", "--dry-run", "--", *TRICKY
    )
    lines = lines_of(done)
    assert list(lines) == ["pod-w-0", "pod-w-1", "pod-w-2"]
    for line in lines.values():
        assert shlex.split(line) == ["env", "A=b c", *TRICKY]
        assert_runs(line, tools, A="b c")


def test_tpu_vm_dry_run_of_several_slices_in_a_directory(tools, tmp_path):
    where = tmp_path / "my code"
    where.mkdir()
    common = ["--name", "qr", "--zone", "z", "--slices", "2", "--hosts", "2", "--directory", str(where)]
    lines = lines_of(script("tpu_vm.sh", *common, "--dry-run", "--", *TRICKY))
    assert list(lines) == ["qr-0-w-0", "qr-0-w-1", "qr-1-w-0", "qr-1-w-1"]
    assert_runs(lines["qr-1-w-0"], tools)
    assert tools("medglip")[1] == str(where)


@pytest.mark.parametrize("slices", [None, "2"])
def test_tpu_vm_gives_gcloud_the_command_of_the_dry_run(tools, slices):
    common = ["--name", "pod", "--zone", "z", *(["--slices", slices] if slices else []), "--project", "p"]
    done = script("tpu_vm.sh", *common, "--", *TRICKY)
    assert done.returncode == 0, done.stderr
    *arguments, command = tools("gcloud")[0]
    if slices:
        expected = ["compute", "tpus", "queued-resources", "ssh", "pod", "--node=all"]
    else:
        expected = ["compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert arguments == [*expected, "--zone=z", "--worker=all", "--project=p"]
    lines = lines_of(script("tpu_vm.sh", *common, "--hosts", "1", "--dry-run", "--", *TRICKY))
    assert {command} == {f"--command={line}" for line in lines.values()}


def test_slurm_dry_run_has_a_line_for_each_node(tools):
    lines = lines_of(script("slurm.sbatch", "--nodes", "2", "--env", "A=b c", "--dry-run", "--", *TRICKY))
    assert list(lines) == ["node-0", "node-1"]
    for line in lines.values():
        assert_runs(line, tools, A="b c")


@pytest.mark.parametrize(
    ("accelerator", "options"), [("gpu", ["exec", "--nv"]), ("tpu", ["exec", "--bind", "/dev"]), ("cpu", ["exec"])]
)
def test_slurm_runs_in_an_image(tools, accelerator, options):
    common = ["--accelerator", accelerator, "--image", "my image.sif", "--nodes", "1", "--dry-run", "--"]
    (line,) = lines_of(script("slurm.sbatch", *common, *TRICKY)).values()
    assert_runs(line, tools, "apptainer", [*options, "my image.sif", *TRICKY])
    assert ("JAX_PLATFORMS=cpu" in line) == (accelerator == "cpu")


def test_slurm_gives_srun_the_command_of_the_dry_run(tools, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    done = script("slurm.sbatch", "--env", "A=b c", "--", *TRICKY)
    assert done.returncode == 0, done.stderr
    nodes, tasks, *rest = tools("srun")[0]
    assert (nodes, tasks) == ("--nodes=4", "--ntasks-per-node=1")
    lines = lines_of(script("slurm.sbatch", "--env", "A=b c", "--dry-run", "--", *TRICKY))
    assert len(lines) == 4
    for line in lines.values():
        assert rest[rest.index("env") :] == shlex.split(line)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tpu_vm.sh", ["--name", "a", "--zone", "z"], "no command"),
        ("tpu_vm.sh", ["--zone", "z", "--", "true"], "--name and --zone are needed"),
        ("tpu_vm.sh", ["--name", "a", "--zone", "z", "--dry-run", "--", "true"], "needs --hosts N"),
        ("tpu_vm.sh", ["--name", "a", "--zone", "z", "--env", "x", "--", "true"], "expected NAME=VALUE"),
        ("slurm.sbatch", ["--", "true"], "not in a job"),
        ("slurm.sbatch", ["--nodes"], "--nodes needs a value"),
        ("slurm.sbatch", ["--nodes", "1", "--accelerator", "gpus", "--", "true"], "expected gpu, tpu or cpu"),
        ("slurm.sbatch", ["--node", "1", "--", "true"], "unknown option --node"),
    ],
)
def test_mistakes_are_told_and_run_nothing(tools, name, arguments, message):
    done = script(name, *arguments)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        ([*TPU, "--slices", "2"], [f"run1-host-{job}-{pod}" for job in range(2) for pod in range(4)]),
        (GPU, [f"run1-host-0-{pod}" for pod in range(3)]),
    ],
    ids=["tpu", "gpu"],
)
def test_jobset_dry_run_is_what_the_pods_of_the_manifest_run(tools, capsys, options, hosts):
    assert jobset.main([*options, "--env", "A=b $(B) c", "--dry-run", "--", *TRICKY]) == 0
    lines = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert list(lines) == hosts
    assert jobset.main([*options, "--env", "A=b $(B) c", "--", *TRICKY]) == 0
    (job,) = yaml.safe_load(capsys.readouterr().out)["spec"]["replicatedJobs"]
    container = job["template"]["spec"]["template"]["spec"]["containers"][0]
    pod = [expand(argument) for argument in container["command"]]
    assert pod == TRICKY and container["env"][-1] == {"name": "A", "value": "b $$(B) c"}
    assert expand(container["env"][-1]["value"]) == "b $(B) c"
    for line in lines.values():
        assert shlex.split(line) == ["env", "A=b $(B) c", *TRICKY]
        assert_runs(line, tools, A="b $(B) c")


def expand(text: str) -> str:
    """What Kubernetes makes of a command where no variable is defined: $$ is a dollar, the rest stays."""
    return re.sub(r"\$\$", "$", text)


# Fields of jobset.x-k8s.io/v1alpha2 (api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset, 2026), batch/v1 and
# v1: those that exist at each place of a manifest, as far as one of ours may have them, and those that must be there.
_POD = {
    "restartPolicy!": str,
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": {str: str},
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
    "volumes": [{"name!": str, "emptyDir": {"medium": str, "sizeLimit": str}}],
    "containers!": [
        {
            "name!": str,
            "image!": str,
            "command": [str],
            "env": [{"name!": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath!": str}}}],
            "ports": [{"containerPort!": int}],
            "resources": {"limits": {str: int}},
            "volumeMounts": [{"name!": str, "mountPath!": str}],
        }
    ],
}
_JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "template!": {"spec!": _POD},
}
_JOBSET = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str, "namespace": str, "labels": {str: str}, "annotations": {str: str}},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {"maxRestarts": int, "restartStrategy": str},
        "successPolicy": {"operator!": str},
        "replicatedJobs": [{"name!": str, "groupName": str, "replicas": int, "template!": {"spec!": _JOB}}],
    },
}


def check(value, schema, path="") -> None:
    """Raises AssertionError where a value is not as the schema says."""
    if isinstance(schema, type):
        assert type(value) is schema, f"{path} is {value!r}"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, f"{path} is {value!r}"
        for index, item in enumerate(value):
            check(item, schema[0], f"{path}[{index}]")
    elif str in schema:
        assert isinstance(value, dict)
        for key, item in value.items():
            check(key, str, path)
            check(item, schema[str], f"{path}.{key}")
    else:
        fields = {name.rstrip("!"): kind for name, kind in schema.items()}
        assert isinstance(value, dict) and set(value) <= set(fields), f"{path} has {set(value) - set(fields)}"
        assert {name[:-1] for name in schema if name.endswith("!")} <= set(value), f"{path} lacks fields"
        for key, item in value.items():
            check(item, fields[key], f"{path}.{key}")


@pytest.mark.parametrize("extra", [[], ["--spot", "--namespace", "n", "--queue", "q", "--service-account", "s"]])
@pytest.mark.parametrize("options", [[*TPU, "--slices", "2"], GPU], ids=["tpu", "gpu"])
def test_manifest_is_one_that_jobset_accepts(options, extra):
    found = yaml.safe_load(yaml.safe_dump(jobset.manifest(jobset.parse([*options, *extra, "--", *TRICKY]))))
    check(found, _JOBSET)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")  # a Job allows no other
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    for variable in pod["containers"][0]["env"]:
        assert ("value" in variable) != ("valueFrom" in variable)
    # JobSet's webhook: names of jobs and pods, the random suffix included, are RFC 1035 labels.
    name = f"{found['metadata']['name']}-{job['name']}-{job['replicas'] - 1}-{spec['completions'] - 1}-abcde"
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 63


def test_tpu_and_gpu_manifests_ask_for_their_nodes():
    tpu = jobset.manifest(jobset.parse([*TPU, "--", "true"]))
    spec = tpu["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    assert spec["completions"] == 4 and pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    topology = tpu["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert topology == "cloud.google.com/gke-nodepool"
    gpu = jobset.manifest(jobset.parse([*GPU, "--", "true"]))
    spec = gpu["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    assert spec["completions"] == 3 and pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}


@pytest.mark.parametrize(
    ("topology", "chips", "pods"),
    [("1x1", None, 1), ("2x2", None, 1), ("2x4", "8", 1), ("2x4", None, 2), ("4x4x8", None, 32)],
)
def test_pods_of_a_topology(topology, chips, pods):
    options = [*TPU[:-1], topology, *(["--chips", chips] if chips else [])]
    assert jobset.parse([*options, "--", "true"]).pods == pods


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TPU, "no command"),
        ([*TPU[:-2], "--", "true"], "needs --topology"),
        ([*TPU[:-1], "4by4", "--", "true"], "needs --topology"),
        ([*TPU, "--chips", "3", "--", "true"], "16 chips are no hosts of 3"),
        ([*GPU, "--topology", "2x2", "--", "true"], "needs --nodes and --chips"),
        ([*GPU, "--nodes", "0", "--", "true"], "at least 1"),
        ([*GPU, "--name", "Run_1", "--", "true"], "lower-case"),
        ([*GPU, "--name", "r" * 50, "--", "true"], "names of pods would have 65"),
        ([*GPU, "--env", "A", "--", "true"], "expected NAME=VALUE"),
    ],
)
def test_mistakes_in_a_jobset_are_told(capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        jobset.main(options)
    assert caught.value.code == 2 and message in capsys.readouterr().err
