"""Files that torch.save wrote, opened as data: tensors and plain containers come out, and no code of the file runs.

Such a file is a program for Python's unpickler, so a stranger's can ask for any function. Before anything is built,
its instructions are listed, and a file that names more than `TENSOR_NAMES` and `INERT_NAMES` is refused by what it
names. What is left goes through torch's own restricted reader (`weights_only`), which would refuse it as well. Classes
of `INERT_NAMES` (settings that trainers store beside the weights) come out as `Inert`: attributes, and no behaviour.
Both forms are read. The zip form (torch 1.6 and later) is mapped into memory, so a tensor costs nothing until it is
used; the older one is loaded whole.
"""

from __future__ import annotations

import contextlib
import json
import pickletools  # lists instructions; it cannot execute them
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from xlmega.errors import CheckpointError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_NAME = "pytorch_model.bin.index.json"

_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
TENSOR_NAMES = frozenset(
    [
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch._tensor._rebuild_from_type_v2",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "_codecs.encode",
        "builtins.set",
        *(f"torch.{kind}Storage" for kind in _KINDS),
        *(f"torch.storage.{kind}" for kind in ("TypedStorage", "UntypedStorage")),
        *(f"torch.{dtype}" for dtype in _DTYPES),
    ]
)
"""What tensors and containers are made of."""
INERT_NAMES = frozenset(
    [
        "argparse.Namespace",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        "numpy.dtype",
        "numpy.ndarray",
    ]
)
"""Classes that become Inert."""

# The instructions that name a function or class; Python 2's names of modules stand for Python 3's.
_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "commands": "subprocess", "posix": "os", "nt": "os"}
_LEGACY_PICKLES = 4  # magic number, version, platform, and then the object
_UNWRAPPED = ("model", "state_dict", "model_state_dict", "module")
_WRAPPERS = ("module.", "_orig_mod.")


class Inert:
    """An object whose class was not run: what it was made from in `arguments`, its attributes as attributes."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        # torch's reader would otherwise set any attribute that a tuple of states names.
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})


def read_torch(path: Path) -> Any:
    """What torch.save stored in `path`, on the CPU; a CheckpointError that names what a file asks for beyond data."""
    try:
        zipped = zipfile.is_zipfile(path)
        refused = sorted(name for name in _wanted(path, zipped) if name not in TENSOR_NAMES | INERT_NAMES)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from None
    except Exception as error:  # whatever a damaged file makes the parsers raise is the file's fault
        raise CheckpointError(f"'{path}' is damaged or not a file of torch.save: {error!r}.") from None
    if refused:
        raise CheckpointError(
            f"'{path}' asks for {', '.join(refused)}. Weights are tensors in plain containers; a file that wants to "
            "call or make anything else is not opened, and nothing of it has run.\n  Ask its author for safetensors."
        )
    try:
        with _only_inert():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever a damaged file makes torch raise is the file's fault
        # torch wraps its reason in advice on how to load the file unsafely.
        lines = [line for line in str(error).split("error:")[-1].splitlines() if line.strip()] or [repr(error)]
        reason = next((line for line in lines if "GLOBAL" in line), lines[0]).strip()
        raise CheckpointError(
            f"'{path}' is damaged or not a file of weights: {reason}\n  What torch.save writes by default (pickle "
            "protocol 2) is read."
        ) from None


@contextlib.contextmanager
def _only_inert() -> Iterator[None]:
    """torch's allow-list is this file's alone: Megatron-core, once imported, lets argparse.Namespace and others in."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(Inert, name) for name in INERT_NAMES])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name: those of a state dict, or of the one under 'model', 'state_dict' or 'module'."""
    return tensors_in(read_torch(path), path)


def tensors_in(stored: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in what `path` stored; names lose the prefixes that wrappers give to all of them."""
    inner = stored if isinstance(stored, dict) else {}
    inner = next((inner[key] for key in _UNWRAPPED if isinstance(inner.get(key), dict)), inner)
    found = {name: value for name, value in inner.items() if torch.is_tensor(value)}
    if not found:
        raise CheckpointError(f"'{path}' holds no named tensors: it is a {type(stored).__name__}, not a state dict.")
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


class TorchTensors:
    """A state dict as a TensorStore."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored; of a mapped file, its pages, which are read as they are used."""
        return self._tensors[name].detach()

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the tensor as stored."""
        return self._tensors[name].detach()[slices]


def torch_folder(folder: Path) -> TorchTensors:
    """The tensors of `pytorch_model.bin`, or of the shards that its index names."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return TorchTensors(state_dict(folder / "pytorch_model.bin"))
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = {name: folder / name for name in sorted(set(places.values()))}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{index}' is not an index of PyTorch shards: {error!r}.") from None
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise CheckpointError(f"'{index}' names {', '.join(missing)}, which is not there: fetch it again.")
    shards = {name: state_dict(path) for name, path in files.items()}
    lost = [name for name, shard in places.items() if name not in shards[shard]]
    if lost:
        raise CheckpointError(f"'{index}' says that {lost[0]} is in {places[lost[0]]}, but it is not.")
    return TorchTensors({name: shards[shard][name] for name, shard in places.items()})


def has_torch_weights(folder: Path) -> bool:
    """The folder holds `pytorch_model.bin` or its index."""
    return (folder / INDEX_NAME).is_file() or (folder / "pytorch_model.bin").is_file()


def _wanted(path: Path, zipped: bool) -> set[str]:
    """Every function and class that a file's instructions name."""
    if not zipped:
        names: set[str] = set()
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                names |= _names(file)
        return names
    with zipfile.ZipFile(path) as archive:
        programs = [name for name in archive.namelist() if name.endswith(".pkl")]
        if not programs:
            raise ValueError("the archive has no data.pkl")
        found = set()
        for name in programs:
            with archive.open(name) as file:
                found |= _names(file)
        return found


def _names(program: IO[bytes]) -> set[str]:
    """The names in one program, which ends where `program` then stands."""
    names: set[str] = set()
    strings: list[str] = []  # those pushed so far: STACK_GLOBAL takes the last two
    memo: dict[int, str] = {}
    num_memoized = 0
    for instruction, argument, _ in pickletools.genops(program):
        code = instruction.name
        if code == "GLOBAL" or code == "INST":
            names.add(_spelt(*str(argument).split(" ", 1)))
        elif code == "STACK_GLOBAL":
            names.add(_spelt(*(strings[-2:] if len(strings) > 1 else ("?", "?"))))
        elif code.startswith("EXT"):
            names.add(f"extension {argument}")
        elif "UNICODE" in code or "STRING" in code:
            strings.append(str(argument))
        elif code == "MEMOIZE":
            if strings:  # the last string, unless something else was just made; then nobody takes it for a name
                memo[num_memoized] = strings[-1]
            num_memoized += 1
        elif "PUT" in code and strings:
            memo[_index(argument)] = strings[-1]
        elif "GET" in code and _index(argument) in memo:
            strings.append(memo[_index(argument)])
    return names


def _index(argument: Any) -> int:
    return int(argument)


def _spelt(module: str, name: str) -> str:
    return f"{_MODULES.get(module, module)}.{name}"
