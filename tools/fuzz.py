"""Damaged model directories: each must be refused by a LaconicError or load to the very model that was written; anything else is a fault.

    python tools/fuzz.py --count 2000 --seed 0

makes small models of every kind of weight, damages copies of their directories (bits, bytes, headers, JSON, files), reads them and prints a
table of what came of it. The same seed makes the same damage. With `--unverified` checksums are not compared, as for directories of earlier
versions: then another model is to be expected, but no traceback and no hang.
"""

import argparse
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import laconic as lc
from laconic.disk.store import MANIFEST
from laconic.disk.tensors import INDEX
from laconic.errors import LaconicError

SECONDS = 60  # after which a read counts as a hang
SCHEMES = {
    "dense": "Cast('float16')", "uniform": "RTN(4, 16)", "second level": "SpQR()", "entropy": "GPTQ(rate=3.0)", "codebook": "KMeans(bits=3)",
    "vectors": "GPTVQ(bits=2, dimension=2, codec='ans')", "sparse": "Magnitude(0.6) >> RTN(4, 'channel')", "2:4": "SparseGPT(pattern='2:4')",
    "blocks": "BlockPrune(0.5, block=(2, 4))", "lowrank": "LowRank(0.5)", "sum": "RTN(3, 16) + LowRank(2)", "rotated": "Hadamard(RTN(4, 16))",
    "scaled": "AWQ(bits=4, group=16)", "permuted": "GPTQ(bits=3, group=16, act_order=True)", "rounded": "SmoothQuant()",
    "static": "RoundInputs(RTN(4, 16), granularity='tensor', symmetric=False, range='mse')", "bias": "AFM(4)",
}  # fmt: skip
IDS = torch.tensor([[5, 9, 17, 30, 42, 7, 7, 25]])


@dataclass(frozen=True)
class Case:
    """A directory, how it is read (the values that must not change, by name), and those of the undamaged one."""

    name: str
    folder: Path
    read: Callable[[Path, bool], dict[str, Tensor]]
    expected: dict[str, Tensor]


class Net(nn.Module):
    """Three layers, a norm with buffers, a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.third = (
            nn.Linear(32, 32),
            nn.BatchNorm1d(32),
            nn.Linear(32, 32),
            nn.Linear(32, 16),
        )
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(self.second(self.norm(self.first(x)).relu()))
        return out


def made(seed: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()


def read_net(folder: Path, verify: bool = True) -> dict[str, Tensor]:
    net = made(1)
    lc.load_into(net, folder, verify=verify)
    with torch.no_grad():
        values = {"output": net.eval()(torch.linspace(-1, 1, 96).view(3, 32)), "norm": net.norm.running_mean.clone()}
        for name in ("first", "second", "third"):
            values |= {
                f"{name}.weight": getattr(net, name).weight.detach().clone(),
                f"{name}.bias": getattr(net, name).bias.detach().clone(),
            }
    return values


def read_lm(folder: Path, verify: bool = True) -> dict[str, Tensor]:
    return _values(lc.load(folder, dtype=torch.float32, verify=verify))


def read_with_transformers(folder: Path, verify: bool = True) -> dict[str, Tensor]:
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config["verify"] = verify
    return _values(transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32))


def _values(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model(IDS).logits, **{name: tensor.clone() for name, tensor in model.state_dict().items()}}


def cases(root: Path) -> list[Case]:
    """The undamaged directories: a net for every kind of weight, language models in one file and in several."""
    found = []
    X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    for name, scheme in SCHEMES.items():
        net, folder = made(0), root / f"net-{name.replace(' ', '-').replace(':', '-')}"
        lc.compress(net, scheme, [X])
        lc.save(net, folder)
        found.append(Case(name, folder, read_net, read_net(folder)))
    for name, folder in language_models(root):
        found.append(Case(name, folder, read_lm, read_lm(folder)))
        found.append(Case(f"{name}, transformers", folder, read_with_transformers, read_with_transformers(folder)))
    return found


def language_models(root: Path) -> Iterator[tuple[str, Path]]:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(root / "original")
    lc.compress(root / "original", "RTN(4, 16)", out=root / "lm", evaluate=False)
    yield "lm", root / "lm"
    yield "lm in shards", split(root / "lm", root / "lm-shards")


def split(source: Path, out: Path) -> Path:
    """The same model in two files and an index."""
    from safetensors.torch import load_file, save_file

    from laconic.disk.store import read_manifest, write_manifest

    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, out / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_manifest(out, read_manifest(out), config=True)
    return out


# ---------------------------------------------------------------------------------------------------------------------- damage
Damage = Callable[[Path, random.Random], None]


def flip_payload(folder: Path, rng: random.Random) -> None:
    file = weights_file(folder, rng)
    data = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.choice((1, 1, 2, 9))):
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def flip_header(folder: Path, rng: random.Random) -> None:
    file = weights_file(folder, rng)
    data = bytearray(file.read_bytes())
    data[rng.randrange(8 + struct.unpack("<Q", data[:8])[0])] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def flip_json(folder: Path, rng: random.Random) -> None:
    file = json_file(folder, rng)
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(folder: Path, rng: random.Random) -> None:
    file = any_file(folder, rng)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def extend(folder: Path, rng: random.Random) -> None:
    file = any_file(folder, rng)
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 64)))


def zero_run(folder: Path, rng: random.Random) -> None:
    file = any_file(folder, rng)
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    file.write_bytes(data)


def swap_tensors(folder: Path, rng: random.Random) -> None:
    file = weights_file(folder, rng)
    header, payload = read_header(file)
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2)
    alike = [name for name in names if name != one and _size(header[name]) == _size(header[one])]
    other = rng.choice(alike) if alike else other
    header[one], header[other] = header[other], header[one]
    write_header(file, header, payload)


def edit_header(folder: Path, rng: random.Random) -> None:
    file = weights_file(folder, rng)
    header, payload = read_header(file)
    edit(header, rng)
    write_header(file, header, payload)


def edit_json(folder: Path, rng: random.Random) -> None:
    file = json_file(folder, rng)
    value = json.loads(file.read_text())
    edit(value, rng)
    file.write_text(json.dumps(value))


def twice(folder: Path, rng: random.Random) -> None:
    """A key of an object comes a second time, with another value."""
    file = json_file(folder, rng)
    text = file.read_text()
    key = rng.choice(list(json.loads(text)))
    file.write_text(text.rstrip()[:-1].rstrip() + f", {json.dumps(key)}: {rng.choice(['0', '{}', '[]', 'null'])}}}")


def nest(folder: Path, rng: random.Random) -> None:
    """A value becomes a deep one."""
    file, depth = json_file(folder, rng), rng.choice((20, 500, 100_000))
    text = file.read_text()
    key = rng.choice(list(json.loads(text)))
    file.write_text(text.rstrip()[:-1].rstrip() + f', "{key}2": {"[" * depth}{"]" * depth}}}')


def drop(folder: Path, rng: random.Random) -> None:
    any_file(folder, rng).unlink()


def empty(folder: Path, rng: random.Random) -> None:
    any_file(folder, rng).write_bytes(b"")


def exchange(folder: Path, rng: random.Random) -> None:
    """Two files have each other's content."""
    one, other = rng.sample([file for file in sorted(folder.iterdir()) if file.is_file()], 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def another_kind(folder: Path, rng: random.Random) -> None:
    """A folder, or a link to nothing, to itself or to another file, in a file's place."""
    file = any_file(folder, rng)
    others = [other for other in sorted(folder.iterdir()) if other != file]
    file.unlink()
    target = rng.choice([None, folder / "nowhere", file, *others])
    if target is None:
        file.mkdir()
    else:
        file.symlink_to(target)


def more(folder: Path, rng: random.Random) -> None:
    """Files beside the model's."""
    name = rng.choice(
        (
            "notes.txt",
            "consolidated.safetensors",
            INDEX,
            "pytorch_model.bin",
            "model.safetensors.tmp",
            "adapter_config.txt",
        )
    )
    if not (folder / name).exists():
        (folder / name).write_bytes(rng.choice((b"{}", b'{"weight_map": {"x": "y.safetensors"}}', rng.randbytes(64))))


DAMAGES: dict[str, tuple[Damage, int]] = {
    "payload bits": (flip_payload, 5),
    "header bits": (flip_header, 3), "JSON bits": (flip_json, 4), "truncated": (truncate, 2), "longer": (extend, 1),
    "zeros": (zero_run, 1), "tensors swapped": (swap_tensors, 2), "header edited": (edit_header, 3), "JSON edited": (edit_json, 5),
    "key twice": (twice, 1), "deep JSON": (nest, 1), "file dropped": (drop, 1), "file emptied": (empty, 1), "files exchanged": (exchange, 1),
    "folder or link": (another_kind, 1), "file added": (more, 1),
}  # fmt: skip
"""What is done to a directory, and how often among all."""


def any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(
        [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("report")]
    )


def weights_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def json_file(folder: Path, rng: random.Random) -> Path:
    names = (MANIFEST, MANIFEST, INDEX, "config.json", "generation_config.json")
    return folder / rng.choice([name for name in names if (folder / name).is_file()])


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(file: Path, header: dict[str, Any], payload: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def _size(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["dtype"], entry["shape"]


def edit(value: Any, rng: random.Random) -> None:
    """One leaf, or one key, of nested values becomes another."""
    places = list(_places(value))
    holder, key = rng.choice(places)
    old = holder[key]
    what = rng.randrange(6)
    if what == 0 and isinstance(holder, dict):
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif isinstance(old, bool) or old is None:
        holder[key] = rng.choice((not old, 1, "true", []))
    elif isinstance(old, int | float):
        holder[key] = rng.choice(
            (old + 1, old - 1, -old, 0, old * 2, 2**31, 2**63, 10**30, 1e300, float("nan"), str(old), None, [old], True)
        )
    elif isinstance(old, str):
        holder[key] = rng.choice(
            (old + "x", old[:-1], "", old.upper(), "../" + old, "\0", "a" * 10_000, 7, None, [old])
        )
    else:
        holder[key] = rng.choice((None, 0, "x", [], {}, [old], {"x": old}))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


# ---------------------------------------------------------------------------------------------------------------------- judgement
def judge(case: Case, folder: Path, verify: bool) -> tuple[str, str]:
    """What comes of reading a damaged directory: 'refused', 'same', 'OTHER', 'TRACEBACK' or 'HANG', and what was said."""
    own = case.read is not read_with_transformers
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        found = case.read(folder, verify)
    except LaconicError as error:
        return "refused", str(error)
    except _Late:
        return "HANG", ""
    except Exception as error:  # noqa: BLE001 # which is what is looked for
        # what transformers raises before it asks us is its own
        return ("TRACEBACK" if own else "refused"), f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    alike = found.keys() == case.expected.keys()
    same = alike and all(_equal(found[name], value) for name, value in case.expected.items())
    return ("same" if same else "OTHER" if verify else "other"), ""


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


class _Late(BaseException):
    """A read takes too long."""


def _late(*_: Any) -> None:
    raise _Late


def run(
    count: int, seed: int, root: Path, *, verify: bool = True, only: str | None = None
) -> list[tuple[str, str, str, str, int]]:
    """Damage and read `count` directories; returns (damage, case, outcome, message, number) of each."""
    rng = random.Random(seed)
    known = cases(root)
    names = [name for name, (_, weight) in DAMAGES.items() for _ in range(weight)]
    found = []
    for number in range(count):
        own = random.Random(rng.getrandbits(64))
        case, damage = own.choice(known), own.choice(names)
        if only is not None and str(number) != only:
            continue
        copy = root / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(case.folder, copy)
        DAMAGES[damage][0](copy, own)
        found.append((damage, case.name, *judge(case, copy, verify), number))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the number of one damage, to look at it")
    parser.add_argument("--unverified", action="store_true", help="read without comparing checksums")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        results = run(options.count, options.seed, Path(root), verify=not options.unverified, only=options.only)
    outcomes = ("refused", "same", "other", "OTHER", "TRACEBACK", "HANG")
    table = Counter((damage, outcome) for damage, _, outcome, _, _ in results)
    lines = [f"{'':18}" + "".join(f"{outcome:>11}" for outcome in outcomes)]
    lines += [f"{damage:18}" + "".join(f"{table[damage, outcome]:11}" for outcome in outcomes) for damage in DAMAGES]
    lines += [f"{'all':18}" + "".join(f"{sum(table[d, outcome] for d in DAMAGES):11}" for outcome in outcomes)]
    faults = [row for row in results if row[2].isupper()]
    lines += [
        f"{number}: {damage} in {case}: {outcome} {message[:300]}" for damage, case, outcome, message, number in faults
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.only is not None:
        sys.stdout.write("".join(f"{row}\n" for row in results))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
