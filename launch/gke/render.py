"""Render the JobSet that trains one run on GKE: TPU slices, or nodes of eight GPUs.

    python launch/gke/render.py --name big --image IMAGE --accelerator v5e \
        --topology 4x8 --workdir gs://BUCKET/runs/big -- --config C.py >big.yaml
    python launch/gke/render.py --name big --image IMAGE --accelerator h200 --nodes 4 \
        --pvc runs:/mnt/runs --workdir /mnt/runs/big -- --config C.py >big.yaml

What follows `--` goes to `python -m attnjax.train`. What does not depend on these
options is in jobset.template.yaml.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from string import Template

EXIT_MISTAKE = 2
TEMPLATE = Path(__file__).with_name("jobset.template.yaml")
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
COORDINATOR_PORT = 8476
GPUS_PER_NODE = 8

# Node labels: "Plan TPUs in GKE" and "About GPUs in GKE" in Google's documentation.
TPUS = {
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
GPUS = {
    "h100": "nvidia-h100-80gb",
    "h100-mega": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
# v5e and v6e slices: chips in a host by topology; larger ones have 4 in each.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SINGLE_HOST = {"1x1": 1, "2x2": 4, "2x4": 8}
CUBE_CHIPS = 4  # in every host of a v5p slice
LARGEST_CUBE = 6144  # chips of the largest v5p slice


class Mistake(Exception):
    """A wrong option; the text is one line."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the pods need of their nodes.

    Attributes:
        hosts: pods in a slice, or GPU nodes.
        slices: TPU slices; 1 for GPUs.
        resource: name of the accelerator resource.
        count: of it in each pod.
        labels: of the nodes.
    """

    hosts: int
    slices: int
    resource: str
    count: int
    labels: dict[str, str]


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    try:
        options, rest = parse(argv)
        text = render(options, rest)
        if options.out is None:
            print(text, end="")
        else:
            Path(options.out).write_text(text)
    except (Mistake, OSError) as error:
        print(f"error: render: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the words after `--`."""
    parser = argparse.ArgumentParser(
        prog="python launch/gke/render.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet; its pods are NAME-worker-...")
    add("--image", required=True, help="container image with attnjax installed")
    add("--accelerator", required=True, help=", ".join([*TPUS, *GPUS]))
    add("--topology", help="of one TPU slice, such as 4x8 or 4x4x8")
    add("--slices", type=int, default=1, help="TPU slices (default 1)")
    add("--nodes", type=int, help="GPU nodes, eight GPUs each")
    add("--workdir", required=True, help="gs://BUCKET/PATH, or a path under --pvc's")
    add("--pvc", help="CLAIM:/PATH: mount this claim (ReadWriteMany) there")
    add("--namespace", help="of the JobSet (default: kubectl's)")
    add("--service_account", help="of the pods; gs:// needs one that may write there")
    add("--queue", help="Kueue LocalQueue")
    add("--spot", action="store_true", help="run on Spot nodes")
    add("--max_restarts", type=int, default=3, help="after faults (default 3)")
    add("--grace", type=int, default=300, help="seconds to save in (default 300)")
    add("--join_seconds", type=int, default=1800, help="to wait for all pods (1800)")
    add("--out", help="file to write (default: stdout)")
    own, rest = argv, []
    if "--" in argv:
        cut = argv.index("--")
        own, rest = argv[:cut], argv[cut + 1 :]
    return parser.parse_args(own), rest


def render(options: argparse.Namespace, train: list[str]) -> str:
    """The manifest.

    Raises:
        Mistake: when an option is wrong.
    """
    shape = shape_of(options)
    check(options, shape, train)
    volumes, mounts, workdir, annotations = storage(options)
    is_gpu = options.accelerator in GPUS
    if is_gpu:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    environment = {
        # One pod may get its node long before another.
        "ATTNJAX_JOIN_SECONDS": str(options.join_seconds),
        **(gpu_environment(options.name, shape.hosts) if is_gpu else {}),
    }
    return Template(TEMPLATE.read_text()).substitute(
        title=title(options, shape),
        name=json.dumps(options.name),
        metadata=json.dumps(metadata(options, shape)),
        max_restarts=options.max_restarts,
        slices=shape.slices,
        hosts=shape.hosts,
        pod_metadata=json.dumps({"annotations": annotations} if annotations else {}),
        grace=options.grace,
        pod_settings=pairs(pod_settings(options, shape), 14),
        image=json.dumps(options.image),
        # Kubernetes puts variables in for $(NAME), and reads $$ as $.
        args=items(
            [word.replace("$", "$$") for word in ("--workdir", workdir, *train)], 20
        ),
        env=items([variable(*pair) for pair in environment.items()], 20),
        resources=json.dumps({shape.resource: shape.count}),
        mounts=items(mounts, 20),
        volumes=items(volumes, 16),
    )


def title(options: argparse.Namespace, shape: Shape) -> str:
    """The first line of the manifest."""
    what = f"{shape.hosts} nodes of {shape.count}"
    if options.accelerator in TPUS:
        what = f"{shape.slices} x {options.topology} ({shape.hosts} hosts each)"
    return f"attnjax run {options.name}: {options.accelerator}, {what}."


def metadata(options: argparse.Namespace, shape: Shape) -> dict:
    """Of the JobSet."""
    found: dict = {"name": options.name}
    if options.namespace:
        found["namespace"] = options.namespace
    if options.queue:
        found["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    if options.accelerator in TPUS and shape.hosts > 1:
        # A slice is a node pool: one Job on each.
        found["annotations"] = {EXCLUSIVE: "cloud.google.com/gke-nodepool"}
    return found


def pod_settings(options: argparse.Namespace, shape: Shape) -> dict:
    """Fields of the pod that choose its node and its rights."""
    labels = dict(shape.labels)
    found: dict = {"nodeSelector": labels}
    if options.spot:
        labels["cloud.google.com/gke-spot"] = "true"
        found["tolerations"] = [
            {
                "key": "cloud.google.com/gke-spot",
                "operator": "Equal",
                "value": "true",
                "effect": "NoSchedule",
            }
        ]
    if options.service_account:
        found["serviceAccountName"] = options.service_account
    return found


def shape_of(options: argparse.Namespace) -> Shape:
    """The nodes that --accelerator with --topology or --nodes asks for."""
    name = options.accelerator
    if name in GPUS:
        if options.topology or options.slices != 1:
            raise Mistake(
                f"--accelerator {name} takes --nodes, not --topology/--slices."
            )
        if options.nodes is None or options.nodes < 1:
            raise Mistake(f"--accelerator {name} needs --nodes N, at least 1.")
        labels = {"cloud.google.com/gke-accelerator": GPUS[name]}
        return Shape(options.nodes, 1, "nvidia.com/gpu", GPUS_PER_NODE, labels)
    if name not in TPUS:
        known = ", ".join([*TPUS, *GPUS])
        raise Mistake(f"unknown --accelerator {name!r}. Known: {known}.")
    if options.nodes is not None or options.topology is None:
        raise Mistake(f"--accelerator {name} takes --topology, not --nodes.")
    chips, hosts = slice_of(name, options.topology)
    if options.slices < 1 or (options.slices > 1 and hosts == 1):
        raise Mistake(
            "--slices must be at least 1, and GKE joins slices of several hosts alone; "
            f"got slices={options.slices}, topology={options.topology} ({hosts} hosts)."
        )
    labels = {
        "cloud.google.com/gke-tpu-accelerator": TPUS[name],
        "cloud.google.com/gke-tpu-topology": options.topology,
    }
    return Shape(hosts, options.slices, "google.com/tpu", chips, labels)


def slice_of(accelerator: str, topology: str) -> tuple[int, int]:
    """Chips in each host, and hosts, of one slice."""
    if accelerator != "v5p":
        if topology not in FLAT:
            raise Mistake(
                f"--topology of {accelerator} must be one of {', '.join(FLAT)}; "
                f"got topology={topology}."
            )
        across, down = map(int, topology.split("x"))
        chips = SINGLE_HOST.get(topology, 4)
        return chips, across * down // chips
    sides = tuple(map(int, re.findall(r"[1-9][0-9]*", topology)))
    small = sides in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    cubes = len(sides) == 3 and all(side % 4 == 0 for side in sides)
    large = cubes and list(sides) == sorted(sides) and math.prod(sides) <= LARGEST_CUBE
    if topology != "x".join(map(str, sides)) or not (small or large):
        raise Mistake(
            "--topology of v5p must be 2x2x1, 2x2x2, 2x2x4, 2x4x4 or three multiples "
            f"of 4 in rising order, {LARGEST_CUBE} chips at most; got "
            f"topology={topology}."
        )
    return CUBE_CHIPS, math.prod(sides) // CUBE_CHIPS


def check(options: argparse.Namespace, shape: Shape, train: list[str]) -> None:
    """Refuse what the cluster would refuse, or what would not run."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", options.name):
        raise Mistake(
            "--name must be lower-case letters, digits and -, a letter first; got "
            f"name={options.name}."
        )
    longest = f"{options.name}-worker-{shape.slices - 1}-{shape.hosts - 1}-abcde"
    if len(longest) > 63:
        raise Mistake(
            f"--name is too long by {len(longest) - 63}: a pod such as {longest} may "
            f"have 63 letters; got name={options.name}."
        )
    if not train:
        raise Mistake("nothing to run: give attnjax.train's options after `--`.")
    if any(word.partition("=")[0] == "--workdir" for word in train):
        raise Mistake("--workdir goes before `--`: it decides what is mounted.")
    for name, least in (("max_restarts", 0), ("grace", 30), ("join_seconds", 1)):
        if getattr(options, name) < least:
            value = getattr(options, name)
            raise Mistake(f"--{name} must be at least {least}; got {name}={value}.")


def storage(options: argparse.Namespace) -> tuple[list, list, str, dict]:
    """Volumes, mounts, the run directory in the pod, and the pod's annotations."""
    if options.workdir.startswith("gs://"):
        bucket, _, path = (
            options.workdir.removeprefix("gs://").strip("/").partition("/")
        )
        if options.pvc or not bucket or not path:
            raise Mistake(
                "--workdir must be gs://BUCKET/PATH, without --pvc; got "
                f"workdir={options.workdir}, pvc={options.pvc}."
            )
        volume = {
            "name": "runs",
            "csi": {
                "driver": "gcsfuse.csi.storage.gke.io",
                "volumeAttributes": {
                    "bucketName": bucket,
                    # A checkpoint is a folder that gets its name when it is whole.
                    "mountOptions": "implicit-dirs,rename-dir-limit=100000",
                },
            },
        }
        place = f"/mnt/{bucket}"
        mount = {"name": "runs", "mountPath": place}
        return [volume], [mount], f"{place}/{path}", {"gke-gcsfuse/volumes": "true"}
    claim, _, place = (options.pvc or "").partition(":")
    if not claim or not place.startswith("/"):
        raise Mistake(
            "--workdir must be gs://BUCKET/PATH, or a path under that of "
            f"--pvc CLAIM:/PATH; got workdir={options.workdir}, pvc={options.pvc}."
        )
    if not options.workdir.startswith(place.rstrip("/") + "/"):
        raise Mistake(
            f"--workdir must lie under {place}, where --pvc is mounted: what is "
            f"elsewhere is lost with the pod; got workdir={options.workdir}."
        )
    volume = {"name": "runs", "persistentVolumeClaim": {"claimName": claim}}
    return [volume], [{"name": "runs", "mountPath": place}], options.workdir, {}


def gpu_environment(name: str, hosts: int) -> dict:
    """What jax.distributed needs; for TPU slices GKE sets variables of its own."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return {
        "JAX_COORDINATOR_ADDRESS": f"{name}-worker-0-0.{name}:{COORDINATOR_PORT}",
        "JAX_NUM_PROCESSES": str(hosts),
        "JAX_PROCESS_ID": {"fieldRef": {"fieldPath": index}},
    }


def variable(name: str, value: str | dict) -> dict:
    """One entry of `env`."""
    return {"name": name, "value" if isinstance(value, str) else "valueFrom": value}


def items(values: list, indent: int) -> str:
    """Lines of a YAML list; each entry as JSON, which is YAML."""
    return "\n".join(f"{' ' * indent}- {json.dumps(value)}" for value in values)


def pairs(values: dict, indent: int) -> str:
    """Lines of a YAML mapping, likewise."""
    return "\n".join(
        f"{' ' * indent}{key}: {json.dumps(value)}" for key, value in values.items()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
