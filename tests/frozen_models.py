"""Models whose frozen parameters and buffers are of every dtype, and what their bytes were.

The bytes are drawn here and kept apart: what an engine shows later is compared with them, not with anything that went
through an engine.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

DTYPES = [
    each
    for each in dict.fromkeys(value for value in vars(torch).values() if isinstance(value, torch.dtype))
    if not str(each).startswith(("torch.quint", "torch.qint"))
]
"""Every dtype that torch has, but for those of quantized tensors, which are not plain bytes."""

ORDINARY = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(3, 80), (5,), (), (0, 4), (7, 1, 33)]


class Packed(nn.Parameter):
    """Like bitsandbytes' Params4bit: bytes in the words of some dtype, and what they mean beside them."""

    def __new__(cls, data, requires_grad=False, quant_state=None):
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.quant_state = quant_state
        return made

    def to(self, *args, **kwargs):
        raise AssertionError("nobody casts packed weights")


def drawn(dtype, shape, generator):
    """A tensor of random bits. Every pattern comes up: NaNs with payloads, both infinities, signed zeros."""
    numel = torch.Size(shape).numel()
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def raw_bytes(tensor):
    """The bytes of a contiguous tensor."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0).byte()


def bytes_by_name(named):
    """{name: (dtype, shape, bytes)}, in memory of their own."""
    return {name: (each.dtype, tuple(each.shape), bytes(raw_bytes(each).tolist())) for name, each in named}


class Noting(nn.Linear):
    """A layer that notes what its other parameters are when it runs."""

    def __init__(self):
        super().__init__(8, 8)
        self.seen = {}

    def forward(self, x):
        for name, each in self._parameters.items():
            if name.startswith(("frozen", "packed")):
                self.seen[name] = raw_bytes(each).clone()
        return super().forward(x)


class Mixed(nn.Module):
    """Trained layers beside frozen parameters of every dtype and shape, in the root and in blocks.

    `seen` has what forward found in them when it ran last.
    """

    def __init__(self, seed=0, buffers=True, dtypes=DTYPES):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        warnings.filterwarnings("ignore", message=".*support is experimental.*")
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Noting() for _ in range(3))
        # Trained, without elements.
        self.nothing = nn.Parameter(torch.empty(0, 3))
        for block in self.blocks:
            block.bias.requires_grad_(False)
        places = [self, *self.blocks]
        for number, dtype in enumerate(dtypes):
            owner = places[number % len(places)]
            for at, shape in enumerate(SHAPES if number < 8 else SHAPES[number % len(SHAPES) :][:2]):
                param = nn.Parameter(drawn(dtype, shape, generator), requires_grad=False)
                owner.register_parameter(f"frozen_{number}_{at}", param)
            if buffers:
                owner.register_buffer(f"buffer_{number}", drawn(dtype, SHAPES[number % len(SHAPES)], generator))
        for number, dtype in enumerate((torch.uint8, *ORDINARY)):
            # Every pattern of 16 bits once.
            words = torch.arange(65536).to(torch.uint16).view(torch.uint8).roll(2 * number).view(dtype)
            self.blocks[number % 3].register_parameter(f"packed_{number}", Packed(words, quant_state=[number]))
        self.seen = {}

    def kept(self):
        """Frozen parameters by name, but for the layers' own."""
        return [(name, each) for name, each in self.named_parameters() if "frozen" in name or "packed" in name]

    def forward(self, x):
        for name, each in self._parameters.items():
            if name.startswith("frozen"):
                self.seen[name] = raw_bytes(each).clone()
        x = self.first(x) + self.nothing.sum()
        for at, block in enumerate(self.blocks):
            x = x + block(x)
            self.seen |= {f"blocks.{at}.{name}": found for name, found in block.seen.items()}
        return x.float().square().mean()


def expected_kept(model, compute):
    """What `kept` must show in an engine: the bytes of `model` as it was built.

    Under bf16 and fp16 the plain fp32, bf16 and fp16 ones are cast as `module.bfloat16()` and `module.half()` do; those
    are left out here, unless they are of the compute dtype already.
    """
    return bytes_by_name(
        (name, each)
        for name, each in model.kept()
        if compute is torch.float32 or isinstance(each, Packed) or each.dtype not in ORDINARY or each.dtype == compute
    )
