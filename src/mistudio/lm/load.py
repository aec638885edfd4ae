"""Hugging Face models and tokenizers from a name or a folder; what went wrong, in one sentence.

Weights are read from safetensors only, and no code of a model repository is run.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mistudio.errors import ModelError
from mistudio.lm.families import family_of
from mistudio.lm.shape import ModelShape, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO = Path(__file__).parent / "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_log = logging.getLogger(__name__)


def load_model(
    name: str, device: torch.device | str | None, dtype: torch.dtype | str | None, revision: str | None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model and tokenizer of a Hugging Face name or local folder; "demo" is the one in the package.

    ModelError: there is no such model or revision, it is damaged or of a family that is not supported, or it is gated.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device = _device(device)
    dtype = _dtype(dtype, device)
    source = _source(name, revision)
    if name == "demo" and not (DEMO / "model.safetensors").is_file():
        raise ModelError("This installation lacks the demo model's weights; reinstall mistudio, or name another model.")
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        family_of(config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        with _quiet_bar() if name == "demo" else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(
                source, revision=revision, dtype=dtype, use_safetensors=True, attn_implementation=attention_for(config)
            )
    except (OSError, ValueError) as error:
        raise ModelError(explain(name, error)) from error
    return model.to(device), tokenizer  # type: ignore[arg-type]  # transformers wraps `to` untyped


def _source(name: str, revision: str | None) -> str:
    """What transformers is to load. ModelError: a revision of something that has none."""
    if revision is not None and (name == "demo" or Path(name).is_dir()):
        what = "part of mistudio" if name == "demo" else "a folder on this machine"
        raise ModelError(f"{name} is {what} and has no revisions; leave revision = {revision} out.")
    return str(DEMO) if name == "demo" else name


@contextmanager
def _quiet_bar() -> Iterator[None]:
    """transformers' loading bar is off: the demo model is there at once."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def load_shape(name: str, revision: str | None) -> ModelShape:
    """The sizes of the model of that name, from its configuration alone: a few kilobytes are read, or downloaded.

    ModelError: as `load_model`.
    """
    from transformers import AutoConfig

    source = _source(name, revision)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(explain(name, error)) from error
    return shape_of(name, config)


def attention_for(config: Any) -> str | None:
    """`eager` where attention logits are soft-capped, which PyTorch's fused attention cannot do; else None: any."""
    capped = config.get_text_config().to_dict().get("attn_logit_softcapping")
    return None if capped is None else "eager"


def explain(name: str, error: BaseException) -> str:
    """One sentence for the user: the model is gated, does not exist, cannot be reached, or is damaged."""
    from huggingface_hub import errors as hub

    causes = _causes(error)
    if any(isinstance(cause, hub.GatedRepoError) for cause in causes):
        return f"{name} is gated: accept its licence at https://huggingface.co/{name}, then type `hf auth login`."
    if any(isinstance(cause, hub.RevisionNotFoundError) for cause in causes):
        return f"{name} exists, but not in the revision asked for; leave `revision` out to get the newest."
    if any(isinstance(cause, (hub.RepositoryNotFoundError, hub.HFValidationError)) for cause in causes):
        return (
            f"There is no model {name}: Hugging Face has none of that name (or it is private: `hf auth login`), "
            'and there is no such folder. "demo" is the model that comes with mistudio.'
        )
    if Path(name).is_dir() or name == "demo":
        return f"The folder {name} holds no model that can be loaded: {_first_line(error)}"
    if any(
        isinstance(cause, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError)) for cause in causes
    ):
        return (
            f"{name} is neither a folder nor in the local cache, and Hugging Face cannot be reached; connect to the "
            'network, or use "demo", the model that comes with mistudio.'
        )
    return f"{name} cannot be loaded: {_first_line(error)}"


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        _log.info("device: %s (chosen; set device to change it)", device)
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"There is no device {device!r}; try cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"The device {device} was asked for, but PyTorch sees no CUDA GPU here; use cpu.")
    return device


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        dtype = "float32" if device.type == "cpu" else "bfloat16"
        _log.info("dtype: %s (chosen for %s; set dtype to change it)", dtype, device.type)
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"There is no dtype {dtype!r}; the choices are {', '.join(DTYPES)}.")
    return DTYPES[dtype]
