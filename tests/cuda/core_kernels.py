"""The CPU kernels as an oracle: a core of one process that keeps everything in host memory."""

from __future__ import annotations

from zeroxide import _core
from zeroxide.device.placement import spec
from zeroxide.kernels.arguments import FLOATS


def core(numels, rule, *, compute="f32", grad="f32", format="fp32"):
    """A core with one unit of parameters of those sizes."""
    unit = _core.UnitSpec(
        name="unit", params=[(numel, True) for numel in numels], weights=_core.WeightHome.HOST,
        state=_core.StateHome.HOST, optimizer=rule, format=format,
    )  # fmt: skip
    settings = _core.Settings(
        limit=None, threads=1, compute=compute, grad=grad, tile_elements=4096, staging_bytes=0, gathered_bytes=0,
        engine=_core.IoEngine.AUTO, queue_depth=4, directories=[], job="oracle",
    )  # fmt: skip
    return _core.Offload(settings, [unit])


def norm(tensors) -> tuple[float, bool]:
    """Sum of squares, and whether anything is not finite."""
    sgd = _core.RULES["sgd"](**_core.RULES["sgd"].hyperparameters)
    made = core([each.numel() for each in tensors], sgd, grad=FLOATS[tensors[0].dtype])
    for at, each in enumerate(tensors):
        made.accumulate(0, at, 0, spec(each), True)
    sum_squares, nonfinite, _ = made.grad_norm()
    made.close()
    return sum_squares, nonfinite
