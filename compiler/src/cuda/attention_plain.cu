// Attention in f32, any head dims and memory orders: tiles of 32 × 32, four threads a row.

#define TILE 32
#define THREADS (4 * TILE)
#define OWN_ROW (threadIdx.x / 4)
#define LANE (threadIdx.x % 4)
#define PER_LANE (TILE / 4)

/// Rows `first…` of an operand, zeros behind the last; rows are `WIDTH + 1` apart, so that they begin in different banks.
template <int WIDTH, int LIMIT, u64 ROW, u64 COLUMN>
static __device__ __forceinline__ void read_tile(float *tile, const IN *from, u32 first) {
    for (u32 i = threadIdx.x; i < TILE * WIDTH; i += THREADS) {
        u32 row = i / WIDTH, column = i % WIDTH;
        tile[row * (WIDTH + 1) + column] = first + row < LIMIT ? to_float(from[(first + row) * ROW + column * COLUMN]) : 0.f;
    }
}

/// Products of this thread's row of `own` with its rows of `other`.
template <int WIDTH>
static __device__ __forceinline__ void products(float (&s)[PER_LANE], const float *own, const float *other) {
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) s[j] = 0.f;
    for (int d = 0; d < WIDTH; d++) {
        float x = own[OWN_ROW * (WIDTH + 1) + d];
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) s[j] = fmaf(x, other[(LANE + 4 * j) * (WIDTH + 1) + d], s[j]);
    }
}

/// Adds rows of `other`, weighted by this thread's row of `weights`, of which it keeps each fourth column.
template <int WIDTH>
static __device__ __forceinline__ void weigh(float (&acc)[(WIDTH + 3) / 4], const float *weights, const float *other) {
    for (int j = 0; j < TILE; j++) {
        float w = weights[OWN_ROW * (TILE + 1) + j];
#pragma unroll
        for (int i = 0; i < (WIDTH + 3) / 4; i++)
            if (WIDTH % 4 == 0 || LANE + 4 * i < WIDTH) acc[i] = fmaf(w, other[j * (WIDTH + 1) + LANE + 4 * i], acc[i]);
    }
}

template <int WIDTH, u64 COLUMN>
static __device__ __forceinline__ void write_row(IN *to, const float (&acc)[(WIDTH + 3) / 4], float factor) {
#pragma unroll
    for (int i = 0; i < (WIDTH + 3) / 4; i++)
        if (WIDTH % 4 == 0 || LANE + 4 * i < WIDTH) store(to + (LANE + 4 * i) * COLUMN, acc[i] * factor);
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

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const IN *__restrict__ q, const IN *__restrict__ k, const IN *__restrict__ v, IN *__restrict__ o, float *__restrict__ lse) {
    extern __shared__ float memory[];
    float *q_tile = memory, *k_tile = q_tile + TILE * (HEAD + 1), *v_tile = k_tile + TILE * (HEAD + 1), *weights = v_tile + TILE * (VALUE + 1);
    u32 head = blockIdx.x / TILES(QUERIES, TILE), first = blockIdx.x % TILES(QUERIES, TILE) * TILE;
    u32 batch = head / GROUP, group = head % GROUP, query = first + OWN_ROW;
    read_tile<HEAD, QUERIES, Q_ROW, Q_COLUMN>(q_tile, q + Q_AT(batch, group), first);
    float acc[(VALUE + 3) / 4] = {}, top = -INFINITY_F, sum = 0.f;
    int end = visible(min(first + TILE, QUERIES) - 1), seen = visible(query);
    for (int tile = 0; tile < end; tile += TILE) {
        __syncthreads();
        read_tile<HEAD, KEYS, K_ROW, K_COLUMN>(k_tile, k + K_AT(batch, group), tile);
        read_tile<VALUE, KEYS, V_ROW, V_COLUMN>(v_tile, v + V_AT(batch, group), tile);
        __syncthreads();
        float s[PER_LANE], most = top;
        products<HEAD>(s, q_tile, k_tile);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            s[j] = tile + LANE + 4 * j < seen ? s[j] * (SCALE * LOG2_E) : -INFINITY_F;
            most = fmaxf(most, s[j]);
        }
        most = quad_max(most);
        float shrink = exp2_approx(top - most), part = 0.f;
        top = most;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            float p = exp2_approx(s[j] - top);
            part += p;
            weights[OWN_ROW * (TILE + 1) + LANE + 4 * j] = p;
        }
        sum = sum * shrink + quad_sum(part);
#pragma unroll
        for (int i = 0; i < (VALUE + 3) / 4; i++) acc[i] *= shrink;
        __syncwarp();
        weigh<VALUE>(acc, weights, v_tile);
    }
    if (query >= QUERIES) return;
    write_row<VALUE, O_COLUMN>(o + O_AT(batch, group) + query * O_ROW, acc, 1.f / sum);
    if (LANE == 0) lse[L_AT(batch, group) + query * L_ROW] = (top + log2_approx(sum)) * LN_2;
}

#elif PASS == 2

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const IN *__restrict__ q, const IN *__restrict__ k, const IN *__restrict__ v, const float *__restrict__ lse, const IN *__restrict__ d_o, IN *dq, IN *__restrict__ dk, IN *__restrict__ dv) {
    extern __shared__ float memory[];
    float *k_tile = memory, *q_tile = k_tile + TILE * (HEAD + 1), *v_tile = q_tile + TILE * (HEAD + 1), *do_tile = v_tile + TILE * (VALUE + 1);
    float *weights = do_tile + TILE * (VALUE + 1), *slopes = weights + TILE * (TILE + 1);
    u32 batch = blockIdx.x / TILES(KEYS, TILE), first = blockIdx.x % TILES(KEYS, TILE) * TILE;
    int key = first + OWN_ROW;
    read_tile<HEAD, KEYS, K_ROW, K_COLUMN>(k_tile, k + K_AT(batch, 0), first);
    read_tile<VALUE, KEYS, V_ROW, V_COLUMN>(v_tile, v + V_AT(batch, 0), first);
    float to_k[(HEAD + 3) / 4] = {}, to_v[(VALUE + 3) / 4] = {};
    int begin = CAUSAL ? max(int(first) - OFFSET, 0) / TILE * TILE : 0;
    for (u32 group = 0; group < GROUP; group++) {
        for (int tile = begin; tile < QUERIES; tile += TILE) {
            __syncthreads();
            read_tile<HEAD, QUERIES, Q_ROW, Q_COLUMN>(q_tile, q + Q_AT(batch, group), tile);
            read_tile<VALUE, QUERIES, O_ROW, O_COLUMN>(do_tile, d_o + O_AT(batch, group), tile);
            __syncthreads();
            float s[PER_LANE], dp[PER_LANE];
            products<HEAD>(s, k_tile, q_tile);
            products<VALUE>(dp, v_tile, do_tile);
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) {
                int query = tile + LANE + 4 * j;
                float p = 0.f, ds = 0.f;
                if (query < QUERIES && key < visible(query)) {
                    p = exp2_approx(s[j] * (SCALE * LOG2_E) - lse[L_AT(batch, group) + query * L_ROW] * LOG2_E);
                    ds = p * (dp[j] - *row_dot(dq + Q_AT(batch, group), query)) * SCALE;
                }
                weights[OWN_ROW * (TILE + 1) + LANE + 4 * j] = p;
                slopes[OWN_ROW * (TILE + 1) + LANE + 4 * j] = ds;
            }
            __syncwarp();
            weigh<HEAD>(to_k, slopes, q_tile);
            weigh<VALUE>(to_v, weights, do_tile);
        }
    }
    if (key >= KEYS) return;
    write_row<HEAD, K_COLUMN>(dk + K_AT(batch, 0) + key * K_ROW, to_k, 1.f);
    write_row<VALUE, V_COLUMN>(dv + V_AT(batch, 0) + key * V_ROW, to_v, 1.f);
}

#elif PASS == 3

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const IN *__restrict__ q, const IN *__restrict__ k, const IN *__restrict__ v, const float *__restrict__ lse, const IN *__restrict__ d_o, IN *dq) {
    extern __shared__ float memory[];
    float *q_tile = memory, *k_tile = q_tile + TILE * (HEAD + 1), *v_tile = k_tile + TILE * (HEAD + 1), *do_tile = v_tile + TILE * (VALUE + 1);
    float *slopes = do_tile + TILE * (VALUE + 1);
    u32 head = blockIdx.x / TILES(QUERIES, TILE), first = blockIdx.x % TILES(QUERIES, TILE) * TILE;
    u32 batch = head / GROUP, group = head % GROUP, query = first + OWN_ROW;
    dq += Q_AT(batch, group);
    read_tile<HEAD, QUERIES, Q_ROW, Q_COLUMN>(q_tile, q + Q_AT(batch, group), first);
    read_tile<VALUE, QUERIES, O_ROW, O_COLUMN>(do_tile, d_o + O_AT(batch, group), first);
    bool inside = query < QUERIES;
    float top = inside ? lse[L_AT(batch, group) + query * L_ROW] * LOG2_E : 0.f, dot = inside ? *row_dot(dq, query) : 0.f;
    float acc[(HEAD + 3) / 4] = {};
    int end = visible(min(first + TILE, QUERIES) - 1), seen = visible(query);
    for (int tile = 0; tile < end; tile += TILE) {
        __syncthreads();
        read_tile<HEAD, KEYS, K_ROW, K_COLUMN>(k_tile, k + K_AT(batch, group), tile);
        read_tile<VALUE, KEYS, V_ROW, V_COLUMN>(v_tile, v + V_AT(batch, group), tile);
        __syncthreads();
        float s[PER_LANE], dp[PER_LANE];
        products<HEAD>(s, q_tile, k_tile);
        products<VALUE>(dp, do_tile, v_tile);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            bool sees = tile + LANE + 4 * j < seen;
            float p = sees ? exp2_approx(s[j] * (SCALE * LOG2_E) - top) : 0.f;
            slopes[OWN_ROW * (TILE + 1) + LANE + 4 * j] = p * (dp[j] - dot) * SCALE;
        }
        __syncwarp();
        weigh<HEAD>(acc, slopes, k_tile);
    }
    // All threads of a row have read its D, which the row's gradient now replaces.
    __syncthreads();
    if (inside) write_row<HEAD, Q_COLUMN>(dq + query * Q_ROW, acc, 1.f);
}

#endif
