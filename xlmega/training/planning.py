"""What a run will need: memory of the fullest rank by part and seconds of a step by part, and the ways to run it.

In come a model, a layout, how it is executed (DeepSpeed file, micro-batches, recomputation) and a Cluster; out go
figures. All of it is arithmetic on shapes: nothing is allocated, and a plan for thousands of devices costs what one for
a laptop does. It rests on the cluster's description; `tools/plan_run.py --calibrate` measures on the device at hand
what can be measured there.

Memory counts what is alive at the fullest moment, which is the start of the last micro-batch's backward pass. Seconds
add up what does not overlap: a device computes at `matmul_share` of its peak, tensor-parallel sums and ZeRO's gathers
wait for the links, a pipeline of p stages and m micro-batches idles (p - 1) / (v m + p - 1) of the time, and gradients
are reduced after the last micro-batch.
Sources: Narayanan et al. (arXiv:2104.04473 §2.2, §3.2), Korthikanti et al. (arXiv:2205.05198 §4), Rajbhandari et al.
(arXiv:1910.02054 §5, §7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from xlmega.errors import ConfigError, LayoutError
from xlmega.models.config import ModelConfig, check_layout
from xlmega.parallel.layout import Layout, divisors, spell
from xlmega.training.runtime import Runtime, check_pair

RECOMPUTE = ("none", "selective", "full")
GIB = 2.0**30


@dataclass(frozen=True)
class Cluster:
    """What a plan rests on; every figure is of one device where nothing else is said."""

    nodes: int = 1
    devices_per_node: int = 1
    memory_gib: float = 80.0
    reserved_gib: float = 2.0
    """Taken by the process before there is a model: the driver's context, libraries, allocator slack."""
    tflops: float = 989.0
    """Peak of dense products in bf16 and fp16."""
    fp32_tflops: float = 60.0
    matmul_share: float = 0.45
    """Of the peak that a whole layer reaches, norms and attention included."""
    node_gb_per_second: float = 300.0
    """Between devices of a node, in each direction."""
    network_gb_per_second: float = 40.0
    """Between nodes, for each device."""
    latency_seconds: float = 2e-5
    """Of one exchange between all ranks of a group."""
    memory_gb_per_second: float = 2000.0
    """For what the optimizer reads and writes."""
    disk_gb_per_second: float = 2.0
    """To the run's directory, from all ranks together."""
    price_per_device_hour: float = 0.0
    device_hours_between_failures: float = 50_000.0
    """Llama 3 (arXiv:2407.21783 §3.3.4): 466 interruptions of 16,384 devices in 54 days."""
    restart_seconds: float = 300.0
    """From a failure to the next step."""
    on_gpu: bool = True

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def bytes_per_second(self, span: int) -> float:
        """Of the slowest link in a group that spans so many consecutive ranks."""
        inside = self.nodes == 1 or self.devices_per_node % span == 0
        return 1e9 * (self.node_gb_per_second if inside else self.network_gb_per_second)

    def problems(self) -> Iterator[str]:
        for name, value in vars(self).items():
            may_be_zero = name in (
                "price_per_device_hour", "latency_seconds", "reserved_gib", "restart_seconds", "on_gpu"
            )  # fmt: skip
            if value < 0 or (value == 0 and not may_be_zero):
                yield f"{name} must be positive, but is {value}."
        if not 0 < self.matmul_share <= 1:
            yield f"matmul_share is a share of the peak, from 0 to 1, but is {self.matmul_share}."


CLUSTERS = {
    "h100": Cluster(devices_per_node=8),
    "h200": Cluster(devices_per_node=8, memory_gib=141.0, memory_gb_per_second=4000.0),
    "a100": Cluster(
        devices_per_node=8, tflops=312.0, fp32_tflops=19.5, node_gb_per_second=200.0, network_gb_per_second=20.0
    ),
}
"""Nodes as they are usually sold, by the vendors' data sheets; shares and rates of failure are guesses to replace."""


@dataclass(frozen=True)
class Job:
    """One way to run a model."""

    model: ModelConfig
    layout: Layout
    runtime: Runtime
    batch_windows: int
    """Of a step, over all ranks."""
    sequence_length: int
    recompute: str = "none"
    on_gpu: bool = True

    @property
    def micro_batches(self) -> int:
        return self.batch_windows // (self.layout.dp * self.runtime.micro_batch_windows)

    @property
    def micro_tokens(self) -> int:
        return self.runtime.micro_batch_windows * self.sequence_length

    @property
    def width(self) -> int:
        """Bytes of a weight or activation."""
        return 4 if self.runtime.precision == "fp32" else 2

    def describe(self) -> str:
        how = f"{self.layout.describe()}, {self.runtime.describe()}, {self.micro_batches} micro-batches of"
        return f"{how} {self.runtime.micro_batch_windows} windows, recompute {self.recompute}"


# -------------------------------------------------------------------- memory


def _layers(model: ModelConfig, layout: Layout) -> int:
    """Of the fullest stage."""
    return -(-model.num_layers // layout.pp)


def _words(model: ModelConfig, layout: Layout) -> float:
    """Parameters of a rank's part of the embedding."""
    return model.vocab_size * model.hidden_size / layout.tp


def held_parameters(model: ModelConfig, layout: Layout) -> float:
    """Parameters of the fullest rank: of a stage with the embedding, or of the only one."""
    from xlmega.models.decoder import shard_axis  # megatron-core: seconds that most of a plan does without

    def of_rank(shapes: dict[str, tuple[int, ...]]) -> float:
        return sum(math.prod(shape) / (1 if shard_axis(name) is None else layout.tp) for name, shape in shapes.items())

    layers = _layers(model, layout) * of_rank(model.layer_shapes())
    ends = _words(model, layout) * (1 if model.tied or layout.pp > 1 else 2) + of_rank(model.sense_shapes())
    ends += model.max_positions * model.hidden_size if model.positions == "learned" else 0
    return layers + ends


def kept_values(model: ModelConfig, layout: Layout, recompute: str) -> float:
    """Values that a layer keeps of each token for its backward pass.

    Of attention: its input, the normed input, queries, keys, values and their mix. Of the MLP: the same two and the
    inner width before and after the activation (thrice where it is gated).
    """
    d, inner = model.hidden_size, (3 if model.gated_mlp else 2) * model.ffn_hidden_size
    between = d / layout.tp if layout.sequence_parallel else d
    if recompute == "full":
        return between
    attention = 2 * between + (model.qkv_width + model.attention_width) / layout.tp
    return attention + (between if recompute == "selective" else 2 * between + inner / layout.tp)


def memory(job: Job) -> dict[str, float]:
    """Bytes of the fullest rank at its fullest moment, by part, beside what the process takes without a model.

    Gradients are summed up in fp32; from stage 2 on each rank keeps its share. Where DeepSpeed offloads the optimizer
    of a GPU, its state and the summed gradients are the host's.
    """
    from xlmega.models.head import CHUNK_BYTES

    model, layout, runtime, width = job.model, job.layout, job.runtime, job.width
    stage, tokens = runtime.zero_stage, job.micro_tokens
    held = held_parameters(model, layout)
    shared = layout.dp if stage else 1
    layers, words = _layers(model, layout), _words(model, layout)
    in_flight: float = min(layout.pp, job.micro_batches)
    if layout.virtual_stages > 1:  # the interleaved schedule keeps more chunks of fewer layers (2104.04473 §2.2)
        in_flight += (layout.pp - 1) / layout.virtual_stages
    kept = in_flight * layers * kept_values(model, layout, job.recompute)
    working = 0.0 if job.recompute == "none" else kept_values(model, layout, "none")  # one layer, computed again
    senses = model.num_senses * model.hidden_size / layout.tp * (tokens + job.sequence_length) * (width + 4)
    activations = tokens * width * (kept + working + _passing(job)) + senses
    chunk = CHUNK_BYTES["cuda" if job.on_gpu else "cpu"]
    logits = min(chunk, tokens * model.vocab_size / layout.tp * width) + words * width
    gradients = held * 4 / (layout.dp if stage >= 2 else 1)
    if job.micro_batches == 1 and width == 4 and stage < 2:
        # There are none before the only backward pass, and at its end no activations: the fuller of the two moments.
        late = tokens * width * _passing(job) + words * width
        gradients, activations, logits = max((0.0, activations, logits), (gradients, late, 0.0), key=sum)
    here = 0.0 if job.on_gpu and runtime.offload_optimizer else 1.0
    return {
        "weights": held * width / (layout.dp if stage == 3 else 1),
        "master weights": 0.0 if stage == 0 else here * held * 4 / shared,
        "gradients": here * gradients,
        "moments": here * held * 8 / shared,
        "activations": activations,
        "logits": logits,
        "buffers": _buffer_bytes(job, held, activations + logits),
    }


def _passing(job: Job) -> float:
    """Values of a token that the backward pass of one layer works with besides what was kept."""
    return 2 * job.model.hidden_size + job.model.ffn_hidden_size / job.layout.tp


def _buffer_bytes(job: Job, held: float, beside: float) -> float:
    """What ZeRO puts gradients and weights into on their way, where it is not in the place of activations.

    Stage 3 holds the weights that it has gathered, and a bucket of gradients, while it goes backward. Below, the bucket
    is only there when activations and logits (`beside`) are gone.
    """
    if job.layout.dp == 1 or not job.runtime.zero_stage:
        return 0.0
    settings = job.runtime.settings.get("zero_optimization", {})
    bucket = min(held, float(settings.get("reduce_bucket_size", 5e8)))
    if job.runtime.zero_stage < 3:
        return max(0.0, bucket * 4 - beside)
    gathered = min(held, float(settings.get("stage3_max_live_parameters", 1e9))) * (job.layout.dp - 1) / job.layout.dp
    return (bucket + gathered) * job.width


# -------------------------------------------------------------------- seconds


def step_seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Seconds of a step, by part; they add up."""
    model, layout, runtime = job.model, job.layout, job.runtime
    tokens = job.batch_windows * job.sequence_length
    flops = model.flops_per_token(job.sequence_length) * tokens / layout.world_size
    mlp = 3 if model.gated_mlp else 2
    inner = mlp * model.ffn_hidden_size * model.hidden_size
    whole = inner + model.hidden_size * (model.qkv_width + model.attention_width)
    in_layers = 1 - 6.0 * model.vocab_size * model.hidden_size / model.flops_per_token(job.sequence_length)
    again = {"none": 0.0, "selective": in_layers / 3 * inner / whole, "full": in_layers / 3}[job.recompute]
    rate = cluster.fp32_tflops if runtime.precision == "fp32" else cluster.tflops
    rate *= 1e12 * cluster.matmul_share
    compute, recompute = flops / rate, again * flops / rate
    held = held_parameters(model, layout)
    layers, micro = _layers(model, layout), job.micro_batches
    block = job.micro_tokens * model.hidden_size * job.width
    # Ranks are counted tp first, then dp, then pp: what a group spans decides whether it leaves a node.
    tp_link, dp_link, pp_link = (
        cluster.bytes_per_second(span) for span in (layout.tp, layout.tp * layout.dp, layout.world_size)
    )
    # A layer sums its two outputs forward and its two inputs backward; a recomputed one forward once more.
    sums = (4 + {"none": 0, "selective": 1, "full": 2}[job.recompute]) * layers * micro if layout.tp > 1 else 0
    tp_seconds = sums * (_ring(block, layout.tp) / tp_link + cluster.latency_seconds)
    bubble = (layout.pp - 1) / (layout.virtual_stages * micro) if layout.pp > 1 else 0.0
    hops = 2 * (micro + layout.pp - 1) * layout.virtual_stages if layout.pp > 1 else 0
    pp_seconds = hops * (block / pp_link + cluster.latency_seconds)
    reduced = held * (4 if runtime.zero_stage < 2 else job.width) * (1 if runtime.zero_stage < 2 else micro)
    dp_seconds = _ring(reduced, layout.dp) / dp_link / (2 if runtime.zero_stage >= 2 else 1)
    times = {0: 0, 1: 1, 2: 1}.get(runtime.zero_stage, 2 * micro + (micro if job.recompute == "full" else 0))
    zero = _ring(held * job.width, layout.dp) / 2 * times / dp_link
    zero += times * layers * cluster.latency_seconds if runtime.zero_stage == 3 and layout.dp > 1 else 0.0
    owned = held / (layout.dp if runtime.zero_stage else 1)
    return {
        "compute": compute,
        "recomputation": recompute,
        "tensor parallel": tp_seconds,
        "pipeline bubble": bubble * (compute + recompute + tp_seconds),
        "pipeline transfers": pp_seconds,
        "gradient reduction": dp_seconds,
        "ZeRO gathers": zero,
        "optimizer": owned * 28 / (cluster.memory_gb_per_second * 1e9),  # fp32: read 4 values, write 3
    }


def _ring(size: float, ranks: int) -> float:
    """Bytes that each rank sends to sum `size` bytes over all of them."""
    return 2 * size * (ranks - 1) / ranks


# -------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Plan:
    """A job with its figures."""

    job: Job
    memory: dict[str, float]
    seconds: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.job.batch_windows * self.job.sequence_length / self.step


def plan(job: Job, cluster: Cluster) -> Plan:
    """A job's figures on a cluster."""
    return Plan(job, memory(job), step_seconds(job, cluster))


def plans(
    model: ModelConfig, runtimes: Sequence[Runtime], cluster: Cluster, batches: Sequence[int], sequence_length: int
) -> list[Plan]:
    """Every way that fits into the devices' memory and shares each of the sizes of a batch, fastest for the largest
    first; a LayoutError where there is none."""
    found, closest = [], math.inf
    check_layout(Layout(dp=cluster.devices), model, sequence_length)
    for job in jobs(model, runtimes, cluster, batches, sequence_length):
        one = plan(job, cluster)
        closest = min(closest, one.bytes / GIB + cluster.reserved_gib)
        if one.bytes / GIB + cluster.reserved_gib <= cluster.memory_gib:
            found.append(one)
    if not found:
        short = "no layout is allowed: dp x micro-batch shares the batch, tp divides heads and widths, pp the layers"
        short = f"the smallest needs {closest:.1f} GiB of a device" if closest < math.inf else short
        raise LayoutError(
            f"{model.num_parameters():,} parameters with {spell(sorted(set(batches)))} windows of {sequence_length} a "
            f"step on {cluster.devices} devices of {cluster.memory_gib:g} GiB: {short}. "
            "Take more devices or shorter windows."
        )
    # Of ways that are as fast within a hundredth, the simplest: least model-parallel, least recomputed.
    order = {name: number for number, name in enumerate(RECOMPUTE)}
    best = min(one.step for one in found)

    def rank(one: Plan) -> tuple[float, int, int, float]:
        layout = one.job.layout
        return round(math.log(one.step / best) * 100), layout.tp * layout.pp, order[one.job.recompute], one.bytes

    return sorted(found, key=rank)


def jobs(
    model: ModelConfig, runtimes: Sequence[Runtime], cluster: Cluster, batches: Sequence[int], sequence_length: int
) -> Iterator[Job]:
    """Every allowed combination of layout, ZeRO stage, micro-batch and recomputation that uses all devices."""
    shared = math.gcd(*batches)
    for tp in divisors(cluster.devices_per_node):
        for pp in divisors(cluster.devices // tp):
            layout = Layout(tp, pp, cluster.devices // (tp * pp))
            if shared % layout.dp:
                continue
            a_rank = shared // layout.dp
            for runtime in runtimes:
                try:
                    check_pair(runtime, layout)
                    check_layout(layout, model, sequence_length)
                except (ConfigError, LayoutError):
                    continue
                for micro in (size for size in (1, 2, 4, 8, 16, 32) if a_rank % size == 0):
                    for recompute in RECOMPUTE:
                        how = replace(runtime, micro_batch_windows=micro)
                        yield Job(model, layout, how, max(batches), sequence_length, recompute, cluster.on_gpu)
