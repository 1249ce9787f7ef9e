"""A GPT in nanoGPT's manner: GPT-2's architecture, no more than training it needs.

Nothing in this file knows of Burnish: it is what a user brings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT: `context` is the most tokens that it looks at, `dropout` a probability."""

    num_layers: int
    num_heads: int
    width: int
    context: int
    vocab_size: int
    dropout: float = 0.0


PRESETS = {
    "tiny": GPTConfig(num_layers=4, num_heads=4, width=128, context=128, vocab_size=1024),
    "small": GPTConfig(num_layers=6, num_heads=6, width=384, context=256, vocab_size=1024),
    # 50257 tokens of GPT-2, and as many more as make a multiple of 64, for the matrix units.
    "gpt2-124m": GPTConfig(num_layers=12, num_heads=12, width=768, context=1024, vocab_size=50304),
}


class Attention(nn.Module):
    """Causal attention, (B, T, width) -> (B, T, width), of q, k and v from one product."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.num_heads, -1).transpose(1, 2) for part in self.qkv(x).split(width, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.resid_dropout(self.proj(y.transpose(1, 2).reshape(batch, tokens, width)))


class MLP(nn.Module):
    """Linear, GELU, linear, (B, T, width) -> (B, T, width)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.width, 4 * config.width)
        self.proj = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(F.gelu(self.fc(x))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.width), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.width), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids and the tokens that follow them, (B, T) and (B, T) int64, to the mean cross entropy in nats.

    The loss is all that comes out, so that logits, (B * T, vocab_size), need not exist as a whole. The last product
    shares its weight with the embedding. Weights are drawn from torch's global generator.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.wte.weight
        self.apply(_initialize)
        for name, weight in self.named_parameters():
            if name.endswith("proj.weight"):  # GPT-2's: the sum of all branches starts with the variance of one
                nn.init.normal_(weight, std=0.02 / (2 * config.num_layers) ** 0.5)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, vocab_size)."""
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.ln_f(x))
        return logits


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def sample(
    model: GPT, ids: list[int], new_tokens: int, vocab_size: int, temperature: float, generator: torch.Generator
) -> list[int]:
    """`ids` and `new_tokens` more, each drawn by its probability among the first `vocab_size`; temperature > 0.

    The plainest loop: every token goes through the model again. `generator` is on the CPU.
    """
    device = model.wte.weight.device
    for _ in range(new_tokens):
        context = torch.tensor([ids[-model.config.context :]], device=device)
        logits = model.logits(context)[0, -1, :vocab_size].float().cpu()
        probabilities = torch.softmax(logits / temperature, dim=-1)
        ids = [*ids, int(torch.multinomial(probabilities, 1, generator=generator))]
    return ids
