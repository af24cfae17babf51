"""Told against used: peak memory and seconds of `laconic compress`, on models whose weight lies in different places.

Each model is random and compressed in a process of its own, whose peak nothing else has raised. Prints a table and writes
`results/estimates.json`, with the load of the machine before every run: seconds told before the work are those of an idle one. `--quick`
takes a quarter of the sizes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import parser, record, show

COLUMNS = (
    "model",
    "scheme",
    "parameters",
    "MB told",
    "MB",
    "seconds told",
    "told after a tenth",
    "seconds",
    "load before",
)

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
    """The row of one model: what was told before the work and after the first tenth of its compression, and what was used."""
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        source, out = str(Path(folder) / "model"), str(Path(folder) / "out")
        subprocess.run(
            [sys.executable, "-c", RUN, json.dumps([kind, config]), source, "", str(threads)],
            check=True,
            capture_output=True,
        )
        done = subprocess.run(
            [sys.executable, "-c", COMPRESS, source, out, scheme, str(threads)],
            check=False,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "model": name, "scheme": scheme, "parameters": found["parameters"], "MB told": found["peak_memory"]["expected"] / 1e6,
        "MB": found["peak_memory"]["actual"] / 1e6, "seconds told": found["expected_seconds"], "told after a tenth": found["expected_seconds_later"],
        "seconds": found["seconds"], "load before": load, "stages": found["stages"], "stored_bytes": found["stored_bytes"],
    }  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--only", help="one of the models")
    args = options.parse_args()
    rows: list[dict[str, Any]] = []
    for name, (kind, config, scheme) in models(args.quick).items():
        if args.only in (None, name):
            rows.append(measure(name, kind, config, scheme, args.threads))
            show("Told and used", rows, COLUMNS)
    print(record("estimates", rows, args))


if __name__ == "__main__":
    main()
