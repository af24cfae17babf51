"""Compressing a checkpoint larger than memory: random weights in the shape of Llama-3-8B (16 GB), RTN of the whole, GPTQ of two blocks.

Writes the checkpoint, runs `laconic compress` as a process of its own, and reports that process's peak memory against the targets of
3 GB (RTN) and 2.5 x (one block + its Hessians, both float32) for GPTQ. Needs about 40 GB of disk; everything is deleted afterwards
unless --keep. Smaller: --layers 4.
"""

import json
import shutil
import struct
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Peak, parser, peak_rss_of, record, show

HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 128256
SHARD = 5_000_000_000  # bytes; how Llama-3-8B is published
GB = 1e9
RTN_TARGET, GPTQ_FACTOR = 3 * GB, 2.5


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=32, help="decoder layers (32 are Llama-3-8B)")
    options.add_argument("--blocks", type=int, default=2, help="how many of them GPTQ compresses")
    options.add_argument("--only", choices=("rtn", "gptq"), help="run one of the two")
    options.add_argument("--samples", type=int, default=16, help="calibration windows of GPTQ")
    options.add_argument("--length", type=int, default=256, help="tokens per window")
    options.add_argument("--dir", type=Path, help="where checkpoint and results go; by default a temporary folder")
    options.add_argument("--keep", action="store_true", help="leave the checkpoint for another run with the same --dir")
    options.add_argument("--write-only", action="store_true", help="write the checkpoint into --dir and stop")
    args = options.parse_args()
    folder = args.dir or Path(tempfile.mkdtemp(prefix="laconic-streaming-"))
    source = folder / f"llama-{args.layers}-layers"
    if args.write_only:
        write_checkpoint(source, args.layers, args.seed)
        return
    try:
        rows = []
        for kind, row in run_all(args, folder, source):  # written at once: each takes a while, and the other may fail
            rows.append(row)
            print(
                f"wrote {record(f'streaming-{args.layers}-{kind}', [row], args, checkpoint_bytes=bytes_of(source)).name}",
                flush=True,
            )
        show(
            f"Streaming, {args.layers} layers of Llama-3-8B's shape",
            rows,
            [key for key in rows[0] if key not in ("timeline", "scheme")],
        )
    finally:
        if not args.keep:
            shutil.rmtree(folder if args.dir is None else source, ignore_errors=True)


def run_all(args: Namespace, folder: Path, source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, row) for RTN of all layers, and for GPTQ of the first blocks with the rest kept as it is."""
    if not (source / "config.json").exists():
        needed, free = (
            1.5 * (HIDDEN * VOCABULARY * 4 + args.layers * block_entries() * 2),
            shutil.disk_usage(folder).free,
        )
        if free < needed:
            raise SystemExit(
                f"{needed / GB:.0f} GB of disk are needed, {free / GB:.0f} are free; see --dir and --layers"
            )
        # by another process: whoever starts a process hands down its own peak memory
        command = [
            sys.executable,
            __file__,
            "--write-only",
            "--layers",
            str(args.layers),
            "--dir",
            str(folder),
            "--seed",
            str(args.seed),
        ]
        if peak_rss_of(command).code:
            raise SystemExit("the checkpoint could not be written")
    if args.only != "gptq":
        yield "rtn", measure("RTN, all blocks", "RTN(bits=4, group=128)", source, folder / "out-rtn", [], RTN_TARGET)
    if args.only != "rtn":
        text = folder / "calibration.txt"
        text.write_text(python_manual())
        rules = ", ".join(f"('model.layers.{i}.*', GPTQ(bits=4, group=128))" for i in range(args.blocks))
        extra = ["--data", str(text), "--samples", str(args.samples), "--length", str(args.length)]
        target = GPTQ_FACTOR * (4 * block_entries() + hessian_bytes())
        yield (
            "gptq",
            measure(
                f"GPTQ, first {args.blocks} blocks",
                f"[{rules}, ('*', Keep())]",
                source,
                folder / "out-gptq",
                extra,
                target,
            ),
        )


def measure(name: str, scheme: str, source: Path, out: Path, extra: list[str], target: float) -> dict[str, Any]:
    """Compress in a process of its own; what it took, and what the preflight had said it would take."""
    command = [
        sys.executable,
        "-m",
        "laconic",
        "compress",
        str(source),
        "--scheme",
        scheme,
        "--out",
        str(out),
        "--no-evaluate",
        "--overwrite",
        *extra,
    ]
    peak = peak_rss_of(command)
    if peak.code:
        raise SystemExit(f"{name}: failed with exit code {peak.code}")
    report = json.loads((out / "report.json").read_text())
    shutil.rmtree(out)
    anonymous = None if peak.anonymous is None else round(peak.anonymous / GB, 3)
    return {
        "run": name, "scheme": scheme, "checkpoint GB": round(bytes_of(source) / GB, 2), "stored GB": round(report["stored_bytes"] / GB, 2),
        "peak RSS GB": round(peak.rss / GB, 3), "of it allocated GB": anonymous, "predicted GB": round(report["peak_memory"]["expected"] / GB, 3),
        "target GB": round(target / GB, 3), "met": peak.rss < target, "seconds": round(peak.seconds, 1),
        "predicted seconds": round(report["expected_seconds"], 1), "MB/s": round(bytes_of(source) / 1e6 / peak.seconds, 1),
        "median relative error": sorted(site["error"] for site in report["sites"])[len(report["sites"]) // 2], "timeline": thinned(peak),
    }  # fmt: skip


def thinned(peak: Peak) -> list[dict[str, float]]:
    """At most 200 points of memory over time, in GB, each the largest of its stretch."""
    step = -(-len(peak.timeline) // 200)
    parts = [peak.timeline[i : i + step] for i in range(0, len(peak.timeline), step)]
    worst = [max(part, key=lambda point: point[1] + point[2]) for part in parts]
    return [
        {"seconds": t, "allocated": round(anonymous / GB, 3), "mapped": round(mapped / GB, 3)}
        for t, anonymous, mapped in worst
    ]


def block_entries() -> int:
    """Weights of one decoder layer, without its norms."""
    return sum(rows * columns for rows, columns in _matrices().values())


def hessian_bytes() -> int:
    """float32 Hessians of one layer: q, k, v share one, gate and up share one."""
    return 4 * (3 * HIDDEN**2 + MLP**2)


def bytes_of(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def python_manual() -> str:
    """Text every Python has."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _matrices() -> dict[str, tuple[int, int]]:
    key_rows = HIDDEN // HEADS * KV_HEADS
    return {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (key_rows, HIDDEN), "self_attn.v_proj": (key_rows, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP),
    }  # fmt: skip


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order the published checkpoint has them."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(layers):
        for name, shape in _matrices().items():
            yield f"model.layers.{i}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def write_checkpoint(folder: Path, layers: int, seed: int) -> None:
    """Gaussian bfloat16 weights of deviation 0.02 in shards, a few MB in memory at a time; config and byte-level tokenizer last."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    started, generator = time.time(), torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    for name, shape in tensors(layers):
        size = 2 * torch.Size(shape).numel()
        if sum(entry[2] for entry in shards[-1]) + size > SHARD:
            shards.append([])
        shards[-1].append((name, shape, size))
    weight_map = {}
    for number, shard in enumerate(shards):
        file = folder / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name, shape, size in shard:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
            weight_map[name], position = file.name, position + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for _, shape, size in shard:
                for start in range(0, size // 2, 1 << 24):
                    count = min(1 << 24, size // 2 - start)
                    part = torch.ones(count) if len(shape) == 1 else torch.randn(count, generator=generator) * 0.02
                    stream.write(part.to(torch.bfloat16).view(torch.uint8).numpy().data)
    index = {
        "metadata": {"total_size": sum(size for shard in shards for _, _, size in shard)},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, rope_theta=500000.0, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    print(f"wrote {bytes_of(folder) / GB:.2f} GB in {time.time() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
