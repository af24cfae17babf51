"""Which entries survive, on disk: a bit per entry or block, a combination's index per n:m group, column indices, whole
rows and columns, or an entropy-coded bit per entry."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb, log2
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights import entropy
from laconic.weights.blocks import Blocks
from laconic.weights.codes import dense_bytes, pack_dense, unpack_dense

Pattern = str | tuple[int, int] | Blocks
"""'unstructured', 'n:m' with n kept of every m neighbouring columns, or blocks kept or dropped whole: (rows, columns)
that tile the matrix, or any `Blocks` of the tensor the matrix is a view of."""


def n_of_m(pattern: Pattern) -> tuple[int, int] | None:
    """(n, m) of an 'n:m' pattern, else None. Raises: SchemeError for a string that is neither that nor
    'unstructured'."""
    if not isinstance(pattern, str) or pattern == "unstructured":
        return None
    n, colon, m = pattern.partition(":")
    if not (colon and n.isdigit() and m.isdigit() and 0 < int(n) < int(m) <= 16):
        raise SchemeError(
            f"pattern must be 'unstructured', 'n:m' with n < m <= 16, or a block (rows, columns), got {pattern!r}"
        )
    return int(n), int(m)


def check_pattern(pattern: Pattern, shape: tuple[int, int]) -> None:
    """Raises SchemeError unless the pattern tiles a matrix of this shape."""
    if isinstance(pattern, Blocks):
        if not pattern.fits(shape):
            raise SchemeError(f"blocks of a tensor of shape {pattern.dims} do not fit {shape[0]} x {shape[1]} entries")
        return
    group = n_of_m(pattern)
    rows, columns = (1, 1) if isinstance(pattern, str) else pattern
    if group:
        columns = group[1]
    if rows < 1 or columns < 1 or shape[0] % rows or shape[1] % columns:
        raise SchemeError(f"pattern {pattern!r} does not tile {shape[0]} x {shape[1]} entries")


def choose(score: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask that keeps the highest scores [rows, columns]: exactly n of m, or exactly round(sparsity x units) units
    dropped."""
    group = n_of_m(pattern)
    if group:
        n, m = group
        order = score.unflatten(1, (-1, m)).argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :n], True).flatten(1)
    shape = (score.shape[0], score.shape[1])
    blocks = blocks_of(pattern, shape)
    units = blocks.reduce(score, torch.sum)
    drop = round(sparsity * units.numel())
    keep = torch.ones(units.numel(), dtype=torch.bool, device=score.device)
    keep[units.reshape(-1).argsort(dim=0, stable=True)[:drop]] = False
    return blocks.spread(keep.view_as(units), shape)


def blocks_of(pattern: Pattern, shape: tuple[int, int]) -> Blocks:
    """The blocks that a pattern keeps or drops whole, of a matrix of this shape; single entries if it is
    unstructured."""
    if isinstance(pattern, Blocks):
        return pattern
    return Blocks(shape, (1, 1) if isinstance(pattern, str) else pattern)


@cache
def _ranks(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """For n:m: the bit set of every combination by its rank, and the rank of every bit set (or -1)."""
    bits = 1 << np.array(list(combinations(range(m), n)))
    sets = bits.sum(1).astype(np.int32)
    ranks = np.full(1 << m, -1, np.int32)
    ranks[sets] = np.arange(len(sets))
    return sets, ranks


def _count_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns < 2**15 else torch.int32


def _index_bytes(mask: Tensor) -> int:
    rows, columns = mask.shape
    return _count_dtype(columns).itemsize * rows + dense_bytes(int(mask.sum()), max(1, (columns - 1).bit_length()))


def _index(mask: Tensor) -> dict[str, Tensor]:
    width = max(1, (mask.shape[1] - 1).bit_length())
    return {
        "mask": pack_dense(mask.nonzero()[:, 1].int(), width),
        "counts": mask.sum(1).to(_count_dtype(mask.shape[1])),
    }


def _cross(mask: Tensor) -> Tensor | None:
    """Which rows and then which columns survive, if every entry where they cross does."""
    rows, columns = mask.any(1), mask.any(0)
    return torch.cat([rows, columns]) if int(rows.sum()) * int(columns.sum()) == int(mask.sum()) else None


def _coded_bytes(entries: int, density: float) -> float:
    """About the bytes of an entropy-coded mask: entries x the binary entropy, one head, and 12 bytes per stream."""
    bits = sum(-p * log2(p) for p in (density, 1 - density) if p > 0)
    return entries * bits / 8 + _HEAD + 12 * -(-entries // entropy.TILE)


_HEAD = 44  # bytes of an entropy-coded mask's head with one table, and what the last word of a stream leaves unused


@dataclass(frozen=True)
class _Coding:
    """One way to store an unstructured mask: its name, the bytes of its tensors, and what makes these."""

    name: str
    bytes: int
    make: Callable[[], dict[str, Tensor]]


def _cheapest(mask: Tensor) -> _Coding:
    """The coding of an unstructured mask that takes the fewest bytes, among equals the one that comes first here."""
    cross = _cross(mask)
    found = []
    if cross is not None:
        size = dense_bytes(sum(mask.shape), 1)
        found.append(_Coding("cross", size, lambda: {"mask": pack_dense(cross.int(), 1)}))
    found.append(_Coding("bitmap", dense_bytes(mask.numel(), 1), lambda: {"mask": pack_dense(mask.int(), 1)}))
    found.append(_Coding("index", _index_bytes(mask), lambda: _index(mask)))
    # encoding takes longer than estimating
    if _coded_bytes(mask.numel(), float(mask.float().mean())) <= min(coding.bytes for coding in found):
        coded = entropy.encode(mask.cpu().numpy().astype(np.int32))
        stored = {"mask": coded["head"], "stream": coded["codes"]}
        found.append(_Coding("entropy", sum(t.nbytes for t in stored.values()), lambda: stored))
    return min(found, key=lambda coding: coding.bytes)


def mask_bytes(mask: Tensor, pattern: Pattern) -> int:
    """Bytes of the tensors that `store_mask` would write for a mask [out, in]."""
    group = n_of_m(pattern)
    if group:
        return dense_bytes(mask.numel() // group[1], (comb(group[1], group[0]) - 1).bit_length())
    if not isinstance(pattern, str):
        return dense_bytes(blocks_of(pattern, (mask.shape[0], mask.shape[1])).count, 1)
    return _cheapest(mask).bytes


def density_of(pattern: Pattern, sparsity: float) -> float:
    """The share of entries a pattern keeps at a sparsity; n:m patterns say it themselves."""
    group = n_of_m(pattern)
    return group[0] / group[1] if group else 1 - sparsity


def expected_mask_bits(shape: tuple[int, int], pattern: Pattern, sparsity: float) -> float:
    """Bits a mask will take, from its description alone. Raises: SchemeError when the pattern does not tile the
    shape."""
    check_pattern(pattern, shape)
    entries = shape[0] * shape[1]
    group = n_of_m(pattern)
    if group:
        return 8 * dense_bytes(entries // group[1], (comb(group[1], group[0]) - 1).bit_length())
    if not isinstance(pattern, str):
        return 8 * dense_bytes(blocks_of(pattern, shape).count, 1)
    index = 8 * _count_dtype(shape[1]).itemsize * shape[0] + (1 - sparsity) * entries * max(
        1, (shape[1] - 1).bit_length()
    )
    return min(8 * dense_bytes(entries, 1), index, 8 * _coded_bytes(entries, 1 - sparsity))


def store_mask(mask: Tensor, pattern: Pattern) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The mask [out, in] as (spec, tensors); unstructured masks take the cheapest of four codings."""
    mask = mask.cpu()
    group = n_of_m(pattern)
    if group:
        n, m = group
        sets = (mask.unflatten(1, (-1, m)).long() << torch.arange(m)).sum(-1)
        ranks = torch.from_numpy(_ranks(n, m)[1])[sets]
        return {"coding": "nm"}, {"mask": pack_dense(ranks, (comb(m, n) - 1).bit_length())}
    if not isinstance(pattern, str):
        return {"coding": "block"}, {
            "mask": pack_dense(blocks_of(pattern, (mask.shape[0], mask.shape[1])).corners(mask).int(), 1)
        }
    coding = _cheapest(mask)
    return {"coding": coding.name}, coding.make()


def mask_tensors(spec: Any) -> tuple[str, ...]:
    """The names of the tensors `store_mask` made, by its spec, which may be damaged."""
    coding = spec.get("coding") if isinstance(spec, dict) else None
    second = {"index": "counts", "entropy": "stream"}.get(str(coding))
    return ("mask",) if second is None else ("mask", second)


def restore_mask(spec: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, int], pattern: Pattern) -> Tensor:
    """The inverse of `store_mask`. Raises: CheckpointError when the stored bytes are not a mask of this shape and
    pattern."""
    check_pattern(pattern, shape)
    if not isinstance(spec, dict):
        raise CheckpointError(f"sparse: expected a mask's spec, found {type(spec).__name__}")
    coding, data, entries = spec.get("coding"), tensors.get("mask"), shape[0] * shape[1]
    group = n_of_m(pattern)
    if data is None or data.dtype != torch.uint8 or data.dim() != 1:
        raise CheckpointError("sparse: expected a stored uint8 tensor 'mask'")
    if coding == "index" and pattern == "unstructured":
        return _restore_index(data, tensors.get("counts"), shape)
    if coding == "nm" and group:
        n, m = group
        width, count = (comb(m, n) - 1).bit_length(), entries // m
        _expect_bytes(data, count, width)
        ranks = unpack_dense(data, width, count)
        if count and int(ranks.max()) >= comb(m, n):
            raise CheckpointError(f"sparse: a {n}:{m} group names combination {int(ranks.max())} of {comb(m, n)}")
        sets = torch.from_numpy(_ranks(n, m)[0])[ranks.long()]
        return ((sets.unsqueeze(1) >> torch.arange(m)) & 1).bool().reshape(shape)
    if coding == "block" and not isinstance(pattern, str):
        blocks = blocks_of(pattern, shape)
        _expect_bytes(data, blocks.count, 1)
        return blocks.spread(unpack_dense(data, 1, blocks.count).bool().view(blocks.grid), shape)
    if coding == "cross" and pattern == "unstructured":
        _expect_bytes(data, sum(shape), 1)
        kept = unpack_dense(data, 1, sum(shape)).bool()
        return kept[: shape[0], None] & kept[shape[0] :]
    if coding == "entropy" and pattern == "unstructured":
        stream = tensors.get("stream")
        decoded = entropy.decode({"head": data} | ({"codes": stream} if stream is not None else {}), shape)
        if not bool(((decoded == 0) | (decoded == 1)).all()):
            raise CheckpointError("sparse: an entropy-coded mask holds something else than 0 and 1")
        return decoded.bool()
    if coding == "bitmap" and pattern == "unstructured":
        _expect_bytes(data, entries, 1)
        return unpack_dense(data, 1, entries).bool().view(shape)
    raise CheckpointError(f"sparse: mask coding {coding!r} does not belong to pattern {pattern!r}")


def _expect_bytes(data: Tensor, count: int, width: int) -> None:
    if data.numel() != dense_bytes(count, width):
        raise CheckpointError(f"sparse: the mask should take {dense_bytes(count, width)} bytes, found {data.numel()}")


def _restore_index(data: Tensor, counts: Tensor | None, shape: tuple[int, int]) -> Tensor:
    if (
        counts is None
        or counts.dtype != _count_dtype(shape[1])
        or counts.shape != (shape[0],)
        or bool((counts < 0).any())
    ):
        raise CheckpointError(f"sparse: index coding needs {shape[0]} row counts")
    total, width = int(counts.sum(dtype=torch.int64)), max(1, (shape[1] - 1).bit_length())
    _expect_bytes(data, total, width)
    columns = unpack_dense(data, width, total).long()
    mask = torch.zeros(shape, dtype=torch.bool)
    if total and (int(columns.max()) >= shape[1] or int(counts.max()) > shape[1]):
        raise CheckpointError(f"sparse: an index lies outside the {shape[1]} columns")
    mask[torch.repeat_interleave(torch.arange(shape[0]), counts.long()), columns] = True
    if int(mask.sum()) != total:
        raise CheckpointError("sparse: an index is stored twice")
    return mask
