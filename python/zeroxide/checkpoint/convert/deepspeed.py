"""Reading DeepSpeed's ZeRO-1, 2 and 3 checkpoints, tensor by tensor, without running anything that they contain.

The files are pickles. They are read by torch's unpickler for weights, which calls only what is on its list of safe
things; objects of DeepSpeed's own classes become stand-ins that hold what the file says of them and do nothing. Tensors
are views of the mapped files, so that nothing is read before it is used.

Where the elements are (deepspeed/utils/zero_to_fp32.py and the optimizers' `state_dict` of DeepSpeed 0.19):

* Stages 1 and 2: the parameters of one optimizer group lie end to end in the order of `param_shapes`, each followed by
  `param_alignment_paddings` elements; the ranks hold equal contiguous parts of that, the weights without the padding
  at the end, the moments with it.
* Stage 3: of every parameter each rank holds ceil(numel / world) elements, the last of them padding; these parts lie
  end to end over the sub-groups in the order of `param_shapes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from zeroxide.checkpoint.convert.portable import Portable, PortableParameter
from zeroxide.checkpoint.format.json_codec import encode
from zeroxide.checkpoint.load.foreign import foreign_format
from zeroxide.errors import CheckpointError

__all__ = ["HYPERPARAMETERS", "MOMENTS", "Reader", "is_deepspeed", "load_file", "read_deepspeed"]

OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
OWN = "deepspeed."
MOMENTS = ("exp_avg", "exp_avg_sq")
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "initial_lr")
SCHEDULES = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
ENGINE_KEYS = frozenset(
    {
        *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"),
        *("shared_params", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
        *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size"),
        *("ds_config", "ds_version", "checkpoint_parallel_dims", "checkpoint_parallel_dimensions"),
        "universal_checkpoint_info",
    }
)
"""Keys of the model states that are DeepSpeed's; every other one is the client's."""


class _StandIn:
    """Instead of an object of a class of DeepSpeed: its arguments and attributes, without behaviour."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __new__(cls, *args: Any) -> _StandIn:
        made = super().__new__(cls)
        made.args = args
        return made


def is_deepspeed(directory: Path) -> bool:
    """Whether the directory looks like one that DeepSpeed saved a checkpoint to."""
    patterns = ("*_model_states.pt", "*_optim_states.pt")
    return directory.is_dir() and any(next(directory.glob(pattern), None) is not None for pattern in patterns)


def load_file(path: Path, *, plain: bool = False) -> Any:
    """What one of the files holds: a dict, or, if `plain`, anything that runs nothing.

    Raises CheckpointError for one that is damaged or holds anything that could run.
    """
    try:
        unknown = [name for name in get_unsafe_globals_in_checkpoint(path) if not name.startswith(OWN)]
        if unknown:
            raise CheckpointError(
                f"{path} is not read: it asks for {unknown[0]}, which is neither a tensor nor plain data",
                path=path.parent,
            )
        own = [name for name in get_unsafe_globals_in_checkpoint(path) if name.startswith(OWN)]
        with safe_globals([(_StandIn, name) for name in own]):
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", path=path.parent) from None
    except Exception as error:
        # Whatever a damaged archive or pickle makes the unpickler raise.
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint of DeepSpeed: {first}", path=path.parent
        ) from None
    if not plain and not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a checkpoint of DeepSpeed: it holds no dict", path=path.parent)
    return found


def read_deepspeed(directory: Path) -> Portable:
    """The checkpoint in `directory` (the one named by the tag). Values are read when they are asked for.

    Raises CheckpointError where files are missing, damaged or hold what could run, where parts do not fit together,
    and for checkpoints with experts or of several model-parallel ranks.
    """
    try:
        return Reader(directory).portable()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{directory} is not laid out as DeepSpeed's checkpoints are: {type(error).__name__}: {error}",
            path=directory,
        ) from error


Cut = Iterator[tuple[str, Sequence[int], int, list[tuple[int, int, int, int]]]]
"""Of each trainable parameter: name, shape, its flat tensor, and its runs (rank, flat tensor, first element, count)."""


class Reader:
    """Reads the parts of a checkpoint; `portable` puts them together."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notes: list[str] = []
        optimizers = self._optimizer_files()
        self.states = [self._state(path) for path in optimizers]
        self.world = len(self.states)
        # DeepSpeed's bf16 optimizer, which shards as stage 1 does, does not say so.
        stage = self.states[0].get("zero_stage", 1)
        self.stage = int(stage.args[0] if isinstance(stage, _StandIn) else stage)
        self._check_world()
        name = "zero_pp_rank_{}_mp_rank_00_model_states.pt" if self.stage == 3 else "mp_rank_00_model_states.pt"
        self.models = [
            load_file(self.there(directory / name.format(rank))) for rank in range(self.world if self.stage == 3 else 1)
        ]
        self.model = self.models[0]
        if self.model.get("param_shapes") is None:
            raise self.wrong("it was saved without ZeRO: stages 1 to 3 can be converted")

    def wrong(self, what: str) -> CheckpointError:
        """The error that says why it cannot be converted."""
        return CheckpointError(f"{self.directory} cannot be converted: {what}", path=self.directory)

    def there(self, path: Path) -> Path:
        """The path, if there is a file."""
        if not path.is_file():
            raise self.wrong(f"{path.name} is missing")
        return path

    def _state(self, path: Path) -> dict[str, Any]:
        found = load_file(path).get("optimizer_state_dict")
        if not isinstance(found, dict):
            raise self.wrong(
                f"{path.name} has no optimizer_state_dict, so it is not of DeepSpeed's ZeRO stages 1 to 3, and FSDP2's "
                "or universal checkpoints have other files"
            )
        return found

    def _optimizer_files(self) -> list[Path]:
        if any(self.directory.glob("*expert_*_states.pt")) or any(self.directory.glob("expp_rank_*")):
            raise self.wrong("it has experts")
        found: dict[int, Path] = {}
        for path in sorted(self.directory.glob("*_optim_states.pt")):
            match = OPTIMIZER.fullmatch(path.name)
            if match is None or int(match[2]):
                raise self.wrong(f"{path.name} belongs to model parallelism")
            if int(match[1]) in found:
                raise self.wrong(f"{path.name} and {found[int(match[1])].name} are of one rank: remove the stale one")
            found[int(match[1])] = path
        if not found and (foreign := foreign_format(self.directory)) is not None:
            raise self.wrong(f"it {foreign}")
        if not found:
            raise self.wrong("it has no *_optim_states.pt: stages 1 to 3 can be converted")
        for rank in range(max(found)):
            if rank not in found:
                raise self.wrong(f"the optimizer state of rank {rank} is missing")
        return [found[rank] for rank in sorted(found)]

    def _check_world(self) -> None:
        count = self.states[0]["partition_count"]
        expected = max(count) if isinstance(count, list) else count
        if expected != self.world:
            raise self.wrong(f"it was saved by {expected} ranks and has the optimizer state of {self.world}")
        if self.stage not in (1, 2, 3):
            raise self.wrong(f"its ZeRO stage is {self.stage}")

    # Trainable parameters -----------------------------------------------------------------------------------------

    def _flats(self, part: str) -> list[list[torch.Tensor]]:
        """The flat tensors of a part, of every rank: one a group, in stage 3 one a sub-group."""
        result = []
        for state in self.states:
            weights = state["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]
            if part == "weights":
                result.append([flat.view(-1) for flat in weights])
                continue
            base = state["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
            entries: Any = base if isinstance(base, list) else base["state"]
            found = []
            for number, flat in enumerate(weights):
                entry = entries[number] if isinstance(base, list) else entries.get(number, {})
                # No step has been made yet: the moments are zero.
                found.append(entry[part].view(-1) if part in entry else flat.new_zeros(()).expand(flat.numel()))
            result.append(found)
        return result

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer."""
        base = self.states[0]["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        if isinstance(base, list):
            return [{} for _ in base]
        groups: list[dict[str, Any]] = base["param_groups"]
        return groups

    def _group_of(self, flat: int) -> int:
        for number, group in enumerate(self.groups()):
            if flat in group.get("params", [number]):
                return number
        raise ValueError(f"flat tensor {flat} is in no group")

    def updates(self, flat: int) -> int:
        """How often the parameters of a flat tensor were updated."""
        base = self.states[0]["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        if isinstance(base, list):
            return int(self.states[0].get("base_optimizer_state_step", base[flat].get("step", 0)))
        step = base["state"].get(flat, {}).get("step", base["param_groups"][self._group_of(flat)].get("step", 0))
        return int(step)

    def sharded(self) -> Iterator[tuple[str, Sequence[int], int, dict[str, list[torch.Tensor]]]]:
        """(name, shape, flat tensor, elements by part) of each trainable parameter."""
        parts = {part: self._flats(part) for part in ("weights", *MOMENTS)}
        cut = self._cut_stage_3 if self.stage == 3 else self._cut_stages_1_and_2
        for name, shape, flat, runs in cut([[each.numel() for each in flats] for flats in parts["exp_avg"]]):
            found = {}
            for part, flats in parts.items():
                segments = [flats[rank][number][start : start + count] for rank, number, start, count in runs]
                if sum(segment.numel() for segment in segments) != prod(shape):
                    raise self.wrong(
                        f"{part} of {name} is not complete; state that was offloaded to NVMe is not in the checkpoint"
                    )
                found[part] = segments
            yield name, shape, flat, found

    def _cut_stages_1_and_2(self, sizes: list[list[int]]) -> Cut:
        paddings = self.states[0].get("param_alignment_paddings")
        for number, shapes in enumerate(self.model["param_shapes"]):
            at = 0
            for position, (name, shape) in enumerate(shapes.items()):
                numel, runs, begin = prod(shape), [], 0
                for rank in range(self.world):
                    low = max(at, begin)
                    high = min(at + numel, begin + sizes[rank][number])
                    if low < high:
                        runs.append((rank, number, low - begin, high - low))
                    begin += sizes[rank][number]
                yield name, tuple(shape), number, runs
                at += numel + (paddings[number][position] if paddings is not None else 0)

    def _cut_stage_3(self, sizes: list[list[int]]) -> Cut:
        bounds = [0]
        for size in sizes[0]:
            bounds.append(bounds[-1] + size)
        at = 0
        for shapes in self.model["param_shapes"]:
            for name, shape in shapes.items():
                numel = prod(shape)
                part = -(-numel // self.world)
                first = next(number for number in range(len(sizes[0])) if at < bounds[number + 1])
                runs = []
                for rank in range(self.world):
                    left = min(part, numel - rank * part)
                    start, number = at, first
                    while left > 0:
                        count = min(left, bounds[number + 1] - start)
                        runs.append((rank, number, start - bounds[number], count))
                        start, left, number = start + count, left - count, number + 1
                yield name, tuple(shape), first, runs
                at += part

    # Everything else ----------------------------------------------------------------------------------------------

    def _frozen(self, known: set[str]) -> Iterator[tuple[str, Sequence[int], list[torch.Tensor]]]:
        shapes = self.model.get("frozen_param_shapes")
        if shapes is not None:
            for name, shape in shapes.items():
                parts = [model["frozen_param_fragments"][name].reshape(-1) for model in self.models]
                left = prod(shape)
                segments = []
                for part in parts:
                    segments.append(part[: min(left, part.numel())])
                    left -= segments[-1].numel()
                if left:
                    raise self.wrong(f"{name} is not complete")
                yield name, tuple(shape), segments
        elif self.stage == 1:
            # There they are only among the weights of the module.
            skip = known | set(self.model["buffer_names"]) | set(self.model.get("shared_params") or {})
            for name, tensor in self.model["module"].items():
                if name not in skip:
                    yield name, tuple(tensor.shape), [tensor.reshape(-1)]

    def portable(self) -> Portable:
        """What was found, in the form that is written."""
        names: dict[str, list[str]] = {}
        for alias, stored in (self.model.get("shared_params") or {}).items():
            names.setdefault(stored, []).append(alias)
        parameters, segments = [], {}
        for name, shape, flat, parts in self.sharded():
            parameters.append(
                PortableParameter(
                    names=[name, *names.get(name, [])],
                    shape=list(shape),
                    trainable=True,
                    updates=self.updates(flat),
                    group=self._group_of(flat),
                )
            )
            segments.update({(name, part): found for part, found in parts.items()})
        for name, shape, found in self._frozen({each.name for each in parameters}):
            parameters.append(
                PortableParameter([name, *names.get(name, [])], list(shape), trainable=False, updates=0, group=None)
            )
            segments[name, "weights"] = found
        module = self.model["module"]
        return Portable(
            parameters=parameters,
            segments=segments,
            buffers={name: module[name] for name in self.model["buffer_names"] if name in module},
            precision=self._precision(),
            groups=[self._hyperparameters(group) for group in self.groups()],
            scheduler=self._scheduler(),
            counters=self._counters(),
            client_state=self._client_state(),
            notes=self.notes,
        )

    def _precision(self) -> str:
        kinds = {tensor.dtype for tensor in self.model["module"].values() if torch.is_tensor(tensor)}
        return "bf16" if torch.bfloat16 in kinds else "fp16" if torch.float16 in kinds else "fp32"

    @staticmethod
    def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
        return {
            key: float(value) if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key in HYPERPARAMETERS
        }

    def _config(self) -> dict[str, Any]:
        found = self.model.get("ds_config")
        return found if isinstance(found, dict) else {}

    def _scheduler(self) -> tuple[str, Any] | None:
        state = self.model.get("lr_scheduler")
        if state is None:
            return None
        kind = (self._config().get("scheduler") or {}).get("type")
        if kind not in SCHEDULES:
            self.notes.append("the learning-rate schedule is left out: the checkpoint does not name one of ours")
            return None
        return kind, state

    def _counters(self) -> dict[str, int]:
        steps = int(self.model.get("global_steps") or 0)
        accumulation = self._config().get("gradient_accumulation_steps")
        return {
            "global_steps": steps,
            "global_samples": int(self.model.get("global_samples") or 0),
            "micro_steps": steps * (accumulation if isinstance(accumulation, int) else 1),
            "skipped_steps": int(self.model.get("skipped_steps") or 0),
        }

    def _client_state(self) -> dict[str, Any]:
        kept = {}
        for key, value in self.model.items():
            if key in ENGINE_KEYS:
                continue
            try:
                encode(value, f"client_state[{key!r}]")
            except CheckpointError as error:
                self.notes.append(f"left out: {error}")
                continue
            kept[key] = value
        return kept
