"""Compute from measured costs per volume what a training on many GPUs takes: time, storage, network, checkpoints.

Nothing is measured here. The plan assumes that every GPU is as fast as the device of the costs, and that communication
takes no time; it gives the rate that the network between the nodes needs for that.
"""

import math
from dataclasses import dataclass
from typing import TypedDict


class StepCost(TypedDict):
    """A training step of one device: `batch` samples in `seconds`."""

    seconds: float
    batch: int
    passes: float  # how often the recipe trains on each volume
    gradient_bytes: int
    checkpoint_bytes: int  # weights, average, state of the optimizer, and the best weights
    precision: str  # as `loop.mixed_precision`


class Costs(TypedDict):
    """Costs of one volume on one device, or one core where no device takes part."""

    prepare: dict[str, float]  # "seconds" of one process; "read_bytes" of its files; "stored_bytes" when prepared
    latents: dict[str, float]  # "seconds" of the volume as it is; "version_seconds" of another version; "bytes" of each
    versions: int  # of each volume in the latent cache
    vae_step: StepCost
    ldm_step: StepCost
    generate: dict[str, float]  # "seconds"; "bytes" of its files
    evaluate: dict[str, float]  # "seconds" of the features for `evaluate.py realism`
    pipeline_bytes: int


@dataclass(frozen=True)
class Job:
    """What is planned.

    Args:
        volumes: in the data set.
        generated: volumes to generate.
        gpus: in all.
        gpus_per_node: at most.
        processes: of `medvolume prepare` on each node.
        kept: checkpoints that a training keeps (`loop.keep_checkpoints`).
    """

    volumes: int
    generated: int
    gpus: int
    gpus_per_node: int = 8
    processes: int = 8
    kept: int = 2

    @property
    def nodes(self) -> int:
        """Return the number of nodes."""
        return -(-self.gpus // self.gpus_per_node)


class Plan(TypedDict):
    """The plan of a job; sizes in bytes, times in seconds."""

    gpus: int
    nodes: int
    steps: dict[str, int]  # of each training
    seconds: dict[str, float]  # of each stage, and "total"
    shared: dict[str, float]  # object storage: "source", "latents", "generated"
    node: dict[str, float]  # the cache of each node: "copies", "prepared", "latents", "total"
    run: dict[str, float]  # folders of the runs: "vae_checkpoints", "ldm_checkpoints", "pipeline"
    network: dict[str, float]  # through each node: "download", "upload"; sent between nodes in a second of training


def plan(costs: Costs, job: Job) -> Plan:
    """Plan a job.

    Each node prepares all volumes in a cache of its own, because training reads them in random order. Latents are
    encoded once, by all GPUs, stored together, and copied to each node. Each training sees every volume as often as the
    recipe does, with the recipe's batch on each GPU. The features of an evaluation are those of one process.
    """
    everything = job.volumes * costs["versions"]
    encoding = costs["latents"]["seconds"] + (costs["versions"] - 1) * costs["latents"]["version_seconds"]
    trainings = {"train_vae": costs["vae_step"], "train_ldm": costs["ldm_step"]}
    steps = {
        name: math.ceil(cost["passes"] * job.volumes / (cost["batch"] * job.gpus)) for name, cost in trainings.items()
    }
    seconds = {
        "prepare": job.volumes * costs["prepare"]["seconds"] / job.processes,
        "train_vae": steps["train_vae"] * costs["vae_step"]["seconds"],
        "latents": job.volumes * encoding / job.gpus,
        "train_ldm": steps["train_ldm"] * costs["ldm_step"]["seconds"],
        "generate": job.generated * costs["generate"]["seconds"] / job.gpus,
        "evaluate": (job.generated + job.volumes) * costs["evaluate"]["seconds"],
    }
    shared = {
        "source": job.volumes * costs["prepare"]["read_bytes"],
        "latents": everything * costs["latents"]["bytes"],
        "generated": job.generated * costs["generate"]["bytes"],
    }
    node = {
        "copies": shared["source"],
        "prepared": job.volumes * costs["prepare"]["stored_bytes"],
        "latents": shared["latents"],
    }
    # A ring over all GPUs sends its gradients once to be summed and once to be spread.
    ring = 2 * (job.gpus - 1) / job.gpus if job.nodes > 1 else 0.0
    written = job.kept + 1  # one more while the oldest is not removed yet
    return {
        "gpus": job.gpus,
        "nodes": job.nodes,
        "steps": steps,
        "seconds": {**seconds, "total": sum(seconds.values())},
        "shared": shared,
        "node": {**node, "total": sum(node.values())},
        "run": {
            "vae_checkpoints": written * costs["vae_step"]["checkpoint_bytes"],
            "ldm_checkpoints": written * costs["ldm_step"]["checkpoint_bytes"],
            "pipeline": costs["pipeline_bytes"],
        },
        "network": {
            "download": shared["source"] + shared["latents"],
            "upload": (shared["latents"] + shared["generated"]) / job.nodes,
            **{
                f"{name}_per_second": ring * cost["gradient_bytes"] / cost["seconds"] if cost["seconds"] else 0.0
                for name, cost in trainings.items()
            },
        },
    }
