"""Every call that multiplies by what may be a weight: which operand that is, which of its dimensions are summed, and
what it is fed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """One product W x, with the operand `w` that may be a weight as the call was given it.

    `batch`, `rows` and `columns` are the dimensions of w that number matrices, that the output has, and that are summed
    over. `inputs()` is X [batch or 1, tokens, in], of a look-up the rows [1, tokens, 1] as integers; `outputs(y)`
    brings the call's result, or its gradient, to [batch or 1, tokens, out].
    """

    w: Tensor
    batch: Dims
    rows: Dims
    columns: Dims
    inputs: Callable[[], Tensor] = field(compare=False)
    outputs: Callable[[Tensor], Tensor] = field(compare=False)
    kind: Literal["product", "convolution", "lookup"] = "product"
    groups: int = 1


def products(func: Any, args: Any, kwargs: Any) -> list[Product]:
    """The products of a call, one for each operand that may be a weight; none of a call that multiplies nothing."""
    read = _READERS.get(func)
    return read(*args, **kwargs) if read is not None else []


def _linear(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Product]:
    if weight.dim() != 2:
        return []
    return [Product(weight, (), rows=(0,), columns=(1,), inputs=lambda: _flat(input.detach()), outputs=_flat)]


def _matmul(input: Tensor, other: Tensor | None = None, *, mat2: Tensor | None = None, **_: Any) -> list[Product]:
    """a @ b with the weight on the right (x W), and with the weight on the left (W x)."""
    b = other if other is not None else mat2
    if not (isinstance(input, Tensor) and isinstance(b, Tensor)):
        return []
    found = [_on_the_right(input, b)] if b.dim() >= 2 else []
    return [*found, _on_the_left(input, b)] if input.dim() >= 2 else found


def _on_the_right(x: Tensor, w: Tensor) -> Product:
    matrices, vector = _matrices(w), x.dim() == 1

    def inputs() -> Tensor:
        return _grouped(x.detach().unsqueeze(0) if vector else x.detach(), matrices)

    return Product(
        w,
        _numbering(w),
        rows=(w.dim() - 1,),
        columns=(w.dim() - 2,),
        inputs=inputs,
        outputs=lambda y: _grouped(y.unsqueeze(-2) if vector else y, matrices),
    )


def _on_the_left(w: Tensor, x: Tensor) -> Product:
    matrices, vector = _matrices(w), x.dim() == 1

    def inputs() -> Tensor:
        return _grouped((x.detach().unsqueeze(-1) if vector else x.detach()).mT, matrices)

    return Product(
        w,
        _numbering(w),
        rows=(w.dim() - 2,),
        columns=(w.dim() - 1,),
        inputs=inputs,
        outputs=lambda y: _grouped((y.unsqueeze(-1) if vector else y).mT, matrices),
    )


def _reversed_matmul(other: Tensor, input: Tensor) -> list[Product]:
    return _matmul(input, other)


def _addmm(_: Tensor, mat1: Tensor | None = None, mat2: Tensor | None = None, **named: Any) -> list[Product]:
    # as `baddbmm` names them
    a, b = (given if given is not None else named.get(name) for given, name in ((mat1, "batch1"), (mat2, "batch2")))
    return _matmul(a, b) if isinstance(a, Tensor) else []


def _inner(input: Tensor, other: Tensor) -> list[Product]:
    return (
        [*_linear(input, other), *[_turned(product) for product in _linear(other, input)]]
        if min(input.dim(), other.dim()) == 2
        else []
    )


def _turned(product: Product) -> Product:
    return Product(
        product.w,
        (),
        rows=product.rows,
        columns=product.columns,
        inputs=product.inputs,
        outputs=lambda y: y.reshape(len(product.w), -1).mT.unsqueeze(0),
    )


def _grouped_mm(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> list[Product]:
    """Rows of x up to offs[e] with matrix e: torch's kernel for packed experts."""
    if offs is None:
        return _matmul(mat_a, mat_b)
    if mat_a.dim() != 2 or mat_b.dim() != 3:
        return []
    if mat_b.is_meta:
        return [
            Product(
                mat_b,
                (0,),
                rows=(2,),
                columns=(1,),
                inputs=lambda: mat_a.detach().unsqueeze(0),
                outputs=lambda y: y.unsqueeze(0),
            )
        ]
    ends = [0, *offs.tolist()]

    def of_expert(e: int) -> Product:
        own = slice(ends[e], ends[e + 1])
        return Product(
            mat_b[e],
            (),
            rows=(1,),
            columns=(0,),
            inputs=lambda: mat_a.detach()[own].unsqueeze(0),
            outputs=lambda y: y[own].unsqueeze(0),
        )

    return [of_expert(e) for e in range(len(mat_b))]


def _conv(
    input: Tensor,
    weight: Tensor,
    _: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    **__: Any,
) -> list[Product]:
    def inputs() -> Tensor:
        return _patches(input.detach(), weight, (stride, padding, dilation), groups)

    def outputs(y: Tensor) -> Tensor:
        return _flat(y.movedim(1 if y.dim() == weight.dim() else 0, -1))[0].unflatten(1, (groups, -1)).transpose(0, 1)

    return [
        Product(
            weight,
            (),
            rows=(0,),
            columns=tuple(range(1, weight.dim())),
            inputs=inputs,
            outputs=outputs,
            kind="convolution",
            groups=groups,
        )
    ]


def _lookup(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Product]:
    if weight.dim() != 2:
        return []
    return [
        Product(
            weight,
            (),
            rows=(0,),
            columns=(1,),
            inputs=lambda: input.detach().reshape(1, -1, 1),
            outputs=_flat,
            kind="lookup",
        )
    ]


def _einsum(equation: Any, *operands: Any, **_: Any) -> list[Product]:
    """Products of two operands written with letters, an ellipsis among them."""
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else list(operands)
    if (
        not isinstance(equation, str)
        or len(tensors) != 2
        or "->" not in equation
        or not all(isinstance(t, Tensor) for t in tensors)
    ):
        return []
    left, out = equation.replace(" ", "").split("->")
    terms, out = _without_ellipsis(left.split(","), out, tensors)
    if any(len(set(term)) != len(term) for term in (*terms, out)):
        return []
    return [
        product
        for i in (0, 1)
        if (product := _einsum_with(terms[i], terms[1 - i], out, tensors[i], tensors[1 - i])) is not None
    ]


def _without_ellipsis(terms: list[str], out: str, tensors: list[Tensor]) -> tuple[list[str], str]:
    """Letters of their own for the dimensions that "..." stands for."""
    spare = list(map(chr, range(0x100, 0x100 + 64)))
    most = max((t.dim() - len(term) + 3 for term, t in zip(terms, tensors, strict=True) if "..." in term), default=0)
    letters = "".join(spare[:most])
    counts = [t.dim() - len(term) + 3 for term, t in zip(terms, tensors, strict=True)]
    named = [term.replace("...", letters[most - n :] if n else "") for term, n in zip(terms, counts, strict=True)]
    return named, out.replace("...", letters)


def _einsum_with(of_w: str, of_x: str, out: str, w: Tensor, x: Tensor) -> Product | None:
    columns = [letter for letter in of_w if letter in of_x and letter not in out]
    batch = [letter for letter in of_w if letter in of_x and letter in out]
    rows = [letter for letter in of_w if letter not in of_x]
    tokens = [letter for letter in of_x if letter not in of_w]
    if not columns or not rows or any(letter not in out for letter in (*rows, *tokens)):
        return None

    def brought(t: Tensor, letters: str, last: list[str]) -> Tensor:
        """t with its letters as [batch, tokens, last]."""
        turned = t.permute([letters.index(letter) for letter in (*batch, *tokens, *last)])
        sizes = turned.shape
        return turned.reshape(sizes[: len(batch)].numel(), -1, sizes[len(batch) + len(tokens) :].numel())

    numbers, outs, ins = (tuple(of_w.index(letter) for letter in letters) for letters in (batch, rows, columns))
    return Product(
        w,
        numbers,
        rows=outs,
        columns=ins,
        inputs=lambda: brought(x.detach(), of_x, columns),
        outputs=lambda y: brought(y, out, rows),
    )


def _flat(t: Tensor) -> Tensor:
    """[..., n] as [1, tokens, n]."""
    return t.reshape(1, -1, t.shape[-1])


def _matrices(w: Tensor) -> Dims:
    """How many matrices w [..., a, b] holds along each of its first dimensions; one that is only expanded counts
    once.
    """
    return tuple(1 if w.stride(i) == 0 else w.shape[i] for i in range(w.dim() - 2))


def _numbering(w: Tensor) -> Dims:
    return tuple(i for i, n in enumerate(_matrices(w)) if n > 1)


def _grouped(t: Tensor, matrices: Dims) -> Tensor:
    """t [..., tokens, n] for matrices numbered by its last dimensions but two: [matrices, tokens, n], all else counting
    as tokens.
    """
    shape = torch.broadcast_shapes(t.shape[:-2], matrices)
    t = t.expand(*shape, *t.shape[-2:])
    numbers = [len(shape) - len(matrices) + i for i, n in enumerate(matrices) if n > 1]
    others = [i for i in range(len(shape)) if i not in numbers]
    count = 1
    for i in numbers:
        count *= shape[i]
    return t.permute(*numbers, *others, t.dim() - 2, t.dim() - 1).reshape(count, -1, t.shape[-1])


def _patches(x: Tensor, w: Tensor, how: tuple[Any, Any, Any], groups: int) -> Tensor:
    """The patches a convolution in any number of dimensions multiplies, [groups, patches, in / groups x kernel]."""
    kernel = tuple(w.shape[2:])
    x = x if x.dim() == w.dim() else x.unsqueeze(0)
    stride, padding, dilation = (_each(value, len(kernel)) for value in how)
    if isinstance(how[1], str):
        total = [d * (k - 1) if how[1] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
        padding = (0,) * len(kernel)
    if len(kernel) == 1:
        x, kernel, stride, padding, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    if len(kernel) == 2:
        unfolded = F.unfold(x, kernel, dilation, padding, stride)  # [batch, in x kernel, patches]
    else:
        windows = F.pad(x, [side for p in reversed(padding) for side in (p, p)])
        for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
            windows = windows.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
        outside = tuple(range(2, 2 + len(kernel)))
        inside = tuple(range(2 + len(kernel), 2 + 2 * len(kernel)))
        unfolded = windows.permute(0, 1, *inside, *outside).flatten(2 + len(kernel)).flatten(1, 1 + len(kernel))
    return unfolded.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    if isinstance(value, str):
        return (0,) * dimensions
    values = (value,) * dimensions if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


_READERS: dict[Any, Callable[..., list[Product]]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _reversed_matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.bmm: _matmul,
    torch.mv: _matmul,
    Tensor.mv: _matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.baddbmm: _addmm,
    Tensor.baddbmm: _addmm,
    torch.addmv: _addmm,
    torch.inner: _inner,
    torch.einsum: _einsum,
    torch._grouped_mm: _grouped_mm,
    F.grouped_mm: _grouped_mm,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    F.embedding: _lookup,
    F.embedding_bag: _lookup,
}


def _one_linear(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Any]:
    return input, weight, None


def _one_addmm(_: Tensor, mat1: Tensor, mat2: Tensor, **__: Any) -> tuple[Tensor, Tensor, Any]:
    return mat1, mat2, None


def _one_conv(
    input: Tensor,
    weight: Tensor,
    _: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *__: Any,
    **___: Any,
) -> tuple[Tensor, Tensor, Any]:
    return input, weight, (stride, padding, dilation)


def _one_lookup(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Any]:
    return input, weight, "lookup"


PRODUCTS: dict[Any, Callable[..., tuple[Tensor, Tensor, Any]]] = {
    F.linear: _one_linear,
    torch.addmm: _one_addmm,
    torch.matmul: _one_linear,
    Tensor.matmul: _one_linear,
    Tensor.__matmul__: _one_linear,
    torch.bmm: _one_linear,
    torch.mm: _one_linear,
    F.conv1d: _one_conv,
    F.conv2d: _one_conv,
    torch.conv1d: _one_conv,
    torch.conv2d: _one_conv,
    F.embedding: _one_lookup,
}
"""The calls that surgery follows: input, weight, and how (None, a convolution's stride, padding and dilation, or
"lookup").
"""
