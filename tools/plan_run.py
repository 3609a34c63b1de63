"""Plan a run: memory of the fullest rank, step time, the layout to take, days, cost and how often to save.

python tools/plan_run.py --recipe xglm_tiny --set model.preset=xglm_1.7b --set training.batch_windows=1024 \\
    --set data.sequence_length=2048 --cluster h100 --nodes 8 --tokens 100e9
python tools/plan_run.py --recipe xglm_tiny --set model.preset=xglm_27m --set model.vocab_size=8192 \\
    --calibrate here.toml
torchrun --nproc_per_node 2 tools/plan_run.py ... --calibrate here.toml     (with how fast the ranks sum)

A cluster is a name (a100, h100, h200: nodes of eight) or a TOML file with keys of planning.Cluster.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
from dataclasses import replace
from pathlib import Path

from xlmega import config
from xlmega.data.languages import id_space, roots_of
from xlmega.errors import ConfigError, run_main
from xlmega.parallel import groups
from xlmega.parallel.layout import choose, spell
from xlmega.text.vocabulary import load_vocabulary
from xlmega.training import planning
from xlmega.training.outlook import report
from xlmega.training.recipe import Recipe, read_recipe
from xlmega.training.runtime import Runtime, read_runtime, runtime

STANDARD = [
    {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    for stage in (1, 2, 3)
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="name in xlmega/recipes or path of a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=v", help="override a key of the recipe")
    parser.add_argument("--ds_config", type=Path, help="plan with this one only; else ZeRO 1, 2 and 3 in bf16")
    parser.add_argument("--cluster", default="h100", help="a100, h100, h200 or a TOML file")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--devices_per_node", type=int)
    parser.add_argument("--tokens", type=float, help="to train on; else what the recipe's steps serve")
    parser.add_argument("--tp", type=int, help="this layout only, with --pp")
    parser.add_argument("--pp", type=int)
    parser.add_argument("--show", type=int, default=5, help="how many ways to show")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="measure this device, write its TOML and end")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    recipe = sized(read_recipe(args.recipe, args.set))
    runtimes = [read_runtime(args.ds_config)] if args.ds_config else [runtime(settings) for settings in STANDARD]
    if args.calibrate:
        calibrate(args.calibrate, recipe, runtimes[0])
        return
    if args.tokens is not None and not 0 < args.tokens < math.inf:
        raise ConfigError(f"--tokens {args.tokens:g} is not a number of tokens: give more than 0, as in 1e11.")
    if args.show < 1:
        raise ConfigError(f"--show {args.show}: at least the fastest way is shown, so 1 or more.")
    cluster = cluster_of(args)
    batches, length = recipe.training.batch.values, recipe.data.sequence_length
    found = planning.plans(recipe.model, runtimes, cluster, batches, length)
    if args.tp is not None or args.pp is not None:
        tp, pp = (1 if size is None else size for size in (args.tp, args.pp))
        layout = choose(cluster.devices, tp=tp, pp=pp)
        found = [one for one in found if (one.job.layout.tp, one.job.layout.pp) == (layout.tp, layout.pp)]
        if not found:
            raise ConfigError(
                f"{layout.describe()} does not fit, or is not allowed. Without --tp and --pp see what is."
            )
    tokens = args.tokens or float(length * sum_of_windows(recipe))
    words = f"{max(batches)} windows" + (" at most" if len(set(batches)) > 1 else "")
    print(f"{recipe.model.num_parameters():,} parameters, {words} of {length} a step, {tokens:.3g} tokens")
    if len(set(batches)) > 1:
        print(f"note: steps are of {spell(sorted(set(batches)))} windows; times are of steps of {max(batches)}")
    for line in report(found[: args.show], cluster, tokens):
        print(line)


def sized(recipe: Recipe) -> Recipe:
    """The recipe with its vocabulary's size, which is the data's where the recipe has none."""
    if recipe.model.vocab_size:
        return recipe
    if not recipe.data.root:
        raise ConfigError("how large is the vocabulary? Give --set model.vocab_size=N or --set data.root=FOLDER.")
    vocabularies = [load_vocabulary(root / "vocabulary") for root in roots_of(recipe.data)]
    return replace(recipe, model=replace(recipe.model, vocab_size=id_space(recipe.data, vocabularies).size))


def sum_of_windows(recipe: Recipe) -> int:
    """Windows that all steps serve."""
    steps = recipe.training.total_steps
    return sum(recipe.training.batch.at(step) for step in range(steps))


def cluster_of(args: argparse.Namespace) -> planning.Cluster:
    """The named or written cluster, with --nodes and --devices_per_node in place of its own."""
    if args.cluster in planning.CLUSTERS:
        cluster = planning.CLUSTERS[args.cluster]
    elif args.cluster.endswith(".toml"):
        cluster = config.build(planning.Cluster, config.read_toml(Path(args.cluster)), what=args.cluster)
    else:
        raise ConfigError(f"no cluster '{args.cluster}'. It is {', '.join(planning.CLUSTERS)} or a file CLUSTER.toml.")
    given = {name: getattr(args, name) for name in ("nodes", "devices_per_node") if getattr(args, name) is not None}
    return config.build(planning.Cluster, {**vars(cluster), **given}, what="cluster")


def calibrate(output: Path, recipe: Recipe, how: Runtime) -> None:
    """Measure and write; every rank of a launcher takes part."""
    from xlmega.training import calibration  # deepspeed and megatron-core, which arithmetic does not need

    if output.exists():
        raise ConfigError(f"'{output}' exists. Choose another file.")
    if not output.parent.is_dir():
        raise ConfigError(f"'{output}' cannot be written: there is no folder '{output.parent}'. Make it first.")
    process = groups.discover(os.environ)
    with groups.joined(process, choose(process.world_size)) as device:
        if len(hosts := set(groups.words_of_all(socket.gethostname()))) > 1:
            raise ConfigError(f"--calibrate measures one node, but ranks are on {', '.join(sorted(hosts))}. Start one.")
        told = calibration.calibrate(recipe.model, how, recipe.data.sequence_length, device)
        if process.rank == 0:
            lines = [f"devices_per_node = {process.world_size}", f"on_gpu = {str(device.type == 'cuda').lower()}"]
            lines += [f"{key} = {value}" for key, value in told.items()]
            output.write_text("\n".join(lines) + "\n", encoding="utf-8")
            print("\n".join(lines) + f"\nwrote {output}")


if __name__ == "__main__":
    run_main(main)
