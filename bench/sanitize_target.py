"""What compute-sanitizer runs (see gpu_report.py): forward, backward, decode and short pieces on tiny shapes."""

import os

import torch
from common import kernel_paths, using_kernels

from mesa_ext import MesaState, mesa_attention, mesa_decode_step

CASES = [  # dtype, K, V, T, heads of q, k and v
    (torch.bfloat16, 128, 128, 130, 1, 1, 1),
    (torch.float16, 64, 128, 65, 2, 1, 1),
    (torch.bfloat16, 40, 24, 70, 1, 1, 2),
    (torch.float32, 128, 64, 66, 1, 1, 1),
    (torch.float32, 17, 5, 3, 2, 2, 2),
]


def run(dtype, K, V, T, q_heads, k_heads, heads, bounds, steps=4, spread=None):
    """With a `spread`, keys lie within about that of one direction and weigh heavily: badly conditioned rows."""
    torch.manual_seed(0)
    normalize = torch.nn.functional.normalize
    q = normalize(torch.randn(1, T, q_heads, K), dim=-1).to("cuda", dtype).requires_grad_()
    k = torch.randn(1, T, k_heads, K)
    if spread is not None:
        k = k[:, :1] + spread * k
    k = normalize(k, dim=-1).to("cuda", dtype).requires_grad_()
    v = torch.randn(1, T, heads, V).to("cuda", dtype).requires_grad_()
    g = torch.empty(1, T, heads).uniform_(-0.1, 0).cuda().requires_grad_()
    beta = torch.rand(1, T, heads).mul(1 if spread is None else 50).cuda().requires_grad_()
    lamb = torch.rand(heads, K).add(0.3).cuda().requires_grad_()
    n = 1 if bounds is None else len(bounds) - 1
    state = MesaState.zeros(n, heads, K, V, device="cuda")
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda")
    o, after = mesa_attention(
        q, k, v, g, beta, lamb, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens,
        max_cg_iterations=steps,
    )  # fmt: skip
    (o.float().sum() + after.h_kk.sum() + after.h_kv.sum()).backward()
    with torch.no_grad():
        pool = MesaState(*(torch.cat([h, h]) for h in after))
        rows = torch.tensor([n, -1], device="cuda")
        tokens = [a[0, :2].contiguous() for a in (q, k, v, g, beta)]
        packed = MesaState(*(h.clone() for h in pool.packed()))
        o = mesa_decode_step(*tokens, lamb, pool, state_indices=rows, max_cg_iterations=4)
        mesa_decode_step(*tokens, lamb, packed, state_indices=rows, max_cg_iterations=4, out=torch.empty_like(o))
        counts = torch.arange(-1, 5, device="cuda").expand(1, -1)  # out of range at both ends
        piece, along = mesa_attention(
            *(a[:, :3] for a in (q, k, v, g, beta)), lamb, initial_state=MesaState(*(h[:1] for h in after)),
            output_final_state=True, state_at=counts, max_cg_iterations=steps,
        )  # fmt: skip
    torch.cuda.synchronize()
    finite = [o, *pool, *packed, piece, *along, *(a.grad for a in (q, k, v, g, beta, lamb))]
    assert all(a.isfinite().all().item() for a in finite), (dtype, K, V)


def main():
    os.environ["MESA_EXT_STATE_MEMORY"] = "0"  # heads one after the other, in the same memory
    for kernels in kernel_paths("cuda"):
        with using_kernels(kernels):
            for case in CASES:
                run(*case, bounds=None)
            run(torch.float32, 128, 64, 70, 1, 1, 1, bounds=[0, 3, 70], steps=100, spread=0.05)  # refined in float64
            run(torch.bfloat16, 128, 128, 130, 1, 1, 1, bounds=[0, 0, 67, 68, 130])
            run(torch.bfloat16, 16, 16, 4200, 1, 1, 1, bounds=None)  # of two segments
    print("sanitize_target: done")


if __name__ == "__main__":
    main()
