"""The JobSet manifests of launch/gke: valid, and each exit code has its fate."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from attnjax.core.errors import EXIT_FAULT, EXIT_SAVED, EXIT_USER
from attnjax.core.flags import parse_command_line
from attnjax.train import Flags
from attnjax.training import hosts
from launch.gke import render

kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads(Path(__file__).with_name("jobset_v1alpha2.json").read_text())
# The oldest that the manifests name, and one that is newer.
KUBERNETES = ("1.31", "1.34")
BASE = ["--name", "big", "--image", "registry/image:1"]
BUCKET = ["--workdir", "gs://bucket/runs/big"]
CLAIM = ["--pvc", "claim:/mnt/runs", "--workdir", "/mnt/runs/big"]
TRAIN = ["--", "--config", "configs/quickstart.py", "--config.mesh.data=-1"]
CASES = {
    "v5e": ["--accelerator", "v5e", "--topology", "4x8", *BUCKET],
    "one host": ["--accelerator", "v6e", "--topology", "2x4", *CLAIM],
    "slices": [
        *("--accelerator", "v6e", "--topology", "16x16", "--slices", "3", *BUCKET),
        *("--spot", "--service_account", "trainer", "--queue", "tpus"),
    ],
    "v5p": ["--accelerator", "v5p", "--topology", "4x4x8", *CLAIM, "--spot"],
    "h100": ["--accelerator", "h100", "--nodes", "1", *CLAIM, "--namespace", "lab"],
    "h200": ["--accelerator", "h200", "--nodes", "5", *BUCKET, "--max_restarts", "7"],
}


def rendered(*words, base=BASE, train=TRAIN):
    return yaml.safe_load(render.render(*render.parse([*base, *words, *train])))


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(jobset):
    return job_of(jobset)["template"]["spec"]


def container_of(jobset):
    (container,) = pod_of(jobset)["containers"]
    return container


def check(jobset):
    """Raise when the manifest has a field or value that the API does not know."""
    jsonschema.validate(jobset, SCHEMA)
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "one"},
        "spec": job_of(jobset),
    }
    for version in KUBERNETES:
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_manifest_has_the_fields_of_the_api_and_no_other(words):
    check(rendered(*words))


def test_a_field_that_the_api_lacks_is_found():
    for place in (
        lambda jobset: jobset["spec"],
        lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0],
        job_of,
        lambda jobset: job_of(jobset)["podFailurePolicy"]["rules"][0],
        pod_of,
        container_of,
    ):
        jobset = rendered(*CASES["v5e"])
        place(jobset)["restartsPolicy"] = "Never"
        with pytest.raises(jsonschema.ValidationError):
            check(jobset)


def fate(jobset, *, code=None, evicted=False):
    """What happens when a pod ends so: the Job controller's word, then JobSet's."""
    reason, message = "BackoffLimitExceeded", "Job has reached the backoff limit"
    for number, rule in enumerate(job_of(jobset)["podFailurePolicy"]["rules"]):
        where = f"matching {rule['action']} rule at index {number}"
        codes = rule.get("onExitCodes")
        if codes and codes["operator"] == "In" and code in codes["values"]:
            pod = f"Container {codes['containerName']} for pod default/big-worker-0-2"
            message = f"{pod} failed with exit code {code} {where}"
        elif evicted and {"type": "DisruptionTarget", "status": "True"} in rule.get(
            "onPodConditions", []
        ):
            message = f"Pod default/big-2 has condition DisruptionTarget {where}"
        else:
            continue
        assert rule["action"] == "FailJob"
        reason = "PodFailurePolicy"
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in patterns
        ):
            return rule["action"]
    return "RestartJobSet"


def test_exit_code_decides_whether_the_run_starts_again():
    jobset = rendered(*CASES["h200"])
    assert job_of(jobset)["backoffLimit"] == 0
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    always = "RestartJobSetAndIgnoreMaxRestarts"
    assert fate(jobset, code=EXIT_SAVED) == always
    assert fate(jobset, code=EXIT_USER) == "FailJobSet"
    assert fate(jobset, code=137, evicted=True) == always
    # A mistake stays one on a node that is going down.
    assert fate(jobset, code=EXIT_USER, evicted=True) == "FailJobSet"
    for code in (EXIT_FAULT, 3, 22, 57, 137, 175):
        assert fate(jobset, code=code) == "RestartJobSet", code


def test_rules_name_the_container_that_trains():
    jobset = rendered(*CASES["v5e"])
    for rule in job_of(jobset)["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container_of(jobset)["name"]


def environment_of(jobset, index):
    """The container's variables in the pod with this completion index."""
    found = {}
    for entry in container_of(jobset)["env"]:
        if "valueFrom" in entry:
            assert entry["valueFrom"] == {
                "fieldRef": {
                    "fieldPath": "metadata.annotations"
                    "['batch.kubernetes.io/job-completion-index']"
                }
            }
        found[entry["name"]] = entry.get("value", str(index))
    return found


def test_processes_of_gpu_nodes_find_each_other():
    jobset = rendered(*CASES["h200"])
    (group,) = jobset["spec"]["replicatedJobs"]
    first = f"{jobset['metadata']['name']}-{group['name']}-0-0"
    place = hosts.find(environment_of(jobset, 3))
    subdomain = jobset["spec"]["network"]["subdomain"]
    assert place.coordinator.partition(":")[0] == f"{first}.{subdomain}"
    assert (place.count, place.index) == (5, 3)
    assert job_of(jobset)["completionMode"] == "Indexed"
    assert job_of(jobset)["completions"] == job_of(jobset)["parallelism"] == 5
    assert jobset["spec"]["network"]["publishNotReadyAddresses"] is True


def test_one_gpu_node_is_one_process():
    assert hosts.find(environment_of(rendered(*CASES["h100"]), 0)) is None


def test_tpu_hosts_take_the_variables_that_gke_sets():
    environment = environment_of(rendered(*CASES["slices"]), 0)
    assert not [name for name in environment if name.startswith("JAX_")]
    environment |= {
        "TPU_WORKER_HOSTNAMES": ",".join(f"big-worker-1-{n}.big" for n in range(64)),
        "TPU_WORKER_ID": "5",
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "big-worker-0-0.big",
    }
    place = hosts.find(environment)
    assert (place.count, place.index) == (192, 69)


def test_pods_wait_for_nodes_that_come_late():
    for words in (CASES["v5e"], CASES["h200"]):
        environment = environment_of(rendered(*words, "--join_seconds", "77"), 0)
        assert environment[hosts.TIMEOUT] == "77"


@pytest.mark.parametrize("accelerator", ["v5e", "v6e"])
@pytest.mark.parametrize("topology", render.FLAT)
def test_flat_slices_have_all_their_chips(accelerator, topology):
    chips, count = render.slice_of(accelerator, topology)
    across, down = map(int, topology.split("x"))
    assert chips * count == across * down
    assert count == 1 or chips == 4


@pytest.mark.parametrize(
    ("topology", "count"), [("2x2x1", 1), ("2x4x4", 8), ("4x4x4", 16), ("8x16x24", 768)]
)
def test_cubes_have_four_chips_a_host(topology, count):
    assert render.slice_of("v5p", topology) == (4, count)


def test_pods_ask_for_their_accelerator_and_its_nodes():
    labels = pod_of(rendered(*CASES["slices"]))["nodeSelector"]
    assert labels == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    jobset = rendered(*CASES["slices"])
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    assert pod_of(jobset)["serviceAccountName"] == "trainer"
    assert container_of(jobset)["resources"] == {
        "requests": {"google.com/tpu": 4},
        "limits": {"google.com/tpu": 4},
    }
    resources = container_of(rendered(*CASES["one host"]))["resources"]
    assert resources["limits"] == {"google.com/tpu": 8}
    resources = container_of(rendered(*CASES["h200"]))["resources"]
    assert resources["limits"] == {"nvidia.com/gpu": 8}


def mounted(jobset):
    """The run directory, and the volume that it lies on."""
    container = container_of(jobset)
    workdir = container["args"][container["args"].index("--workdir") + 1]
    (mount,) = (
        mount
        for mount in container["volumeMounts"]
        if workdir.startswith(mount["mountPath"] + "/")
    )
    (volume,) = (v for v in pod_of(jobset)["volumes"] if v["name"] == mount["name"])
    return workdir, volume


def test_run_directory_lies_on_the_bucket():
    jobset = rendered(*CASES["v5e"])
    workdir, volume = mounted(jobset)
    assert workdir == "/mnt/bucket/runs/big"
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    read = parse_command_line(container_of(jobset)["args"], Flags, program="train")
    assert read.flags.workdir == workdir
    assert read.config == "configs/quickstart.py"
    attributes = volume["csi"]["volumeAttributes"]
    assert attributes["bucketName"] == "bucket"
    assert "rename-dir-limit" in attributes["mountOptions"]
    annotations = job_of(jobset)["template"]["metadata"]["annotations"]
    assert annotations == {"gke-gcsfuse/volumes": "true"}


def test_run_directory_lies_on_the_claim():
    workdir, volume = mounted(rendered(*CASES["h100"]))
    assert workdir == "/mnt/runs/big"
    assert volume["persistentVolumeClaim"] == {"claimName": "claim"}


def test_pods_may_save_before_they_are_killed():
    pod = pod_of(rendered(*CASES["v5e"], "--grace", "123"))
    assert pod["terminationGracePeriodSeconds"] == 123
    assert pod["restartPolicy"] == "Never"


def test_container_trains_with_exactly_the_words_given():
    words = [
        "--config",
        "c.py:a b",
        '--config.model.layers="(x*3 y)*2" $(z)$$',
        "--e=' #",
    ]
    container = container_of(rendered(*CASES["v5e"], train=["--", *words]))
    assert container["command"] == ["python", "-u", "-m", "attnjax.train"]
    assert importlib.util.find_spec(container["command"][-1])
    given = [word.replace("$$", "$") for word in container["args"]]
    assert given == ["--workdir", "/mnt/bucket/runs/big", *words]
    assert container["args"][-2].endswith(" $$(z)$$$$")


def test_manifest_goes_to_stdout_or_to_a_file(tmp_path, capsys):
    words = [*BASE, *CASES["v5e"]]
    assert render.main([*words, *TRAIN]) == 0
    shown = capsys.readouterr().out
    path = tmp_path / "big.yaml"
    assert render.main([*words, "--out", str(path), *TRAIN]) == 0
    assert path.read_text() == shown
    assert capsys.readouterr().out == ""
    check(yaml.safe_load(shown))


def test_commands_of_the_readme_render(shown_commands, capsys):
    shown = shown_commands("gke/render.py")
    assert len(shown) == 3
    for words in shown:
        assert render.main(words) == 0
        check(yaml.safe_load(capsys.readouterr().out))


MISTAKES = {
    "unknown accelerator": (
        ["--accelerator", "v4", "--topology", "2x2x1", *BUCKET],
        "unknown --accelerator 'v4'. Known: v5e, v5p, v6e, h100",
    ),
    "nodes of a TPU": (
        ["--accelerator", "v5e", "--nodes", "2", *BUCKET],
        "--accelerator v5e takes --topology, not --nodes.",
    ),
    "topology of a GPU": (
        ["--accelerator", "h200", "--topology", "4x4", *BUCKET],
        "--accelerator h200 takes --nodes, not --topology/--slices.",
    ),
    "no nodes": (
        ["--accelerator", "h200", "--nodes", "0", *BUCKET],
        "--accelerator h200 needs --nodes N, at least 1.",
    ),
    "flat topology": (
        ["--accelerator", "v5e", "--topology", "4x6", *BUCKET],
        "--topology of v5e must be one of 1x1, 2x2, 2x4,",
    ),
    "cube topology": (
        ["--accelerator", "v5p", "--topology", "4x4", *BUCKET],
        "--topology of v5p must be 2x2x1,",
    ),
    "cube order": (
        ["--accelerator", "v5p", "--topology", "8x4x4", *BUCKET],
        "in rising order",
    ),
    "cube size": (
        ["--accelerator", "v5p", "--topology", "16x20x24", *BUCKET],
        "6144 chips at most; got topology=16x20x24",
    ),
    "slices of one host": (
        ["--accelerator", "v6e", "--topology", "2x4", "--slices", "2", *BUCKET],
        "--slices must be at least 1, and GKE joins slices of several hosts alone",
    ),
    "name": (
        ["--name", "Big_run", *CASES["v5e"]],
        "--name must be lower-case letters, digits and -, a letter first",
    ),
    "long name": (
        ["--name", "n" * 50, *CASES["v5e"]],
        "--name is too long by 4:",
    ),
    "nothing to run": ([*CASES["v5e"], "--"], "nothing to run: give attnjax.train's"),
    "workdir twice": (
        [*CASES["v5e"], "--", "--workdir=/tmp/x"],
        "--workdir goes before `--`",
    ),
    "grace": ([*CASES["v5e"], "--grace", "5"], "--grace must be at least 30; got"),
    "no volume": (
        ["--accelerator", "h200", "--nodes", "2", "--workdir", "/runs/x"],
        "--workdir must be gs://BUCKET/PATH, or a path under that of --pvc CLAIM:/PATH",
    ),
    "bucket alone": (
        ["--accelerator", "h200", "--nodes", "2", "--workdir", "gs://bucket/"],
        "--workdir must be gs://BUCKET/PATH, without --pvc; got",
    ),
    "off the claim": (
        ["--accelerator", "h200", "--nodes", "2", "--pvc", "c:/a", "--workdir", "/ab"],
        "--workdir must lie under /a, where --pvc is mounted",
    ),
    "no folder": ([*CASES["v5e"], "--out", "/nowhere/x.yaml"], "No such file"),
}


@pytest.mark.parametrize(("words", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_one_readable_line(words, text, capsys):
    words = words if "--" in words else [*words, *TRAIN]
    assert render.main([*BASE, *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: render: ") and shown.err.count("\n") == 1
    assert text in shown.err
