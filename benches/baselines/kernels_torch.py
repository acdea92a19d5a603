"""Kernels of a decoder's training step in PyTorch: its own ones, and those that torch.compile makes with Triton.

    python kernels_torch.py --size large --dtype bf16 [--device cpu]

A line a kernel: milliseconds of the fastest run, eager and compiled, and what the faster one reaches: operations a
second of products and attention (the causal half of it), bytes a second of everything else (every operand read once,
every result written once). The work is that of one layer, or of the head, of `golden_torch.py`'s model of that size;
names are those that `make bench-gpu` prints for ours.
"""

import argparse
import time

import torch
import torch.nn.functional as F

import golden

N_RUNS = 20


def seconds(run, device):
    """The fastest of some runs; on a GPU by events, without the time of the launch."""
    for _ in range(3):
        run()
    best = float("inf")
    for _ in range(N_RUNS):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - begin)
    return best


def n_bytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def rms(x, g):
    return F.rms_norm(x, x.shape[-1:], g, golden.NORM_EPS)


def works(size, dtype, device):
    """(name, function, arguments, operations or None, bytes); a gradient takes one more argument, the result's."""
    n, d, f = size.batch * size.seq, size.d, size.ffn
    rand = lambda *shape, dtype=dtype: torch.randn(*shape, device=device, dtype=dtype)
    x_ND, g_D, h_NF, u_NF = rand(n, d), rand(d), rand(n, f), rand(n, f)
    for name, shape in [("attn.q", (d, d)), ("mlp.gate", (d, f)), ("mlp.out", (f, d)), ("final.logits", (d, size.vocab))]:
        a, w = (h_NF if shape[0] == f else x_ND), rand(*shape)
        yield name, torch.matmul, (a, w), 2 * n * shape[0] * shape[1], None
    q, k, v = (rand(size.batch, size.n_heads, size.seq, d // size.n_heads) for _ in range(3))
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    forward = 2 * size.batch * size.seq**2 * d
    yield "attn.core", attend, (q, k, v), forward, None
    yield "grad.attn.core", attend, (q, k, v), 2.5 * forward, None
    # The residual is added in the same kernel, as ours does.
    yield "mlp.input", lambda x, r, g: rms(x + r, g), (x_ND, x_ND.clone(), g_D), None, 3 * n_bytes(x_ND)
    yield "grad.mlp.input", rms, (x_ND, g_D), None, 3 * n_bytes(x_ND)
    yield "mlp.act", lambda a, b: F.silu(a) * b, (h_NF, u_NF), None, 3 * n_bytes(h_NF)
    yield "grad.mlp.act", lambda a, b: F.silu(a) * b, (h_NF, u_NF), None, 5 * n_bytes(h_NF)
    logits, targets = rand(n, size.vocab), torch.randint(size.vocab, (n,), device=device)
    loss = lambda logits, targets: F.cross_entropy(logits.float(), targets)
    yield "loss.tokens", loss, (logits, targets), None, n_bytes(logits)
    yield "grad.loss.tokens", loss, (logits, targets), None, 2 * n_bytes(logits)
    w, m, v = (rand(d, f, dtype=torch.float32) for _ in range(3))
    grad = rand(d, f, dtype=torch.float32)

    def update(w, m, v, grad):
        m = 0.9 * m + 0.1 * grad
        v = 0.95 * v + 0.05 * grad * grad
        return w - 1e-3 * (m / (v.abs().sqrt() + 1e-8) + 0.1 * w), m, v

    yield "mlp.gate.next", update, (w, m, v, grad), None, 7 * n_bytes(w)


def runner(name, function, arguments):
    """What is timed: the function, or its gradient alone."""
    if not name.startswith("grad."):
        def forward():
            with torch.no_grad():
                function(*arguments)
        return forward
    leaves = [a.detach().requires_grad_(a.is_floating_point()) for a in arguments]
    result = function(*leaves)
    of = [leaf for leaf in leaves if leaf.requires_grad]
    seed = torch.ones_like(result)
    return lambda: torch.autograd.grad(result, of, seed, retain_graph=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=golden.SIZES, default="large")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="bf16")
    args = parser.parse_args()
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    where = torch.cuda.get_device_name() if args.device == "cuda" else "this CPU"
    print(f"PyTorch {torch.__version__}, kernels of {args.size} in {args.dtype} on {where} (measured)")
    print("   eager ms   compiled ms   of the faster one   kernel")
    for name, function, arguments, n_flops, moved in works(golden.SIZES[args.size], dtype, args.device):
        eager = seconds(runner(name, function, arguments), args.device)
        try:
            torch._dynamo.reset()
            compiled = seconds(runner(name, torch.compile(function), arguments), args.device)
        except Exception as error:  # Without Triton or a C++ compiler eager times remain.
            print(f"   {name} is not compiled: {type(error).__name__}")
            compiled = float("inf")
        best = min(eager, compiled)
        rate = f"{n_flops / best / 1e12:9.1f} TFLOP/s" if n_flops else f"{moved / best / 1e9:9.0f} GB/s   "
        print(f"  {1e3 * eager:9.3f}     {1e3 * compiled:9.3f}   {rate}   {name}", flush=True)


if __name__ == "__main__":
    main()
