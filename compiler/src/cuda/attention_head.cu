// What the kernels of attention share: the places of heads and rows, and what a query sees.
//
// Named parameters: PASS (0 forward, 1 D = Σ o ∘ do into dq, 2 dk and dv, 3 dq), IN (element type), BATCH (key heads),
// GROUP (query heads of each), QUERIES, KEYS, HEAD, VALUE, CAUSAL, OFFSET (position of the first query), SCALE, and for
// each operand X of Q K V O L: X_AT(batch, group), the place of a head, X_ROW and X_COLUMN, its strides.
//
// Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2; the gradient in two passes, over keys and over queries, so
// that no sum depends on which block comes first.

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define INFINITY_F __int_as_float(0x7f800000)
#define TILES(n, tile) (((n) + (tile) - 1) / (tile))

/// Keys that a query sees: the first so many.
static __device__ __forceinline__ int visible(int query) {
    return CAUSAL ? min(max(query + OFFSET + 1, 1), KEYS) : KEYS;
}

/// D of a query stands at the beginning of its row of dq, until the last pass writes that row.
static __device__ __forceinline__ float *row_dot(IN *dq, u32 query) { return (float *)(dq + query * Q_ROW); }

#if PASS == 1
#define DOTS_ROWS 8

/// A warp a query.
extern "C" __global__ void __launch_bounds__(32 * DOTS_ROWS) ENTRY(const IN *__restrict__ o, const IN *__restrict__ d_o, IN *__restrict__ dq) {
    u32 head = blockIdx.x / TILES(QUERIES, DOTS_ROWS), query = blockIdx.x % TILES(QUERIES, DOTS_ROWS) * DOTS_ROWS + threadIdx.x / 32;
    if (query >= QUERIES) return;
    auto at = O_AT(head / GROUP, head % GROUP) + query * O_ROW;
    float sum = 0;
    for (u32 i = threadIdx.x % 32; i < VALUE; i += 32) sum = fmaf(to_float(o[at + i * O_COLUMN]), to_float(d_o[at + i * O_COLUMN]), sum);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (threadIdx.x % 32 == 0) *row_dot(dq + Q_AT(head / GROUP, head % GROUP), query) = sum;
}
#endif
