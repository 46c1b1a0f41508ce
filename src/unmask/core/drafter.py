"""A drafter: low-rank adapters on a frozen base that act on noisy rows only (Uno 2609.04010, section 3).

Clean rows run the base's own arithmetic, bit for bit, so the AR model is unchanged; the masks have a trained
embedding outside the base's vocabulary. Knows modules and which rows of a pass are noisy; knows no pattern, no
cache and no file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from unmask.core.transfer import to_device
from unmask.limits import check_number, check_whole
from unmask.plain_numbers import plain_fields

HALF = (torch.bfloat16, torch.float16)
"""Types in which the small updates of adapters would be rounded away: these learn in float32 beside such weights."""


@dataclass(frozen=True)
class DrafterConfig:
    """rank and scale of W x + (scale / rank) B A x on noisy rows, and which linear maps have it.

    targets: "all" (every linear map of the layers), or endings of module names, separated by commas.
    mask_rows: embeddings of the mask, one for each place in a block, or one for all; none for noisy rows that read
    random tokens.
    """

    rank: int = 32
    scale: float = 64.0
    targets: str = "all"
    mask_rows: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)
        check_whole("drafter_rank", self.rank)
        check_number("drafter_scale", self.scale)
        if self.mask_rows < 0:
            raise ValueError(f"mask_rows {self.mask_rows} must be at least 0")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"drafter_scale {self.scale} must be positive")


class _NoisyRows:
    """Noisy rows of a pass, (batch, length) bool with some True, and their indices, known without reading a device."""

    def __init__(self, noisy: Tensor, device: torch.device) -> None:
        self.shape, self._noisy, self._device = noisy.shape, noisy, device
        self.mask = to_device(noisy, device)
        columns = noisy.all(0)
        self._first = int(columns.long().argmax())
        # The same suffix of every row, as in drafting, is a view; other rows need a gather.
        self._suffix = bool(columns[self._first :].all()) and bool((noisy == columns).all())
        self.everywhere = self._suffix and self._first == 0

    @cached_property
    def index(self) -> tuple[Tensor | slice, ...]:
        """Index of the noisy rows in (batch, length)."""
        if self._suffix:
            return slice(None), slice(self._first, None)
        return tuple(to_device(x, self._device) for x in self._noisy.nonzero(as_tuple=True))

    @cached_property
    def flat_index(self) -> tuple[Tensor]:
        """Index of the noisy rows in (batch * length): some layers flatten."""
        return (to_device(self._noisy.flatten().nonzero()[:, 0], self._device),)


class Drafter(nn.Module):
    """The trained part; hooks on `model` apply it inside `rows(noisy)` and nowhere else.

    maps: names of the linear maps that can be gated, all by default. tables: names of embeddings that ids index beside
    the input embedding, where masks have rows of their own too. `hf.drafters` measures both.
    """

    def __init__(
        self,
        model: Any,
        mask_token_id: int,
        config: DrafterConfig,
        maps: Collection[str] | None = None,
        tables: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.mask_token_id, self.config = mask_token_id, config
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self._noisy: _NoisyRows | None = None
        self._places: Tensor | None = None
        embedding = model.get_input_embeddings()
        self._handles: list[Any] = []
        self.tables = nn.ParameterDict()
        if config.mask_rows:
            self._add_masks(model, tables)
        generator = torch.Generator().manual_seed(0)
        for name, module in target_modules(model, config.targets, maps):
            out_features, in_features = shape_of(module)
            key = name.replace(".", "-")  # a parameter's name holds no dot
            down = torch.randn(config.rank, in_features, generator=generator) / in_features**0.5
            # A packed weight has another type than the rows that it is applied to, which is the embedding's.
            self.down[key] = nn.Parameter(down.to(embedding.weight))
            self.up[key] = nn.Parameter(torch.zeros(out_features, config.rank).to(embedding.weight))
            self._handles.append(module.register_forward_hook(self._adapt(name, key)))

    def _add_masks(self, model: Any, tables: Sequence[str]) -> None:
        """Embeddings of the masks, in the input embedding and in further tables."""
        embedding, number = model.get_input_embeddings(), self.config.mask_rows
        with torch.no_grad():  # the mean of outputs, not of weights: some models scale them
            ids = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)
            mean = embedding(ids[None])[0].float().mean(0).to(embedding.weight.dtype)
            self.masks = nn.Parameter(mean.repeat(number, 1))
        self._handles += [
            embedding.register_forward_pre_hook(self._hide_masks),
            embedding.register_forward_hook(self._embed_masks),
        ]
        for name in tables:
            table, key = model.get_submodule(name), name.replace(".", "-")
            self.tables[key] = nn.Parameter(_mean_row(table).repeat(number, 1))
            self._handles += [
                table.register_forward_pre_hook(self._hide_places),
                table.register_forward_hook(self._embed_places(key)),
            ]

    @contextmanager
    def rows(self, noisy: Tensor) -> Iterator[None]:
        """Within the context the adapters act on the rows of a pass where `noisy` (batch, length) is True."""
        before, noisy = self._noisy, noisy.cpu()  # on the host, where reading it does not wait
        self._noisy = _NoisyRows(noisy, next(self.parameters()).device) if bool(noisy.any()) else None
        try:
            yield
        finally:
            self._noisy = before

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    # Hooks look their parameters up when they are called: sharding them over ranks puts others in their place.

    def _adapt(self, name: str, key: str) -> Any:
        scale = self.config.scale / self.config.rank

        def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            noisy = self._noisy
            if noisy is None:
                return out
            x = args[0]
            down, up = self.down[key].to(x.dtype), self.up[key].to(x.dtype)  # the base may be in half precision
            if x.shape[:-1] not in (noisy.shape, (noisy.shape.numel(),)):
                raise ValueError(
                    f"drafter_targets: {name!r} gets {tuple(x.shape[:-1])} rows of a pass of {tuple(noisy.shape)}, "
                    "so noisy ones cannot be picked: leave it out (experts are routed)"
                )
            if noisy.everywhere or torch.compiler.is_compiling():  # compiled shapes do not depend on which rows
                added = out + linear(linear(x, down), up) * scale
                mask = noisy.mask.flatten() if x.ndim == 2 else noisy.mask
                return added if noisy.everywhere else torch.where(mask[..., None], added, out)
            index = noisy.flat_index if x.ndim == 2 else noisy.index
            out[index] += linear(linear(x[index], down), up) * scale  # in place: nothing else holds `out`
            return out

        return hook

    def _hide_masks(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self._places = None
        if self._noisy is None:
            return None
        places = args[0] - self.mask_token_id
        self._places = places.masked_fill((places < 0) | (places >= self.config.mask_rows), -1)
        return (args[0].masked_fill(self._places >= 0, 0), *args[1:])

    def _embed_masks(self, _module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self._places is None:
            return out
        rows = self.masks.to(out.dtype)[self._places.clamp_min(0)]
        return torch.where(self._places[..., None] >= 0, rows, out)

    # Further tables see ids after the input embedding has, perhaps with those hidden that it does not hold.

    def _hide_places(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self._places is None else (args[0].masked_fill(self._places >= 0, 0), *args[1:])

    def _embed_places(self, key: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if self._places is None:
                return out
            rows = self.tables[key].to(out.dtype)[self._places.clamp_min(0)]
            return torch.where(self._places[..., None] >= 0, rows, out)

        return hook


def linear_maps(model: Any) -> list[tuple[str, nn.Module]]:
    """Linear maps of the model; the head is never one."""
    head = model.get_output_embeddings()
    return [(name, module) for name, module in model.named_modules() if module is not head and is_linear_map(module)]


def target_modules(model: Any, targets: str, maps: Collection[str] | None = None) -> list[tuple[str, nn.Module]]:
    """Linear maps of the model whose names end in one of `targets`, of those in `maps` if that is given."""
    every = linear_maps(model)
    usable = [(name, module) for name, module in every if maps is None or name in maps]
    if not usable:
        raise ValueError(f"drafter_targets {targets!r}: {type(model).__name__} has no linear maps that can be adapted")
    if targets == "all":
        return usable
    endings = tuple(ending.strip() for ending in targets.split(","))
    for ending in endings:
        if ending and any(name.endswith(ending) for name, _ in usable):
            continue
        known = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name, _ in usable))
        reason = "is no linear map of this model"
        if ending and any(name.endswith(ending) for name, _ in every):
            reason = "does not run once on each token of a pass, and on these alone, so noisy ones cannot be picked"
        raise ValueError(f"drafter_targets {ending!r} {reason}: use 'all', or some of {known}")
    return [(name, module) for name, module in usable if name.endswith(endings)]


def _mean_row(table: nn.Embedding) -> Tensor:
    """The mean of what a table gives, which may be scaled; a part at a time, since such tables are wide."""
    with torch.no_grad():
        ids = torch.arange(table.weight.shape[0], device=table.weight.device)
        total = sum(table(part[None])[0].float().sum(0) for part in ids.split(1 << 12))
        return (total / len(ids)).to(table.weight.dtype)


def is_linear_map(module: Any) -> bool:
    """Whether a module multiplies by one matrix, which may be stored packed (quantised)."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    packed = all(isinstance(size, int) for size in sizes) and not list(module.children())
    return isinstance(module, nn.Linear) or packed or type(module).__name__ == "Conv1D"


def shape_of(module: Any) -> tuple[int, int]:
    """(out, in); GPT-2's Conv1D says neither, and stores its weight transposed."""
    if type(module).__name__ == "Conv1D":
        columns, rows = module.weight.shape
        return rows, columns
    return module.out_features, module.in_features
