"""Pushes on the rows of a batch: every row its own steering, in as few operations as the rows have kinds of push.

Pushes at one site run in their order, each on what the one before left; sites run in the order of the forward pass, so
a later layer reads a residual that earlier ones have already changed. At each turn, rows whose pushes are alike but for
direction and number are one operation on [n, T, D].
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mistudio.errors import ConfigError, EditError
from mistudio.lm import Edit, Pass, Site
from mistudio.sae import SAE
from mistudio.steer.lab import Lab
from mistudio.steer.methods import METHODS, Method
from mistudio.steer.positions import Place, positions_mask
from mistudio.steer.push import Push

Pushes = tuple[Push, ...]
"""The steering of one row; none: the untouched model."""


Rows = Int[Tensor, " _n"] | None
"""Rows of the batch; None: all of them."""

Mask = Bool[Tensor, "_n _T"] | None
"""Positions of those rows; None: all of them."""


PENDING_BYTES = 1 << 25
"""Activations kept until their sizes are computed: of many passes at once, since each operation costs a small pass
as much as the whole edit."""


@dataclass
class Trace:
    """Where pushes acted, and how large they were against the residual; filled while forward passes run."""

    rows: int
    """Rows N of the batch."""

    _passes: dict[Site, list[tuple[int, Float[Tensor, "N T"]]]] = field(default_factory=dict)
    """Per site and forward pass: the position of its first column, and the sizes, nan where no push acted."""

    _pending: dict[Site, list[tuple[int, Tensor, Tensor, Tensor | None]]] = field(default_factory=dict)
    """The same before sizes are computed: position, h, h', and where a push acted (None: everywhere)."""

    def sites(self) -> list[Site]:
        """Where there were pushes."""
        return list({**self._passes, **self._pending})

    def note(self, site: Site, start: int, h: Tensor, new: Tensor, acted: Tensor | None) -> None:
        """A pass has changed h into new; neither may change afterwards."""
        waiting = self._pending.setdefault(site, [])
        waiting.append((start, h, new, acted))
        if len(waiting) * h.nbytes > PENDING_BYTES:
            self._settle(site)

    def sizes(self, site: Site) -> Float[Tensor, "N S"]:
        """‖h' - h‖/‖h‖ of each row and position, float32; nan where no push acted, and in rows without one."""
        self._settle(site)
        passes = self._passes.get(site, [])
        length = max((start + part.shape[1] for start, part in passes), default=0)
        sizes = torch.full((self.rows, length), torch.nan)
        for start, part in passes:
            sizes[:, start : start + part.shape[1]] = part
        return sizes

    def _settle(self, site: Site) -> None:
        waiting = self._pending.pop(site, [])
        if not waiting:
            return
        h = torch.cat([h for _, h, _, _ in waiting], dim=1)  # [N, S, D]
        new = torch.cat([new for _, _, new, _ in waiting], dim=1)
        ratio = ((new - h).float().norm(dim=-1) / h.float().norm(dim=-1)).cpu()
        parts = ratio.split([entry[1].shape[1] for entry in waiting], dim=1)
        for (start, _, _, acted), part in zip(waiting, parts, strict=True):
            known = part if acted is None else torch.where(acted.cpu(), part, torch.nan)
            self._passes.setdefault(site, []).append((start, known))


@contextmanager
def steered(lab: Lab, rows: Sequence[Pushes], prompt_lengths: Sequence[int], *, insist: bool = True) -> Iterator[Trace]:
    """A block in which row i of every forward pass is steered by `rows[i]`; its prompt has `prompt_lengths[i]` tokens.

    The value is filled as the passes run. Without any push the model is untouched. EditError: a push met none of its
    positions in any of its rows (unless `insist` is False), or as `LanguageModel.editing`. ConfigError, SAEError: as
    `Lab.check`.
    """
    if len(rows) != len(prompt_lengths):
        raise ConfigError(f"{len(rows)} rows, but {len(prompt_lengths)} prompt lengths.")
    plan = _plan(lab, rows)
    trace = Trace(rows=len(rows))
    lengths = torch.tensor(list(prompt_lengths), device=lab.lm.device)[:, None]
    with ExitStack() as stack:
        now = stack.enter_context(lab.lm.following())
        edits = {site: _edit(lab, site, steps, now, lengths, trace) for site, steps in plan.items()}
        if edits:
            stack.enter_context(lab.lm.editing(edits))
        yield trace
    for site, steps in plan.items():
        for step in steps:
            if insist and not step.reached:
                raise EditError(
                    f"A push at {site} on the positions {step.positions!r} met none of them: the text ended before. "
                    "The last token written is never fed back, so it cannot be steered."
                )


@dataclass
class _Step:
    """The pushes of one turn that are alike but for direction and number, of the rows `rows`."""

    method: Method
    positions: str
    rows: Int[Tensor, " n"]
    c: Float[Tensor, "n 1 1"]
    d: Float[Tensor, "n 1 D"]
    feature: Int[Tensor, " n"] | None
    when: tuple[Int[Tensor, " n"], Float[Tensor, "n 1"]] | None
    turned: Float[Tensor, "n 1 D"] | None
    sae: SAE | None
    reached: bool = False

    def __call__(self, h: Float[Tensor, "n T D"]) -> tuple[Float[Tensor, "n T D"], Bool[Tensor, "n T"] | None]:
        """(h', where the condition held), before positions are looked at; None: everywhere."""
        f = self.sae.encode(h) if self.sae is not None else None  # [n, T, F]
        new = self.method.apply(h, *self._terms(f))
        if self.turned is not None:
            new = h + (new - h).norm(dim=-1, keepdim=True) * self.turned.to(h)
        if self.when is None:
            return new, None
        assert f is not None
        return new, _column(f, self.when[0])[..., 0] > self.when[1]

    def _terms(self, f: Float[Tensor, "n T F"] | None) -> list[Tensor | SAE]:
        terms: list[Tensor | SAE] = [self.d] if self.method.unit is None else [self.c, self.d]
        if self.method.reads != "direction":
            assert f is not None
            assert self.feature is not None
            terms.append(_column(f, self.feature))
        if self.method.reads == "sae":
            assert self.sae is not None
            terms.append(self.sae)
        return terms


def _column(f: Float[Tensor, "n T F"], feature: Int[Tensor, " n"]) -> Float[Tensor, "n T 1"]:
    """Of row j the activation of `feature[j]`."""
    return f.gather(2, feature[:, None, None].expand(-1, f.shape[1], 1))


def _edit(lab: Lab, site: Site, steps: list[_Step], now: Pass, lengths: Int[Tensor, "N 1"], trace: Trace) -> Edit:
    special = torch.tensor(sorted({*lab.lm.special_ids, *lab.lm.tokenizer.all_special_ids}), device=lengths.device)

    def place() -> Place:
        position = torch.arange(now.start, now.start + now.tokens.shape[1], device=lengths.device)[None]
        return Place(position, lengths, torch.isin(now.tokens, special))

    def edit(h: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        if h.shape[0] != len(lengths):
            raise ConfigError(f"The pushes are for {len(lengths)} rows; the forward pass has {h.shape[0]}.")
        new, marks = h, list[tuple[Rows, Mask]]()
        for step in steps:
            wanted = None if step.positions == "all" else positions_mask(step.positions, place())
            rows = None if len(step.rows) == len(lengths) else step.rows
            new, mask = _applied(step, new, rows, wanted)
            marks.append((rows, mask))
        trace.note(site, now.start, h, new, _acted(marks, h))
        return new

    return edit


def _applied(
    step: _Step, h: Float[Tensor, "N T D"], rows: Rows, wanted: Bool[Tensor, "N T"] | None
) -> tuple[Float[Tensor, "N T D"], Mask]:
    """(h', where in its rows the step acted); rows None: all, mask None: everywhere."""
    part = h if rows is None else h[rows]
    if wanted is not None and rows is not None:
        wanted = wanted[rows]
    step.reached = step.reached or wanted is None or bool(wanted.any())
    changed, held = step(part)
    mask = wanted if held is None else held if wanted is None else wanted & held
    if mask is not None:
        changed = torch.where(mask[..., None], changed, part)
    return (changed if rows is None else h.index_copy(0, rows, changed)), mask


def _acted(marks: list[tuple[Rows, Mask]], h: Float[Tensor, "N T D"]) -> Bool[Tensor, "N T"] | None:
    """Where any step acted; None: everywhere."""
    if any(rows is None and mask is None for rows, mask in marks):
        return None
    acted = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
    for rows, mask in marks:
        where = slice(None) if rows is None else rows
        acted[where] = True if mask is None else acted[where] | mask
    return acted


def _plan(lab: Lab, rows: Sequence[Pushes]) -> dict[Site, list[_Step]]:
    """The operations at each site, in order."""
    turns: dict[Site, list[dict[tuple[object, ...], list[tuple[int, Push]]]]] = {}
    for row, pushes in enumerate(rows):
        taken: dict[Site, int] = {}
        for push in pushes:
            site = lab.site(push)
            turn = taken[site] = taken.get(site, -1) + 1
            levels = turns.setdefault(site, [])
            if turn == len(levels):
                levels.append({})
            kind = (push.method, push.positions, push.when is None, push.turned is None)
            levels[turn].setdefault(kind, []).append((row, push))
    return {site: [_step(lab, site, g) for level in levels for g in level.values()] for site, levels in turns.items()}


def _step(lab: Lab, site: Site, group: list[tuple[int, Push]]) -> _Step:
    pushes = [push for _, push in group]
    device = lab.lm.device
    method = METHODS[pushes[0].method]

    def indices(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=device)

    features = [push.feature for push in pushes if push.feature is not None]
    whens = [push.when for push in pushes if push.when is not None]
    seeds = [push.turned for push in pushes if push.turned is not None]
    when = None
    if whens:
        above = torch.tensor([w.above for w in whens], device=device)[:, None]
        when = (indices([w.feature for w in whens]), above)
    d = torch.stack([lab.direction(push) for push in pushes])[:, None]
    reads_sae = method.reads != "direction" or bool(whens)
    return _Step(
        method=method,
        positions=pushes[0].positions,
        rows=indices([row for row, _ in group]),
        c=torch.tensor([lab.number(push) for push in pushes], dtype=d.dtype, device=device)[:, None, None],
        d=d,
        feature=indices(features) if method.reads != "direction" else None,
        when=when,
        turned=torch.stack([random_direction(d.shape[-1], seed) for seed in seeds])[:, None].to(d) if seeds else None,
        sae=lab.sae(site) if reads_sae else None,
    )


def random_direction(width: int, seed: int) -> Float[Tensor, " D"]:
    """A unit vector, uniform on the sphere, float32; a function of (width, seed)."""
    v = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (v / v.norm()).float()
