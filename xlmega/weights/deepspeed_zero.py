"""fp32 weights out of the directories that DeepSpeed's engines save: ZeRO stages 0 to 3, any number of ranks.

In: `TAG/` (or the folder above it, whose `latest` names the tag) with `mp_rank_00_model_states.pt` and, from stage 1
on, `zero_pp_rank_N_mp_rank_00_optim_states.pt`. Out: a TensorStore with the names of the module that was trained.
Nothing is assembled ahead: the files are mapped, and a tensor is gathered from the ranks when it is read.

How the master weights lie there. Stages 1 and 2: the parameters of a group one after another in the order of
`param_shapes`, cut into equal partitions, one a rank. Stage 3: each parameter cut into `ranks` equal pieces (the last
one padded), and each rank's pieces one after another over its sub-groups. Frozen parameters lie beside the module.
Source: the layout of deepspeed 0.19.8's own checkpoints, read from files that it wrote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xlmega.errors import CheckpointError
from xlmega.weights.torch_files import Inert, TorchTensors, read_torch, tensors_in

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


def zero_folder(path: Path) -> Path | None:
    """The folder of DeepSpeed's files that `path` is or that its `latest` names; None where there is none."""
    if any(_MODEL.fullmatch(file.name) for file in path.iterdir()):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    folder = path / tag
    if not tag or "/" in tag or not folder.is_dir():
        raise CheckpointError(
            f"'{latest}' names '{tag}', which is not a folder beside it. Give the tag's folder itself."
        )
    return folder


def open_zero(folder: Path) -> ZeroTensors | TorchTensors:
    """The weights of one of DeepSpeed's tag folders, in fp32 wherever it keeps master weights."""
    models = _ranks(folder, _MODEL)
    if not models:
        raise CheckpointError(f"'{folder}' has no mp_rank_00_model_states.pt: it is not a checkpoint of DeepSpeed.")
    optimizers = _ranks(folder, _OPTIMIZER)
    stored = [_table(models[rank]) for rank in sorted(models)]
    if not optimizers:
        return TorchTensors(tensors_in(stored[0], models[min(models)]))
    states = {rank: _part(_table(path), "optimizer_state_dict", path) for rank, path in optimizers.items()}
    first = optimizers[min(optimizers)]
    stage = _number(_part(states[min(states)], "zero_stage", first))
    count = _part(states[min(states)], "partition_count", first)
    num_ranks = max(map(_number, count)) if isinstance(count, list) else _number(count)
    missing = [str(rank) for rank in range(num_ranks) if rank not in states]
    if missing or len(states) != num_ranks:
        raise CheckpointError(
            f"'{folder}' was saved by {num_ranks} ranks, but has the optimizer states of {len(states)}"
            + (f"; those of rank {', '.join(missing)} are missing." if missing else ".")
        )
    if stage == 3 and len(stored) != num_ranks:
        raise CheckpointError(f"'{folder}' was saved by {num_ranks} ranks, but has the model states of {len(stored)}.")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = [_flat_groups(states[rank], key, optimizers[rank]) for rank in range(num_ranks)]
    return ZeroTensors(folder, stage, stored, groups, _paddings(states[0]))


@dataclass(frozen=True)
class Line:
    """Flat tensors, back to back."""

    parts: Sequence[torch.Tensor]

    @property
    def length(self) -> int:
        return sum(part.numel() for part in self.parts)

    def take(self, start: int, count: int) -> torch.Tensor:
        """Values start .. start + count as a flat tensor of its own."""
        found = []
        for part in self.parts:
            if count > 0 and start < part.numel():
                found.append(part[start : start + count])
                count -= found[-1].numel()
                start += found[-1].numel()
            start -= part.numel()
        assert count == 0, count
        return torch.cat(found) if found else torch.empty(0)


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: `count` values from `start` on in each of `lines`; together they are it (and padding)."""

    lines: Sequence[Line]
    start: int
    count: int


class ZeroTensors:
    """A TensorStore over flat partitions; made by `open_zero`."""

    def __init__(
        self,
        folder: Path,
        stage: int,
        stored: Sequence[Mapping[str, Any]],
        groups: Sequence[Sequence[torch.Tensor]],
        paddings: Sequence[Sequence[int]] | None,
    ) -> None:
        """`stored` are the model states, one a rank at stage 3; `groups[rank]` its flat partitions."""
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, _Place] = {}
        shapes: Sequence[Mapping[str, Any]] = _part(stored[0], "param_shapes", folder)
        if stage == 3:
            self._place_pieces(shapes, [Line(rank) for rank in groups])
        else:
            self._place_whole(shapes, groups, paddings)
        self._place_frozen(stored)
        for name, kept in dict(stored[0].get("shared_params") or {}).items():
            if kept in self._places and name not in self._places:
                self._add(name, self.shapes[kept], self._places[kept])

    def read(self, name: str) -> torch.Tensor:
        """The tensor, gathered from the ranks."""
        place, shape = self._places[name], self.shapes[name]
        pieces = [line.take(place.start, place.count) for line in place.lines]
        return torch.cat(pieces)[: math.prod(shape)].view(shape)

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the tensor."""
        return self.read(name)[slices]

    def _place_whole(
        self,
        shapes: Sequence[Mapping[str, Any]],
        groups: Sequence[Sequence[torch.Tensor]],
        paddings: Sequence[Sequence[int]] | None,
    ) -> None:
        if len(groups[0]) != len(shapes):
            raise CheckpointError(f"'{self.folder}' has {len(groups[0])} flat groups for {len(shapes)} of parameters.")
        for index, group in enumerate(shapes):
            line, start = Line([rank[index] for rank in groups]), 0
            for position, (name, shape) in enumerate(group.items()):
                self._add(name, shape, _Place([line], start, math.prod(shape)))
                start += math.prod(shape) + (paddings[index][position] if paddings else 0)
            # DeepSpeed rounds a group up to a multiple of a few values a rank; more than that is another model's file.
            if not 0 <= line.length - start <= max(1024, 64 * len(groups)):
                raise CheckpointError(
                    f"'{self.folder}': parameters of {start} values do not fill the {line.length} of their group."
                )

    def _place_pieces(self, shapes: Sequence[Mapping[str, Any]], lines: Sequence[Line]) -> None:
        start = 0
        for group in shapes:
            for name, shape in group.items():
                count = -(-math.prod(shape) // len(lines))
                self._add(name, shape, _Place(lines, start, count))
                start += count
        short = [rank for rank, line in enumerate(lines) if line.length < start]
        if short:
            raise CheckpointError(
                f"'{self.folder}': each rank must hold {start} values, but rank {short[0]} has only "
                f"{lines[short[0]].length}."
            )

    def _place_frozen(self, stored: Sequence[Mapping[str, Any]]) -> None:
        for name, shape in dict(stored[0].get("frozen_param_shapes") or {}).items():
            lines = [Line([one["frozen_param_fragments"][name].flatten()]) for one in stored]
            self._add(name, shape, _Place(lines, 0, -(-math.prod(shape) // len(lines))))

    def _add(self, name: str, shape: Sequence[int], place: _Place) -> None:
        self.shapes[name], self._places[name] = tuple(shape), place


def _ranks(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Data-parallel rank to file; refuses files of several model-parallel ranks."""
    found = {path: match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    parallel = {int(match[2]) for match in found.values()}
    if len(parallel) > 1 or any(folder.glob("layer_*-model_*_model_states.pt")):
        raise CheckpointError(
            f"'{folder}' was saved by {len(parallel)} model-parallel ranks or a pipeline, and how another's code cut "
            "its parameters is not in the files. Merge them with that code, then convert the result."
        )
    return {int(match[1] or 0): path for path, match in found.items()}


def _table(path: Path) -> Mapping[str, Any]:
    stored = read_torch(path)
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"'{path}' is not a checkpoint of DeepSpeed: it holds a {type(stored).__name__}.")
    return stored


def _part(table: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in table:
        raise CheckpointError(f"'{path}' has no '{key}', which DeepSpeed's checkpoints have.")
    return table[key]


def _number(value: Any) -> int:
    # The stage is an enumeration in newer releases.
    return int(value.arguments[0] if isinstance(value, Inert) and value.arguments else value)


def _flat_groups(state: Mapping[str, Any], key: str, path: Path) -> list[torch.Tensor]:
    groups = _part(state, key, path)
    flat = [groups] if torch.is_tensor(groups) else list(groups)
    return [group.detach().flatten() for group in flat]


def _paddings(state: Mapping[str, Any]) -> Sequence[Sequence[int]] | None:
    found = state.get("param_alignment_paddings")
    return found if isinstance(found, Sequence) and found else None
