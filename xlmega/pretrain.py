"""Train a multilingual model: the entry that deepspeed, torchrun, srun, mpirun and plain python start.

    deepspeed --num_gpus 4 xlmega/pretrain.py --ds_config ds_configs/zero1_bf16.json --recipe xglm_tiny \\
        --set data.root=tokens/pydocs --tp 2 --pp 2 --output runs/first
"""

import argparse
import contextlib
import functools
import os
from dataclasses import replace
from pathlib import Path

import torch

from xlmega import __version__
from xlmega.errors import ConfigError, DataError, XlmegaError, run_main
from xlmega.parallel import groups
from xlmega.parallel.layout import choose, fitting
from xlmega.parallel.preflight import preflight
from xlmega.training.checkpoint import list_checkpoints, newest, restore
from xlmega.training.history import Recorded
from xlmega.training.metrics import check_trackers
from xlmega.training.outline import summary, warnings
from xlmega.training.recipe import Recipe, read_recipe
from xlmega.training.run import (
    Run,
    check_output,
    continued,
    create_output,
    data_damage,
    facts,
    first_weights,
    occupy,
    resolve,
)
from xlmega.training.runtime import Runtime, read_runtime
from xlmega.training.spikes import Guard
from xlmega.training.supervision import SupervisionSettings, Supervisor


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is learnt")
    what.add_argument("--recipe", required=True, help="name in xlmega/recipes or path of a TOML file")
    what.add_argument("--set", action="append", default=[], metavar="a.b=v", help="override a key of the recipe")
    how = parser.add_argument_group("how it is run")
    how.add_argument("--ds_config", type=Path, required=True, help="DeepSpeed JSON: precision, ZeRO, micro-batch")
    how.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    how.add_argument("--pp", type=int, default=1, help="pipeline-parallel size")
    how.add_argument("--virtual_stages", type=int, default=1, help="model chunks per pipeline rank (interleaved)")
    how.add_argument("--sequence_parallel", action="store_true")
    how.add_argument("--elastic", action="store_true", help="leave ranks idle that cannot share the batch evenly")
    how.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    how.add_argument("--rendezvous_timeout_seconds", type=float, default=600.0, help="how long ranks await each other")
    how.add_argument("--master_port", type=int, help="where ranks meet; launchers have their own option")
    run = parser.add_argument_group("the run")
    run.add_argument("--output", type=Path, required=True, help="run directory")
    run.add_argument("--resume", action="store_true", help="go on where the run directory stands")
    run.add_argument("--stop_at", type=int, default=0, metavar="STEP", help="save and end there, schedules unchanged")
    run.add_argument("--save_asynchronously", action="store_true", help="train on while checkpoints are written")
    run.add_argument("--dry_run", action="store_true", help="print what the run would be, and exit")
    run.add_argument("--world_size", type=int, help="with --dry_run: plan for this many ranks")
    run.add_argument("--wandb", default="", metavar="PROJECT", help="track in this wandb project (offline works)")
    run.add_argument("--tensorboard", action="store_true")
    watch = parser.add_argument_group("what watches over it")
    watch.add_argument("--hang_timeout_seconds", type=float, default=900.0, help="no progress for so long: exit code 6")
    watch.add_argument("--silent_seconds", type=float, default=60.0, help="a rank silent for so long is lost: code 5")
    watch.add_argument(
        "--check_replicas_every_steps", type=int, default=0, metavar="N", help="exit code 7 on a difference"
    )
    watch.add_argument("--straggler_seconds", type=float, default=60.0, help="how often slow ranks are looked for")
    watch.add_argument("--prometheus", action="store_true", help="keep the run's metrics.prom for a monitor")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.world_size is not None and not args.dry_run:
        raise ConfigError("--world_size plans a --dry_run; the ranks of a real run are counted by its launcher.")
    if not 0 < args.rendezvous_timeout_seconds < 1e8:
        raise ConfigError(f"--rendezvous_timeout_seconds {args.rendezvous_timeout_seconds} is not a time to wait.")
    settings = SupervisionSettings(
        args.hang_timeout_seconds,
        args.silent_seconds,
        args.check_replicas_every_steps,
        args.prometheus,
        args.straggler_seconds,
    )
    check_trackers(wandb=bool(args.wandb), tensorboard=args.tensorboard)
    process = groups.discover(os.environ, master_port=args.master_port)
    world_size = process.world_size
    if args.dry_run:
        world_size = max(world_size, args.tp * args.pp) if args.world_size is None else args.world_size
    recipe, runtime = read_recipe(args.recipe, args.set), read_runtime(args.ds_config)
    if args.elastic:
        process, world_size = shrunk(args, process, world_size, recipe, runtime)
        if process.rank >= world_size:
            return  # the others go on without it
    layout = choose(
        world_size,
        tp=args.tp,
        pp=args.pp,
        virtual_stages=args.virtual_stages,
        sequence_parallel=args.sequence_parallel,
    )
    run = resolve(
        recipe,
        runtime,
        layout,
        args.output,
        recompute=args.recompute,
        stop_at=args.stop_at,
        save_asynchronously=args.save_asynchronously,
    )
    recorded = check_output(run, resume=args.resume) if args.resume or not args.dry_run else None
    if args.dry_run:
        first_weights(run.recipe)
        print(summary(continued(run, recorded, max(list_checkpoints(run.output), default=0)) if recorded else run))
        return
    device = groups.device_of(process)
    if process.rank == 0:  # said before the imports that take seconds, so that something is seen at once
        print(
            f"xlmega {__version__}: {layout.describe()}, {run.runtime.describe()}, on "
            f"{groups.device_name(device)} started by {process.launcher}; waiting for {world_size} ranks",
            flush=True,
        )
    wait, silence = args.rendezvous_timeout_seconds, settings.longest_silence_seconds
    with groups.joined(process, layout, timeout_seconds=wait, collective_timeout_seconds=silence):
        store = groups.meeting_store(process, "supervision")
        with contextlib.ExitStack() as held:
            watch = held.enter_context(Supervisor(settings, store, run.output, process))
            check_ranks(run, groups.meeting_store(process, "preflight"), device, args)
            execute(run, recorded, process, device, args, watch, held)


def shrunk(
    args: argparse.Namespace, process: groups.Process, world_size: int, recipe: Recipe, runtime: Runtime
) -> tuple[groups.Process, int]:
    """This process and the number of ranks that train, of those that the launcher gave; rank 0 says how many idle."""
    fits = fitting(
        world_size,
        tp=args.tp,
        pp=args.pp,
        virtual_stages=args.virtual_stages,
        micro_batch_windows=runtime.micro_batch_windows,
        batches=recipe.training.batch.values,
    )
    if fits < world_size and process.rank == 0:
        words = f"{fits} of {world_size} ranks train (dp={fits // (args.tp * args.pp)}); the others end now"
        print(f"note: --elastic: {words}", flush=True)
    return replace(process, world_size=fits), fits


# Options with which ranks that were started by hand, node by node, would wait for each other where they differ. The
# layout is compared before they meet, and what the files hold in their hashes.
_SAME_FOR_ALL = (
    "recompute", "resume", "stop_at", "save_asynchronously", "hang_timeout_seconds", "check_replicas_every_steps"
)  # fmt: skip


def check_ranks(run: Run, store: torch.distributed.Store, device: torch.device, args: argparse.Namespace) -> None:
    """Refuse ranks that differ, before anything is built; rank 0 says what is merely worth knowing."""
    needs = 12.0 * run.recipe.model.num_parameters()  # fp32 weights and two moments
    facts = run.identity() | {f"--{name}": str(getattr(args, name)) for name in _SAME_FOR_ALL}
    for remark in preflight(store, facts, run.output, device, needs_bytes=needs):
        if torch.distributed.get_rank() == 0:
            print(f"note: {remark}", flush=True)


def execute(
    run: Run,
    recorded: Recorded | None,
    process: groups.Process,
    device: torch.device,
    args: argparse.Namespace,
    watch: Supervisor,
    held: contextlib.ExitStack,
) -> None:
    """Build the engine, give it its weights and train: what every rank does once all are there."""
    from xlmega.models.specs import extras_in_words
    from xlmega.training import engine as engines  # deepspeed and megatron-core: 5 s that --dry_run does not need
    from xlmega.training.loop import train
    from xlmega.training.metrics import Metrics, peak_flops

    speaker = process.rank == 0
    say = functools.partial(print, flush=True) if speaker else lambda text: None
    # What can still be refused comes before the run directory is made: once made, it is occupied.
    damaged = [words for words in groups.words_of_all(data_damage(run, process.rank, run.layout.world_size)) if words]
    if damaged:
        raise DataError(damaged[0])
    if args.resume:
        occupy(run, held, resume=True, recorded=recorded)
        watch.stop.begin()
    found = newest(run.output, say) if args.resume else None
    weights = None if found else first_weights(run.recipe)
    first_step = found.step if found else 0
    if recorded:
        run = continued(run, recorded, first_step)
    recipe = run.recipe
    for words in warnings(run):
        say(f"note: {words}")
    say(f"{recipe.model.num_parameters():,} parameters, {len(run.languages)} languages; {extras_in_words()}")
    engine = engines.Engine(
        recipe.model,
        run.layout,
        run.runtime,
        recipe.optimizer,
        device=device,
        micro_batches=run.micro_batches,
        recompute=run.recompute,
        seed=recipe.training.seed,
        languages=run.languages,
    )
    if found:
        restore(engine, found)
        say(f"resuming from step {found.step} of '{found.folder}'")
    elif weights:
        engine.write_state(weights)
        say(f"starting from {recipe.init.weights or f'seed {recipe.training.seed}'}")
    if first_step >= run.stop_at:
        say(f"nothing to do: step {first_step} is reached, and the run ends at {run.stop_at}")
        return
    if not args.resume:
        occupy(run, held, resume=False)
        watch.stop.begin()
    if speaker:
        create_output(run)
    metrics = (
        Metrics(
            run.output,
            first_step=first_step,
            total_steps=recipe.training.total_steps,
            log_every_steps=recipe.training.log_every_steps,
            flops_per_token=recipe.model.flops_per_token(recipe.data.sequence_length),
            peak=peak_flops(groups.device_name(device), run.layout.world_size),
            wandb_project=args.wandb,
            tensorboard=args.tensorboard,
            settings=facts(run),
        )
        if speaker
        else None
    )
    with metrics or contextlib.nullcontext():
        guard = Guard(recipe.training, found.manifest["facts"].get("guard") if found else None)
        train(run, engine, metrics, first_step, watch, guard)
    say(f"done: step {run.stop_at} of {recipe.training.total_steps}; metrics and checkpoints are in '{run.output}'")


def speaks(error: XlmegaError) -> bool:
    """One rank of a node tells of an error that all see; what one rank alone knows, it tells itself."""
    return groups.local_rank(os.environ) == 0 or error.of_one_rank


if __name__ == "__main__":
    run_main(main, speaks)
