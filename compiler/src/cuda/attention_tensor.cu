// Attention on tensor cores (MATH 1 tf32, 2 bf16): a block owns some rows of one side (queries, or keys in pass 2) and the
// other side's rows stream through shared memory. Four warps; each owns `PIECES` pieces of 16 rows. Products of own and
// streamed rows stay in registers, where they are in place to be the next product's left operand.
//
// Further named parameters: PIECES, OTHER (streamed rows at a time).

#define THREADS 128
#define OWN (64 * PIECES)
#define N_OTHER (OTHER / 8)
#define N_HEAD (HEAD / 8)
#define N_VALUE (VALUE / 8)
// 16 bytes between rows, so that the rows that a warp reads together lie in different banks.
#define PITCH(width) ((width) + 16 / (int)sizeof(IN))

/// Starts the copy of `ROWS` rows of an operand, zeros behind the last.
template <int ROWS, int WIDTH, int LIMIT, u64 STRIDE>
static __device__ __forceinline__ void copy_rows(IN *tile, const IN *from, int first) {
    constexpr int STEP = 16 / sizeof(IN), PER_ROW = WIDTH / STEP;
#pragma unroll
    for (int i = 0; i < (ROWS * PER_ROW + THREADS - 1) / THREADS; i++) {
        int copy = threadIdx.x + i * THREADS;
        if (ROWS * PER_ROW % THREADS != 0 && copy >= ROWS * PER_ROW) break;
        int row = copy / PER_ROW, column = copy % PER_ROW * STEP;
        bool valid = LIMIT % ROWS == 0 || first + row < LIMIT;
        copy_async<16>(tile + row * PITCH(WIDTH) + column, from + (valid ? (first + row) * STRIDE + column : 0), valid);
    }
}

/// s[own, other] = own · otherᵀ over `WIDTH`.
template <int WIDTH>
static __device__ __forceinline__ void products(float (&s)[PIECES][N_OTHER][4], const IN *own, const IN *other) {
    u32 lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * PIECES;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int j = 0; j < N_OTHER; j++)
#pragma unroll
            for (int l = 0; l < 4; l++) s[i][j][l] = 0.f;
#if MATH == 1
    const float *a = own + (warp_row + lane / 4) * PITCH(WIDTH) + lane % 4, *b = other + lane / 4 * PITCH(WIDTH) + lane % 4;
#pragma unroll
    for (int k = 0; k < WIDTH; k += 8) {
        u32 x[PIECES][4];
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int l = 0; l < 4; l++) x[i][l] = to_tf32(a[(i * 16 + l % 2 * 8) * PITCH(WIDTH) + k + l / 2 * 4]);
#pragma unroll
        for (int j = 0; j < N_OTHER; j++) {
            u32 low = to_tf32(b[j * 8 * PITCH(WIDTH) + k]), high = to_tf32(b[j * 8 * PITCH(WIDTH) + k + 4]);
#pragma unroll
            for (int i = 0; i < PIECES; i++) multiply_tf32(s[i][j], x[i], low, high);
        }
    }
#else
    u32 a = shared_address(own + (warp_row + lane % 16) * PITCH(WIDTH) + lane / 16 * 8);
    u32 b = shared_address(other + (lane % 8 + lane / 16 * 8) * PITCH(WIDTH) + lane / 8 % 2 * 8);
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
        u32 x[PIECES][4];
#pragma unroll
        for (int i = 0; i < PIECES; i++) load_matrices(x[i], a + (i * 16 * PITCH(WIDTH) + k) * 2);
#pragma unroll
        for (int j = 0; j < N_OTHER; j += 2) {
            u32 y[4];
            load_matrices(y, b + (j * 8 * PITCH(WIDTH) + k) * 2);
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                multiply_bf16(s[i][j], x[i], y[0], y[1]);
                multiply_bf16(s[i][j + 1], x[i], y[2], y[3]);
            }
        }
    }
#endif
}

/// acc[own, width] += weights[own, other] · other[other, width].
template <int WIDTH>
static __device__ __forceinline__ void weigh(float (&acc)[PIECES][WIDTH / 8][4], const float (&weights)[PIECES][N_OTHER][4], const IN *other) {
    u32 lane = threadIdx.x % 32;
#if MATH == 1
    // A sum may run in any order: depth t is streamed row 2 t, depth t + 4 is row 2 t + 1, which is where the weights are.
    const float *b = other + lane % 4 * 2 * PITCH(WIDTH) + lane / 4;
#pragma unroll
    for (int j = 0; j < N_OTHER; j++) {
        u32 x[PIECES][4];
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int l = 0; l < 4; l++) x[i][l] = to_tf32(weights[i][j][l % 2 * 2 + l / 2]);
#pragma unroll
        for (int w = 0; w < WIDTH / 8; w++) {
            u32 low = to_tf32(b[j * 8 * PITCH(WIDTH) + w * 8]), high = to_tf32(b[(j * 8 + 1) * PITCH(WIDTH) + w * 8]);
#pragma unroll
            for (int i = 0; i < PIECES; i++) multiply_tf32(acc[i][w], x[i], low, high);
        }
    }
#else
    u32 b = shared_address(other + lane % 16 * PITCH(WIDTH) + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < N_OTHER; j += 2) {
        u32 x[PIECES][4];
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int l = 0; l < 4; l++) x[i][l] = pack_bf16(weights[i][j + l / 2][l % 2 * 2], weights[i][j + l / 2][l % 2 * 2 + 1]);
#pragma unroll
        for (int w = 0; w < WIDTH / 8; w += 2) {
            u32 y[4];
            load_matrices_transposed(y, b + (j * 8 * PITCH(WIDTH) + w * 8) * 2);
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                multiply_bf16(acc[i][w], x[i], y[0], y[1]);
                multiply_bf16(acc[i][w + 1], x[i], y[2], y[3]);
            }
        }
    }
#endif
}

static __device__ __forceinline__ void put_pair(IN *to, float x, float y) {
    if (sizeof(IN) == 4) {
        *(float2 *)to = make_float2(x, y);
    } else {
        *(u32 *)to = pack_bf16(x, y);
    }
}

/// Own row of half `l` (0 or 1) of piece `i`.
static __device__ __forceinline__ int own_row(int i, int l) {
    return threadIdx.x / 32 * 16 * PIECES + i * 16 + l * 8 + threadIdx.x % 32 / 4;
}

/// Writes own rows, those of a query or key behind the last one left out.
template <int WIDTH, int LIMIT, u64 STRIDE>
static __device__ __forceinline__ void write_rows(IN *to, const float (&acc)[PIECES][WIDTH / 8][4], const float (&factor)[PIECES][2], int first) {
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int l = 0; l < 2; l++) {
            int row = first + own_row(i, l);
            if (LIMIT % OWN == 0 || row < LIMIT) {
#pragma unroll
                for (int w = 0; w < WIDTH / 8; w++)
                    put_pair(to + row * STRIDE + w * 8 + threadIdx.x % 4 * 2, acc[i][w][2 * l] * factor[i][l], acc[i][w][2 * l + 1] * factor[i][l]);
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

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const IN *__restrict__ q, const IN *__restrict__ k, const IN *__restrict__ v, IN *__restrict__ o, float *__restrict__ lse) {
    extern __shared__ __align__(16) unsigned char memory[];
    IN *q_tile = (IN *)memory, *k_tile = q_tile + OWN * PITCH(HEAD), *v_tile = k_tile + OTHER * PITCH(HEAD);
    // The last queries see the most keys, so they go first.
    u32 head = blockIdx.x / TILES(QUERIES, OWN);
    int first = (TILES(QUERIES, OWN) - 1 - blockIdx.x % TILES(QUERIES, OWN)) * OWN;
    u32 batch = head / GROUP, group = head % GROUP;
    k += K_AT(batch, group);
    v += V_AT(batch, group);
    copy_rows<OWN, HEAD, QUERIES, Q_ROW>(q_tile, q + Q_AT(batch, group), first);
    copy_rows<OTHER, HEAD, KEYS, K_ROW>(k_tile, k, 0);
    commit();
    float acc[PIECES][N_VALUE][4] = {}, top[PIECES][2], sum[PIECES][2] = {};
#pragma unroll
    for (int i = 0; i < PIECES; i++) top[i][0] = top[i][1] = -INFINITY_F;
    int end = visible(min(first + OWN, QUERIES) - 1);
#pragma unroll 1
    for (int tile = 0; tile < end; tile += OTHER) {
        // The keys are here, and all warps are done with the last values.
        wait<0>();
        __syncthreads();
        copy_rows<OTHER, VALUE, KEYS, V_ROW>(v_tile, v, tile);
        commit();
        float s[PIECES][N_OTHER][4];
        products<HEAD>(s, q_tile, k_tile);
        // The values are here, and all warps are done with these keys.
        wait<0>();
        __syncthreads();
        if (tile + OTHER < end) copy_rows<OTHER, HEAD, KEYS, K_ROW>(k_tile, k, tile + OTHER);
        commit();
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int l = 0; l < 2; l++) {
                int seen = visible(first + own_row(i, l)) - tile - threadIdx.x % 4 * 2;
                float most = top[i][l], part = 0.f;
#pragma unroll
                for (int j = 0; j < N_OTHER; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &x = s[i][j][2 * l + e];
                        x = j * 8 + e < seen ? x * (SCALE * LOG2_E) : -INFINITY_F;
                        most = fmaxf(most, x);
                    }
                most = quad_max(most);
                float shrink = exp2_approx(top[i][l] - most);
                top[i][l] = most;
#pragma unroll
                for (int j = 0; j < N_OTHER; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &x = s[i][j][2 * l + e];
                        x = exp2_approx(x - most);
                        part += x;
                    }
                sum[i][l] = sum[i][l] * shrink + part;
#pragma unroll
                for (int w = 0; w < N_VALUE; w++) {
                    acc[i][w][2 * l] *= shrink;
                    acc[i][w][2 * l + 1] *= shrink;
                }
            }
        weigh<VALUE>(acc, s, v_tile);
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int l = 0; l < 2; l++) {
            sum[i][l] = quad_sum(sum[i][l]);
            int query = first + own_row(i, l);
            if (threadIdx.x % 4 == 0 && query < QUERIES) lse[L_AT(batch, group) + query * L_ROW] = (top[i][l] + log2_approx(sum[i][l])) * LN_2;
            sum[i][l] = 1.f / sum[i][l];
        }
    write_rows<VALUE, QUERIES, O_ROW>(o + O_AT(batch, group), acc, sum, first);
}

#else

#if PASS == 2
#define OWN_LIMIT KEYS
#define OTHER_LIMIT QUERIES
#else
#define OWN_LIMIT QUERIES
#define OTHER_LIMIT KEYS
#endif
#define STAGE_SIZE (OTHER * (PITCH(HEAD) + PITCH(VALUE)))

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const IN *__restrict__ q, const IN *__restrict__ k, const IN *__restrict__ v, const float *__restrict__ lse, const IN *__restrict__ d_o, IN *dq
#if PASS == 2
    , IN *__restrict__ dk, IN *__restrict__ dv
#endif
) {
    extern __shared__ __align__(16) unsigned char memory[];
    // Queries beside do, keys beside values: one pair is owned, the other streams.
    IN *own_head = (IN *)memory, *own_value = own_head + OWN * PITCH(HEAD), *stages = own_value + OWN * PITCH(VALUE);
    float *stage_rows = (float *)(stages + STAGES * STAGE_SIZE);
    u32 head = blockIdx.x / TILES(OWN_LIMIT, OWN);
    int first = blockIdx.x % TILES(OWN_LIMIT, OWN) * OWN;
#if PASS == 2
    u32 batch = head;
    copy_rows<OWN, HEAD, KEYS, K_ROW>(own_head, k + K_AT(batch, 0), first);
    copy_rows<OWN, VALUE, KEYS, V_ROW>(own_value, v + V_AT(batch, 0), first);
    int begin = CAUSAL ? max(first - OFFSET, 0) / OTHER * OTHER : 0, end = QUERIES;
    int n_tiles = max(TILES(end - begin, OTHER), 0), n_steps = GROUP * n_tiles;
#else
    u32 batch = head / GROUP, group = head % GROUP;
    first = (TILES(QUERIES, OWN) - 1) * OWN - first;
    copy_rows<OWN, HEAD, QUERIES, Q_ROW>(own_head, q + Q_AT(batch, group), first);
    copy_rows<OWN, VALUE, QUERIES, O_ROW>(own_value, d_o + O_AT(batch, group), first);
    int n_steps = TILES(visible(min(first + OWN, QUERIES) - 1), OTHER);
    float own_lse[PIECES][2], own_dot[PIECES][2];
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int l = 0; l < 2; l++) {
            int query = first + own_row(i, l);
            own_lse[i][l] = query < QUERIES ? lse[L_AT(batch, group) + query * L_ROW] * LOG2_E : 0.f;
            own_dot[i][l] = query < QUERIES ? *row_dot(dq + Q_AT(batch, group), query) : 0.f;
        }
#endif

    auto load = [&](int step) {
        if (step < n_steps) {
            IN *stage = stages + step % STAGES * STAGE_SIZE;
#if PASS == 2
            u32 group = step / n_tiles;
            int tile = begin + step % n_tiles * OTHER;
            copy_rows<OTHER, HEAD, QUERIES, Q_ROW>(stage, q + Q_AT(batch, group), tile);
            copy_rows<OTHER, VALUE, QUERIES, O_ROW>(stage + OTHER * PITCH(HEAD), d_o + O_AT(batch, group), tile);
            if (threadIdx.x < OTHER) {
                float *rows = stage_rows + step % STAGES * 2 * OTHER;
                int query = tile + threadIdx.x;
                copy_async<4>(rows + threadIdx.x, query < QUERIES ? lse + L_AT(batch, group) + query * L_ROW : lse, query < QUERIES);
                copy_async<4>(rows + OTHER + threadIdx.x, query < QUERIES ? row_dot(dq + Q_AT(batch, group), query) : (float *)dq, query < QUERIES);
            }
#else
            copy_rows<OTHER, HEAD, KEYS, K_ROW>(stage, k + K_AT(batch, group), step * OTHER);
            copy_rows<OTHER, VALUE, KEYS, V_ROW>(stage + OTHER * PITCH(HEAD), v + V_AT(batch, group), step * OTHER);
#endif
        }
        commit();
    };

    float to_head[PIECES][N_HEAD][4] = {};
#if PASS == 2
    float to_value[PIECES][N_VALUE][4] = {};
#endif
    load(0);
#pragma unroll 1
    for (int step = 0; step < n_steps; step++) {
        if (STAGES > 1) {
            // All warps are done with the stage that is filled next.
            __syncthreads();
            load(step + 1);
            wait<1>();
        } else {
            wait<0>();
        }
        __syncthreads();
        const IN *stage = stages + step % STAGES * STAGE_SIZE;
        float s[PIECES][N_OTHER][4], ds[PIECES][N_OTHER][4];
        products<HEAD>(s, own_head, stage);
        products<VALUE>(ds, own_value, stage + OTHER * PITCH(HEAD));
#if PASS == 2
        const float *rows = stage_rows + step % STAGES * 2 * OTHER;
        int tile = begin + step % n_tiles * OTHER;
#else
        int tile = step * OTHER;
#endif
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int j = 0; j < N_OTHER; j++)
#pragma unroll
                for (int l = 0; l < 4; l++) {
                    int row = first + own_row(i, l / 2), column = j * 8 + threadIdx.x % 4 * 2 + l % 2;
#if PASS == 2
                    bool sees = tile + column < QUERIES && row < visible(tile + column);
                    float log_sum = rows[column] * LOG2_E, dot = rows[OTHER + column];
#else
                    bool sees = tile + column < visible(row);
                    float log_sum = own_lse[i][l / 2], dot = own_dot[i][l / 2];
#endif
                    float p = sees ? exp2_approx(s[i][j][l] * (SCALE * LOG2_E) - log_sum) : 0.f;
                    s[i][j][l] = p;
                    ds[i][j][l] = p * (ds[i][j][l] - dot) * SCALE;
                }
        weigh<HEAD>(to_head, ds, stage);
#if PASS == 2
        weigh<VALUE>(to_value, s, stage + OTHER * PITCH(HEAD));
#endif
        if (STAGES == 1) {
            __syncthreads();
            load(step + 1);
        }
    }
    wait<0>();
    float ones[PIECES][2];
#pragma unroll
    for (int i = 0; i < PIECES; i++) ones[i][0] = ones[i][1] = 1.f;
#if PASS == 2
    write_rows<HEAD, KEYS, K_ROW>(dk + K_AT(batch, 0), to_head, ones, first);
    write_rows<VALUE, KEYS, V_ROW>(dv + V_AT(batch, 0), to_value, ones, first);
#else
    // All threads of a row have read its D, which the row's gradient now replaces.
    __syncthreads();
    write_rows<HEAD, QUERIES, Q_ROW>(dq + Q_AT(batch, group), to_head, ones, first);
#endif
}

#endif
