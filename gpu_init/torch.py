"""Put the vectors of an artifact into the tables of a model.

`init_` fills one table, `init_model_` several tables of a model, named by dotted paths. A table is an `nn.Embedding`, a
parameter or a plain tensor, of any floating-point dtype and on any device. It is filled in place, block by block, so
that an artifact larger than memory stays on the disk. `requires_grad` and all random states stay as they are, so a
run from random tables and a run from filled tables differ in nothing else.

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gpu_init.artifact.read import Artifact, ModalityArrays
from gpu_init.errors import InputError
from gpu_init.ids import WHOLE_NUMBER, is_text

try:
    import torch
    from torch import nn
    from torch.utils.dlpack import from_dlpack
except ModuleNotFoundError:
    raise ImportError("torch is not installed, and gpu_init.torch needs it: pip install 'gpu-init[torch]'.") from None

if TYPE_CHECKING:
    from gpu_init.api import ModalityResult

BLOCK_BYTES = 64 << 20  # most bytes of vectors that are in memory at a time

_SIDES = ("users", "items")
_CHOICES = {"mode": ("replace", "add"), "cold": ("fill", "keep"), "columns": ("all", "first", "last")}
# A modality's name, which a weight and a star may precede.
_TERM = re.compile(r"(?:([0-9]+(?:\.[0-9]+)?)\*)?([^\W_][\w.-]*)")

Holder: TypeAlias = torch.Tensor | nn.Embedding | nn.EmbeddingBag
Step = str | Callable[[Any], Any]
Gain = float | str | None


@dataclass(frozen=True)
class Table:
    """What one table is filled with, and how.

    Parameters
    ----------
    modalities : str
        ``"image"`` is one modality; ``"image+audio"`` the mean of two; ``"0.3*image+0.7*audio"`` their weighted mean;
        ``"image,audio"`` puts them side by side. After ``"items:"`` these are vectors of the projected items,
        otherwise of the users.
    mode : {"replace", "add"}
        Whether vectors replace the table's rows or are added to them. Rows that are added to keep the differences that
        they had at random.
    gain : float, "match" or None
        None: vectors are written as they are. A number: all vectors are scaled by one factor, so that their mean row
        norm is this number times the table's mean row norm; ``"match"`` is 1. Both means are over the rows that are
        written and not cold.
    centre : bool
        Whether the mean of the rows that are not cold is subtracted from every vector. Features often share a large
        mean, and without its removal all vectors have nearly the same direction.
    cold : {"fill", "keep"}
        Whether the row of a cold user, or of an item without the modality, gets the artifact's vector for it or keeps
        its values. With several modalities, a row is cold if it is cold in all of them.
    via : path, callable, or sequence of them
        Transforms through which the vectors go before they are written, such as ``"v_gcn.MLP"``, with which the model
        itself brings features to its own width. Modules run in evaluation mode and without gradients.
    offset : int, "users" or None
        Row of the table that gets the first vector. ``"users"`` is the number of users, for a table that holds users
        and then items. None is 0, or 1 for an `nn.Embedding` whose row 0 is padding.
    rows : int array of shape (n,), optional
        Row of the artifact for each row ``offset + i`` of the table; -1 leaves that row as it is. `rows_of` makes it.
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
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: found {getattr(self, name)!r}; wanted is {' or '.join(choices)}.")
        is_number = isinstance(self.gain, int | float) and not isinstance(self.gain, bool)
        if self.gain not in (None, "match") and not (is_number and 0 < float(self.gain or 0) < math.inf):
            raise InputError(f"gain: found {self.gain!r}; wanted is a number above 0, 'match' or None.")
        if self.offset not in (None, "users") and not (isinstance(self.offset, int) and self.offset >= 0):
            raise InputError(f"offset: found {self.offset!r}; wanted is a row number, 'users' or None.")
        parse_modalities(self.modalities)


def init_(
    target: Holder,
    modality: ModalityArrays | ModalityResult,
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
        A dense table of a floating-point dtype. Rows beyond those of the artifact stay as they are.
    modality : ModalityArrays or ModalityResult
        Such as ``gpu_init.load("vectors")["image"]``.
    of : {"users", "items"}
        Whose vectors are taken; those of items need an artifact that was made with a projection.
    mode, gain, centre, cold, via, offset, rows, columns
        As in `Table`, but ``via`` takes callables only.

    Returns
    -------
    Tensor
        The table.

    Raises
    ------
    InputError
        Shapes do not fit, a padding row would be written to, an option is wrong, or the table's dtype cannot hold the
        vectors.
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
        Its tables may be modules, parameters or attributes that are plain tensors.
    artifact : Artifact or Result
        Modality name to its arrays.
    tables : mapping of str to str, Table, or a sequence of those
        Path of each table, and the modalities that it is filled with, such as ``{"user_embedding.weight":
        "image+audio"}``, or a `Table` with its options. A table that holds users and items gets a sequence of two.
    **options
        Fields of `Table` for entries that are texts.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    InputError
        As in `init_`, or a path does not lead to a table. Nothing has been written then, except where a dtype cannot
        hold the vectors.

    Examples
    --------
    >>> init_model_(model, gpu_init.load("vectors"), {"user_embedding.weight": "image+audio"}, mode="add", gain="match")
    """
    plans = []
    for path, given in tables.items():
        for one in [given] if isinstance(given, str | Table) else given:
            spec = one if isinstance(one, Table) else Table(one, **options)
            plans.append(_plan(path, _find(model, path), artifact, spec, model))
    for plan in plans:
        _write(plan)
    return model


def rows_of(artifact: Artifact, ids: Iterable[int | str], *, of: str = "users") -> NDArray[np.int64]:
    """Give the artifact's row of each id of another library's table, in the order of that table.

    Parameters
    ----------
    artifact : Artifact
        Opened by `gpu_init.load`.
    ids : iterable of int or str, length n
        Raw ids, such as RecBole's ``dataset.field2id_token["user_id"]``; numbers may be written as text.
    of : {"users", "items"}
        Whether these are ids of users or of items.

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
    index = pd.RangeIndex(artifact.manifest[of]["rows"]) if known is None else pd.Index(known)
    wanted = [one if isinstance(one, str) else str(int(one)) for one in ids]
    if is_text(str(index.dtype)):
        rows = index.get_indexer(pd.Index(wanted, dtype=index.dtype))
    else:
        whole = [re.fullmatch(WHOLE_NUMBER, one) is not None for one in wanted]
        numbers = [int(one) if is_whole else -1 for one, is_whole in zip(wanted, whole, strict=True)]
        rows = np.where(whole, index.get_indexer(pd.Index(numbers, dtype=np.int64)), -1)
    found: NDArray[np.int64] = np.asarray(rows, np.int64)
    if not (found >= 0).any():
        shown = ", ".join(repr(one) for one in wanted[:3])
        raise InputError(f"{artifact.path}: none of the {len(wanted)} ids ({shown}, ...) is one of its {of}.")
    return found


def parse_modalities(text: str) -> tuple[str, list[tuple[float, str]], bool]:
    """Read the `modalities` of a `Table`.

    Returns
    -------
    side : str
        ``"users"`` or ``"items"``.
    terms : list of (float, str)
        Weight and name of each modality. Weights of a mean sum to 1; those of modalities side by side are the factors
        that the text gives.
    side_by_side : bool
        Whether the modalities go side by side.

    Raises
    ------
    InputError
        The text is not of that form.
    """
    side, colon, rest = text.replace(" ", "").partition(":")
    if not colon:
        side, rest = "users", side
    side_by_side = "," in rest
    terms = [_TERM.fullmatch(term) for term in rest.split("," if side_by_side else "+")]
    if side not in _SIDES or not all(terms):
        raise InputError(
            f"modalities {text!r}: wanted is a name, names with + (their mean; 0.3*image+0.7*audio with weights)"
            " or with , (side by side), and items: before them for the items' vectors."
        )
    parts = [(float(term[1] or 1), term[2]) for term in terms if term]
    if min(weight for weight, _ in parts) <= 0:
        raise InputError(f"modalities {text!r}: a weight of 0 takes nothing from a modality; leave it out.")
    total = 1.0 if side_by_side else sum(weight for weight, _ in parts)
    return side, [(weight / total, name) for weight, name in parts], side_by_side


# Paths of a model.


def _look_up(model: nn.Module, path: str) -> Any:
    """Give what a dotted path leads to; AttributeError where it leads nowhere."""
    found: Any = model
    for part in path.split("."):
        found = found[part] if isinstance(found, Mapping) and part in found else getattr(found, part)
    return found


def _find(model: nn.Module, path: str) -> Holder:
    """Give the table at a path; for the weight of an embedding the embedding, which knows which row is padding."""
    owner_path, _, name = path.rpartition(".")
    try:
        found = _look_up(model, path)
        owner = _look_up(model, owner_path) if owner_path else model
    except AttributeError:
        problem = "is not there"
    else:
        if name == "weight" and isinstance(owner, nn.Embedding | nn.EmbeddingBag):
            return owner
        if isinstance(found, Holder):
            return found
        problem = f"is {type(found).__name__}"
    names = sorted(_tables(model))
    close = ", ".join(difflib.get_close_matches(path, names, 5, 0.4) or names[:10]) or "(it has none)"
    raise InputError(f"{type(model).__name__}.{path} {problem}; wanted is a table, such as {close}.")


def _tables(model: nn.Module) -> Iterator[str]:
    """Yield the paths of a model's tables of two dimensions: parameters and plain tensors."""
    for prefix, module in model.named_modules():
        for name, value in itertools.chain(module.named_parameters(recurse=False), vars(module).items()):
            if isinstance(value, torch.Tensor) and value.ndim == 2 and value.is_floating_point():
                yield f"{prefix}.{name}".lstrip(".")


def _transforms(via: Any, model: nn.Module | None) -> list[Callable[[Any], Any]]:
    """Give the callables of a table's ``via``, with paths looked up in the model."""
    transforms = []
    for step in [via] if isinstance(via, str) or callable(via) else via:
        found = step
        if isinstance(step, str) and model is not None:
            with suppress(AttributeError):
                found = _look_up(model, step)
        if not callable(found):
            raise InputError(f"via {step!r}: not a path of the model to something that can be called.")
        transforms.append(found)
    return transforms


# Vectors.


@dataclass(frozen=True)
class _Source:
    """Vectors of one or several modalities, combined and transformed, any rows at a time."""

    name: str  # what errors call these vectors
    parts: list[tuple[float, Any, Any]]  # weight, vectors (n, d), and labels or mask (n,)
    side_by_side: bool
    transforms: list[Callable[[Any], Any]]
    device: torch.device  # the table's

    def __len__(self) -> int:
        return int(self.parts[0][1].shape[0])

    @property
    def width(self) -> int:
        """Columns before the transforms."""
        widths = [int(array.shape[1]) for _, array, _ in self.parts]
        return sum(widths) if self.side_by_side else widths[0]

    def warm(self, rows: Any) -> torch.Tensor:
        """Mask (n,) of rows that are warm in any of the modalities."""
        marks = [_tensor(marks, rows) for _, _, marks in self.parts]
        return torch.stack([mark if mark.dtype == torch.bool else mark >= 0 for mark in marks]).any(dim=0)

    def block(self, rows: Any) -> torch.Tensor:
        """Transformed vectors (n, width) of some rows, float32, on the table's device."""
        parts = [weight * _tensor(array, rows).to(self.device, torch.float32) for weight, array, _ in self.parts]
        values = torch.cat(parts, dim=1) if self.side_by_side else torch.stack(parts).sum(dim=0)
        for transform in self.transforms:
            values = self._transformed(transform, values)
        return values.to(self.device, torch.float32)

    def _transformed(self, transform: Callable[[Any], Any], values: torch.Tensor) -> torch.Tensor:
        own = next(transform.parameters(), None) if isinstance(transform, nn.Module) else None
        try:
            return torch.as_tensor(transform(values if own is None else values.to(own.device, own.dtype)))
        except (RuntimeError, IndexError) as error:
            name = getattr(transform if own is None else type(transform), "__name__", "via")
            raise InputError(
                f"{self.name}: {name} does not take vectors of width {values.shape[-1]}"
                f" ({str(error).splitlines()[0][:120]})."
                " A transform of raw features needs an artifact made without dim."
            ) from None


def _tensor(array: Any, rows: Any) -> torch.Tensor:
    """Copy rows of an array to a tensor, as torch may write to memory that it shares, even if that is read-only."""
    if isinstance(array, np.ndarray):
        return torch.from_numpy(np.array(array[rows]))
    return torch.as_tensor(from_dlpack(array)[rows]).clone()


def _source(
    path: str, artifact: Mapping[str, Any], spec: Table, model: nn.Module | None, device: torch.device
) -> _Source:
    side, terms, side_by_side = parse_modalities(spec.modalities)
    parts: list[tuple[float, Any, Any]] = []
    for weight, name in terms:
        if name not in artifact:
            raise InputError(f"{path}: the artifact has no modality {name}; it has {', '.join(artifact)}.")
        modality = artifact[name]
        users = side == "users"
        array, marks = (modality.users, modality.labels) if users else (modality.items, modality.items_mask)
        if array is None:
            raise InputError(f"{path}: modality {name} has no projected items; make the artifact with dim.")
        parts.append((weight, array, marks))
    source = _Source(f"{path} from {spec.modalities}", parts, side_by_side, _transforms(spec.via, model), device)
    widths = sorted({int(array.shape[1]) for _, array, _ in parts})
    if len(widths) > 1 and not side_by_side:
        raise InputError(
            f"{source.name}: modalities of widths {', '.join(map(str, widths))} have no mean;"
            " make the artifact with dim, or put them side by side with a comma."
        )
    return source


# Writing.


@dataclass(frozen=True)
class _Plan:
    """One table, checked and ready to be written."""

    path: str
    table: torch.Tensor  # detached, and of the columns that are filled
    source: _Source
    spec: Table
    offset: int

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield rows of the table (n,), their vectors (n, width), and which of them are warm (n,)."""
        rows = self.spec.rows
        count = len(self.source) if rows is None else len(rows)
        step = max(1, BLOCK_BYTES // (4 * max(self.table.shape[1], self.source.width)))
        for start in range(0, count, step):
            stop = min(start + step, count)
            places = torch.arange(start, stop)
            taken: Any = slice(start, stop)
            if rows is not None:
                taken = np.asarray(rows[start:stop], np.int64)
                places, taken = places[torch.from_numpy(taken >= 0)], taken[taken >= 0]
            warm = self.source.warm(taken).cpu()
            values = self.source.block(taken)
            if self.spec.cold == "keep":
                places, values, warm = places[warm], values[warm.to(values.device)], warm[warm]
            if len(places):
                yield (places + self.offset).to(self.table.device), values, warm.to(values.device)


def _plan(path: str, target: Holder, artifact: Mapping[str, Any], spec: Table, model: nn.Module | None) -> _Plan:
    """Check everything that can be checked before a row is written."""
    table = target if isinstance(target, torch.Tensor) else target.weight
    if table.ndim != 2 or not table.is_floating_point() or table.layout != torch.strided or table.is_meta:
        raise InputError(
            f"{path}: {table.dtype} of shape {tuple(table.shape)} on {table.device}; wanted is a dense table of"
            " two dimensions and floating-point numbers."
        )
    source = _source(path, artifact, spec, model, table.device)
    padding = None if isinstance(target, torch.Tensor) else target.padding_idx
    if isinstance(spec.offset, int):
        offset = spec.offset
    elif spec.offset == "users":
        offset = int(next(iter(artifact.values())).users.shape[0])
    else:
        offset = 0 if spec.rows is not None else _default_offset(path, len(table), len(source), padding)
    _check_rows(path, table, source, spec, offset, padding)
    return _Plan(path, _columns(table.detach(), source, spec.columns), source, spec, offset)


def _default_offset(path: str, have: int, count: int, padding: int | None) -> int:
    if padding is None and have > count:
        warnings.warn(
            f"{path}: the table has {have:,} rows, the artifact {count:,}; the first {count:,} are filled."
            " Give offset=1 if row 0 is padding, or offset=0 to say that it is not.",
            UserWarning,
            stacklevel=4,
        )
    if padding is None or padding >= count:
        return 0
    if padding == 0:
        return 1
    raise InputError(f"{path}: row {padding} is padding, amid the rows; give rows, the artifact's row of each.")


def _check_rows(path: str, table: torch.Tensor, source: _Source, spec: Table, offset: int, padding: int | None) -> None:
    count, rows = len(source), spec.rows
    if rows is not None:
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise InputError(f"{path}: rows is {rows.dtype} of shape {rows.shape}; wanted are row numbers (n,).")
        if len(rows) and int(rows.max()) >= count:
            raise InputError(f"{path}: rows names row {int(rows.max())}; the artifact has {count:,}.")
    needed = offset + (count if rows is None else len(rows))
    if needed > len(table):
        raise InputError(
            f"{path}: a table of shape {tuple(table.shape)} has no room for the artifact's {count:,} rows of width"
            f" {source.width}{f' from row {offset} on' if offset else ''};"
            " were both made from the same users and items?"
        )
    if padding is not None and offset <= padding < needed and (rows is None or rows[padding - offset] >= 0):
        raise InputError(f"{path}: row {padding} is padding and would be filled; give another offset or rows.")


def _columns(table: torch.Tensor, source: _Source, columns: str) -> torch.Tensor:
    """Give the columns of a table that are filled; one row is transformed to learn how wide the vectors are."""
    with _evaluating(source.transforms):
        shape = tuple(source.block(slice(0, 1)).shape)
    have = table.shape[1]
    if len(shape) != 2 or shape[1] > have or (shape[1] < have and columns == "all"):
        raise InputError(
            f"{source.name}: the vectors are {shape[-1]} wide, the table {have};"
            f" make the artifact with dim {have}, or say which columns (first or last) are filled."
        )
    return table[:, have - shape[1] :] if columns == "last" else table[:, : shape[1]]


@contextmanager
def _evaluating(transforms: Iterable[Callable[[Any], Any]]) -> Iterator[None]:
    """Run modules in evaluation mode, in which they draw no random numbers, and without gradients."""
    modules = [part for one in transforms if isinstance(one, nn.Module) for part in one.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _write(plan: _Plan) -> None:
    table = plan.table
    with _evaluating(plan.source.transforms):
        mean = _mean(plan) if plan.spec.centre else 0.0
        factor = 1.0 if plan.spec.gain is None else _factor(plan, mean)
        for places, values, _ in plan.blocks():
            scaled = (values - mean) * factor
            stored = (table[places] + scaled if plan.spec.mode == "add" else scaled).to(table.dtype)
            finite = torch.isfinite(stored).all(dim=1)
            if not bool(finite.all()):
                raise InputError(
                    f"{plan.source.name}: row {int(places[~finite][0])} would not be finite in {table.dtype}; a gain"
                    " makes vectors shorter. Rows before it may be filled already."
                )
            table.index_copy_(0, places, stored)


def _mean(plan: _Plan) -> torch.Tensor:
    """Mean (width,) of the warm vectors, float32, summed in float64."""
    total = torch.zeros(plan.table.shape[1], dtype=torch.float64, device=plan.table.device)
    count = 0
    for _, values, warm in plan.blocks():
        total += values[warm].sum(dim=0, dtype=torch.float64)
        count += int(warm.sum())
    return (total / max(count, 1)).to(torch.float32)


def _factor(plan: _Plan, mean: torch.Tensor | float) -> float:
    """Factor by which the warm vectors' mean row norm becomes `gain` times that of the rows they are written to."""
    own = given = 0.0
    for places, values, warm in plan.blocks():
        given += float((values[warm] - mean).norm(dim=1).sum(dtype=torch.float64))
        own += float(plan.table[places[warm]].double().norm(dim=1).sum())
    if own <= 0 or given <= 0:
        which = "the table's rows are all zero" if own <= 0 else "the vectors are all zero"
        raise InputError(f"{plan.source.name}: {which}, so there is no norm to match; give gain=None.")
    return own / given * (1.0 if plan.spec.gain == "match" else float(plan.spec.gain or 1.0))
