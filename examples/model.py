"""The small models of the examples: a stack of Mesa layers, or of the same layers without the solve."""

import torch
import torch.nn.functional as F
from torch import nn

from mesa_ext import MesaState
from mesa_ext.nn import MesaLayer

CHUNK = 64


def linear_attention(q, k, v, g, beta, h_kv):
    """o_t = G_t' q_t with the G_t of mesa_attention, chunk by chunk in plain PyTorch -> o, final G."""
    tokens, outputs = q.shape[1], []
    q, k, v = (a.transpose(1, 2).to(h_kv.dtype) for a in (q, k, v))  # [B, H, T, ...]
    g, beta = g.transpose(1, 2), beta.transpose(1, 2)
    for start in range(0, tokens, CHUNK):
        qc, kc, vc, gc, bc = (a[:, :, start : start + CHUNK] for a in (q, k, v, g, beta))
        gc = gc.cumsum(-1)
        mask = (gc.unsqueeze(-1) - gc.unsqueeze(-2)).tril().exp().tril() * bc.unsqueeze(-2)
        outputs.append(gc.exp().unsqueeze(-1) * (qc @ h_kv) + (qc @ kc.mT * mask) @ vc)
        written = (gc[..., -1:] - gc).exp() * bc
        h_kv = gc[..., -1].exp()[..., None, None] * h_kv + (kc * written.unsqueeze(-1)).mT @ vc
    return torch.cat(outputs, 2).transpose(1, 2).to(beta.dtype), h_kv


class LinearAttentionLayer(MesaLayer):
    """MesaLayer with the query itself in the place of the solution: plain gated linear attention."""

    def attend(self, q, k, v, g, beta, lamb, state, cu_seqlens):
        if cu_seqlens is not None:
            raise NotImplementedError("LinearAttentionLayer: packed sequences are not supported")
        if state is None:
            state = self.init_state(q.shape[0]).mesa
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        with torch.autocast(q.device.type, enabled=False):
            o, h_kv = linear_attention(q, k, v, g, beta, state.h_kv)
        return o.to(v.dtype), MesaState(state.h_kk, h_kv), None

    def decode(self, q, k, v, g, beta, lamb, state):
        step = (a.unsqueeze(1) for a in (q, k, v, g, beta))
        o, after, _ = self.attend(*step, lamb, state, None)
        state.h_kv.copy_(after.h_kv)
        return o.squeeze(1)


class Block(nn.Module):
    """Pre-norm residual block: sequence mixing, then a gated feed-forward network."""

    def __init__(self, width, heads, head_dim, layer):
        super().__init__()
        inner = 8 * width // 3
        self.mix_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.mix = layer(width, heads, head_dim)
        self.up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x, state=None):
        mixed, state = self.mix(self.mix_norm(x), state)
        x = x + mixed
        gate, value = self.up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value), state


class TokenModel(nn.Module):
    """tokens [B, T] -> logits [B, T, vocabulary] and one state per layer.

    kind: "mesa" or "linear".
    """

    def __init__(self, kind, vocabulary, width, heads, head_dim, depth):
        super().__init__()
        layer = {"mesa": MesaLayer, "linear": LinearAttentionLayer}[kind]
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, head_dim, layer) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.5)

    def forward(self, tokens, states=None):
        x = self.embed(tokens)
        after = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[i])
            after.append(state)
        return self.head(self.norm(x)), after

    @torch.no_grad()
    def solver_steps(self, tokens):
        """Mean solver steps of every (Mesa) layer on these tokens."""
        x, means = self.embed(tokens), []
        for block in self.blocks:
            _, _, info = block.mix(block.mix_norm(x), return_solver_info=True)
            means.append(info.steps.float().mean().item())
            x, _ = block(x)
        return means

    @torch.no_grad()
    def generate(self, prompt, count, temperature=0.7, generator=None):
        """Continues the prompt [B, T]: one call over the prompt, then `count` decode steps -> [B, count]."""
        logits, states = self(prompt)
        tokens = []
        for _ in range(count):
            p = (logits[:, -1].float() / temperature).softmax(-1)
            tokens.append(torch.multinomial(p.cpu(), 1, generator=generator).to(prompt.device))
            logits, states = self(tokens[-1], states)
        return torch.cat(tokens, 1)


def make_optimizer(model, learning_rate):
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
