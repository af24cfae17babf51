"""Told against used: peak memory and seconds of `laconic compress`, on models whose weight lies in different places.

Each model is random and compressed in a process of its own, whose peak nothing else has raised. Prints a table and writes
`results/estimates.json`. `--quick` takes a tenth of the sizes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUN = """
import json, sys
from pathlib import Path
import torch, transformers
torch.set_num_threads(int(sys.argv[4]))
kind, config = json.loads(sys.argv[1])
model = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**config)).to(torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""
COMPRESS = """
import json, sys
import torch
torch.set_num_threads(int(sys.argv[4]))
import laconic as lc
report = lc.compress(sys.argv[1], sys.argv[3], out=sys.argv[2], samples=32, length=128, test_tokens=2048)
keys = ("peak_memory", "expected_seconds", "expected_seconds_later", "seconds", "stages", "parameters", "stored_bytes")
print(json.dumps({key: report[key] for key in keys}))
"""


def models(quick: bool) -> dict[str, tuple[str, dict[str, Any], str]]:
    """Name -> class, configuration and scheme."""
    f = 4 if quick else 1
    llama = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return {
        "large vocabulary": (
            "Llama", {**llama, "vocab_size": 131072 // f, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}, "GPTQ(rate=3)",
        ),
        "long": ("Llama", {**llama, "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 64 // f}, "GPTQ(rate=3)"),
        "wide": ("Llama", {**llama, "vocab_size": 4096, "hidden_size": 1024 // f, "intermediate_size": 2816 // f, "num_hidden_layers": 2}, "GPTQ(3)"),
        "experts": (
            "Mixtral",
            {**llama, "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_local_experts": 32 // f},
            "GPTQ(4)",
        ),
    }  # fmt: skip


def measure(name: str, kind: str, config: dict[str, Any], scheme: str, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        source, out = str(Path(folder) / "model"), str(Path(folder) / "out")
        subprocess.run([sys.executable, "-c", RUN, json.dumps([kind, config]), source, "", str(threads)], check=True, capture_output=True)
        done = subprocess.run([sys.executable, "-c", COMPRESS, source, out, scheme, str(threads)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"model": name, "scheme": scheme, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="one of the models")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "estimates.json")
    given = parser.parse_args()
    rows = []
    print(f"{'model':<18} {'parameters':>11} {'memory told':>12} {'used':>8} {'seconds told':>13} {'later':>7} {'used':>7}")
    for name, (kind, config, scheme) in models(given.quick).items():
        if given.only not in (None, name):
            continue
        row = measure(name, kind, config, scheme, given.threads)
        rows.append(row)
        told, used = row["peak_memory"]["expected"] / 1e6, row["peak_memory"]["actual"] / 1e6
        times = row["expected_seconds"], row["expected_seconds_later"] or float("nan"), row["seconds"]
        print(f"{name:<18} {row['parameters']:>11,} {told:>9.0f} MB {used:>5.0f} MB {times[0]:>13.1f} {times[1]:>7.1f} {times[2]:>7.1f}")
        print("    " + ", ".join(f"{stage} {cost['expected']:.1f}/{cost['actual']:.1f}" for stage, cost in row["stages"].items()), flush=True)
    given.out.write_text(json.dumps({"command": "python benchmarks/estimates.py" + " --quick" * given.quick, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
