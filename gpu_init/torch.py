"""Vectors of an artifact as the start of a model's tables.

`init_` fills one table, `init_model_` several of a model, named by dotted paths. A table is an `nn.Embedding`, a
parameter or a plain tensor, in any floating-point dtype and on any device. It is filled in place, block by block, so
that an artifact larger than memory stays on the disk; `requires_grad` and all random states stay as they are, so a
run from random tables and one from filled tables differ in nothing else.

Everything is checked before the first row is written. After a model has been filled, nothing may initialise it again:
call these functions last, just before the optimizer is made.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gpu_init.artifact.read import Artifact
from gpu_init.errors import InputError
from gpu_init.ids import WHOLE_NUMBER, is_text

try:
    import torch
    from torch import nn
    from torch.utils.dlpack import from_dlpack
except ModuleNotFoundError:
    raise ImportError("torch is not installed, and gpu_init.torch needs it: pip install 'gpu-init[torch]'.") from None

BLOCK_BYTES = 64 << 20  # of vectors in memory at a time

_MODES = ("replace", "add")
_COLDS = ("fill", "keep")
_COLUMNS = ("all", "first", "last")
_SIDES = ("users", "items")
_TERM = re.compile(r"(?:([0-9]+(?:\.[0-9]+)?)\*)?([^\W_][\w.-]*)")

Holder: TypeAlias = torch.Tensor | nn.Embedding | nn.EmbeddingBag
Step = str | Callable[[Any], Any]
Gain = float | str | None


class Modality(Protocol):
    """What is read of a modality: `artifact.ModalityArrays` and `method.ModalityResult` have it."""

    @property
    def users(self) -> Any:
        """Array of shape (U, d)."""

    @property
    def labels(self) -> Any:
        """Array of shape (U,); -1 for a cold user."""

    @property
    def items(self) -> Any:
        """Array of shape (I, d), or None without projection."""

    @property
    def items_mask(self) -> Any:
        """Array of shape (I,), bool, or None without projection."""


@dataclass(frozen=True)
class Table:
    """What one table is filled with, and how.

    Parameters
    ----------
    modalities : str
        ``"image"``; ``"image+audio"``, their mean; ``"0.3*image+0.7*audio"``, the mean with weights;
        ``"image,audio"``, side by side. With ``"items:"`` before it the projected items are taken, else the users.
    mode : {"replace", "add"}
        ``add``: to what the table holds, so that what tells two rows apart survives.
    gain : float, "match" or None
        None: vectors as they are. A number: one factor makes their mean row norm so many times the mean row norm
        that the table had; ``"match"`` is 1. Means over the rows that are written and not cold.
    centre : bool
        Take the mean of the rows that are not cold out of all rows: features share a large one, and without its
        removal all rows point one way.
    cold : {"fill", "keep"}
        What a cold user's row, or that of an item without the modality, gets: the artifact's vector for it, or
        nothing. A row that is warm in one of several modalities is warm.
    via : path, callable, or sequence of them
        What the vectors go through first, such as ``"v_gcn.MLP"``: the model's own way from the features' width to
        its own. Modules run in evaluation mode and without gradients.
    offset : int, "users" or None
        Row of the table that gets the first vector; ``"users"``: the number of users, where one table holds users
        and then items. None: 0, or 1 for an `nn.Embedding` whose row 0 is padding.
    rows : int array of shape (n,), optional
        For row ``offset + i`` of the table, the artifact's row; -1 leaves the row as it is. `rows_of` makes it.
    columns : {"all", "first", "last"}
        Which columns are filled, where the table is wider than the vectors.
    """

    modalities: str
    mode: str = "replace"
    gain: Gain = None
    centre: bool = False
    cold: str = "fill"
    via: Step | Sequence[Step] = ()
    offset: int | str | None = None
    rows: Any = None
    columns: str = "all"

    def __post_init__(self) -> None:
        for name, choices in (("mode", _MODES), ("cold", _COLDS), ("columns", _COLUMNS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: found {getattr(self, name)!r}; wanted is {' or '.join(choices)}.")
        wrong = isinstance(self.gain, bool) or not (
            self.gain in (None, "match")
            or (isinstance(self.gain, int | float) and math.isfinite(self.gain) and self.gain > 0)
        )
        if wrong:
            raise InputError(f"gain: found {self.gain!r}; wanted is a number above 0, 'match' or None.")
        if self.offset not in (None, "users") and not (isinstance(self.offset, int) and self.offset >= 0):
            raise InputError(f"offset: found {self.offset!r}; wanted is a row number, 'users' or None.")
        parse_modalities(self.modalities)


def init_(
    target: Holder,
    modality: Modality,
    *,
    of: str = "users",
    mode: str = "replace",
    gain: Gain = None,
    centre: bool = False,
    cold: str = "fill",
    via: Callable[[Any], Any] | Sequence[Callable[[Any], Any]] = (),
    offset: int | str | None = None,
    rows: Any = None,
    columns: str = "all",
) -> torch.Tensor:
    """Fill a table in place with the vectors of one modality.

    Parameters
    ----------
    target : nn.Embedding, Parameter or Tensor, shape (n, width)
        Dense, of a floating-point dtype. Rows beyond those of the artifact stay as they are.
    modality : ModalityArrays or ModalityResult
        Such as ``gpu_init.load("vectors")["image"]``.
    of : {"users", "items"}
        Which vectors; items need an artifact made with a projection.
    mode, gain, centre, cold, via, offset, rows, columns
        As in `Table`; ``via`` takes callables here.

    Returns
    -------
    Tensor
        The table.

    Raises
    ------
    InputError
        Shapes that do not fit, a padding row that would be written to, options that are wrong, or vectors that the
        dtype cannot hold.
    """
    if of not in _SIDES:
        raise InputError(f"of: found {of!r}; wanted is users or items.")
    spec = Table(f"{of}:vectors", mode, gain, centre, cold, via, offset, rows, columns)
    plan = _plan("the table", target, {"vectors": modality}, spec, None)
    _write(plan)
    return plan.table


def init_model_(
    model: nn.Module,
    artifact: Mapping[str, Any],
    tables: Mapping[str, str | Table | Sequence[str | Table]],
    **options: Any,
) -> nn.Module:
    """Fill tables of a model in place, each named by its dotted path.

    Parameters
    ----------
    model : nn.Module
        Attributes that are plain tensors are found as well as parameters and modules.
    artifact : Artifact or Result
        Modality name to its arrays.
    tables : mapping of str to str, Table, or a sequence of those
        What each table gets: ``{"user_embedding.weight": "image+audio"}``, or a `Table` where more is to be said;
        several, where one tensor holds users and items.
    **options
        Fields of `Table` for the entries that are text.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    InputError
        As in `init_`, or a path that leads nowhere. Nothing has been written then, but for vectors that the dtype
        cannot hold.

    Examples
    --------
    >>> init_model_(model, gpu_init.load("vectors"), {"user_embedding.weight": "image+audio"}, mode="add", gain="match")
    """
    plans = [
        _plan(path, _find(model, path), artifact, spec, model)
        for path, given in tables.items()
        for spec in _specs(given, options)
    ]
    for plan in plans:
        _write(plan)
    return model


def rows_of(artifact: Artifact, ids: Iterable[int | str], *, of: str = "users") -> NDArray[np.int64]:
    """Give the artifact's row of each id that another library's table has, in the order of that table.

    Parameters
    ----------
    artifact : Artifact
        Opened by `gpu_init.load`.
    ids : iterable of int or str, length n
        Raw ids, such as RecBole's ``dataset.field2id_token["user_id"]``; numbers may be written as text.
    of : {"users", "items"}
        Whose ids they are.

    Returns
    -------
    ndarray of shape (n,), int64
        For `Table.rows`; -1 for an id that the artifact does not have, such as ``"[PAD]"``.

    Raises
    ------
    InputError
        None of the ids is known.
    """
    known = artifact.user_ids if of == "users" else artifact.item_ids
    wanted = [one if isinstance(one, str) else str(int(one)) for one in ids]
    if known is not None and is_text(str(known.dtype)):
        rows = pd.Index(known).get_indexer(pd.Index(wanted, dtype=known.dtype))
    else:
        whole = [re.fullmatch(WHOLE_NUMBER, one) is not None for one in wanted]
        numbers = np.array([int(one) if fits else -1 for one, fits in zip(wanted, whole, strict=True)], np.int64)
        count = artifact.manifest[of]["rows"]
        if known is None:
            rows = np.where((numbers >= 0) & (numbers < count), numbers, -1)
        else:
            rows = np.where(whole, pd.Index(known).get_indexer(pd.Index(numbers)), -1)
    found: NDArray[np.int64] = np.asarray(rows, np.int64)
    if not (found >= 0).any():
        shown = ", ".join(repr(one) for one in wanted[:3])
        raise InputError(f"{artifact.path}: none of the {len(wanted)} ids ({shown}, ...) is one of its {of}.")
    return found


def parse_modalities(text: str) -> tuple[str, list[tuple[float, str]], bool]:
    """Read ``"image+audio"`` and its like: side, weights and names, and whether they go side by side.

    Weights of a mean are made to sum to 1; those of parts side by side are factors, as they are.

    Raises
    ------
    InputError
        It is not of that form.
    """
    side, colon, rest = text.replace(" ", "").partition(":")
    if not colon:
        side, rest = "users", side
    beside = "," in rest
    terms = [_TERM.fullmatch(term) for term in rest.split("," if beside else "+")]
    if side not in _SIDES or not all(terms):
        raise InputError(
            f"modalities {text!r}: wanted is a name, names with + (their mean; 0.3*image+0.7*audio with weights)"
            " or with , (side by side), and items: before them for the items' vectors."
        )
    parts = [(float(term[1] or 1), term[2]) for term in terms if term]
    total = 1.0 if beside else sum(weight for weight, _ in parts)
    if min(weight for weight, _ in parts) <= 0:
        raise InputError(f"modalities {text!r}: a weight of 0 takes nothing from a modality; leave it out.")
    return side, [(weight / total, name) for weight, name in parts], beside


# Where to.


def _specs(given: str | Table | Sequence[str | Table], options: Mapping[str, Any]) -> Iterator[Table]:
    for one in [given] if isinstance(given, str | Table) else given:
        yield one if isinstance(one, Table) else Table(one, **options)


def _find(model: nn.Module, path: str) -> Holder:
    """Table at a dotted path: the embedding for its weight too, since it knows which row is padding."""
    parts = path.split(".")
    found = [model, *_walk(model, parts)]
    if len(found) == len(parts) + 1:
        if parts[-1] == "weight" and isinstance(found[-2], nn.Embedding | nn.EmbeddingBag):
            return found[-2]
        if isinstance(found[-1], torch.Tensor | nn.Embedding | nn.EmbeddingBag):
            return found[-1]
    names = sorted(_tables(model))
    close = difflib.get_close_matches(path, names, 5, 0.4) or names[:10]
    what = f"is {type(found[-1]).__name__}" if len(found) == len(parts) + 1 else "is not there"
    raise InputError(
        f"{type(model).__name__}.{path} {what}; wanted is a table, such as {', '.join(close) or '(it has none)'}."
    )


def _walk(model: nn.Module, parts: Sequence[str]) -> Iterator[Any]:
    """Yield what each part of a path leads to, as far as it does."""
    here: Any = model
    for part in parts:
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif hasattr(here, part):
            here = getattr(here, part)
        else:
            return
        yield here


def _tables(model: nn.Module) -> Iterator[str]:
    """Paths of a model's tables of two dimensions: parameters, buffers and plain tensors."""
    for prefix, module in model.named_modules():
        for name, value in itertools.chain(module.named_parameters(recurse=False), vars(module).items()):
            if isinstance(value, torch.Tensor) and value.ndim == 2 and value.is_floating_point():
                yield f"{prefix}.{name}".lstrip(".")


def _steps(via: Any, model: nn.Module | None) -> list[Callable[[Any], Any]]:
    """What vectors go through, paths looked up."""
    steps = [via] if isinstance(via, str) or callable(via) else list(via)
    for position, step in enumerate(steps):
        if isinstance(step, str) and model is not None:
            found = list(_walk(model, step.split(".")))
            steps[position] = found[-1] if len(found) == step.count(".") + 1 else None
        if not callable(steps[position]):
            raise InputError(f"via {step!r}: not a path of the model to something that can be called.")
    return steps


# What.


@dataclass
class _Vectors:
    """Vectors of one or several modalities, made into one and taken through the model, any rows at a time."""

    parts: list[tuple[float, Any, Any]]  # weight, array (n, d), labels or mask (n,)
    beside: bool
    steps: list[Callable[[Any], Any]]
    device: torch.device
    what: str

    def __len__(self) -> int:
        return int(self.parts[0][1].shape[0])

    @property
    def source_width(self) -> int:
        widths = [int(array.shape[1]) for _, array, _ in self.parts]
        return sum(widths) if self.beside else widths[0]

    def warm(self, rows: Any) -> torch.Tensor:
        """Mask (n,) of rows that are warm in any of the modalities."""
        marks = [_tensor(marks, rows) for _, _, marks in self.parts]
        return torch.stack([mark if mark.dtype == torch.bool else mark >= 0 for mark in marks]).any(dim=0)

    def block(self, rows: Any) -> torch.Tensor:
        """Rows (n, width) float32, on the table's device."""
        parts = [weight * _tensor(array, rows).to(self.device, torch.float32) for weight, array, _ in self.parts]
        values = torch.cat(parts, dim=1) if self.beside else torch.stack(parts).sum(dim=0)
        for step in self.steps:
            values = _through(step, values, self.what)
        return values.to(self.device, torch.float32)


def _tensor(array: Any, rows: Any) -> torch.Tensor:
    """Rows of an array as a tensor of its own: torch may write through what it shares with a read-only map."""
    if isinstance(array, np.ndarray):
        return torch.from_numpy(np.array(array[rows]))
    return torch.as_tensor(from_dlpack(array)[rows]).clone()


def _through(step: Callable[[Any], Any], values: torch.Tensor, what: str) -> torch.Tensor:
    own = next(step.parameters(), None) if isinstance(step, nn.Module) else None
    try:
        return torch.as_tensor(step(values if own is None else values.to(own.device, own.dtype)))
    except (RuntimeError, IndexError) as error:
        name = type(step).__name__ if isinstance(step, nn.Module) else getattr(step, "__name__", "via")
        raise InputError(
            f"{what}: {name} does not take vectors of width {values.shape[-1]} ({str(error).splitlines()[0][:120]})."
            " A transform of raw features needs an artifact made without dim."
        ) from None


def _vectors(
    path: str, artifact: Mapping[str, Any], spec: Table, steps: list[Callable[[Any], Any]], device: torch.device
) -> _Vectors:
    side, terms, beside = parse_modalities(spec.modalities)
    parts: list[tuple[float, Any, Any]] = []
    for weight, name in terms:
        if name not in artifact:
            raise InputError(f"{path}: the artifact has no modality {name}; it has {', '.join(artifact)}.")
        modality = artifact[name]
        array = modality.users if side == "users" else modality.items
        if array is None:
            raise InputError(f"{path}: modality {name} has no projected items; make the artifact with dim.")
        parts.append((weight, array, modality.labels if side == "users" else modality.items_mask))
    what = f"{path} from {spec.modalities}"
    widths = {int(array.shape[1]) for _, array, _ in parts}
    if len(widths) > 1 and not beside:
        raise InputError(
            f"{what}: modalities of widths {', '.join(map(str, sorted(widths)))} have no mean;"
            " make the artifact with dim, or put them side by side with a comma."
        )
    return _Vectors(parts, beside, steps, device, what)


# How.


@dataclass
class _Plan:
    """One table, checked and ready to be written."""

    path: str
    table: torch.Tensor  # detached; the columns that are filled
    vectors: _Vectors
    spec: Table
    offset: int
    modules: list[nn.Module] = field(default_factory=list)

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield rows of the table (n,), the vectors that they get (n, width), and which of them are warm (n,)."""
        rows = self.spec.rows
        count = len(self.vectors) if rows is None else len(rows)
        widest = max(self.table.shape[1], self.vectors.source_width)
        step = max(1, BLOCK_BYTES // (4 * widest))
        for start in range(0, count, step):
            stop = min(start + step, count)
            places = torch.arange(start, stop)
            taken: Any = slice(start, stop)
            if rows is not None:
                taken = np.asarray(rows[start:stop], np.int64)
                places, taken = places[torch.from_numpy(taken >= 0)], taken[taken >= 0]
            warm = self.vectors.warm(taken).cpu()
            values = self.vectors.block(taken)
            if self.spec.cold == "keep":
                places, values, warm = places[warm], values[warm.to(values.device)], warm[warm]
            if len(places):
                yield (places + self.offset).to(self.table.device), values, warm.to(values.device)


def _plan(path: str, target: Holder, artifact: Mapping[str, Any], spec: Table, model: nn.Module | None) -> _Plan:
    """Check everything that can be checked before a row is written."""
    weight = target if isinstance(target, torch.Tensor) else target.weight
    if weight.ndim != 2 or not weight.is_floating_point() or weight.layout != torch.strided or weight.is_meta:
        raise InputError(
            f"{path}: {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}; wanted is a dense table of"
            " two dimensions and floating-point numbers."
        )
    steps = _steps(spec.via, model)
    vectors = _vectors(path, artifact, spec, steps, weight.device)
    modules = [step for step in steps if isinstance(step, nn.Module)]
    padding = None if isinstance(target, torch.Tensor) else target.padding_idx
    plan = _Plan(path, weight.detach(), vectors, spec, _offset(path, weight, padding, vectors, artifact, spec), modules)
    _check_rows(plan, padding)
    plan.table = _columns(plan)
    return plan


def _offset(
    path: str,
    weight: torch.Tensor,
    padding: int | None,
    vectors: _Vectors,
    artifact: Mapping[str, Any],
    spec: Table,
) -> int:
    if isinstance(spec.offset, int):
        return spec.offset
    if spec.offset == "users":
        return int(next(iter(artifact.values())).users.shape[0])
    if spec.rows is not None:
        return 0
    if padding is None and weight.shape[0] > len(vectors):
        warnings.warn(
            f"{path}: the table has {weight.shape[0]:,} rows, the artifact {len(vectors):,}; the first"
            f" {len(vectors):,} are filled. Give offset=1 if row 0 is padding, or offset=0 to say that it is not.",
            UserWarning,
            stacklevel=4,
        )
    if padding is None or padding >= len(vectors):
        return 0
    if padding == 0:
        return 1
    raise InputError(f"{path}: row {padding} is padding, amid the rows; give rows, the artifact's row of each.")


def _check_rows(plan: _Plan, padding: int | None) -> None:
    have, count, rows = plan.table.shape[0], len(plan.vectors), plan.spec.rows
    if rows is not None:
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise InputError(f"{plan.path}: rows is {rows.dtype} of shape {rows.shape}; wanted are row numbers (n,).")
        if len(rows) and int(rows.max()) >= count:
            raise InputError(f"{plan.path}: rows names row {int(rows.max())}; the artifact has {count:,}.")
    needed = plan.offset + (count if rows is None else len(rows))
    if needed > have:
        source = f"{count:,} rows of width {plan.vectors.source_width}"
        raise InputError(
            f"{plan.path}: a table of shape {tuple(plan.table.shape)} has no room for the artifact's {source}"
            + (f" from row {plan.offset} on" if plan.offset else "")
            + "; were both made from the same users and items?"
        )
    if padding is not None and plan.offset <= padding < needed and (rows is None or rows[padding - plan.offset] >= 0):
        raise InputError(f"{plan.path}: row {padding} is padding and would be filled; give another offset or rows.")


def _columns(plan: _Plan) -> torch.Tensor:
    """Columns of the table that are filled; one row is taken through the model to learn how many."""
    with _quiet(plan.modules):
        shape = tuple(plan.vectors.block(slice(0, 1)).shape)
    have, columns = plan.table.shape[1], plan.spec.columns
    if len(shape) != 2 or shape[1] > have or (shape[1] < have and columns == "all"):
        raise InputError(
            f"{plan.vectors.what}: the vectors are {shape[-1]} wide, the table {have};"
            f" make the artifact with dim {have}, or say which columns (first or last) are filled."
        )
    return plan.table[:, have - shape[1] :] if columns == "last" else plan.table[:, : shape[1]]


@contextmanager
def _quiet(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run without gradients and in evaluation mode, so that no random numbers are drawn; put modes back after."""
    every = [part for module in modules for part in module.modules()]
    modes = [part.training for part in every]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        try:
            for part in every:
                part.training = False
            yield
        finally:
            for part, mode in zip(every, modes, strict=True):
                part.training = mode


def _write(plan: _Plan) -> None:
    with _quiet(plan.modules):
        mean = _mean(plan) if plan.spec.centre else None
        factor = _factor(plan, mean) if plan.spec.gain is not None else None
        for places, values, _ in plan.blocks():
            shifted = values if mean is None else values - mean
            scaled = shifted if factor is None else shifted * factor
            result = plan.table[places] + scaled if plan.spec.mode == "add" else scaled
            stored = result.to(plan.table.dtype)
            if not bool(torch.isfinite(stored).all()):
                row = int(places[~torch.isfinite(stored).all(dim=1)][0])
                raise InputError(
                    f"{plan.vectors.what}: row {row} would not be finite in {plan.table.dtype}; a gain makes vectors"
                    " shorter. Rows before it may be filled already."
                )
            plan.table.index_copy_(0, places, stored)


def _mean(plan: _Plan) -> torch.Tensor:
    """Mean (width,) of the warm rows, summed in float64."""
    total = torch.zeros(plan.table.shape[1], dtype=torch.float64, device=plan.table.device)
    count = 0
    for _, values, warm in plan.blocks():
        total += values[warm].sum(dim=0, dtype=torch.float64)
        count += int(warm.sum())
    return (total / max(count, 1)).to(torch.float32)


def _factor(plan: _Plan, mean: torch.Tensor | None) -> float:
    """Factor that gives the warm vectors `gain` times the mean row norm that their rows of the table have."""
    own = given = 0.0
    for places, values, warm in plan.blocks():
        shifted = values[warm] if mean is None else values[warm] - mean
        given += float(shifted.norm(dim=1).sum(dtype=torch.float64))
        own += float(plan.table[places[warm.to(places.device)]].double().norm(dim=1).sum())
    if own <= 0 or given <= 0:
        which = "the table's rows are all zero" if own <= 0 else "the vectors are all zero"
        raise InputError(f"{plan.vectors.what}: {which}, so there is no norm to match; give gain=None.")
    return own / given * (1.0 if plan.spec.gain == "match" else float(plan.spec.gain or 1.0))
