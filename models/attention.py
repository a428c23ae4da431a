"""The transformer block that families share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention through PyTorch's fused kernels."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (B, N, D), each (B, heads, N, D / heads)."""
        batch, num, dim = x.shape
        q, k, v = self.qkv(x).view(batch, num, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
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
    """Pre-norm transformer block (ViT, Dosovitskiy et al. 2021): attention and a GELU network of 4 times the width."""

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attn(self.norm1(x), keys)
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


def initialise(module: nn.Module) -> None:
    """Xavier-uniform for linear layers, zero biases, as MAE has it."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
