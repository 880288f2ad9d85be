"""An engine with the interface of zeroxide's and plain torch inside, to test the training loop by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from zeroxide.plan.recompute import Recompute
from zeroxide.plan.update_in_backward import EarlyPlan


class FakePlan:
    recompute = Recompute()
    early = EarlyPlan()

    def expected_peaks(self, *, loaded: bool) -> dict[str, int]:
        return {"weights": 1 << 20}

    def expected_process(self, made: Any, forward: Any, backward: Any, *, loaded: bool) -> int:
        return int(backward["peak"])

    def expected_traffic(self) -> tuple[int, int]:
        return 3, 2

    def describe(self) -> list[str]:
        return ["everything in memory"]


class FakeTrace:
    """Forgets by steps, not by moments."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.begins = [engine.applied]
        self.applied = engine.applied

    def forget_before(self, moment: int) -> None:
        self.begins = [*self.begins[-1:], self.engine.applied]
        self.applied = self.begins[0]


class FakeEngine(nn.Module):
    """fp32 weights, torch AdamW. `before_step` is called with the number of each step about to be applied."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], config: dict[str, Any], weights: Any) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        real: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    new = real.setdefault(id(parameter), nn.Parameter(torch.zeros(parameter.shape)))
                    module._parameters[key] = new
        for old, new in real.items():
            weights.fill({names[old]: new.data}, {})
        self.module = model
        self.clip = config["gradient_clipping"]
        self.accumulate = config["gradient_accumulation_steps"]
        params = config["optimizer"]["params"]
        self.optimizer = torch.optim.AdamW(
            [{**group, "params": [real[id(p)] for p in group["params"]]} for group in groups],
            lr=params["lr"],
            betas=tuple(params["betas"]),
        )
        self.scheduler: Any = None
        self.micro_steps = self.applied = 0
        self.norm: float | None = None
        self.destroyed = False
        self.config = config
        self.before_step: Callable[[int], None] = lambda number: None

    def forward(self, **batch: Any) -> Any:
        return self.module(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulate).backward()

    def step(self) -> None:
        self.micro_steps += 1
        if self.micro_steps % self.accumulate:
            return
        self.before_step(self.applied + 1)
        largest = self.clip or float("inf")
        self.norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), largest))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.applied += 1

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_global_grad_norm(self) -> float | None:
        return self.norm

    def was_step_applied(self) -> bool:
        return True

    def plan(self) -> FakePlan:
        return FakePlan()

    def memory(self) -> dict[str, Any]:
        return {
            "weights": {"current": 1 << 20, "peak": 1 << 20},
            "process": {"rss": 1 << 30, "anon": 1 << 29, "file": 1 << 29, "peak": 1 << 30},
            "limit": 2 << 30,
        }

    def device_memory(self) -> dict[str, Any]:
        return {}

    def io(self) -> dict[str, Any]:
        count = self.applied
        return {
            "read_bytes": 3 * count,
            "write_bytes": 2 * count,
            "read_seconds": 1.0 * count,
            "write_seconds": 1.0 * count,
            "wait_seconds": 0.5 * count,
            "engine": "none",
        }

    @contextmanager
    def trace(self, path: Path) -> Iterator[FakeTrace]:
        """One forward a step, of those that were not forgotten."""
        trace, first = FakeTrace(self), self.applied
        try:
            yield trace
        finally:
            steps = range(max(first, trace.applied) + 1, self.applied + 1)
            phase = {"ph": "X", "cat": "engine", "name": "forward", "pid": 0, "tid": 0, "dur": 1.0}
            events = [{**phase, "ts": float(step), "args": {"step": step}} for step in steps]
            path.write_text(json.dumps({"traceEvents": events, "otherData": {"memory": [], "left_out": 0}}))

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any]) -> None:
        path = Path(folder, tag)
        path.mkdir(parents=True)
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        torch.save({"model": self.module.state_dict(), **state, "applied": self.applied}, path / "state.pt")
        (path / "client.json").write_text(json.dumps(client_state))
        Path(folder, "latest").write_text(tag)

    def load_checkpoint(self, folder: str) -> tuple[str, dict[str, Any]]:
        path = Path(folder, Path(folder, "latest").read_text())
        state = torch.load(path / "state.pt", weights_only=False)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.applied = state["applied"]
        self.micro_steps = self.applied * self.accumulate
        return str(path), json.loads((path / "client.json").read_text())

    def save_16bit_model(self, folder: str) -> None:
        named = {name: parameter.detach().bfloat16() for name, parameter in self.module.named_parameters()}
        save_file(named, Path(folder, "model.safetensors"), metadata={"format": "pt"})

    def destroy(self) -> None:
        self.destroyed = True


class FakeInitialize:
    """Stands in for `zeroxide.initialize` and keeps what it was called with and what it made."""

    def __init__(self, before_step: Callable[[int], None] = lambda number: None) -> None:
        self.before_step = before_step
        self.engine: FakeEngine | None = None
        self.arguments: dict[str, Any] = {}

    def __call__(self, **arguments: Any) -> tuple[Any, Any, None, Any]:
        self.arguments = arguments
        engine = FakeEngine(
            arguments["model"], arguments["model_parameters"], arguments["config"], arguments["weights"]
        )
        engine.scheduler = arguments["lr_scheduler"](engine.optimizer)
        engine.before_step = self.before_step
        self.engine = engine
        return engine, engine.optimizer, None, engine.scheduler
