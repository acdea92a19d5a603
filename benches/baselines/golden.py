"""The golden model without a framework: sizes, weights, data, and the measuring loop that the baselines share.

The model is defined without any random generator, so that independent programs reach the same losses: every weight is a
32-bit hash of its flat index, scaled by one f32 multiply. `README.md` next to this file says what is computed.

Shape legend: B batch, S sequence, D model, H heads, K head size, F feed-forward, V vocabulary, E experts, C capacity.
"""

import argparse
import dataclasses
import math
import resource
import statistics
import time

import numpy as np

N_EXPERTS, TOP_K = 8, 2
NORM_EPS = 1e-5
ROPE_THETA = 10000.0
ADAMW = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1)
SGD_LR = 0.1


@dataclasses.dataclass(frozen=True)
class Size:
    n_layers: int
    d: int
    n_heads: int
    ffn: int
    vocab: int
    seq: int
    batch: int


SIZES = {
    "tiny": Size(2, 128, 4, 512, 512, 64, 8),
    "odd": Size(3, 96, 6, 192, 320, 32, 4),
    "small": Size(4, 512, 8, 1408, 8192, 256, 8),
    "gpt2": Size(12, 768, 12, 2048, 50304, 512, 4),
    "large": Size(24, 2048, 16, 5504, 32000, 2048, 4),
    "attention-8k": Size(2, 2048, 16, 256, 512, 8192, 2),
}

# moe is None for a dense model, else the capacity factor (0: nothing is dropped).
VARIANTS = {"dense": None, "moe-cf2": 2.0, "moe-dropless": 0.0}

TENSOR_ID = {"wte": 0, "lnf": 1, "head": 2, "tokens": 3}
LAYER_TENSORS = ["ln1", "wq", "wk", "wv", "wo", "ln2", "wg", "wu", "wd", "router", "we_g", "we_u", "we_d"]
NORMS = {"ln1", "ln2", "lnf"}


def hash_u32(n, tensor_id):
    """lowbias32 of n flat indices, offset by the tensor's id."""
    x = (np.arange(n, dtype=np.uint64) + np.uint64(tensor_id * 0x9E3779B9)).astype(np.uint32)
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    x ^= x >> 16
    return x


def uniform(shape, tensor_id, scale):
    """f32 values in scale * [-1, 1): the only rounding is that of one multiply."""
    x = hash_u32(math.prod(shape), tensor_id)
    unit = (x >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return (np.float32(scale) * unit).reshape(shape)


def shapes(size, moe, tied):
    """Parameter names, in order, with their shapes; matrices are [in, out]."""
    s, half = size, size.ffn // 2
    out = {"wte": (s.vocab, s.d)}
    for l in range(s.n_layers):
        layer = {"ln1": (s.d,), "wq": (s.d, s.d), "wk": (s.d, s.d), "wv": (s.d, s.d), "wo": (s.d, s.d), "ln2": (s.d,)}
        if moe is None:
            layer |= {"wg": (s.d, s.ffn), "wu": (s.d, s.ffn), "wd": (s.ffn, s.d)}
        else:
            layer |= {"router": (s.d, N_EXPERTS), "we_g": (N_EXPERTS, s.d, half), "we_u": (N_EXPERTS, s.d, half),
                      "we_d": (N_EXPERTS, half, s.d)}
        out |= {f"layers[{l}].{k}": v for k, v in layer.items()}
    out["lnf"] = (s.d,)
    if not tied:
        out["head"] = (s.d, s.vocab)
    return out


def params(size, moe=None, tied=False):
    """All weights, f32, by name."""
    out = {}
    for name, shape in shapes(size, moe, tied).items():
        leaf = name.split(".")[-1]
        if leaf in NORMS:
            out[name] = np.ones(shape, np.float32)
            continue
        if leaf in TENSOR_ID:
            tensor_id = TENSOR_ID[leaf]
        else:
            tensor_id = 16 * (int(name[len("layers["):name.index("]")]) + 1) + LAYER_TENSORS.index(leaf)
        if leaf == "wte":
            scale = math.sqrt(3 / size.d) if tied else 1.0
        else:
            scale = math.sqrt(3 / shape[-2])
        if leaf in ("wo", "wd", "we_d"):
            scale /= math.sqrt(2 * size.n_layers)
        out[name] = uniform(shape, tensor_id, scale)
    return out


def tokens(size):
    """The one batch, i32 [B, S+1]: inputs are all but the last column, targets all but the first."""
    shape = (size.batch, size.seq + 1)
    return (hash_u32(math.prod(shape), TENSOR_ID["tokens"]) % size.vocab).astype(np.int32).reshape(shape)


def rope_tables(size):
    """cos and sin [S, K/2]: computed in f64, rounded to f32."""
    hd = size.d // size.n_heads
    inv_freq_k = ROPE_THETA ** (-2.0 * np.arange(hd // 2) / hd)
    angle_SK = np.arange(size.seq)[:, None] * inv_freq_k
    return np.cos(angle_SK).astype(np.float32), np.sin(angle_SK).astype(np.float32)


def capacity(size, moe):
    """Slots an expert has for one sequence; a token never chooses an expert twice, so S is dropless."""
    return size.seq if moe == 0 else min(size.seq, math.ceil(moe * TOP_K * size.seq / N_EXPERTS))


def arguments(doc, meshes):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--variant", choices=VARIANTS, default="dense")
    parser.add_argument("--tied", action="store_true", help="head = transpose of wte")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--mesh", choices=meshes, default="1")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps left out of the times (they train all the same)")
    return parser


def measure(args, step):
    """Calls `step()`, which trains one step and returns its loss as a float, and prints losses, times and memory."""
    walls_ms, cpus_ms = [], []
    for i in range(args.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        walls_ms.append((time.perf_counter() - wall) * 1e3)
        cpus_ms.append((time.process_time() - cpu) * 1e3)
        print(f"step {i} loss {loss:.6f} wall {walls_ms[-1]:.1f} ms cpu {cpus_ms[-1]:.1f} ms", flush=True)
    walls_ms, cpus_ms = walls_ms[args.warmup:], cpus_ms[args.warmup:]
    if walls_ms:
        print(f"wall ms min {min(walls_ms):.1f} median {statistics.median(walls_ms):.1f} | "
              f"cpu ms min {min(cpus_ms):.1f} median {statistics.median(cpus_ms):.1f} | {len(walls_ms)} steps")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
