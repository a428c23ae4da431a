"""The transformer block that families share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention through PyTorch's fused kernels.

    Without `key_bias` queries and values have biases of their own and keys have none, as in BEiT (Bao et al. 2022).
    """

    def __init__(self, dim: int, num_heads: int, key_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (B, N, D), each (B, heads, N, D / heads)."""
        batch, num, dim = x.shape
        if self.q_bias is None or self.v_bias is None:
            rows = self.qkv(x)
        else:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            rows = functional.linear(x, self.qkv.weight, bias)
        q, k, v = rows.view(batch, num, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def weights(self, x: Tensor) -> Tensor:
        """(B, heads, N, N) how much each token takes from each other: what the fused kernels never hold, for pictures."""
        q, k, _ = self.split(x)
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `keys` (B, N) bool: which tokens may be attended to, None = all."""
        q, k, v = self.split(x)
        mask = None if keys is None else keys[:, None, None, :]
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Pre-norm transformer block (ViT, Dosovitskiy et al. 2021): attention and a GELU network, 4 times as wide if not said."""

    def __init__(
        self, dim: int, num_heads: int, eps: float = 1e-6, mlp_dim: int | None = None, key_bias: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, key_bias)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.fc1 = nn.Linear(dim, mlp_dim or 4 * dim)
        self.fc2 = nn.Linear(mlp_dim or 4 * dim, dim)

    def forward(self, x: Tensor, keys: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `kept` (2, B, 1, 1): what each branch is multiplied by, for stochastic depth."""
        branch = self.attn(self.norm1(x), keys)
        x = x + (branch if kept is None else kept[0] * branch)
        branch = self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return x + (branch if kept is None else kept[1] * branch)


def initialise(module: nn.Module) -> None:
    """Xavier-uniform for linear layers, zero biases, as MAE has it."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
