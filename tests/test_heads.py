"""Heads of attention go as a whole, with the numbers of them that modules remember; shuffled channels stay in place."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import apbm_core
from apbm_core.anatomy import Anatomy

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Self-attention, whose channels are told apart in several ways."""

    def __init__(self, how: str, width: int, heads: int, head_dim: int):
        super().__init__()
        self.how, self.num_heads, self.head_dim, self.inner = how, heads, head_dim, heads * head_dim
        self.qkv, self.leave = nn.Linear(width, 3 * self.inner), nn.Linear(self.inner, width)
        self.position = nn.Parameter(torch.randn(1, 16, 16, heads))

    def forward(self, x):
        n, tokens, _ = x.shape
        y = self.qkv(x)
        if self.how == "last":
            y = y.reshape(n, tokens, self.num_heads, 3 * self.head_dim).transpose(1, 2)
            q, k, v = y.split([self.head_dim] * 3, dim=3)
        elif self.how == "chunks":
            q, k, v = (part.view(n, tokens, self.num_heads, -1).transpose(1, 2) for part in y.chunk(3, -1))
        else:
            y = y.reshape(n, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = y.unbind(0)
        if self.how == "products":
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5 + self.position.permute(0, 3, 1, 2)
            z = scores.softmax(-1) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v)
        return self.leave(z.transpose(1, 2).reshape(n, tokens, self.inner))


class Transformer(nn.Module):
    def __init__(self, how: str, heads: int, head_dim: int, width: int = 24):
        super().__init__()
        self.patches, self.positions = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 16, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.ModuleList(Attention(how, width, heads, head_dim) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for norm, attention in zip(self.norms, self.attention, strict=True):
            x = x + attention(norm(x))
        return self.head(x.mean(1))


def parts_of_head(how: str, heads: int, width: int, head: int) -> list[int]:
    """The channels of queries, keys and values that belong to a head."""
    if how == "last":
        return list(range(head * 3 * width, (head + 1) * 3 * width))
    return [part * heads * width + head * width + i for part in range(3) for i in range(width)]


@pytest.mark.parametrize(("heads", "width"), [(4, 6), (3, 8), (4, 4)])
@pytest.mark.parametrize("how", ["sdpa", "products", "last", "chunks"])
def test_a_network_without_some_heads_is_the_dense_one_whose_heads_give_nothing(how, heads, width):
    torch.manual_seed(0)
    model = Transformer(how, heads, width).eval()
    reasons = apbm_core.why_not_prunable(model, IMAGES, groups=True)
    assert [layer for layer, reason in reasons.items() if reason] == ["head"]
    kept, gone = [0, 2], [head for head in range(heads) if head not in (0, 2)]
    channels = sorted(sum((parts_of_head(how, heads, width, head) for head in kept), []))
    small = apbm_core.slim(model, IMAGES, {"attention.0.qkv": channels}, groups=True)
    assert (small.attention[0].num_heads, small.attention[0].head_dim, small.attention[0].inner) == (
        2,
        width,
        2 * width,
    )
    assert (small.attention[1].num_heads, model.attention[0].num_heads) == (heads, heads)
    assert small.attention[0].leave.in_features == 2 * width

    def nothing(_module, inputs):
        x = inputs[0].clone()
        for head in gone:
            x[..., head * width : (head + 1) * width] = 0
        return (x,)

    model.attention[0].leave.register_forward_pre_hook(nothing)
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_heads_are_fused_and_the_compact_network_computes_the_same():
    torch.manual_seed(0)
    model = Transformer("sdpa", 4, 6)
    fused = apbm_core.fuse(model, IMAGES, 0.5)
    fused(IMAGES).square().mean().backward()
    apbm_core.rescore(fused, progress=0.3)
    net = apbm_core.compact(fused.eval())
    assert [attention.num_heads for attention in net.attention] == [2, 2] and net.patches.out_channels == 12
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), fused(IMAGES), rtol=1e-4, atol=1e-5)


class Derived(Attention):
    """Works out how many heads there are from the width of what comes in."""

    def forward(self, x):
        self.num_heads = x.shape[-1] // self.head_dim
        return super().forward(x)


def test_where_the_number_of_heads_is_worked_out_they_stay():
    torch.manual_seed(0)
    model = Transformer("sdpa", 4, 6)
    model.attention[0] = Derived("sdpa", 24, 4, 6)
    reasons = apbm_core.why_not_prunable(model, IMAGES, groups=True)
    assert reasons["attention.0.qkv"] and reasons["attention.1.qkv"] is None


class Shuffled(nn.Module):
    def __init__(self, groups: int):
        super().__init__()
        self.groups, self.enter = groups, nn.Conv2d(3, 24, 1)
        self.first, self.second = nn.Conv2d(24, 24, 1, groups=groups), nn.Conv2d(24, 24, 1)
        self.head = nn.Conv2d(24, 2, 1)

    def forward(self, x):
        y = self.first(self.enter(x).relu())
        n, c, h, w = y.shape
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.second(y))


@pytest.mark.parametrize("groups", [2, 4])
def test_of_shuffled_channels_one_in_each_group_goes(groups):
    torch.manual_seed(0)
    model, size = Shuffled(groups).eval(), 24 // groups
    assert [layer for layer, why in apbm_core.why_not_prunable(model, IMAGES, groups=True).items() if why] == ["head"]
    units = Anatomy(model, IMAGES, True).groups["first"].layers["first"]
    assert units.tolist() == [[place + group * size for group in range(groups)] for place in range(size)]
    kept = sorted(units[[0, 2, 5]].flatten().tolist())
    small = apbm_core.slim(model, IMAGES, {"first": kept}, groups=True)
    gone = [channel for channel in range(24) if channel not in kept]

    def nothing(_module, _inputs, output):
        return output.index_fill(1, torch.tensor(gone), 0.0)

    model.first.register_forward_hook(nothing)
    model.second.bias.data, small.second.bias.data = torch.zeros(24), torch.zeros_like(small.second.bias.data)
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
