"""Small models of every type that transformers knows, each with an ordinary batch and a loss."""

from __future__ import annotations

import inspect
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from shrinking import ORDINARY, RECIPES, VOCABULARY, small_config
from torch import nn

ROWS, LENGTH = 2, 12
MOST_ELEMENTS = 12_000_000
"""A model with more is not small."""
ATTEMPT_SECONDS, TYPE_SECONDS = 15, 60
"""What one combination may take, and the search for one."""

Batch = dict[str, Any]

HEADS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "CTC", "MASKED_LM",
    "PRETRAINING", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION",
    "TIME_SERIES_PREDICTION", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "MASK_GENERATION", "BACKBONE",
)  # fmt: skip
WITH_LABELS = {
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ",
}  # fmt: skip


class Unbuildable(Exception):
    """No small model of the type runs in plain torch. The text has the last reason."""


def model_types() -> list[str]:
    """All types that transformers has a config for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def classes_of(config_class: type) -> list[tuple[str, type[nn.Module]]]:
    """The model classes for a config class: those with a head first, then the bare model."""
    from transformers.models.auto import modeling_auto

    found: list[tuple[str, type[nn.Module]]] = []
    for head in (*(f"MODEL_FOR_{each}_MAPPING" for each in HEADS), "MODEL_MAPPING"):
        mapping = getattr(modeling_auto, head)
        try:
            values = mapping[config_class]
        except (KeyError, ImportError, AttributeError):
            continue
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, type) and all(value is not known for _, known in found):
                found.append((head.removeprefix("MODEL_FOR_").removesuffix("_MAPPING"), value))
    return found


def loss_of(output: Any) -> torch.Tensor:
    """The model's own loss; else a fixed linear and quadratic form of every differentiable tensor in the output."""
    if isinstance(output, torch.Tensor) and output.dim() == 0:
        return output
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor) and loss.requires_grad and loss.numel() == 1:
        return loss.reshape(())
    parts = []
    for number, tensor in enumerate(_differentiable(output)):
        weights = torch.sin(torch.arange(tensor.numel(), dtype=torch.float32) + number).view(tensor.shape)
        values = tensor.float()
        # What a mask has set to an infinite or an extreme value says nothing.
        usable = torch.isfinite(values.detach()) & (values.detach().abs() < 1e6)
        values = torch.where(usable, values, torch.zeros(()))
        parts.append((values * weights).mean() + 0.1 * values.square().mean())
    if not parts:
        raise ValueError("no differentiable output")
    return torch.stack(parts).sum()


def _differentiable(tree: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        if tree.requires_grad and tree.is_floating_point() and tree.numel():
            yield tree
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _differentiable(each, depth + 1)
    elif isinstance(tree, list | tuple) and depth < 4:
        for each in tree:
            yield from _differentiable(each, depth + 1)


@contextmanager
def seconds(limit: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the time is over."""

    def over(*_: Any) -> None:
        raise TimeoutError(f"took longer than {limit} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Small:
    """One small model type: how to build it, and its batches."""

    model_type: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    what: str
    call: Callable[[Any, Batch], Any] = lambda model, batch: model(**batch)
    """Forward of a model or of an engine."""
    loss: Callable[[nn.Module, Any], torch.Tensor] = lambda model, output: loss_of(output)
    """From the module and what `call` has returned."""


def find(model_type: str) -> Small:
    """The first combination of config, class and batch that goes forward and backward in plain torch."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config_class = CONFIG_MAPPING[model_type]
    except Exception as error:
        raise Unbuildable(f"no config: {error}") from error
    classes = classes_of(config_class)
    if not classes:
        raise Unbuildable("no model class takes this config")
    reasons: list[str] = []
    begun = time.monotonic()
    for recipe in RECIPES:
        if time.monotonic() - begun > TYPE_SECONDS:
            reasons.append(f"nothing found in {TYPE_SECONDS} s")
            break
        try:
            small_config(config_class, recipe)
        except Exception as error:
            reasons.append(f"{recipe}: config: {type(error).__name__} {error}")
            continue
        for head, model_class in classes:
            try:
                with seconds(ATTEMPT_SECONDS):
                    return _attempt(model_type, config_class, recipe, head, model_class)
            except Exception as error:
                reasons.append(f"{recipe}: {model_class.__name__}: {type(error).__name__}: {_line(error)}")
    raise Unbuildable(" | ".join(dict.fromkeys(reasons)))


def _line(error: BaseException) -> str:
    return str(error).strip().replace("\n", " ")[:200]


def _attempt(model_type: str, config_class: type, recipe: str, head: str, model_class: type[nn.Module]) -> Small:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = model_class(small_config(config_class, recipe))
        model.train()
        return model

    with torch.device("meta"):
        size = sum(param.numel() for param in model_class(small_config(config_class, recipe)).parameters())
    if size > MOST_ELEMENTS:
        raise Unbuildable(f"{size / 1e6:.0f} M elements")
    if size == 0:
        raise Unbuildable("no parameters")
    model = build()
    first: Exception | None = None
    for names, layout in _input_choices(model, head):
        extra: dict[str, Any] = {"layout": layout}
        for _ in range(2):
            try:
                torch.manual_seed(0)
                batch = make_batch(model, names, 0, extra)
                loss = loss_of(model(**batch))
                if not torch.isfinite(loss):
                    raise ValueError(f"the loss is {loss.item()}")
                loss.backward()
                if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()):
                    raise ValueError("no gradient")
                return Small(
                    model_type,
                    build,
                    lambda seed, names=names, extra=extra: make_batch(model, names, seed, extra),
                    f"{model_class.__name__}({', '.join(names)}; {recipe}; {size / 1e3:.0f} k)",
                )
            except TimeoutError:
                raise
            except Exception as error:
                first = first or error
                model.zero_grad()
                wanted = _image_tokens(error)
                if wanted is None or "image_tokens" in extra:
                    break
                extra["image_tokens"] = wanted // ROWS
    assert first is not None
    raise first


def _image_tokens(error: Exception) -> int | None:
    """How many image tokens a model that counted them had expected."""
    found = re.search(r"features:? ?(\d+)|tokens: \d+, features (\d+)", str(error))
    return int(next(group for group in found.groups() if group)) if found and "oken" in str(error) else None


MAIN = (
    "input_ids", "pixel_values", "input_values", "input_features", "pixel_values_videos", "past_values",
    "inputs_embeds", "hidden_states", "input_embeds", "audio_values", "input_points", "bbox", "flattened_patches",
)  # fmt: skip
WITH_THEM = {
    "pixel_values": ("pixel_mask",),
    "past_values": ("past_time_features", "past_observed_mask", "future_values", "future_time_features"),
}


OF_SOUND = ("input_values", "input_features", "audio_values")
"""Inputs that types lay out differently: three ways are tried."""


def _input_choices(model: nn.Module, head: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Arguments of forward to try, and how sound lies in them, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    required = [
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]
    present = [name for name in MAIN if name in parameters]
    main = getattr(model, "main_input_name", None)
    both = [name for name in ("input_ids", "pixel_values") if name in parameters]
    choices: list[list[str]] = []
    if len(both) == 2:
        choices.append(both)
    if main in present:
        choices.append([main])
    if {"input_ids", "bbox"} <= set(present):
        choices.append(["input_ids", "bbox"])
    if "image_grid_thw" in parameters and "input_ids" not in parameters:
        choices.append(["pixel_values", "image_grid_thw"])
    choices += [[name] for name in present if name != main]
    choices += [[]]
    if len(present) >= 2:
        choices.append(present[:2])
    seen = set()
    for choice in choices:
        names = list(dict.fromkeys([*required, *choice]))
        with_decoder = [*names]
        if "decoder_input_ids" in parameters and "decoder_input_ids" not in names and "labels" not in required:
            with_decoder.append("decoder_input_ids")
        variants = [with_decoder, names] if with_decoder != names else [names]
        for variant in variants:
            for labels in (["labels"], []) if head in WITH_LABELS and "labels" in parameters else ([],):
                full = tuple(dict.fromkeys([*variant, *labels]))
                if full and full not in seen:
                    seen.add(full)
                    for layout in range(3 if any(name in full for name in OF_SOUND) else 1):
                        yield full, layout


EMBEDDED = ("inputs_embeds", "input_embeds", "hidden_states", "encoder_hidden_states", "decoder_inputs_embeds")
PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "backbone_config", "encoder_config")


def _of(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the attributes that the config, or one of its parts, has."""
    parts = [config]
    for part in (
        "text_config",
        "vision_config",
        "audio_config",
        "encoder",
        "decoder",
        "backbone_config",
        "encoder_config",
    ):
        value = getattr(config, part, None)
        if hasattr(value, "to_dict"):
            parts.append(value)
    for name in names:
        for part in parts:
            try:
                value = getattr(part, name, None)
            except Exception:
                continue
            if value is not None:
                return value
    return default


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        value = list(value.values())
    return (int(value[0]), int(value[-1])) if isinstance(value, list | tuple) else (int(value), int(value))


def make_batch(model: nn.Module, names: tuple[str, ...], seed: int, extra: dict[str, Any]) -> Batch:
    """Tensors for the named arguments of forward, by what each name means everywhere in transformers."""
    config = model.config
    generator = torch.Generator().manual_seed(1000 + seed)
    ordinary = min(ORDINARY.stop, int(_of(config, "vocab_size", default=VOCABULARY) or VOCABULARY))

    def tokens(rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
        return torch.randint(min(ORDINARY.start, ordinary // 2), ordinary, (rows, length), generator=generator)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    height, width = _pair(_of(config, "image_size", default=64))
    channels = _of(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    mels = _of(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feat_dim", default=80)
    frames = _of(config, "num_frames", default=4)
    layout = extra["layout"]
    batch: Batch = {}
    for name in names:
        if name in ("input_ids", "decoder_input_ids", "tgt_in", "question_ids", "input_tokens"):
            batch[name] = tokens()
            count = extra.get("image_tokens", 0)
            if name == "input_ids" and count:
                token = _of(config, "image_token_id", "image_token_index")
                images = torch.full((ROWS, count), int(token))
                batch[name] = torch.cat([batch[name][:, :4], images, batch[name][:, 4:]], 1)
        elif name == "labels":
            batch[name] = (batch.get("decoder_input_ids", batch.get("input_ids", tokens()))).clone()
        elif name in ("attention_mask", "pixel_mask", "decoder_attention_mask"):
            batch[name] = torch.ones(ROWS, LENGTH, dtype=torch.long)
        elif name in ("hidden_states", "pixel_values") and "grid_thw" in " ".join(names):
            patch, times = _of(config, "patch_size", default=8), _of(config, "temporal_patch_size", default=1)
            batch[name] = floats(ROWS * 16, channels * int(times) * int(patch) ** 2)
        elif name in ("pixel_values", "images", "pixel_values_1"):
            video = "Video" in type(model).__name__ or _of(config, "tubelet_size") is not None
            batch[name] = (
                floats(ROWS, frames, channels, height, width) if video else floats(ROWS, channels, height, width)
            )
        elif name == "pixel_values_videos":
            batch[name] = floats(ROWS, frames, channels, height, width)
        elif name in ("input_values", "audio_values", "waveform"):
            longest = int(_of(config, "max_length", default=64))
            batch[name] = floats(*((ROWS, 4000), (ROWS, 1, 4000), (ROWS, longest, mels))[layout])
        elif name == "input_features":
            batch[name] = floats(*((ROWS, mels, 64), (ROWS, 64, mels), (ROWS, mels, 256))[layout])
        elif name == "input_features_mask":
            batch[name] = torch.ones(ROWS, 256 if layout == 2 else 64, dtype=torch.bool)
        elif name == "input_points":
            batch[name] = 10 * floats(ROWS, 1, 2, 2).abs()
        elif name in ("grid_thw", "image_grid_thw"):
            batch[name] = torch.tensor([[1, 4, 4]] * ROWS)
        elif name == "query_embeds":
            batch[name] = floats(ROWS, 8, int(_of(config, "hidden_size", default=32)))
        elif name in EMBEDDED:
            batch[name] = floats(ROWS, LENGTH, int(_of(config, "hidden_size", "d_model", "n_embd", default=32)))
        elif name == "bbox":
            batch[name] = torch.tensor([1, 2, 30, 40]).expand(ROWS, LENGTH, 4).clone()
        elif name in ("past_values", "past_observed_mask", "future_values"):
            length = _of(config, "prediction_length" if "future" in name else "context_length", default=16)
            targets = _of(config, "num_input_channels", "input_size", default=1)
            lags = max(_of(config, "lags_sequence", default=[0]) or [0])
            length += lags if "future" not in name else 0
            shape = (
                (ROWS, length) if targets == 1 and "num_input_channels" not in dir(config) else (ROWS, length, targets)
            )
            batch[name] = torch.ones(shape) if "mask" in name else floats(*shape)
        elif name in ("past_time_features", "future_time_features"):
            length = _of(config, "prediction_length" if "future" in name else "context_length", default=16)
            length += max(_of(config, "lags_sequence", default=[0]) or [0]) if "future" not in name else 0
            batch[name] = floats(ROWS, length, max(1, int(_of(config, "num_time_features", default=1))))
        elif name == "return_loss":
            batch[name] = True
        else:
            raise ValueError(f"no idea what {name} is")
    return batch
