"""The chunked Mesa layer in plain PyTorch operations: the yardstick for the compiled CPU backend.

Same algorithm, same stopping rule, same hand-written backward as mesa_ext (one more solve, one linear-attention
backward with values [v | k] and output gradients [do | -w]), but every step is a batched PyTorch operation over all
chunks and heads at once. Equal heads for q, k, v; no packed sequences.
"""

import torch
import torch.nn.functional as F

CHUNK = 64
MIN_LOG_DECAY = -128.0


def _to_chunks(x, chunks):
    """[B, T, H, ...] -> [B, H, N, C, ...], padded with zeros at the end."""
    b, t, h = x.shape[:3]
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, chunks * CHUNK - t))
    return x.reshape(b, chunks, CHUNK, h, *x.shape[3:]).transpose(2, 3).transpose(1, 2).contiguous()


def _from_chunks(x, tokens):
    """Inverse of _to_chunks."""
    b, h, n, c = x.shape[:4]
    return x.transpose(1, 2).transpose(2, 3).reshape(b, n * c, h, *x.shape[4:])[:, :tokens]


class _Chunks:
    """What forward and backward share: chunked inputs, decays, and the state [G | H] before every chunk."""

    def __init__(self, k, v, g, beta, lamb, state):
        tokens, self.v_dim = k.shape[1], v.shape[-1]
        n = -(-tokens // CHUNK)
        self.k, self.v = _to_chunks(k, n), _to_chunks(v, n)
        self.beta = _to_chunks(beta, n)
        self.lamb = lamb[None, :, None, None, :]
        gc = _to_chunks(g.clamp_min(MIN_LOG_DECAY), n).cumsum(-1)
        self.decay = (gc[..., :, None] - gc[..., None, :]).tril().exp().tril()  # [.., i, j] for j <= i
        self.mask = self.decay * self.beta[..., None, :]
        self.into = gc.exp()[..., None]  # weight of the state before the chunk at each token
        self.out_of = (gc[..., -1:] - gc).exp()[..., None]  # weight of each token in the state after the chunk
        self.total = gc[..., -1].exp()[..., None, None]
        self.u = torch.cat([self.v, self.k], -1)
        added = (self.k * (self.out_of * self.beta[..., None])).transpose(-1, -2) @ self.u
        self.s = torch.empty_like(added)
        for i in range(n):
            self.s[:, :, i] = state
            state = torch.addcmul(added[:, :, i], self.total[:, :, i], state)
        self.final = state
        self.h_kv, self.h_kk = self.s.split([self.v_dim, k.shape[-1]], -1)

    def read(self, x, h, values):
        """X -> e^gc (X H) + ((X K') o M) values."""
        return (x @ h).mul_(self.into) + ((x @ self.k.transpose(-1, -2)).mul_(self.mask)) @ values

    def solve(self, b, max_iterations, tol):
        """Conjugate gradients from zero, preconditioned by Lambda, each row frozen once its error bound meets tol."""
        scale = torch.exp2(-torch.floor(torch.log2(b.abs().amax(-1, keepdim=True).clamp_min(1e-38))))
        r = b * scale
        z = r / self.lamb
        rz = (r * z).sum(-1, keepdim=True)
        p, x = z, torch.zeros_like(r)
        # Lambda-norm products p.p, x.p and x.x by recurrence, as in csrc/cg.h.
        pp, xp, xx = rz, torch.zeros_like(rz), torch.zeros_like(rz)
        active, first = rz > 0, rz
        for _ in range(max_iterations):
            ap = self.read(p, self.h_kk, self.k).addcmul_(p, self.lamb)
            p_ap = (p * ap).sum(-1, keepdim=True)
            active = active & (p_ap > 0)
            alpha = torch.where(active, rz / p_ap, 0)
            x.addcmul_(alpha, p)
            r.addcmul_(alpha, ap, value=-1)
            z = r / self.lamb
            new = (r * z).sum(-1, keepdim=True)
            xx = xx + alpha * (2 * xp + alpha * pp)
            active = active & (new > tol * tol * xx) & (new > 1e-22 * first)
            if not active.any():
                break
            ratio = torch.where(active, new / rz, 0)
            xp = ratio * (xp + alpha * pp)
            pp = new + ratio * ratio * pp
            p = torch.addcmul(z, ratio, p)
            rz = new
        return x / scale


class _ChunkedMesa(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, lamb, h_kk, h_kv, max_iterations, tol):
        c = _Chunks(k, v, g, beta, lamb, torch.cat([h_kv, h_kk], -1))
        x = c.solve(_to_chunks(q, c.k.shape[2]), max_iterations, tol)
        ctx.save_for_backward(x, k, v, g, beta, lamb, h_kk, h_kv)
        ctx.solver = (max_iterations, tol)
        final_kv, final_kk = (s.contiguous() for s in c.final.split([v.shape[-1], k.shape[-1]], -1))
        return _from_chunks(c.read(x, c.h_kv, c.v), q.shape[1]), final_kk, final_kv

    @staticmethod
    def backward(ctx, do, dh_kk, dh_kv):
        x, k, v, g, beta, lamb, h_kk, h_kv = ctx.saved_tensors
        c = _Chunks(k, v, g, beta, lamb, torch.cat([h_kv, h_kk], -1))
        n, tokens, v_dim = c.k.shape[2], k.shape[1], c.v_dim
        do = _to_chunks(do, n)
        w = c.solve(_dx(c, do), *ctx.solver)
        y = torch.cat([do, -w], -1)

        # Adjoint of the state after every chunk, from the end to the beginning.
        added = (x * c.into).transpose(-1, -2) @ y
        adjoint = torch.empty_like(added)
        a = torch.cat([dh_kv, dh_kk.transpose(-1, -2)], -1)
        for i in reversed(range(n)):
            adjoint[:, :, i] = a
            a = torch.addcmul(added[:, :, i], c.total[:, :, i], a)
        dh_kv0, dh_kk0 = a.split([v_dim, k.shape[-1]], -1)

        scores = x @ c.k.transpose(-1, -2)
        residuals = y @ c.u.transpose(-1, -2)
        weights = c.out_of * c.beta[..., None]
        adjoint_u = c.u @ adjoint.transpose(-1, -2)  # E u_j for each token
        du = (scores * c.mask).transpose(-1, -2) @ y + (c.k @ adjoint) * weights
        dk = (residuals * c.mask).transpose(-1, -2) @ x + adjoint_u * weights + du[..., v_dim:]
        product = scores * residuals
        across = (c.k * adjoint_u).sum(-1)
        dbeta = (product * c.decay).sum(-2) + across * c.out_of[..., 0]
        product = product * c.mask
        across = across * weights[..., 0]
        dgc = product.sum(-1) - product.sum(-2) - across + ((y @ c.s.transpose(-1, -2)) * x).sum(-1) * c.into[..., 0]
        dgc[..., -1] += across.sum(-1) + (adjoint * c.s).sum((-1, -2)) * c.total[..., 0, 0]
        dg = dgc.flip(-1).cumsum(-1).flip(-1)
        dlamb = -(w * x).sum((0, 2, 3))
        tensors = (_from_chunks(t, tokens) for t in (w, dk, du[..., :v_dim], dg, dbeta))
        return *tensors, dlamb, dh_kk0.transpose(-1, -2), dh_kv0, None, None


def _dx(c, do):
    """dx_t = G_t do_t."""
    scores = (do @ c.v.transpose(-1, -2)).mul_(c.mask)
    return (do @ c.h_kv.transpose(-1, -2)).mul_(c.into) + scores @ c.k


def torch_chunked(q, k, v, g, beta, lamb, h_kk=None, h_kv=None, max_cg_iterations=30, cg_tol=3e-6):
    """q, k [B,T,H,K], v [B,T,H,V], g, beta [B,T,H], lamb [H,K], all of one dtype -> o, final h_kk, final h_kv."""
    b, _, h, k_dim = q.shape
    h_kk = k.new_zeros(b, h, k_dim, k_dim) if h_kk is None else h_kk
    h_kv = k.new_zeros(b, h, k_dim, v.shape[-1]) if h_kv is None else h_kv
    return _ChunkedMesa.apply(q, k, v, g, beta, lamb, h_kk, h_kv, max_cg_iterations, cg_tol)
