"""Networks to cut: generated from a few words, with random statistics of norms, so that nothing is hidden by a zero."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """relu(F(x) + S(x)): S is the identity, or a 1x1 projection where width or stride change."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, 7, 3, stride, 1, bias=False), nn.BatchNorm2d(7)
        self.conv2, self.bn2 = nn.Conv2d(7, after, 3, 1, 1), nn.BatchNorm2d(after)
        plain = before == after and stride == 1
        self.shortcut = (
            nn.Identity()
            if plain
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class PreActivation(nn.Module):
    """x + F(relu(bn(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 6, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class Dense(nn.Module):
    """Every layer reads everything before it."""

    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width + i * growth) for i in range(layers))
        self.convs = nn.ModuleList(
            nn.Conv2d(width + i * growth, growth, 3, 1, 1, bias=i % 2 == 0) for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return x


class Inception(nn.Module):
    """Branches of different kernel sizes, side by side."""

    def __init__(self, width: int, after: int) -> None:
        super().__init__()
        a, b = after // 3, after // 3
        self.one, self.three = (
            nn.Conv2d(width, a, 1),
            nn.Sequential(nn.Conv2d(width, 4, 1), nn.SiLU(), nn.Conv2d(4, b, 3, 1, 1)),
        )
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(width, after - a - b, 1))
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(torch.cat([self.one(x), self.three(x), self.pooled(x)], 1)))


def separable(before: int, after: int, stride: int) -> nn.Module:
    """MobileNet: depthwise, then pointwise."""
    return nn.Sequential(
        nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False), nn.BatchNorm2d(before), nn.ReLU6(),
        nn.Conv2d(before, after, 1), nn.BatchNorm2d(after), nn.Hardswish(),
    )  # fmt: skip


def grouped(before: int, after: int) -> nn.Module:
    """ResNeXt's middle: 1x1, grouped 3x3 with more rows than columns per group, 1x1."""
    return nn.Sequential(
        nn.Conv2d(before, 8, 1),
        nn.PReLU(8),
        nn.Conv2d(8, 12, 3, 1, 1, groups=4),
        nn.GroupNorm(4, 12),
        nn.LeakyReLU(),
        nn.Conv2d(12, after, 1),
    )


KINDS = ("residual", "narrowing", "preactivation", "dense", "inception", "separable", "grouped")


def conv_net(kinds: tuple[str, ...], widths: tuple[int, ...], flatten: bool) -> nn.Module:
    """A stem, a block per word, and a classifier behind a flattened map or a mean."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    width, side = widths[0], 8
    for kind, after in zip(kinds, widths[1:], strict=True):
        if kind == "residual":
            layers.append(Residual(width, width, 1))
        elif kind == "preactivation":
            layers.append(PreActivation(width))
        elif kind == "dense":
            layers.append(Dense(width, 3, 2))
            width += 6
        else:
            stride = 2 if kind in ("narrowing", "separable") and side > 2 else 1
            side //= stride
            makers = {
                "narrowing": Residual(width, after, stride),
                "inception": Inception(width, after),
                "grouped": grouped(width, after),
            }
            layers.append(makers[kind] if kind in makers else separable(width, after, stride))
            width = after
    if flatten:
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 9), nn.GELU(), nn.Linear(9, 5)]
    else:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]
    return nn.Sequential(*layers)


class Attention(nn.Module):
    """Grouped-query attention. `fused`: one projection for all three; `sizes`: the module keeps and uses its number of heads."""

    def __init__(
        self, width: int, heads: int, groups: int, entries: int, fused: bool, sizes: bool, eager: bool
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.entries, self.repeats = heads, groups, entries, heads // groups
        self.fused, self.sizes, self.eager = fused, sizes, eager
        if fused:
            self.qkv = nn.Linear(width, 3 * heads * entries)
        else:
            self.q, self.k, self.v = (nn.Linear(width, n * entries, bias=n == heads) for n in (heads, groups, groups))
        self.o = nn.Linear(heads * entries, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        counts = (self.heads, self.kv_heads, self.kv_heads) if self.sizes else (-1, -1, -1)
        q, k, v = (z.view(b, t, n, self.entries).transpose(1, 2) for z, n in zip((q, k, v), counts, strict=True))
        if self.repeats > 1:
            k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
        if self.eager:
            y = torch.softmax(q @ k.transpose(-1, -2) / self.entries**0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Gated(nn.Module):
    """silu(gate) x value, in one projection or two."""

    def __init__(self, width: int, inner: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.up = nn.Linear(width, 2 * inner, bias=False)
        else:
            self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * value)


class Transformer(nn.Module):
    """Embedding, blocks of attention and a gated network behind norms, and a head."""

    def __init__(
        self, layers: int, heads: int, groups: int, fused: bool, sizes: bool, eager: bool, norm: type[nn.Module]
    ) -> None:
        super().__init__()
        width = 16
        self.embed = nn.Embedding(20, width)
        self.attention = nn.ModuleList(Attention(width, heads, groups, 4, fused, sizes, eager) for _ in range(layers))
        self.gated = nn.ModuleList(Gated(width, 10, fused) for _ in range(layers))
        self.norms = nn.ModuleList(norm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i, (attention, gated) in enumerate(zip(self.attention, self.gated, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + gated(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode with random weights, biases and statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise * (0.1 if tensor.dim() > 1 else 0.4))
    return model.eval()
