"""Integers on disk: dense bit packing (3-bit codes take 3 bits) or entropy coding, behind one pair of functions."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights import entropy

Codec = Literal["dense", "ans"]
CODECS = ("dense", "ans")
# codes handled at a time, a multiple of 8 so that every chunk ends on a byte: bounds the working memory
_CHUNK = 1 << 20


def dense_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits each, densely packed; the last byte is padded."""
    return (count * bits + 7) // 8


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (any shape, values below 2**bits, bits 1-16) as uint8 bytes, least significant bit first."""
    flat = codes.reshape(-1).cpu().numpy()
    out = np.empty(dense_bytes(len(flat), bits), np.uint8)
    for start in range(0, len(flat), _CHUNK):
        packed = (_pack_words if bits <= 8 else _pack_planes)(flat[start : start + _CHUNK], bits)
        out[start * bits // 8 : start * bits // 8 + len(packed)] = packed
    return torch.from_numpy(out)


def _pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Eight codes take `bits` bytes: a 64-bit word each, of which that many bytes are kept. Twice as fast as single
    bits."""
    words = np.zeros(-(-len(codes) // 8) * 8, "<u8")
    words[: len(codes)] = codes
    joined = np.bitwise_or.reduce(words.reshape(-1, 8) << _shifts(bits), axis=1)
    return joined.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[: dense_bytes(len(codes), bits)]


def _pack_planes(codes: np.ndarray, bits: int) -> np.ndarray:
    planes = np.unpackbits(codes.astype("<u2").view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")[:, :bits]
    return np.packbits(planes.reshape(-1), bitorder="little")


def _shifts(bits: int) -> np.ndarray:
    return np.arange(8, dtype="<u8") * np.uint64(bits)


def unpack_dense(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_dense`: int32 codes [count]."""
    source = data.cpu().numpy()
    out = np.empty(count, np.int32)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        part = source[start * bits // 8 : start * bits // 8 + dense_bytes(stop - start, bits)]
        out[start:stop] = (_unpack_words if bits <= 8 else _unpack_planes)(part, bits, stop - start)
    return torch.from_numpy(out)


def _unpack_words(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `_pack_words`. Twelve times as fast as single bits."""
    whole = np.zeros(-(-count // 8) * bits, np.uint8)
    whole[: len(data)] = data
    words = np.zeros((len(whole) // bits, 8), np.uint8)
    words[:, :bits] = whole.reshape(-1, bits)
    return ((words.view("<u8") >> _shifts(bits)) & np.uint64(2**bits - 1)).reshape(-1)[:count]


def _unpack_planes(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    padded = np.zeros((count, 16), np.uint8)
    padded[:, :bits] = np.unpackbits(data, count=count * bits, bitorder="little").reshape(-1, bits)
    return np.packbits(padded, axis=1, bitorder="little").view("<u2").reshape(-1)


def store(codes: Tensor, low: int, bits: int | None, codec: Codec, keep: Tensor | None = None) -> dict[str, Tensor]:
    """Integer codes [rows, columns] with least value `low` as named tensors; with `keep`, only the entries where it is
    true.

    Raises: SchemeError for unbounded codes (`bits` None) with the dense codec, which has no width for them.
    """
    kept = codes[keep].reshape(-1, 1) if keep is not None else codes
    if codec == "ans":
        return entropy.encode(kept.cpu().numpy())
    if bits is None:
        raise SchemeError("unbounded integer codes need codec='ans': dense packing has no fixed width for them")
    return {"codes": pack_dense(kept.to(torch.int32) - low, bits)}


def stored_names(codec: object) -> tuple[str, ...]:
    """The names of the tensors that `store` makes."""
    return ("codes", "head") if codec == "ans" else ("codes",)


def stored_bits(codes: Tensor, bits: int | None, codec: Codec, keep: Tensor | None = None) -> int:
    """8 x the bytes that `store` would write; cheap for the dense codec, one encoding for the entropy codec."""
    if codec == "ans":
        return 8 * sum(t.nbytes for t in store(codes, 0, bits, codec, keep).values())
    count = codes.numel() if keep is None else int(keep.sum())
    return 8 * dense_bytes(count, bits or 0)


def restore(
    tensors: dict[str, Tensor],
    shape: tuple[int, int],
    low: int,
    bits: int | None,
    codec: Codec,
    keep: Tensor | None = None,
) -> Tensor:
    """The inverse of `store`: int32 codes [rows, columns], zero where `keep` is false.

    Raises: CheckpointError when the stored bytes cannot hold that many codes (checked before anything is allocated).
    """
    count = shape[0] * shape[1] if keep is None else int(keep.sum())
    if codec == "ans":
        flat = entropy.decode(tensors, shape if keep is None else (count, 1))
    else:
        data = tensors.get("codes")
        expected = dense_bytes(count, bits or 0)
        if data is None or data.dtype != torch.uint8 or data.numel() != expected:
            found = "no tensor" if data is None else f"{data.dtype} x {data.numel()}"
            raise CheckpointError(f"codes: {count} codes of {bits} bits need {expected} bytes of uint8, found {found}")
        flat = unpack_dense(data, bits or 0, count) + low
    if keep is None:
        return flat.reshape(shape)
    codes = torch.zeros(shape, dtype=torch.int32)
    codes[keep] = flat.reshape(-1)
    return codes
