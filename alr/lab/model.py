"""Two language models of plain nn.Linear, a GPT and an MLP over a fixed window.  They have never heard of rank.

Dims: B sequences, T tokens, C vocabulary size, H heads, D head size, E = d_model = H D, w window of the MLP.
Both map token ids (B, T) to logits (B, T, C), position t predicting token t + 1, so the same batches, loss and
evaluation serve both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..causal import evaluating


def _positive(config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{type(config).__name__}: {name} is {getattr(config, name)}; it must be at least 1.")


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; the defaults are script v10's."""

    vocab_size: int
    block_size: int = 256               # the longest sequence, in tokens
    n_layers: int = 6
    n_heads: int = 8
    d_model: int = 512
    d_ff: int = 2048
    dropout: float = 0.0                # on embeddings, attention weights and the output of both sublayers
    causal: bool = True                 # False: attention sees the tokens that it must predict (scripts v7 to v10)
    tied: bool = False                  # True: the head's weight is the token embedding's
    embed_std: float = 0.02             # of the embeddings at the start; GPT-2's

    def __post_init__(self):
        _positive(self, "vocab_size", "block_size", "n_layers", "n_heads", "d_model", "d_ff")
        if self.d_model % self.n_heads:
            raise ValueError(f"GPTConfig: d_model {self.d_model} is not divisible by n_heads {self.n_heads}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout is {self.dropout}; it must be in [0, 1).")


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of an MLP language model: two hidden layers of 512, as the MLP of scripts v1 to v6 (there on images)."""

    vocab_size: int
    block_size: int = 8                 # the window: how many tokens the prediction sees
    d_embed: int = 64                   # ours
    d_hidden: int = 512                 # scripts v1 to v6

    def __post_init__(self):
        _positive(self, "vocab_size", "block_size", "d_embed", "d_hidden")


class LanguageModel(nn.Module):
    """What both models share: a `config`, and `generate`."""

    config: GPTConfig | MLPConfig

    def generate(self, tokens: Tensor, n: int, temperature: float = 1.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> Tensor:
        """Go on writing: (B, T) -> (B, T + n), each new token drawn from the model's prediction.

        temperature divides the logits; 0 takes the likeliest token.  top_k: draw among the k likeliest only.  The model
        sees the last block_size tokens, in eval mode, and is left in the mode it was in.  generator: torch's global one
        if not said.  ValueError for an empty prompt, a negative n or temperature, top_k below 1.
        """
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"generate: tokens of shape {tuple(tokens.shape)}; wanted (B, T) with T of at least 1.")
        if n < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"generate: n={n}, temperature={temperature}, top_k={top_k}; wanted n >= 0, "
                             "temperature >= 0 and top_k >= 1 or None.")
        with evaluating(self):
            for _ in range(n):
                logits = self(tokens[:, -self.config.block_size:])[:, -1].float()           # (B, C)
                if temperature == 0:
                    new = logits.argmax(-1, keepdim=True)                                   # (B, 1)
                else:
                    logits = logits / temperature
                    if top_k is not None and top_k < logits.shape[-1]:
                        least = logits.topk(top_k).values[:, -1:]                           # (B, 1)
                        logits = logits.masked_fill(logits < least, -torch.inf)
                    new = torch.multinomial(logits.softmax(-1), 1, generator=generator)     # (B, 1)
                tokens = torch.cat((tokens, new), 1)                                        # (B, T + 1)
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention; q, k, v, o are (E, E) without bias: a factorised one is U V and nothing else."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        E = config.d_model
        self.q, self.k, self.v, self.o = (nn.Linear(E, E, bias=False) for _ in range(4))
        self.n_heads, self.dropout, self.causal = config.n_heads, config.dropout, config.causal

    def forward(self, x: Tensor) -> Tensor:
        B, T, E = x.shape
        # heads come before time: attention is over the last two dims, and (B, T, H, D) would attend over heads (v7)
        q, k, v = (f(x).view(B, T, self.n_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0,
                                           is_causal=self.causal)                           # (B, H, T, D)
        y = self.o(y.transpose(1, 2).reshape(B, T, E))                                      # (B, T, E)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """E -> d_ff -> E with GELU, no bias."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training)        # (B, T, E)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(config.d_model), Attention(config)
        self.ln2, self.mlp = nn.LayerNorm(config.d_model), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))                                                      # (B, T, E)
        return x + self.mlp(self.ln2(x))                                                    # (B, T, E)


class GPT(LanguageModel):
    """A GPT: learned positions, pre-norm blocks, GELU, SDPA attention, no bias in any linear layer.

    Starts: embeddings N(0, embed_std^2), linear layers as torch starts an nn.Linear (uniform, variance 1 / (3 n)).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.block_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, 0.0, config.embed_std)
        if config.tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, C).  ValueError when T is above block_size."""
        B, T = tokens.shape
        if T > self.config.block_size:
            raise ValueError(f"GPT: {T} tokens in a sequence; the model was made for at most {self.config.block_size}.")
        x = self.wte(tokens) + self.wpe(torch.arange(T, device=tokens.device))              # (B, T, E)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)                                                                    # (B, T, E)
        return self.head(self.ln_f(x))                                                      # (B, T, C)


class MLPLM(LanguageModel):
    """An MLP that predicts the next token from the last w: embeddings side by side, two hidden ReLU layers, a head.

    Positions before the first token are zero vectors.  Starts as the GPT does.
    """

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_embed)
        self.fc1 = nn.Linear(config.block_size * config.d_embed, config.d_hidden, bias=False)
        self.fc2 = nn.Linear(config.d_hidden, config.d_hidden, bias=False)
        self.head = nn.Linear(config.d_hidden, config.vocab_size, bias=False)
        nn.init.normal_(self.wte.weight, 0.0, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T), T of any length -> logits (B, T, C); position t sees tokens t - w + 1 to t."""
        w = self.config.block_size
        x = F.pad(self.wte(tokens), (0, 0, w - 1, 0))                                       # (B, w - 1 + T, d_embed)
        x = x.unfold(1, w, 1).transpose(2, 3).flatten(2)                                    # (B, T, w d_embed)
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))                             # (B, T, C)


def block_linears(name: str) -> bool:
    """The `where` of factorize_ for both models: every linear layer but the head."""
    return name.split(".")[-1] != "head"


def count_parameters(model: nn.Module) -> dict[str, int]:
    """How many numbers the model holds now: {"blocks", "embedding", "head", "total"}.  Recounted at every call.

    embedding: what sits in an nn.Embedding; head: what is named so; blocks: all else, norms included.  A shared tensor
    counts once, where it appears first: a tied head is part of the embedding and 0 here.
    """
    tables = {id(p) for mod in model.modules() if isinstance(mod, nn.Embedding) for p in mod.parameters(recurse=False)}
    count = {"blocks": 0, "embedding": 0, "head": 0}
    for name, p in model.named_parameters():                        # each tensor once
        part = "embedding" if id(p) in tables else "head" if "head" in name.split(".") else "blocks"
        count[part] += p.numel()
    return count | {"total": sum(count.values())}
