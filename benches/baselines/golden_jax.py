"""The golden model in JAX: losses, wall and CPU time of a full training step, and peak memory.

    python golden_jax.py --size small --mesh tp4 --steps 8

Meshes: 1 device, dp4 (batch over 4), tp4 (heads, feed-forward and vocabulary over 4), the devices being virtual ones
of this host. Sharding is by NamedSharding on the parameters and the batch; XLA places the collectives.
"""

import functools
import os
import time

MESHES = {"1": 1, "dp4": 4, "tp4": 4}
if __name__ == "__main__":
    import golden
    ARGS = golden.arguments(__doc__, MESHES).parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={MESHES[ARGS.mesh]}"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import golden


def rms(x, g):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + golden.NORM_EPS) * g


def rotate(x_BSHK, cos, sin):
    x1, x2 = jnp.split(x_BSHK, 2, axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def attention(m_BSD, p, size, tables):
    b, s, d = m_BSD.shape
    q, k, v = ((m_BSD @ p[w]).reshape(b, s, size.n_heads, d // size.n_heads) for w in ("wq", "wk", "wv"))
    q, k = rotate(q, *tables), rotate(k, *tables)
    scores = jnp.einsum("bshk,bthk->bhst", q, k) * (1.0 / (d // size.n_heads) ** 0.5)
    scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -jnp.inf)
    o = jnp.einsum("bhst,bthk->bshk", jax.nn.softmax(scores, axis=-1), v)
    return o.reshape(b, s, d) @ p["wo"]


def ffn(m, wg, wu, wd):
    return (jax.nn.silu(m @ wg) * (m @ wu)) @ wd


def experts(m_SD, p, n_slots):
    """One sequence's MoE: top-2 of E, slots in (token, choice) order, what exceeds the capacity is dropped."""
    s, d = m_SD.shape
    probs = jax.nn.softmax(m_SD @ p["router"], axis=-1)
    gates, chosen = jax.lax.top_k(probs, golden.TOP_K)
    gates = (gates / gates.sum(-1, keepdims=True)).reshape(-1)
    chosen = chosen.reshape(-1)
    one_hot = jax.nn.one_hot(chosen, golden.N_EXPERTS, dtype=jnp.int32)
    rank = (jnp.cumsum(one_hot, axis=0) * one_hot).sum(-1) - 1
    # A dropped assignment goes to the one slot behind all others, which nobody reads.
    slot = jnp.where(rank < n_slots, chosen * n_slots + rank, golden.N_EXPERTS * n_slots)
    token = jnp.repeat(jnp.arange(s), golden.TOP_K)
    x = jnp.zeros((golden.N_EXPERTS * n_slots + 1, d), m_SD.dtype).at[slot].set(m_SD[token])
    x_ECD = x[:-1].reshape(golden.N_EXPERTS, n_slots, d)
    y_ECD = jax.vmap(ffn)(x_ECD, p["we_g"], p["we_u"], p["we_d"])
    y = jnp.concatenate([y_ECD.reshape(-1, d), jnp.zeros((1, d), m_SD.dtype)])
    return (y[slot] * gates[:, None]).reshape(s, golden.TOP_K, d).sum(1)


def loss_fn(params, tokens, size, moe, tied, tables):
    h = params["wte"][tokens[:, :-1]]
    for l in range(size.n_layers):
        prefix = f"layers[{l}]."
        p = {k[len(prefix):]: v for k, v in params.items() if k.startswith(prefix)}
        h = h + attention(rms(h, p["ln1"]), p, size, tables)
        m = rms(h, p["ln2"])
        if moe is None:
            h = h + ffn(m, p["wg"], p["wu"], p["wd"])
        else:
            h = h + jax.vmap(lambda m_SD: experts(m_SD, p, golden.capacity(size, moe)))(m)
    logits_BSV = rms(h, params["lnf"]) @ (params["wte"].T if tied else params["head"])
    target = tokens[:, 1:, None]
    # A comparison with the vocabulary's index instead of a gather, so that a sharded vocabulary stays sharded.
    picked = jnp.where(jnp.arange(size.vocab) == target, logits_BSV, 0.0).sum(-1)
    return (jax.nn.logsumexp(logits_BSV, axis=-1) - picked).mean()


def update(params, state, grads, optimizer):
    if optimizer == "sgd":
        return jax.tree.map(lambda p, g: p - golden.SGD_LR * g, params, grads), state
    a, t = golden.ADAMW, state["t"] + 1
    m = jax.tree.map(lambda m, g: a["beta1"] * m + (1 - a["beta1"]) * g, state["m"], grads)
    v = jax.tree.map(lambda v, g: a["beta2"] * v + (1 - a["beta2"]) * g * g, state["v"], grads)

    def new(name):
        m_hat, v_hat = m[name] / (1 - a["beta1"] ** t), v[name] / (1 - a["beta2"] ** t)
        decay = 0.0 if name.split(".")[-1] in golden.NORMS else a["decay"]
        return params[name] - a["lr"] * (m_hat / (jnp.sqrt(v_hat) + a["eps"]) + decay * params[name])

    return {name: new(name) for name in params}, {"m": m, "v": v, "t": t}


def init(size, moe, tied, dtype):
    """Weights and optimizer state as arrays of `dtype` (the f32 values, promoted)."""
    params = {k: jnp.asarray(v, dtype) for k, v in golden.params(size, moe, tied).items()}
    zeros = jax.tree.map(jnp.zeros_like, params)
    return params, {"m": zeros, "v": jax.tree.map(jnp.zeros_like, params), "t": jnp.zeros((), dtype)}


def make_step(size, moe, tied, optimizer, dtype):
    tables = tuple(jnp.asarray(t, dtype) for t in golden.rope_tables(size))
    objective = functools.partial(loss_fn, size=size, moe=moe, tied=tied, tables=tables)

    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(objective)(params, tokens)
        params, state = update(params, state, grads, optimizer)
        return params, state, loss

    return step, objective


def spec(name, mesh):
    """Megatron's sharding for tp, replicated parameters otherwise."""
    if mesh != "tp4":
        return P()
    leaf = name.split(".")[-1]
    return {"wq": P(None, "x"), "wk": P(None, "x"), "wv": P(None, "x"), "wo": P("x", None), "wg": P(None, "x"),
            "wu": P(None, "x"), "wd": P("x", None), "we_g": P(None, None, "x"), "we_u": P(None, None, "x"),
            "we_d": P(None, "x", None), "wte": P("x", None), "head": P(None, "x")}.get(leaf, P())


def main(args):
    size, moe = golden.SIZES[args.size], golden.VARIANTS[args.variant]
    mesh = Mesh(np.array(jax.devices()), ("x",))
    place = lambda spec: NamedSharding(mesh, spec)
    params, state = init(size, moe, args.tied, jnp.float32)
    by_name = {k: place(spec(k, args.mesh)) for k in params}
    shardings = (by_name, {"m": by_name, "v": by_name, "t": place(P())}, place(P("x") if args.mesh == "dp4" else P()))
    params, state, tokens = jax.device_put((params, state, golden.tokens(size)), shardings)
    step, _ = make_step(size, moe, args.tied, args.optimizer, jnp.float32)
    start = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=(0, 1), in_shardings=shardings, out_shardings=(*shardings[:2], place(P())))
    compiled = jitted.lower(params, state, tokens).compile()
    print(f"JAX {jax.__version__}, {args.size} {args.variant}, mesh {args.mesh}, compiled in {time.perf_counter() - start:.2f} s")

    def run():
        nonlocal params, state
        params, state, loss = compiled(params, state, tokens)
        jax.block_until_ready(params)
        return float(loss)

    golden.measure(args, run)


if __name__ == "__main__":
    main(ARGS)
