"""Several SAEs from one stream: what a batch is, which part of it an SAE reads, and the step they take together.

A batch is a tensor x [B, D]; or a pair (x, y), what a transcoder reads and what it reconstructs; or, where SAEs of
several sites are trained together, a mapping site → [B, D], from which each SAE takes what its configuration names.

Nothing that SAEs share depends on who shares it: each ends with the bits of its run alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mistudio.errors import TrainError
from mistudio.mesh import Mesh
from mistudio.sae import Transcoder
from mistudio.sae.code import FeatureCode
from mistudio.train.config import TrainConfig
from mistudio.train.objectives import Trainable
from mistudio.train.state import TrainState
from mistudio.train.threads import leading

Batch = Tensor | tuple[Tensor, Tensor] | Mapping[str, Tensor]


@runtime_checkable
class Resumable(Protocol):
    """A source of batches that knows its place: `restore(state())` goes on with the batch after the last one taken."""

    def state(self) -> dict[str, Any]:
        """The place, as plain data for JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go to that place; called before the source is iterated."""


class BySite:
    """A feed of several sites (a store's `joint_feed`), whose tuples become mappings site → [B, D].

    The place it gives for one of its sites is the one that the store's feed of that site has, so that a run that began
    among others can go on alone.
    """

    def __init__(self, feed: Any, sites: Sequence[str]):
        """feed: yields a tuple with a batch for each of `sites`, and has `state` and `restore`."""
        self.feed, self.sites = feed, tuple(sites)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (dict(zip(self.sites, batches, strict=True)) for batches in self.feed)

    def state(self) -> dict[str, Any]:
        """The place in the feed."""
        return self.feed.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a place that `state` or `place` gave."""
        rest = {name: value for name, value in state.items() if name not in ("site", "sites")}
        self.feed.restore({"sites": list(self.sites), **rest})

    def place(self, sites: Sequence[str]) -> dict[str, Any]:
        """The place as the feed of these sites alone would give it."""
        rest = {name: value for name, value in self.state().items() if name != "sites"}
        return {"site": sites[0], **rest} if len(sites) == 1 else {"sites": list(sites), **rest}


def place_of(batches: object, sae: Trainable) -> dict[str, Any] | None:
    """Where the source of batches is, for the checkpoint of this SAE; None where it does not know."""
    if isinstance(batches, BySite):
        return batches.place(sites_of(sae))
    return batches.state() if isinstance(batches, Resumable) else None


def sites_of(sae: Trainable) -> tuple[str, ...]:
    """The site that an SAE reads, or the two of a transcoder: what it reads, what it writes. TrainError: it names
    none."""
    sites = (sae.config.hook_name, sae.config.hook_name_out) if isinstance(sae, Transcoder) else (sae.config.hook_name,)
    named = tuple(site for site in sites if site is not None)
    if len(named) < len(sites):
        raise TrainError("Batches come by site, and an SAE has none. Set hook_name (and hook_name_out) in its config.")
    return named


class Reader:
    """Takes an SAE's tensors out of batches, checked, in float32 and on its device; what SAEs share is moved once."""

    def __init__(self, cfg: TrainConfig, mesh: Mesh):
        self.rows = mesh.rows_here(cfg.batch_rows)
        self._batch: Batch | None = None
        self._moved: dict[tuple[int, torch.device], Tensor] = {}

    def read(self, batch: Batch, sae: Trainable) -> tuple[Tensor, ...]:
        """(x,) or (x, y) of this SAE. TrainError: the batch has another shape, or not its site."""
        if batch is not self._batch:
            self._batch, self._moved = batch, {}
        tensors = _pick(batch, sae)
        widths = (sae.d_in, sae.d_out) if isinstance(sae, Transcoder) else (sae.d_in,)
        if len(tensors) != len(widths):
            raise TrainError(
                f"A batch has {len(tensors)} tensors; expected {len(widths)}: x alone for an SAE, a pair (x, y) for a "
                "transcoder."
            )
        return tuple(self._move(t, width, sae.W_enc.device) for t, width in zip(tensors, widths, strict=True))

    def _move(self, tensor: Tensor, width: int, device: torch.device) -> Tensor:
        if tuple(tensor.shape) != (self.rows, width) or not tensor.is_floating_point():
            raise TrainError(
                f"A batch is {tensor.dtype} {list(tensor.shape)}; expected floating-point {[self.rows, width]} "
                "(batch_rows, d_model)."
            )
        key = (id(tensor), device)
        if key not in self._moved:
            self._moved[key] = tensor.to(device, torch.float32)
        return self._moved[key]


def _pick(batch: Batch, sae: Trainable) -> tuple[Tensor, ...]:
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, tuple):
        return batch
    missing = [site for site in sites_of(sae) if site not in batch]
    if missing:
        raise TrainError(f"The batches have the sites {', '.join(batch)}, and an SAE reads {missing[0]}.")
    return tuple(batch[site] for site in sites_of(sae))


def update_all(states: Sequence[TrainState], tensors: Sequence[tuple[Tensor, ...]]) -> None:
    """Every state takes a step on its tensors. Those on the same x look for their entries in one stacked product."""
    xs = [given[0].contiguous() for given in tensors]
    codes = _search_together(states, xs)
    for state, x, given, code in zip(states, xs, tensors, codes, strict=True):
        state.update(x, given[1] if len(given) > 1 else None, code)


def _search_together(states: Sequence[TrainState], xs: Sequence[Tensor]) -> list[FeatureCode | None]:
    """The entries of the states that share a search; None for the others, which look for their own."""
    codes: list[FeatureCode | None] = [None] * len(states)
    by_x: dict[int, list[int]] = {}
    for i, x in enumerate(xs):
        by_x.setdefault(x.data_ptr(), []).append(i)
    for same in by_x.values():
        sparse = {i: states[i].sparse for i in same if len(same) > 1 and states[i].takes_a_sparse_step(len(xs[i]))}
        asked = {i: step.question() for i, step in sparse.items() if step is not None}
        questions = {i: question for i, question in asked.items() if question is not None}
        if len(questions) > 1:
            from mistudio.train.screen import select_many  # needs numba

            screens, queries = zip(*questions.values(), strict=True)
            found = leading(select_many, screens, xs[same[0]], queries)
            for i, code in zip(questions, found, strict=True):
                codes[i] = code
    return codes
