"""Integers and masks on disk: every value comes back, in exactly the bytes the formulas say."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.errors import CheckpointError, SchemeError
from laconic.weights import Dense, Sparse, codes, entropy, masks, unpack
from laconic.weights.blocks import Blocks
from laconic.weights.grid import fit_grid
from laconic.weights.rotated import hadamard

quick = settings(max_examples=60, deadline=None)


@quick
@given(bits=st.integers(1, 16), count=st.integers(0, 300), seed=st.integers(0, 9))
def test_dense_packing_takes_the_bits_it_says(bits: int, count: int, seed: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.int32))
    packed = codes.pack_dense(values, bits)
    assert packed.nbytes == -(-count * bits // 8)
    assert torch.equal(codes.unpack_dense(packed, bits, count), values)


def test_three_bit_codes_take_three_bits() -> None:
    assert codes.pack_dense(torch.arange(8), 3).tolist() == [0b10001000, 0b11000110, 0b11111010]


def test_packing_is_the_same_across_its_chunks() -> None:
    values = torch.randint(0, 8, (codes._CHUNK + 17,), generator=torch.Generator().manual_seed(0))
    packed = codes.pack_dense(values, 3)
    assert torch.equal(codes.unpack_dense(packed, 3, len(values)).long(), values)


@quick
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 40),
    scale=st.sampled_from([0.0, 0.3, 2.0, 60.0]),
    seed=st.integers(0, 9),
)
def test_entropy_coding_is_lossless(rows: int, columns: int, scale: float, seed: int) -> None:
    values = np.rint(
        np.random.default_rng(seed).normal(size=(rows, columns)) * scale * np.linspace(0.2, 3, columns)
    ).astype(np.int32)
    coded = entropy.encode(values)
    assert torch.equal(entropy.decode(coded, (rows, columns)), torch.from_numpy(values))


@pytest.mark.parametrize("far", [-10_000, 9_000])
def test_values_far_out_on_one_side_are_read_back(far: int) -> None:
    """The table is as wide as it may be and not as what came says: its ends are where a decoder looks for values outside."""
    values = np.zeros((64, 48), np.int32)
    values[::7, 5] = far
    assert torch.equal(entropy.decode(entropy.encode(values), (64, 48)), torch.from_numpy(values))


def test_entropy_coding_takes_little_memory_beside_the_codes() -> None:
    values = np.random.default_rng(0).integers(0, 8, (4096, 1024), dtype=np.uint8)
    tracemalloc.start()
    entropy.encode(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * values.nbytes, (
        "a copy in wider integers alone is 4 times as large, symbols and magnitudes 12 times"
    )


def test_entropy_coding_reaches_the_entropy() -> None:
    values = np.rint(np.random.default_rng(0).normal(size=(512, 2048)) / 0.9).astype(np.int32)
    p = np.unique(values, return_counts=True)[1] / values.size
    bits = 8 * sum(t.nbytes for t in entropy.encode(values).values()) / values.size
    assert 0 <= bits + (p * np.log2(p)).sum() < 0.01


def test_columns_of_unequal_spread_get_tables_of_their_own() -> None:
    spread = np.repeat([0.3, 3.0], 256)
    values = np.rint(np.random.default_rng(0).normal(size=(1024, 512)) * spread).astype(np.int32)
    p = np.unique(values, return_counts=True)[1] / values.size
    single = -(p * np.log2(p)).sum()
    assert 8 * sum(t.nbytes for t in entropy.encode(values).values()) / values.size < single - 0.3


def test_values_far_outside_the_table_come_back() -> None:
    values = np.zeros((64, 64), np.int32)
    values[3, 5], values[60, 2], values[9, 9] = 2_000_000, -1_900_000, 7
    coded = entropy.encode(values)
    assert torch.equal(entropy.decode(coded, (64, 64)), torch.from_numpy(values))
    assert sum(t.nbytes for t in coded.values()) < 6000


def test_several_tiles_come_back_the_last_one_shorter() -> None:
    values = np.rint(np.random.default_rng(0).normal(size=(700, 512)) * 2).astype(np.int32)
    assert 700 % (entropy.TILE // 512)
    assert torch.equal(entropy.decode(entropy.encode(values), (700, 512)), torch.from_numpy(values))


@pytest.mark.parametrize("shape", [(65, 64), (64, 65), (2**30, 2**30)])
def test_a_coded_matrix_of_another_shape_is_refused_before_it_is_allocated(shape: tuple[int, int]) -> None:
    coded = entropy.encode(np.ones((64, 64), np.int32))
    with pytest.raises(CheckpointError):
        entropy.decode(coded, shape)


def test_damaged_streams_are_refused() -> None:
    values = np.rint(np.random.default_rng(0).normal(size=(64, 64)) * 2).astype(np.int32)
    coded = entropy.encode(values)
    for name, damaged in (
        ("codes", coded["codes"][:-1]),
        ("head", coded["head"][:-1]),
        ("head", coded["head"][:20]),
        ("codes", coded["codes"].float()),
    ):
        with pytest.raises(CheckpointError):
            entropy.decode(coded | {name: damaged}, (64, 64))


def test_unbounded_codes_have_no_dense_form() -> None:
    with pytest.raises(SchemeError, match="ans"):
        codes.store(torch.zeros(2, 2, dtype=torch.int32), 0, None, "dense")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4", "7:8", "3:16", (4, 4), (1, 8), (8, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_masks_come_back_in_the_bytes_they_say(pattern: masks.Pattern, sparsity: float) -> None:
    score = torch.rand(32, 48, generator=torch.Generator().manual_seed(0))
    mask = masks.choose(score, pattern, sparsity)
    spec, tensors = masks.store_mask(mask, pattern)
    assert torch.equal(masks.restore_mask(spec, tensors, (32, 48), pattern), mask)
    assert sum(t.nbytes for t in tensors.values()) == masks.mask_bytes(mask, pattern)
    if isinstance(pattern, str) and ":" in pattern:
        n, m = map(int, pattern.split(":"))
        assert (mask.view(32, -1, m).sum(-1) == n).all()
    elif sparsity in (0.0, 0.5):
        assert (~mask).float().mean() == sparsity


def test_a_sparse_mask_takes_the_cheaper_coding() -> None:
    score = torch.rand(64, 1024, generator=torch.Generator().manual_seed(0))
    assert masks.store_mask(masks.choose(score, "unstructured", 0.5), "unstructured")[0] == {"coding": "bitmap"}
    few = masks.choose(score, "unstructured", 0.97)
    spec, tensors = masks.store_mask(few, "unstructured")
    assert spec == {"coding": "entropy"}  # 0.194 bits per entry
    assert (
        sum(t.nbytes for t in tensors.values()) == masks.mask_bytes(few, "unstructured") < 1.1 * 0.194 * few.numel() / 8
    )
    assert torch.equal(masks.restore_mask(spec, tensors, (64, 1024), "unstructured"), few)
    assert masks.store_mask(few[:2], "unstructured")[0] == {"coding": "index"}  # too small to pay for a head


def test_a_mask_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = masks.entropy.encode, []
    monkeypatch.setattr(masks.entropy, "encode", lambda codes: calls.append(codes.shape) or encode(codes))
    few = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) > 0.97
    assert masks.store_mask(few, "unstructured")[0] == {"coding": "entropy"}
    masks.store_mask(few.logical_not(), "unstructured")
    masks.store_mask(
        torch.rand(64, 256, generator=torch.Generator().manual_seed(1)) > 0.5, "unstructured"
    )  # not worth a try
    assert calls == [(64, 256)] * 2


def test_a_damaged_entropy_coded_mask_is_refused() -> None:
    few = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) > 0.97
    spec, tensors = masks.store_mask(few, "unstructured")
    assert spec == {"coding": "entropy"}
    for damaged in (
        {"mask": tensors["mask"]},
        tensors | {"stream": tensors["stream"][:-1]},
        tensors | {"mask": tensors["mask"][:-1]},
    ):
        with pytest.raises(CheckpointError):
            masks.restore_mask(spec, damaged, (64, 256), "unstructured")
    numbers = masks.entropy.encode(torch.arange(64 * 256).view(64, 256).remainder(3).int().numpy())
    with pytest.raises(CheckpointError, match="something else than 0 and 1"):
        masks.restore_mask(spec, {"mask": numbers["head"], "stream": numbers["codes"]}, (64, 256), "unstructured")


def test_whole_rows_and_columns_take_a_bit_each() -> None:
    mask = torch.ones(50, 70, dtype=torch.bool)
    for rows, columns in (([], []), ([3, 49], []), ([], [0, 5]), ([0, 1], [69]), (list(range(50)), [])):
        cut = mask.clone()
        cut[rows], cut[:, columns] = False, False
        spec, tensors = masks.store_mask(cut, "unstructured")
        assert spec == {"coding": "cross"}
        assert tensors["mask"].nbytes == masks.mask_bytes(cut, "unstructured") == 15
        assert torch.equal(masks.restore_mask(spec, tensors, (50, 70), "unstructured"), cut)
        for damaged in (tensors["mask"][:-1], torch.cat([tensors["mask"], tensors["mask"][:1]]), tensors["mask"].int()):
            with pytest.raises(CheckpointError, match="mask"):
                masks.restore_mask(spec, {"mask": damaged}, (50, 70), "unstructured")
    mask[0, 0] = False
    assert masks.store_mask(mask, "unstructured")[0] != {"coding": "cross"}
    with pytest.raises(CheckpointError, match="does not belong"):
        masks.restore_mask({"coding": "cross"}, {"mask": torch.zeros(15, dtype=torch.uint8)}, (50, 70), (1, 70))


@quick
@given(dims=st.lists(st.integers(1, 7), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_n_d_blocks_are_a_bit_each(dims: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    block = tuple(int(torch.randint(1, n + 3, (1,), generator=generator)) for n in dims)
    blocks, shape = Blocks(tuple(dims), block), (dims[0], int(torch.tensor(dims[1:]).prod()))
    assert int(blocks.sizes().sum()) == shape[0] * shape[1]
    assert torch.equal(blocks.reduce(torch.ones(shape), torch.sum).long(), blocks.sizes())
    mask = masks.choose(torch.rand(shape, generator=generator), blocks, 0.5)
    assert int(blocks.corners(mask).sum()) == blocks.count - round(0.5 * blocks.count)
    spec, tensors = masks.store_mask(mask, blocks)
    assert tensors["mask"].nbytes == masks.mask_bytes(mask, blocks) == -(-blocks.count // 8)
    assert torch.equal(masks.restore_mask(spec, tensors, shape, blocks), mask)


def test_blocks_of_another_tensor_are_refused() -> None:
    spec, tensors = Sparse(Dense((6, 8)), pattern=Blocks((6, 2, 4), (2, 1, 3))).pack()
    assert spec["pattern"] == {"dims": [6, 2, 4], "block": [2, 1, 3]}
    patterns = [
        {"dims": [6, 2, 4], "block": [2, 1]}, {"dims": [6, 2, 4], "block": [2, 0, 3]}, {"dims": [6, 2, 5], "block": [2, 1, 3]},
        {"dims": [], "block": []},
        {"dims": [4, 12], "block": [2, 3]}, {"dims": [6, 2, 4], "block": [2, 1, 1]}, {"dims": [6, 2, 4.0], "block": [2, 1, 3]}, {"dims": [6, 2, 4]},
        {"dims": 6, "block": 2}, {"dims": ["6", 2, 4], "block": [2, 1, 3]},
    ]  # fmt: skip
    for pattern in patterns:
        with pytest.raises(CheckpointError):
            unpack(spec | {"pattern": pattern}, tensors)
    with pytest.raises(SchemeError, match="do not fit"):
        Sparse(Dense((6, 8)), pattern=Blocks((8, 6), (2, 2)))
    with pytest.raises(SchemeError, match="all 8 columns at once"):
        Sparse(Dense((6, 8)), pattern=Blocks((6, 2, 4), (2, 1, 3))).fit(torch.ones(6, 4))


@pytest.mark.parametrize("pattern", ["2:3:4", "4:2", "0:4", "two:four", "8:17", (3, 5), (0, 4)])
def test_patterns_that_make_no_sense_are_refused(pattern: masks.Pattern) -> None:
    with pytest.raises(SchemeError, match="pattern"):
        masks.check_pattern(pattern, (32, 48))


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_range_grid_reaches_both_ends(bits: int) -> None:
    w = torch.randn(8, 1, 64, generator=torch.Generator().manual_seed(0))
    scale, zero = fit_grid(w, bits, symmetric=False, integer=True)
    low = (-(2 ** (bits - 1)) - zero) * scale
    high = (2 ** (bits - 1) - 1 - zero) * scale
    assert (low <= w.amin(-1) + 0.505 * scale).all()
    assert (high >= w.amax(-1) - 0.505 * scale).all()


def test_a_least_squares_grid_is_never_worse_than_the_range() -> None:
    w = torch.randn(32, 4, 64, generator=torch.Generator().manual_seed(0))
    for bits in (1, 2, 3, 4):
        for symmetric in (False, True):
            errors = []
            for clip in ("minmax", "mse"):
                scale, zero = (t.unsqueeze(-1) for t in fit_grid(w, bits, symmetric=symmetric, integer=True, clip=clip))
                offset = zero - 0.5 * (symmetric and bits == 1)
                q = (w / scale + offset).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                errors.append((((q - offset) * scale - w) ** 2).sum())
            assert errors[1] <= errors[0]


@pytest.mark.parametrize("n", [1, 2, 8, 64, 12, 96, 704, 7, 45])
def test_the_hadamard_transform_is_orthonormal_and_its_own_inverse(n: int) -> None:
    H = hadamard(torch.eye(n, dtype=torch.float64))
    assert torch.allclose(H @ H.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(H @ H, torch.eye(n, dtype=torch.float64), atol=1e-12)
