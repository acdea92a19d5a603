// Attention of bf16 by products of warp groups: a block owns OWN rows of one side (queries, or keys in pass 2), 64 for each of
// its warp groups; the other side's rows stream through shared memory, OTHER at a time. Products of own and streamed
// rows stay in registers, where they are in place to be the next product's left operand.
//
// While the products of one tile are under way, the threads work on another one's: forward, the scores of a tile are
// computed beside the weighed values of the tile before it (Shah et al. 2024, "FlashAttention-3", algorithm 2).
//
// Head dims are 64 or 128, SCALE is positive. Further named parameters: OWN, OTHER, STAGES (of passes 2 and 3).

#define THREADS (2 * OWN)
/// Bytes of a tile of so many rows.
#define TILE_BYTES(rows, width) ((rows) * (width) * 2)

/// Starts the copy of `ROWS` rows of an operand, zeros behind the last.
template <int ROWS, int WIDTH, int LIMIT, u64 STRIDE>
static __device__ __forceinline__ void copy_rows(u32 tile, const bf16 *from, int first) {
    copy_lines<ROWS, WIDTH, THREADS>(tile, threadIdx.x, [&](u32 row, u32 column, bool &valid) {
        valid = LIMIT % ROWS == 0 || first + int(row) < LIMIT;
        return from + (valid ? (first + row) * STRIDE + column : 0);
    });
}

/// Starts s[64, OTHER] = own · otherᵀ over `WIDTH`, own rows being the warp group's.
template <int WIDTH>
static __device__ __forceinline__ void products(float (&s)[OTHER / 2], u32 own, u32 other) {
    u64 a = descriptor<16>(own + threadIdx.x / 128 * (64 * LINE_BYTES)), b = descriptor<16>(other);
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
        u64 a_at = a + ((k / LINE * OWN * LINE_BYTES) >> 4) + along_depth<true>(k % LINE);
        u64 b_at = b + ((k / LINE * OTHER * LINE_BYTES) >> 4) + along_depth<true>(k % LINE);
        if (k == 0) {
            multiply<OTHER, 0, 0, 0>(s, a_at, b_at);
        } else {
            multiply<OTHER, 1, 0, 0>(s, a_at, b_at);
        }
    }
}

/// Starts acc[64, WIDTH] += weights[64, OTHER] · other[OTHER, WIDTH].
template <int WIDTH>
static __device__ __forceinline__ void weigh(float (&acc)[WIDTH / 2], const u32 (&weights)[OTHER / 4], u32 other) {
    u64 b = descriptor<OTHER * LINE_BYTES>(other);
#pragma unroll
    for (int k = 0; k < OTHER; k += 16) {
        const u32 *a = weights + k / 4;
        multiply<WIDTH, 1>(acc, a[0], a[1], a[2], a[3], b + along_depth<false>(k));
    }
}

/// Weights as left operands.
static __device__ __forceinline__ void pack(u32 (&to)[OTHER / 4], const float (&weights)[OTHER / 2]) {
#pragma unroll
    for (int i = 0; i < OTHER / 4; i++) to[i] = pack_bf16(weights[2 * i], weights[2 * i + 1]);
    settle(to);
}

/// The first of this thread's two rows among the own ones; the other stands eight behind it.
static __device__ __forceinline__ int own_row() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }

/// Writes own rows, those of a query or key behind the last one left out.
template <int WIDTH, int LIMIT, u64 STRIDE>
static __device__ __forceinline__ void write_rows(bf16 *to, const float (&acc)[WIDTH / 2], const float (&factor)[2], int first) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = first + own_row() + i * 8;
        if (LIMIT % OWN == 0 || row < LIMIT) {
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j++)
                *(u32 *)(to + row * STRIDE + j * 8 + threadIdx.x % 4 * 2) = pack_bf16(acc[4 * j + 2 * i] * factor[i], acc[4 * j + 2 * i + 1] * factor[i]);
        }
    }
}

static __device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

#if PASS == 0

/// Turns scores of a tile of keys into weights; `shrink` is what earlier weights, and sums of them, are multiplied by.
static __device__ __forceinline__ void weights_of(float (&s)[OTHER / 2], float (&top)[2], float (&sum)[2], float (&shrink)[2], int first, int tile) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        // Queries see different numbers of keys; a tile that the first of a block sees as a whole needs no look.
        if (tile + OTHER > visible(first)) {
            int seen = visible(first + own_row() + i * 8) - tile - threadIdx.x % 4 * 2;
#pragma unroll
            for (int j = 0; j < OTHER / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    s[4 * j + 2 * i + e] = j * 8 + e < seen ? s[4 * j + 2 * i + e] : -INFINITY_F;
        }
        float most = top[i], part = 0.f;
#pragma unroll
        for (int j = 0; j < OTHER / 8; j++) most = fmaxf(most, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
        most = quad_max(most);
        shrink[i] = exp2_approx((top[i] - most) * (SCALE * LOG2_E));
        top[i] = most;
        float base = most * (SCALE * LOG2_E);
#pragma unroll
        for (int j = 0; j < OTHER / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &x = s[4 * j + 2 * i + e];
                x = exp2_approx(fmaf(x, SCALE * LOG2_E, -base));
                part += x;
            }
        sum[i] = sum[i] * shrink[i] + part;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, bf16 *__restrict__ o, float *__restrict__ lse) {
    extern __shared__ __align__(1024) unsigned char memory[];
    // Two tiles of keys, two of values.
    u32 q_tile = shared_address(memory), k_tiles = q_tile + TILE_BYTES(OWN, HEAD), v_tiles = k_tiles + 2 * TILE_BYTES(OTHER, HEAD);
    // The last queries see the most keys, so they go first.
    u32 head = blockIdx.x / TILES(QUERIES, OWN);
    int first = (TILES(QUERIES, OWN) - 1 - blockIdx.x % TILES(QUERIES, OWN)) * OWN;
    u32 batch = head / GROUP, group = head % GROUP;
    k += K_AT(batch, group);
    v += V_AT(batch, group);
    int n_tiles = TILES(visible(min(first + OWN, QUERIES) - 1), OTHER);
    auto k_tile = [&](int tile) { return k_tiles + tile % 2 * TILE_BYTES(OTHER, HEAD); };
    auto v_tile = [&](int tile) { return v_tiles + tile % 2 * TILE_BYTES(OTHER, VALUE); };
    auto load = [&](int tile) {
        if (tile < n_tiles) copy_rows<OTHER, HEAD, KEYS, K_ROW>(k_tile(tile), k, tile * OTHER);
        copy_rows<OTHER, VALUE, KEYS, V_ROW>(v_tile(tile - 1), v, (tile - 1) * OTHER);
        commit();
    };
    copy_rows<OWN, HEAD, QUERIES, Q_ROW>(q_tile, q + Q_AT(batch, group), first);
    copy_rows<OTHER, HEAD, KEYS, K_ROW>(k_tile(0), k, 0);
    commit();
    load(1);

    float acc[VALUE / 2] = {}, s[OTHER / 2], top[2], sum[2] = {}, shrink[2];
    u32 weights[OTHER / 4];
    top[0] = top[1] = -INFINITY_F;
    settle(acc);
    wait<1>();
    fence_async();
    __syncthreads();
    products_begin();
    products<HEAD>(s, q_tile, k_tile(0));
    products_commit();
    products_wait<0>();
    settle(s);
    weights_of(s, top, sum, shrink, first, 0);
    pack(weights, s);
#pragma unroll 1
    for (int tile = 1; tile < n_tiles; tile++) {
        // This tile's keys and the last one's values are here, and all threads are done with what stood before them.
        wait<0>();
        fence_async();
        __syncthreads();
        products_begin();
        products<HEAD>(s, q_tile, k_tile(tile));
        products_commit();
        weigh<VALUE>(acc, weights, v_tile(tile - 1));
        products_commit();
        load(tile + 1);
        products_wait<1>();
        settle(s);
        weights_of(s, top, sum, shrink, first, tile * OTHER);
        products_wait<0>();
        settle(acc);
#pragma unroll
        for (int j = 0; j < VALUE / 2; j++) acc[j] *= shrink[j / 2 % 2];
        settle(acc);
        pack(weights, s);
    }
    wait<0>();
    fence_async();
    __syncthreads();
    products_begin();
    weigh<VALUE>(acc, weights, v_tile(n_tiles - 1));
    products_commit();
    products_wait<0>();
    settle(acc);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] = quad_sum(sum[i]);
        int query = first + own_row() + i * 8;
        if (threadIdx.x % 4 == 0 && query < QUERIES) lse[L_AT(batch, group) + query * L_ROW] = top[i] * SCALE + log2_approx(sum[i]) * LN_2;
        sum[i] = 1.f / sum[i];
    }
    write_rows<VALUE, QUERIES, O_ROW>(o + O_AT(batch, group), acc, sum, first);
}

#else

#if PASS == 2
#define OWN_LIMIT KEYS
#else
#define OWN_LIMIT QUERIES
#endif
#define STAGE_BYTES TILE_BYTES(OTHER, HEAD + VALUE)

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const float *__restrict__ lse, const bf16 *__restrict__ d_o, bf16 *dq
#if PASS == 2
    , bf16 *__restrict__ dk, bf16 *__restrict__ dv
#endif
) {
    extern __shared__ __align__(1024) unsigned char memory[];
    // Queries beside do, keys beside values: one pair is owned, the other streams.
    u32 own_head = shared_address(memory), own_value = own_head + TILE_BYTES(OWN, HEAD), stages = own_value + TILE_BYTES(OWN, VALUE);
    float *stage_rows = (float *)(memory + TILE_BYTES(OWN, HEAD + VALUE) + STAGES * STAGE_BYTES);
    u32 head = blockIdx.x / TILES(OWN_LIMIT, OWN);
    int first = blockIdx.x % TILES(OWN_LIMIT, OWN) * OWN;
#if PASS == 2
    u32 batch = head;
    copy_rows<OWN, HEAD, KEYS, K_ROW>(own_head, k + K_AT(batch, 0), first);
    copy_rows<OWN, VALUE, KEYS, V_ROW>(own_value, v + V_AT(batch, 0), first);
    int begin = CAUSAL ? max(first - OFFSET, 0) / OTHER * OTHER : 0;
    int n_tiles = max(TILES(QUERIES - begin, OTHER), 0), n_steps = GROUP * n_tiles;
#else
    u32 batch = head / GROUP, group = head % GROUP;
    first = (TILES(QUERIES, OWN) - 1) * OWN - first;
    copy_rows<OWN, HEAD, QUERIES, Q_ROW>(own_head, q + Q_AT(batch, group), first);
    copy_rows<OWN, VALUE, QUERIES, O_ROW>(own_value, d_o + O_AT(batch, group), first);
    int n_steps = TILES(visible(min(first + OWN, QUERIES) - 1), OTHER);
    float own_lse[2], own_dot[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int query = first + own_row() + i * 8;
        own_lse[i] = query < QUERIES ? lse[L_AT(batch, group) + query * L_ROW] * LOG2_E : 0.f;
        own_dot[i] = query < QUERIES ? *row_dot(dq + Q_AT(batch, group), query) : 0.f;
    }
#endif

    auto load = [&](int step) {
        if (step < n_steps) {
            u32 stage = stages + step % STAGES * STAGE_BYTES;
#if PASS == 2
            u32 group = step / n_tiles;
            int tile = begin + step % n_tiles * OTHER;
            copy_rows<OTHER, HEAD, QUERIES, Q_ROW>(stage, q + Q_AT(batch, group), tile);
            copy_rows<OTHER, VALUE, QUERIES, O_ROW>(stage + TILE_BYTES(OTHER, HEAD), d_o + O_AT(batch, group), tile);
            if (threadIdx.x < OTHER) {
                float *rows = stage_rows + step % STAGES * 2 * OTHER;
                int query = tile + threadIdx.x;
                copy_async<4>(rows + threadIdx.x, query < QUERIES ? lse + L_AT(batch, group) + query * L_ROW : lse, query < QUERIES);
                copy_async<4>(rows + OTHER + threadIdx.x, query < QUERIES ? row_dot(dq + Q_AT(batch, group), query) : (float *)dq, query < QUERIES);
            }
#else
            copy_rows<OTHER, HEAD, KEYS, K_ROW>(stage, k + K_AT(batch, group), step * OTHER);
            copy_rows<OTHER, VALUE, KEYS, V_ROW>(stage + TILE_BYTES(OTHER, HEAD), v + V_AT(batch, group), step * OTHER);
#endif
        }
        commit();
    };

    float to_head[HEAD / 2] = {};
    settle(to_head);
#if PASS == 2
    float to_value[VALUE / 2] = {};
    settle(to_value);
    u32 weights[OTHER / 4];
#endif
    u32 d_weights[OTHER / 4];
    load(0);
#pragma unroll 1
    for (int step = 0; step < n_steps; step++) {
        // This step's rows are here, and all threads are done with the stage that is filled next.
        wait<0>();
        fence_async();
        __syncthreads();
        u32 other_head = stages + step % STAGES * STAGE_BYTES, other_value = other_head + TILE_BYTES(OTHER, HEAD);
        float s[OTHER / 2], ds[OTHER / 2];
        products_begin();
        products<HEAD>(s, own_head, other_head);
        products_commit();
        products<VALUE>(ds, own_value, other_value);
        products_commit();
        load(step + 1);
        // With the scores, what the last step added is there too.
        products_wait<1>();
        settle(s);
#if PASS == 2
        const float *rows = stage_rows + step % STAGES * 2 * OTHER;
        int tile = begin + step % n_tiles * OTHER;
#else
        int tile = step * OTHER;
#endif
        // Where all own rows and all of the tile see one another, no pair needs a look.
#if PASS == 2
        bool is_whole = tile + OTHER <= QUERIES && first + OWN <= visible(tile);
#else
        bool is_whole = tile + OTHER <= visible(first);
#endif
        if (!is_whole) {
#pragma unroll
            for (int j = 0; j < OTHER / 8; j++)
#pragma unroll
                for (int l = 0; l < 4; l++) {
                    int row = first + own_row() + l / 2 * 8, column = tile + j * 8 + threadIdx.x % 4 * 2 + l % 2;
#if PASS == 2
                    bool sees = column < QUERIES && row < visible(column);
#else
                    bool sees = column < visible(row);
#endif
                    s[4 * j + l] = sees ? s[4 * j + l] : -INFINITY_F;
                }
        }
#pragma unroll
        for (int j = 0; j < OTHER / 8; j++)
#pragma unroll
            for (int l = 0; l < 4; l++) {
#if PASS == 2
                float log_sum = rows[j * 8 + threadIdx.x % 4 * 2 + l % 2] * LOG2_E;
#else
                float log_sum = own_lse[l / 2];
#endif
                s[4 * j + l] = exp2_approx(fmaf(s[4 * j + l], SCALE * LOG2_E, -log_sum));
            }
        products_wait<0>();
        settle(ds);
#if PASS == 2
        pack(weights, s);
#endif
#pragma unroll
        for (int j = 0; j < OTHER / 8; j++)
#pragma unroll
            for (int l = 0; l < 4; l++) {
#if PASS == 2
                float dot = rows[OTHER + j * 8 + threadIdx.x % 4 * 2 + l % 2];
#else
                float dot = own_dot[l / 2];
#endif
                ds[4 * j + l] = s[4 * j + l] * (ds[4 * j + l] - dot) * SCALE;
            }
        pack(d_weights, ds);
        products_begin();
#if PASS == 2
        weigh<VALUE>(to_value, weights, other_value);
#endif
        weigh<HEAD>(to_head, d_weights, other_head);
        products_commit();
#if PASS == 2
        // The assembler keeps products of two sums apart where they are under way from one round to the next.
        products_wait<0>();
        settle(to_value);
        settle(to_head);
#endif
    }
    wait<0>();
    products_wait<0>();
    settle(to_head);
    float ones[2] = {1.f, 1.f};
#if PASS == 2
    settle(to_value);
    write_rows<HEAD, KEYS, K_ROW>(dk + K_AT(batch, 0), to_head, ones, first);
    write_rows<VALUE, KEYS, V_ROW>(dv + V_AT(batch, 0), to_value, ones, first);
#else
    // All threads of a row have read its D, which the row's gradient now replaces.
    __syncthreads();
    write_rows<HEAD, QUERIES, Q_ROW>(dq + Q_AT(batch, group), to_head, ones, first);
#endif
}

#endif
