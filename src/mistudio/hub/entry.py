"""One released Gemma Scope weight file, and everything that its place in a repository says about it.

A repository's id and the folder of the weights determine the model, the site, the layer, the width and the L0, and with
the model's widths also the shapes and the size of the file. So `parse` is the only description of the two layouts:

    google/gemma-scope-2b-pt-res    layer_20/width_16k/average_l0_71/params.npz                 Gemma Scope 1
    google/gemma-scope-2-1b-pt      resid_post/layer_13_width_16k_l0_medium/params.safetensors  Gemma Scope 2
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

ReleasedSite = Literal["res", "mlp", "att", "transcoder", "embedding"]
SITES: tuple[ReleasedSite, ...] = get_args(ReleasedSite)
L0_CLASSES = ("small", "medium", "big")
"""What the paths of Gemma Scope 2 say instead of a number: targets of about 10-20, 30-60 and 60-150."""

WIDTHS = {
    "4k": 2**12,
    "16k": 2**14,
    "32k": 2**15,
    "65k": 2**16,
    "131k": 2**17,
    "262k": 2**18,
    "524k": 2**19,
    "1m": 2**20,
}
OVERHEAD_BYTES = 8192
"""Room for what a file holds beside its arrays: zip directory and npy headers (1,240 B), or a safetensors header."""

_LABELS = {width: label for label, width in WIDTHS.items()}
_MODEL_WIDTHS = {  # (d_model, heads * head size)
    "gemma-2-2b": (2304, 8 * 256),
    "gemma-2-9b": (3584, 16 * 256),
    "gemma-2-27b": (4608, 32 * 128),
    "gemma-3-270m": (640, 4 * 256),
    "gemma-3-1b": (1152, 4 * 256),
    "gemma-3-4b": (2560, 8 * 256),
    "gemma-3-12b": (3840, 16 * 256),
    "gemma-3-27b": (5376, 32 * 128),
}
_SITE_NAMES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}
_REPO_SITES: dict[str, ReleasedSite] = {"res": "res", "mlp": "mlp", "att": "att", "transcoders": "transcoder"}
_FOLDERS: dict[str, ReleasedSite] = {
    "resid_post": "res",
    "mlp_out": "mlp",
    "attn_out": "att",
    "transcoder": "transcoder",
}

_REPO_1 = re.compile(r"google/gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")
_REPO_2 = re.compile(r"google/gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)")
_PATH_1 = re.compile(
    r"(?:layer_(?P<layer>0|[1-9]\d{0,4})|embedding)/width_(?P<width>[1-9]\d{0,4}[km])/average_l0_(?P<l0>0|[1-9]\d{0,4})",
    re.ASCII,
)
_PATH_2 = re.compile(
    r"(?P<folder>resid_post|mlp_out|attn_out|transcoder)(?:_all)?/layer_(?P<layer>0|[1-9]\d{0,4})"
    r"_width_(?P<width>[1-9]\d{0,4}[km])_l0_(?P<l0>small|medium|big)(?P<affine>_affine)?(?:_seed_\d{1,5})?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A released SAE or transcoder."""

    generation: int
    """1: Gemma Scope (Gemma 2); 2: Gemma Scope 2 (Gemma 3)."""
    repo_id: str
    """The repository on the hub."""
    path: str
    """The folder in it that holds the weights."""
    model: str
    """The hub id of the language model that it was trained on."""
    site: ReleasedSite
    """Where in the model, in Gemma Scope's word."""
    layer: int | None
    """The layer, counted from 0; None for the embedding."""
    width: int
    """Number of features F."""
    l0: int | None
    """Number of active features: the measured average that the path states (generation 1), or the target of training
    (generation 2); None where that is not known."""
    l0_class: str | None
    """small, medium or big; None in Gemma Scope 1."""
    canonical: bool
    """The one that its (model, site, layer, width) is known for: average L0 nearest 100. None in generation 2."""
    neuronpedia_id: str | None
    """The id of its dashboards on Neuronpedia; None where there are none."""
    affine: bool
    """A transcoder with a linear skip connection."""

    @property
    def width_label(self) -> str:
        """`16k` for 16,384."""
        return _LABELS[self.width]

    @property
    def d_model(self) -> int:
        """Width of the model's residual stream."""
        return _MODEL_WIDTHS[_family(self.model)][0]

    @property
    def d_in(self) -> int:
        """Width D of the activations it reads: d_model, but heads times head size at the attention site."""
        return _MODEL_WIDTHS[_family(self.model)][1] if self.site == "att" else self.d_model

    @property
    def d_out(self) -> int:
        """Width of what it reconstructs. Transcoders read and write d_model."""
        return self.d_in

    @property
    def bytes_expected(self) -> int:
        """Bytes of the float32 arrays W_enc, W_dec, b_enc, threshold, b_dec, and the skip matrix of an affine one.

        4·(2·D·F + 2·F + D) (+ 4·D·D). A whole file is longer by at most `OVERHEAD_BYTES`.
        """
        skip = self.d_in * self.d_out if self.affine else 0
        return 4 * (self.width * (self.d_in + self.d_out) + 2 * self.width + self.d_out + skip)

    @property
    def filename(self) -> str:
        """The weights' file in `path`."""
        return "params.npz" if self.generation == 1 else "params.safetensors"

    @property
    def hf_path(self) -> str:
        """`google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`."""
        return f"{self.repo_id}/{self.path}"

    @property
    def site_name(self) -> str | tuple[str, str] | None:
        """`layers.20.resid_post`; for a transcoder what it reads and what it writes; None for the embedding.

        The first generation's transcoders read the MLP's normalised input without the norm's gain (`ln2_normalized`),
        the second's with it (`mlp_in`).
        """
        if self.layer is None:
            return None
        if self.site == "transcoder":
            reads = "ln2_normalized" if self.generation == 1 else "mlp_in"
            return f"layers.{self.layer}.{reads}", f"layers.{self.layer}.mlp_out"
        return f"layers.{self.layer}.{_SITE_NAMES[self.site]}"

    def size_fits(self, file_bytes: int) -> bool:
        """Whether a file of that size can be this one, whole."""
        return self.bytes_expected <= file_bytes <= self.bytes_expected + OVERHEAD_BYTES


def parse(
    repo_id: str, path: str, *, canonical: bool = False, on_neuronpedia: bool = False, target_l0: int | None = None
) -> Entry | None:
    """The entry of a folder in a repository; None where the pair is not one of the two layouts above.

    `canonical`, `on_neuronpedia` and, in the second generation, `target_l0` are what a path cannot say.
    """
    repo = _parse_repo(repo_id)
    folder = None if repo is None else _parse_folder(path, repo[2])
    if repo is None or folder is None:
        return None
    generation, model, _ = repo
    site, layer, label, l0, l0_class, affine = folder
    page = None
    if on_neuronpedia:
        page = neuronpedia_id(model, site, layer, label, None if canonical or site == "transcoder" else l0)
    return Entry(
        generation=generation,
        repo_id=repo_id,
        path=path,
        model=model,
        site=site,
        layer=layer,
        width=WIDTHS[label],
        l0=l0 if generation == 1 else target_l0,
        l0_class=l0_class,
        canonical=canonical,
        neuronpedia_id=page,
        affine=affine,
    )


def neuronpedia_id(model: str, site: str, layer: int | None, width_label: str, l0: int | None = None) -> str:
    """`gemma-2-2b/20-gemmascope-res-16k`, or `…__l0-38` where an L0 is given: all but the canonical ones carry it."""
    scope = "gemmascope" if model.startswith("google/gemma-2-") else "gemmascope-2"
    suffix = "" if l0 is None else f"__l0-{l0}"
    return f"{neuronpedia_model(model)}/{layer}-{scope}-{site}-{width_label}{suffix}"


def neuronpedia_model(model: str) -> str:
    """Neuronpedia's name of a model: `gemma-2-2b`, `gemma-3-4b` for google/gemma-3-4b-pt, `gemma-3-4b-it`."""
    return model.removeprefix("google/").removesuffix("-pt")


_Folder = tuple[ReleasedSite, int | None, str, int | None, str | None, bool]
"""What a path says: site, layer, width as it is written there, L0, L0 class, affine."""


def _parse_folder(path: str, repo_site: ReleasedSite | None) -> _Folder | None:
    """`repo_site`: the site that the whole repository is about (first generation), or None (second)."""
    match = (_PATH_1 if repo_site else _PATH_2).fullmatch(path)
    if match is None or match["width"] not in WIDTHS:
        return None
    layer = None if match["layer"] is None else int(match["layer"])
    if repo_site is None:
        site, affine = _FOLDERS[match["folder"]], match["affine"] is not None
        return (site, layer, match["width"], None, match["l0"], affine) if site == "transcoder" or not affine else None
    if layer is None:
        return ("embedding", None, match["width"], int(match["l0"]), None, False) if repo_site == "res" else None
    return repo_site, layer, match["width"], int(match["l0"]), None, False


@cache
def _parse_repo(repo_id: str) -> tuple[int, str, ReleasedSite | None] | None:
    """Generation, model and site of a repository; those of the second generation hold every site."""
    if match := _REPO_1.fullmatch(repo_id):
        return 1, f"google/gemma-2-{match[1]}" + ("-it" if match[2] == "it" else ""), _REPO_SITES[match[3]]
    if match := _REPO_2.fullmatch(repo_id):
        bare = match[1] == "270m" and match[2] == "pt"  # the one pretrained Gemma 3 without -pt in its name
        return 2, f"google/gemma-3-{match[1]}" + ("" if bare else f"-{match[2]}"), None
    return None


@cache
def _family(model: str) -> str:
    """`gemma-2-9b` for google/gemma-2-9b-it."""
    return neuronpedia_model(model).removesuffix("-it")
