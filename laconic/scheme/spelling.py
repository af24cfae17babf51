"""What other tools and papers call a way to compress, in our words: the scheme nearest to a name that is none of
ours."""

import re

_NAMES: tuple[tuple[str, str], ...] = (
    (r"w(?P<w>[2-8])a16.*", "GPTQ(bits={w}, group=128)"),
    (r"w(?P<w>[2-8])a(?P<a>[2-9]|1[0-5]).*", "SmoothQuant(bits={w}, activations={a})"),
    (r"(bnb|bitsandbytes|load_in)?(nf|fp)4(bit)?", "KMeans(bits=4)"),
    (r"(bnb|bitsandbytes|load_in)?u?int8(wo|dq)?|8bits?|llmint8|fp8.*|float8.*|q8(0|1|k)?|8", "RTN(bits=8)"),
    (
        r"(bnb|bitsandbytes|load_in)?u?int(?P<w>[2-7])(wo|g\d+)?|(?P<v>[2-7])bits?|load_in(?P<u>[2-7])bit|(?P<t>[2-7])",
        "GPTQ(bits={w}, group=64)",
    ),
    (r"i?q(?P<w>[2-6])(k|k[sml]|[01]|xxs|xs|[sm]|nl)?|exl[23]|(?P<r>[1-7]\.\d+)(bpw|bits?)?", "GPTQ(rate={w}.25)"),
    (r"b?fp?16|half|(b?float)16", "Cast('bfloat16')"),
    (r"(auto)?gptq|gptqmodel|optq|obq|quant(ize|ization|ized)?|compress", "GPTQ(bits=4, group=64)"),
    (r"(auto)?awq|llmawq", "AWQ(bits=4, group=64)"),
    (r"rtn|hqq|quanto|round(tonearest|ing)?|minmax", "RTN(bits=4, group=64)"),
    (r"squeezellm|cluster(s|ing)?", "KMeans(bits=4, weights='fisher')"),
    (r"quip(sharp)?|quarot|spinquant|hadamard|rotation", "Hadamard(method=GPTQ(bits=3))"),
    (r"vptq|vq|vector(quantization)?|aqlm", "GPTVQ(bits=8, dimension=4)"),
    (r"(?P<n>\d+):(?P<m>\d+)(sparse|sparsity)?", "SparseGPT(pattern='{n}:{m}')"),
    (r"prun(e|ing)|spars(e|ity)|unstructured|(?P<p>[1-9]\d?)%", "Magnitude(sparsity=0.5) >> RTN(bits=4)"),
    (r"svd|lora|lord", "LowRank(rank=0.5, weighted=True)"),
    (r"afm|atomicfeaturemimicking", "AFM(rank=0.5)"),
)


def scheme_called(text: str) -> str | None:
    """The scheme nearest to a name such as "W4A16", "nf4", "q4_k_m", "2:4" or "awq", or None for what is no such
    name."""
    word = re.sub(r"[\s_\-#'\"]+", "", text).lower()
    if len(word) > 40:
        return None
    for pattern, scheme in _NAMES:
        found = re.fullmatch(pattern, word)
        if found is None:
            continue
        given = {name: value for name, value in found.groupdict().items() if value is not None}
        if "r" in given:
            return f"GPTQ(rate={given['r']})"
        width = given.get("w") or given.get("v") or given.get("u") or given.get("t") or "4"
        return scheme.format(**given | {"w": width})
    return None
