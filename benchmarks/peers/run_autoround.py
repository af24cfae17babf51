"""Runs AutoRound (methods autoround: 200 iterations, rtn: none) on one model; start it with the autoround environment's interpreter."""

import time
from importlib.metadata import version
from pathlib import Path

import common

import torch
from torch import Tensor
from torch.utils.data import DataLoader

PEER = "AutoRound"
BATCH = 8  # the peer's default batch size
ITERATIONS = {"autoround": 200, "rtn": 0}  # 200 is the peer's default
WORD = 32  # bits of a stored integer
AWQ_ORDER = (
    0,
    2,
    4,
    6,
    1,
    3,
    5,
    7,
)  # the column that each nibble of a word holds in the AWQ layout, lowest nibble first


def compress(task: common.Task) -> float:
    """Runs the peer, which quantizes, packs and saves in one call, and returns the seconds."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = common.read_windows(task.calibration)
    rows = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    peer = AutoRound(
        AutoModelForCausalLM.from_pretrained(task.model, dtype="auto"),
        AutoTokenizer.from_pretrained(task.model),
        bits=task.bits,
        group_size=task.group,
        sym=False,
        iters=ITERATIONS[task.method],
        dataset=DataLoader(rows, batch_size=BATCH),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
    )
    start = time.perf_counter()
    peer.quantize_and_save(output_dir=str(task.native), format="auto_round")
    return time.perf_counter() - start


def flatten_folder(native: Path) -> None:
    """Moves the files out of the folder `<model>-w<bits>g<group>` that the peer creates inside the one it was given."""
    for folder in [path for path in native.iterdir() if path.is_dir()]:
        for path in folder.iterdir():
            path.rename(native / path.name)
        folder.rmdir()


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Codes [32 w / bits, m] from int32 words [w, m]: along the first axis the codes follow each other, lowest bit first."""
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    blocks = torch.cat([unsigned, torch.zeros_like(unsigned[:1])])
    positions = torch.arange(words.shape[0] * WORD // bits) * bits
    index, shift = positions // WORD, (positions % WORD)[:, None]
    # a code may cross into the next word; the mask drops what is above it
    return ((blocks[index] >> shift) | (blocks[index + 1] << (WORD - shift))) & (2**bits - 1)


def unpack_awq(words: Tensor, bits: int) -> Tensor:
    """Codes [n, 8 w] from int32 words [n, w] of eight nibbles in the order AWQ_ORDER."""
    nibbles = (words.to(torch.int64)[..., None] >> (torch.arange(WORD // bits) * bits)) & (2**bits - 1)
    return nibbles[..., [AWQ_ORDER.index(column) for column in range(len(AWQ_ORDER))]].flatten(1)


def decode(stored: dict[str, Tensor], modules: list[str], task: common.Task, packing: str) -> dict[str, Tensor]:
    """Decodes the stored int32 words in float32: `(code - zero) * scale`, one zero point and scale for a group of input columns."""
    dense = {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}
    for module in modules:
        words, zero_words = stored[f"{module}.qweight"], stored[f"{module}.qzeros"]
        if packing.endswith("auto_awq"):
            codes, zeros = unpack_awq(words, task.bits), unpack_awq(zero_words, task.bits)
        else:
            codes, zeros = unpack_stream(words, task.bits), unpack_stream(zero_words.t(), task.bits).t()
        group = torch.arange(codes.shape[0]) // task.group
        dense[f"{module}.weight"] = ((codes - zeros[group]) * stored[f"{module}.scales"].float()[group]).t()
    return dense


def main() -> None:
    """Compresses, stores, decodes, checks, and writes result.json."""
    task = common.parse_task(__doc__, methods=tuple(ITERATIONS), bits=(2, 3, 4, 8))
    common.go_offline()
    from transformers import AutoModelForCausalLM

    release = version("auto-round")
    original = common.read_tensors(task.model)
    modules = common.linear_names(original)
    try:
        seconds = compress(task)
    except ValueError as error:
        if not common.undivided(original, task.group):
            raise
        common.write_unsupported(task, PEER, release, str(error))
        return
    flatten_folder(task.native)
    peer_model = AutoModelForCausalLM.from_pretrained(task.native, dtype=torch.float32, device_map="cpu").eval()
    if lost := [module for module in modules if f"{module}.qweight" not in peer_model.state_dict()]:
        reason = f"stored, but the peer does not load it: {len(lost)} layers fall to its `auto_round:fake` backend, such as {lost[0]}"
        common.write_unsupported(task, PEER, release, reason)
        return
    stored, config = common.read_tensors(task.native), common.read_config(task)
    decoded = decode(stored, modules, task, config["packing_format"])
    dense = common.save_dense(task.out / "dense.safetensors", decoded, original)
    dense_model = common.load_dense(AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32), dense)
    torch.nn.Module.float(peer_model)  # 3 bits: the peer forces fp16, and transformers refuses the usual `.float()`
    common.write_result(
        task,
        PEER,
        release,
        {
            "seconds": seconds,
            "seconds_save": 0.0,
            "config": config,
            "options": {"iters": ITERATIONS[task.method], "batch_size": BATCH},
        }
        | common.compare_logits(dense_model, peer_model, common.read_windows(task.calibration)[0])
        | common.count_files(task.native)
        | common.count_tensors(stored, original, common.ideal_bits(original, task.bits, 16 + task.bits, task.group)),
    )


if __name__ == "__main__":
    main()
