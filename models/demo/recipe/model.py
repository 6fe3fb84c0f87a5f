"""The decoder as PyTorch sees it while training: Qwen3's architecture, small.

Norms on the heads of q and k keep large steps stable; the embedding table is also the output projection.
"""
import torch
import torch.nn.functional as F
from torch import nn

from tokens import VOCAB

HIDDEN, LAYERS, HEADS, HEAD_DIM, FFN = 128, 4, 4, 32, 320
KV_HEADS = HEADS  # sharing them saves nothing that matters here
ROPE_THETA, NORM_EPS = 10_000.0, 1e-6


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_norm, self.post_norm = nn.RMSNorm(HIDDEN, NORM_EPS), nn.RMSNorm(HIDDEN, NORM_EPS)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM, NORM_EPS), nn.RMSNorm(HEAD_DIM, NORM_EPS)
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 2 * FFN, bias=False)
        self.down = nn.Linear(FFN, HIDDEN, bias=False)
        # Matrices that share storage, as rows of it.
        self.qkv.weight.parts = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
        self.gate_up.weight.parts = [FFN, FFN]

    def forward(self, x, cos, sin):
        batch, tokens, _ = x.shape
        heads = self.qkv(self.input_norm(x)).view(batch, tokens, HEADS + 2 * KV_HEADS, HEAD_DIM).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, HEADS * HEAD_DIM))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, NORM_EPS)
        nn.init.normal_(self.embed.weight, std=0.08)
        for layer in self.layers:
            nn.init.zeros_(layer.out.weight)
            nn.init.zeros_(layer.down.weight)

    def features(self, ids):
        """Normed features of every token; times `embed.weight` they are logits."""
        at = torch.arange(ids.shape[1], dtype=torch.float32)
        angles = at[:, None] * ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def loss(self, ids, is_answer):
        """Mean cross entropy of the answers' tokens, and how many of them are the likeliest token."""
        features = self.features(ids[:, :-1])[is_answer[:, 1:]]
        logits = features @ self.embed.weight.T
        targets = ids[:, 1:][is_answer[:, 1:]]
        return F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean()
