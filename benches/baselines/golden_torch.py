"""The golden model in PyTorch, on one device: losses, wall and CPU time of a full training step, peak memory.

    python golden_torch.py --size small --steps 8 [--threads 2]
    python golden_torch.py --size large --steps 12 --device cuda --dtype bf16 --compile

It uses PyTorch's own fast paths: scaled_dot_product_attention, rms_norm, cross_entropy and the fused AdamW.
"""

import os
import time

import torch
import torch.nn.functional as F

import golden


def rotate(x_BHSK, cos, sin):
    x1, x2 = x_BHSK.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def attention(m_BSD, p, size, tables):
    b, s, d = m_BSD.shape
    q, k, v = ((m_BSD @ p[w]).view(b, s, size.n_heads, -1).transpose(1, 2) for w in ("wq", "wk", "wv"))
    q, k = rotate(q, *tables), rotate(k, *tables)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return o.transpose(1, 2).reshape(b, s, d) @ p["wo"]


def ffn(m, wg, wu, wd):
    return (F.silu(m @ wg) * (m @ wu)) @ wd


def experts(m_BSD, p, n_slots):
    """Top-2 of E within each sequence, slots in (token, choice) order, what exceeds the capacity is dropped."""
    b, s, d = m_BSD.shape
    gates, chosen = torch.topk(F.softmax(m_BSD @ p["router"], dim=-1), golden.TOP_K)
    gates = (gates / gates.sum(-1, keepdim=True)).flatten(1)
    chosen = chosen.flatten(1)
    one_hot = F.one_hot(chosen, golden.N_EXPERTS)
    kept = (one_hot.cumsum(1) * one_hot).sum(-1) <= n_slots
    rows = m_BSD.repeat_interleave(golden.TOP_K, dim=1)
    out = torch.zeros_like(rows)
    for e in range(golden.N_EXPERTS):
        here = (chosen == e) & kept
        out[here] = ffn(rows[here], p["we_g"][e], p["we_u"][e], p["we_d"][e])
    return (out * gates[..., None]).view(b, s, golden.TOP_K, d).sum(2)


def loss_fn(params, tokens, size, moe, tied, tables):
    h = F.embedding(tokens[:, :-1], params["wte"])
    norm = lambda x, g: F.rms_norm(x, (size.d,), g, golden.NORM_EPS)
    for l in range(size.n_layers):
        prefix = f"layers[{l}]."
        p = {k[len(prefix):]: v for k, v in params.items() if k.startswith(prefix)}
        h = h + attention(norm(h, p["ln1"]), p, size, tables)
        m = norm(h, p["ln2"])
        h = h + (ffn(m, p["wg"], p["wu"], p["wd"]) if moe is None else experts(m, p, golden.capacity(size, moe)))
    logits = norm(h, params["lnf"]) @ (params["wte"].T if tied else params["head"])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make_optimizer(params, kind):
    if kind == "sgd":
        return torch.optim.SGD(params.values(), lr=golden.SGD_LR)
    a = golden.ADAMW
    is_norm = lambda name: name.split(".")[-1] in golden.NORMS
    groups = [{"params": [v for k, v in params.items() if not is_norm(k)], "weight_decay": a["decay"]},
              {"params": [v for k, v in params.items() if is_norm(k)], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=a["lr"], betas=(a["beta1"], a["beta2"]), eps=a["eps"], fused=True)


def main():
    parser = golden.arguments(__doc__, ["1"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss (needs a C++ compiler)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="bf16: autocast, weights stay f32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size, moe = golden.SIZES[args.size], golden.VARIANTS[args.variant]
    here = lambda array: torch.from_numpy(array).to(args.device)
    params = {k: here(v).requires_grad_() for k, v in golden.params(size, moe, args.tied).items()}
    tables = tuple(map(here, golden.rope_tables(size)))
    tokens = here(golden.tokens(size)).long()
    optimizer = make_optimizer(params, args.optimizer)

    def objective(params):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
            return loss_fn(params, tokens, size, moe, args.tied, tables)

    if args.compile:
        objective = torch.compile(objective)
    where = (torch.cuda.get_device_name() if args.device == "cuda" else
             f"{args.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"PyTorch {torch.__version__}, {args.size} {args.variant} {args.dtype}, "
          f"{'compiled' if args.compile else 'eager'}, {where}")

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss = objective(params)
        loss.backward()
        optimizer.step()
        return loss.item()

    golden.measure(args, run)
    if args.device == "cuda":
        print(f"peak memory of the GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
