// The body of contract.cu for products of warp groups, each of which computes 64 rows of a tile. A ring of STAGES stages;
// while the products of one step are under way, the copies of a later one are started into the stage whose products
// every thread has waited for. TILE_DEPTH is 64: one line of a K-major tile.

#define A_TILE_BYTES (TILE_ROWS * LINE_BYTES)
#define B_TILE_BYTES (TILE_COLUMNS * LINE_BYTES)
// Steps from the start of a copy to its use: a stage is free two steps after its products were started.
#define AHEAD (STAGES - 2)

/// Starts the copy of one operand's tile: lines along the depth, or along rows or columns.
#define COPY_LINES(NAME, TILE, LIMIT, INNER, PLACE, PLACE_DEPTH)                                              \
    static __device__ __forceinline__ void NAME(u32 tile, const bf16 *from, u32 first, u32 first_depth) {     \
        copy_lines<INNER ? TILE : TILE_DEPTH, INNER ? TILE_DEPTH : TILE, THREADS>(                            \
            tile, threadIdx.x, [&](u32 line, u32 at, bool &valid) {                                           \
                u32 side = first + (INNER ? line : at), depth = first_depth + (INNER ? at : line);            \
                valid = (LIMIT % TILE == 0 || side < LIMIT) && (DEPTH % TILE_DEPTH == 0 || depth < DEPTH);    \
                return from + (valid ? PLACE(side) + PLACE_DEPTH(depth) : 0);                                 \
            });                                                                                               \
    }

COPY_LINES(copy_lines_a, TILE_ROWS, ROWS, A_DEPTH_INNER, A_ROW, A_DEPTH)
COPY_LINES(copy_lines_b, TILE_COLUMNS, COLUMNS, B_DEPTH_INNER, B_COLUMN, B_DEPTH)

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const bf16 *__restrict__ a, const bf16 *__restrict__ b, OUT *__restrict__ c BIAS_PARAMETER) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 stages = shared_address(memory), group = threadIdx.x / 128;
    u32 first_row, first_column;
    u32 batch = place_tile(first_row, first_column);
    a += A_BATCH(batch);
    b += B_BATCH(batch);
    c += C_BATCH(batch);
    PLACE_BIAS(batch);

    auto load = [&](u32 step) {
        if (step < N_STEPS) {
            u32 stage = stages + step % STAGES * (A_TILE_BYTES + B_TILE_BYTES);
            copy_lines_a(stage, a, first_row, step * TILE_DEPTH);
            copy_lines_b(stage + A_TILE_BYTES, b, first_column, step * TILE_DEPTH);
        }
        commit();
    };
    float acc[TILE_COLUMNS / 2] = {};
    settle(acc);
#pragma unroll
    for (int step = 0; step < AHEAD; step++) load(step);
#pragma unroll 1
    for (u32 step = 0; step < N_STEPS; step++) {
        // This step's copies have arrived, also those of the other threads; and all have waited for the products of the
        // step before the last one.
        wait<AHEAD - 1>();
        fence_async();
        __syncthreads();
        u32 stage = stages + step % STAGES * (A_TILE_BYTES + B_TILE_BYTES);
        u64 a_tile = descriptor<TILE_DEPTH * LINE_BYTES>(stage + group * (64 * LINE_BYTES));
        u64 b_tile = descriptor<TILE_DEPTH * LINE_BYTES>(stage + A_TILE_BYTES);
        products_begin();
#pragma unroll
        for (int k = 0; k < TILE_DEPTH; k += 16)
            multiply<TILE_COLUMNS, 1, !A_DEPTH_INNER, !B_DEPTH_INNER>(acc, a_tile + along_depth<A_DEPTH_INNER>(k), b_tile + along_depth<B_DEPTH_INNER>(k));
        products_commit();
        load(step + AHEAD);
        products_wait<1>();
    }
    products_wait<0>();
    settle(acc);
    u32 row = first_row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = first_column + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < TILE_COLUMNS / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) put_pair(c, bias, row + i * 8, column + j * 8, acc[4 * j + 2 * i], acc[4 * j + 2 * i + 1]);
}
