// c[rows, columns] = Σ a · b, or c += …: one tile of c a block, its tiles of a and b in a ring of stages that
// asynchronous copies fill. Rows, columns, depth and batch are flattened indices; A_ROW(i) and the like
// give their places in the operands.
//
// Named parameters: MATH (0 f32, 1 tf32, 2 bf16, 3 bf16 by warp groups), IN and OUT (element types), ROWS COLUMNS DEPTH,
// TILE_ROWS TILE_COLUMNS TILE_DEPTH STAGES, WARPS_ROWS WARPS_COLUMNS, A_DEPTH_INNER and B_DEPTH_INNER (whether the
// operand's neighbors in memory are neighbors in depth), A_BYTES and B_BYTES (of one copy), OUT_PAIRS
// (whether two columns are stored at once), ACCUMULATE, BIASED (whether a vector is added, with its places), PAD (elements
// behind a line along rows or columns), and the places.

#define THREADS (32 * WARPS_ROWS * WARPS_COLUMNS)
// Rows of shared memory are padded so that the lanes of a warp meet different banks.
#define DEPTH_PITCH (TILE_DEPTH + 16 / (int)sizeof(IN))
#define A_SIZE (A_DEPTH_INNER ? TILE_ROWS * DEPTH_PITCH : TILE_DEPTH * (TILE_ROWS + PAD))
#define B_SIZE (B_DEPTH_INNER ? TILE_COLUMNS * DEPTH_PITCH : TILE_DEPTH * (TILE_COLUMNS + PAD))
#define N_TILES_ROWS ((ROWS + TILE_ROWS - 1) / TILE_ROWS)
#define N_TILES_COLUMNS ((COLUMNS + TILE_COLUMNS - 1) / TILE_COLUMNS)
#define N_STEPS ((DEPTH + TILE_DEPTH - 1) / TILE_DEPTH)
// Blocks that run together take tiles of so many rows of tiles, so that they share operands in cache.
#define BAND 8

/// Copies one tile of an operand; `BYTES` 0 means elements too small for asynchronous copies.
#define COPY_TILE(NAME, TILE, LIMIT, INNER, BYTES, PLACE, PLACE_DEPTH)                                        \
    static __device__ __forceinline__ void NAME(IN *tile, const IN *from, u32 first, u32 first_depth) {       \
        constexpr int WIDTH = BYTES == 0 ? 1 : BYTES / (int)sizeof(IN);                                       \
        constexpr int N_COPIES = TILE * TILE_DEPTH / WIDTH;                                                   \
        constexpr int PER_LINE = (INNER ? TILE_DEPTH : TILE) / WIDTH;                                         \
        constexpr int PITCH = INNER ? DEPTH_PITCH : TILE + PAD;                                               \
        _Pragma("unroll") for (int i = 0; i < (N_COPIES + THREADS - 1) / THREADS; i++) {                      \
            u32 copy = threadIdx.x + i * THREADS;                                                             \
            if (N_COPIES % THREADS != 0 && copy >= N_COPIES) break;                                           \
            u32 line = copy / PER_LINE, at = copy % PER_LINE * WIDTH;                                         \
            u32 side = first + (INNER ? line : at), depth = first_depth + (INNER ? at : line);                \
            bool valid = (LIMIT % TILE == 0 || side < LIMIT) && (DEPTH % TILE_DEPTH == 0 || depth < DEPTH);   \
            const IN *source = from + (valid ? PLACE(side) + PLACE_DEPTH(depth) : 0);                         \
            IN *target = tile + line * PITCH + at;                                                            \
            if (BYTES == 0) {                                                                                 \
                *target = valid ? *source : IN{};                                                             \
            } else {                                                                                          \
                copy_async<BYTES == 0 ? 4 : BYTES>(target, source, valid);                                    \
            }                                                                                                 \
        }                                                                                                     \
    }

COPY_TILE(copy_a, TILE_ROWS, ROWS, A_DEPTH_INNER, A_BYTES, A_ROW, A_DEPTH)
COPY_TILE(copy_b, TILE_COLUMNS, COLUMNS, B_DEPTH_INNER, B_BYTES, B_COLUMN, B_DEPTH)

#if BIASED
#define ADD_BIAS(row, column, x) x += to_float(bias[BIAS_ROW(row) + BIAS_COLUMN(column)])
#define BIAS_PARAMETER , const OUT *__restrict__ bias
#define PLACE_BIAS(batch) bias += BIAS_BATCH(batch)
#else
#define ADD_BIAS(row, column, x)
#define BIAS_PARAMETER
#define PLACE_BIAS(batch) const OUT *bias = nullptr
#endif

static __device__ __forceinline__ void put(OUT *c, const OUT *bias, u32 row, u32 column, float x) {
    if ((ROWS % TILE_ROWS == 0 || row < ROWS) && (COLUMNS % TILE_COLUMNS == 0 || column < COLUMNS)) {
        OUT *to = c + (C_ROW(row) + C_COLUMN(column));
        ADD_BIAS(row, column, x);
        store(to, ACCUMULATE ? to_float(*to) + x : x);
    }
}

/// Two neighbors, of which both or none are inside.
static __device__ __forceinline__ void put_pair(OUT *c, const OUT *bias, u32 row, u32 column, float x, float y) {
#if OUT_PAIRS
    if ((ROWS % TILE_ROWS == 0 || row < ROWS) && (COLUMNS % TILE_COLUMNS == 0 || column < COLUMNS)) {
        OUT *to = c + (C_ROW(row) + C_COLUMN(column));
        ADD_BIAS(row, column, x);
        ADD_BIAS(row, column + 1, y);
        if (ACCUMULATE) {
            x += to_float(to[0]);
            y += to_float(to[1]);
        }
        if (sizeof(OUT) == 4) {
            *(float2 *)to = make_float2(x, y);
        } else {
            *(u32 *)to = pack_bf16(x, y);
        }
    }
#else
    put(c, bias, row, column, x);
    put(c, bias, row, column + 1, y);
#endif
}

/// The first row and column of this block's tile, and its batch.
static __device__ __forceinline__ u32 place_tile(u32 &first_row, u32 &first_column) {
    u32 tile = blockIdx.x % (N_TILES_ROWS * N_TILES_COLUMNS), batch = blockIdx.x / (N_TILES_ROWS * N_TILES_COLUMNS);
    u32 band = tile / (BAND * N_TILES_COLUMNS) * BAND;
    u32 height = min(u32(BAND), N_TILES_ROWS - band), within = tile - band * N_TILES_COLUMNS;
    first_row = (band + within % height) * TILE_ROWS;
    first_column = within / height * TILE_COLUMNS;
    return batch;
}

// Products of warp groups stand in contract_wgmma.cu.
#if MATH != 3
#if MATH == 0

// Each thread of 16 × (THREADS / 16) computes SIDE_ROWS × SIDE_COLUMNS elements.
#define DOWN (THREADS / 16)
#define SIDE_ROWS (TILE_ROWS / DOWN)
#define SIDE_COLUMNS (TILE_COLUMNS / 16)
#define ACCUMULATORS float acc[SIDE_ROWS][SIDE_COLUMNS]

// Neighbors in a tile that is read by fours, strides where each element is a line of its own.
static __device__ __forceinline__ u32 row_of(int i) {
    u32 y = threadIdx.x / 16;
    return A_DEPTH_INNER || SIDE_ROWS % 4 != 0 ? y + i * DOWN : y * 4 + i % 4 + i / 4 * 4 * DOWN;
}
static __device__ __forceinline__ u32 column_of(int j) {
    u32 x = threadIdx.x % 16;
    return B_DEPTH_INNER || SIDE_COLUMNS % 4 != 0 ? x + j * 16 : x * 4 + j % 4 + j / 4 * 64;
}

static __device__ __forceinline__ void multiply(float (&acc)[SIDE_ROWS][SIDE_COLUMNS], const float *a, const float *b) {
    for (int k = 0; k < TILE_DEPTH; k += 4) {
        float x[SIDE_ROWS][4], y[SIDE_COLUMNS][4];
#pragma unroll
        for (int i = 0; i < SIDE_ROWS; i++)
#pragma unroll
            for (int l = 0; l < 4; l++)
                x[i][l] = A_DEPTH_INNER ? a[row_of(i) * DEPTH_PITCH + k + l] : a[(k + l) * (TILE_ROWS + PAD) + row_of(i)];
#pragma unroll
        for (int j = 0; j < SIDE_COLUMNS; j++)
#pragma unroll
            for (int l = 0; l < 4; l++)
                y[j][l] = B_DEPTH_INNER ? b[column_of(j) * DEPTH_PITCH + k + l] : b[(k + l) * (TILE_COLUMNS + PAD) + column_of(j)];
#pragma unroll
        for (int l = 0; l < 4; l++)
#pragma unroll
            for (int i = 0; i < SIDE_ROWS; i++)
#pragma unroll
                for (int j = 0; j < SIDE_COLUMNS; j++) acc[i][j] = fmaf(x[i][l], y[j][l], acc[i][j]);
    }
}

static __device__ __forceinline__ void finish(float (&acc)[SIDE_ROWS][SIDE_COLUMNS], OUT *c, const OUT *bias, u32 first_row, u32 first_column) {
#pragma unroll
    for (int i = 0; i < SIDE_ROWS; i++)
#pragma unroll
        for (int j = 0; j < SIDE_COLUMNS; j++) put(c, bias, first_row + row_of(i), first_column + column_of(j), acc[i][j]);
}

#else

// Each warp computes N_M × N_N pieces of 16 × 8.
#define WARP_ROWS (TILE_ROWS / WARPS_ROWS)
#define WARP_COLUMNS (TILE_COLUMNS / WARPS_COLUMNS)
#define N_M (WARP_ROWS / 16)
#define N_N (WARP_COLUMNS / 8)
#define ACCUMULATORS float acc[N_M][N_N][4]

static __device__ __forceinline__ u32 warp_row() { return threadIdx.x / 32 / WARPS_COLUMNS * WARP_ROWS; }
static __device__ __forceinline__ u32 warp_column() { return threadIdx.x / 32 % WARPS_COLUMNS * WARP_COLUMNS; }

#if MATH == 1

static __device__ __forceinline__ u32 element(const float *tile, bool inner, int pitch, u32 side, u32 depth) {
    return to_tf32(inner ? tile[side * DEPTH_PITCH + depth] : tile[depth * pitch + side]);
}

static __device__ __forceinline__ void multiply(float (&acc)[N_M][N_N][4], const float *a, const float *b) {
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < TILE_DEPTH; k += 8) {
        u32 x[N_M][4], y[N_N][2];
#pragma unroll
        for (int i = 0; i < N_M; i++)
#pragma unroll
            for (int l = 0; l < 4; l++)
                x[i][l] = element(a, A_DEPTH_INNER, TILE_ROWS + PAD, warp_row() + i * 16 + g + l % 2 * 8, k + t + l / 2 * 4);
#pragma unroll
        for (int j = 0; j < N_N; j++)
#pragma unroll
            for (int l = 0; l < 2; l++)
                y[j][l] = element(b, B_DEPTH_INNER, TILE_COLUMNS + PAD, warp_column() + j * 8 + g, k + t + l * 4);
#pragma unroll
        for (int i = 0; i < N_M; i++)
#pragma unroll
            for (int j = 0; j < N_N; j++) multiply_tf32(acc[i][j], x[i], y[j][0], y[j][1]);
    }
}

#else

static __device__ __forceinline__ void multiply(float (&acc)[N_M][N_N][4], const bf16 *a, const bf16 *b) {
    u32 lane = threadIdx.x % 32;
    // Lanes 0–7 give the rows of the first matrix, 8–15 of the second, and so on.
    u32 near = lane % 8 + lane / 8 % 2 * 8, far = lane / 16 * 8;
    u32 low = lane % 8 + lane / 16 * 8, high = lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < TILE_DEPTH; k += 16) {
        u32 x[N_M][4], y[N_N / 2][4];
#pragma unroll
        for (int i = 0; i < N_M; i++) {
            u32 row = warp_row() + i * 16;
            if (A_DEPTH_INNER) {
                load_matrices(x[i], shared_address(a + (row + near) * DEPTH_PITCH + k + far));
            } else {
                load_matrices_transposed(x[i], shared_address(a + (k + low) * (TILE_ROWS + PAD) + row + high));
            }
        }
#pragma unroll
        for (int j = 0; j < N_N / 2; j++) {
            u32 column = warp_column() + j * 16;
            if (B_DEPTH_INNER) {
                load_matrices(y[j], shared_address(b + (column + low) * DEPTH_PITCH + k + high));
            } else {
                load_matrices_transposed(y[j], shared_address(b + (k + near) * (TILE_COLUMNS + PAD) + column + far));
            }
        }
#pragma unroll
        for (int i = 0; i < N_M; i++)
#pragma unroll
            for (int j = 0; j < N_N; j++) multiply_bf16(acc[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
    }
}

#endif

static __device__ __forceinline__ void finish(float (&acc)[N_M][N_N][4], OUT *c, const OUT *bias, u32 first_row, u32 first_column) {
    u32 row = first_row + warp_row() + threadIdx.x % 32 / 4, column = first_column + warp_column() + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < N_M; i++)
#pragma unroll
        for (int j = 0; j < N_N; j++)
#pragma unroll
            for (int l = 0; l < 2; l++)
                put_pair(c, bias, row + i * 16 + l * 8, column + j * 8, acc[i][j][2 * l], acc[i][j][2 * l + 1]);
}

#endif

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const IN *__restrict__ a, const IN *__restrict__ b, OUT *__restrict__ c BIAS_PARAMETER) {
    extern __shared__ __align__(16) unsigned char memory[];
    IN *stages = (IN *)memory;
    u32 first_row, first_column;
    u32 batch = place_tile(first_row, first_column);
    a += A_BATCH(batch);
    b += B_BATCH(batch);
    c += C_BATCH(batch);
    PLACE_BIAS(batch);

    ACCUMULATORS = {};
    auto load = [&](u32 step) {
        if (step < N_STEPS) {
            IN *stage = stages + step % STAGES * (A_SIZE + B_SIZE);
            copy_a(stage, a, first_row, step * TILE_DEPTH);
            copy_b(stage + A_SIZE, b, first_column, step * TILE_DEPTH);
        }
        commit();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) load(step);
#pragma unroll 1
    for (u32 step = 0; step < N_STEPS; step++) {
        wait<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1);
        const IN *stage = stages + step % STAGES * (A_SIZE + B_SIZE);
        multiply(acc, stage, stage + A_SIZE);
    }
    finish(acc, c, bias, first_row, first_column);
}

#endif
