"""Hooks on a forward pass: read an activation, or put another in its place, at a module's input or output.

An edit is a function of the activation `h` [N, T, W]: it returns the tensor that takes the place of `h`, or None to
leave it. It must not change `h` in place, since a reader may hold the same memory; that is found out and refused.
Edits at one site run in the order in which their blocks were opened, each on what the one before returned. Hooks sit
on the model itself, so every forward pass inside the block is edited, whoever calls it; `LanguageModel` lets other
threads wait until the block ends.

An edit that depends on the token or its position reads both from a `Pass`: with the cache, h alone does not tell.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mistudio.errors import EditError
from mistudio.lm.families import Side
from mistudio.lm.site import Site

Edit = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Edits:
    """How many forward passes each edit of a block has seen so far."""

    fired: dict[Site, int]


def attach(module: nn.Module, side: Side, fn: Edit) -> RemovableHandle:
    """A handle whose `remove()` ends it: until then `fn` sees, and may replace, the module's first input or its output.

    A decoder layer's output is a tensor, or a tuple that begins with it, by the version of transformers.
    """

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = fn(args[0])
        return None if new is None else (new, *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            new = fn(output[0])
            return None if new is None else (new, *output[1:])
        return fn(output)

    return module.register_forward_pre_hook(before) if side == "input" else module.register_forward_hook(after)


class Pass:
    """What the forward pass now running is fed: `tokens` [N, T], the first of them at position `start` of its row."""

    tokens: Int[Tensor, "N T"]
    start: int


@contextmanager
def followed(model: nn.Module) -> Iterator[Pass]:
    """A `Pass` that is set anew at the start of every forward pass inside the block, and unset before the first."""
    now = Pass()

    def before(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        cache = options.get("past_key_values")
        now.tokens, now.start = args[0], 0 if cache is None else int(cache.get_seq_length())

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield now
    finally:
        handle.remove()


@contextmanager
def edited(points: Mapping[Site, tuple[nn.Module, Side]], edits: Mapping[Site, Edit]) -> Iterator[Edits]:
    """The counters of a block in which every `edits[site]` is applied at `points[site]`.

    EditError: an edit raised, returned something of another shape, dtype or device, changed its input in place, or
    had not fired when the block ended. The hooks are gone after the block, however it ends.
    """
    counters = Edits(dict.fromkeys(edits, 0))
    with ExitStack() as stack:
        for site, fn in edits.items():
            module, side = points[site]
            stack.callback(attach(module, side, _checked(site, fn, counters)).remove)
        yield counters
    idle = [str(site) for site, count in counters.fired.items() if count == 0]
    if idle:
        raise EditError(
            f"The edit at {', '.join(idle)} never fired: no forward pass inside the block reached it. "
            "A run that only reads stops at the last site it reads; ask for a later one, or for logits=True."
        )


def _checked(site: Site, fn: Edit, counters: Edits) -> Edit:
    def edit(h: Tensor) -> Tensor | None:
        version = _version(h)
        try:
            new = fn(h)
        except EditError:
            raise
        except Exception as error:  # an edit is the user's own code and may raise anything
            raise EditError(f"The edit at {site} raised {type(error).__name__}: {error}") from error
        counters.fired[site] += 1
        if _version(h) != version:
            raise EditError(f"The edit at {site} changed h in place; return a new tensor: h + v, not h += v.")
        if new is not None and (not isinstance(new, Tensor) or _kind(new) != _kind(h)):
            found = _kind(new) if isinstance(new, Tensor) else type(new).__name__
            raise EditError(f"The edit at {site} must return {_kind(h)} or None; it returned {found}.")
        return new

    return edit


def _kind(h: Tensor) -> str:
    return f"a tensor {list(h.shape)} of {h.dtype} on {h.device}"


def _version(h: Tensor) -> int:
    """PyTorch's count of in-place writes to `h`; tensors made in inference mode have none."""
    return 0 if h.is_inference() else h._version
