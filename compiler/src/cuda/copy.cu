// Moves N elements between strided places. Named parameters: WORD (what a thread moves: an element, or as many as lie
// next to each other on both sides in 16 bytes), N, FROM(i) and TO(i), the places of word i in words; or with TILED, for
// operands whose neighbors in memory differ: the inner loops ROWS (neighbors in the source) and COLUMNS (neighbors in
// the destination), their strides ROW_TO and COLUMN_FROM, and FROM(i) and TO(i) the places of tile loop i.

#if TILED

extern "C" __global__ void __launch_bounds__(256) ENTRY(const WORD *__restrict__ from, WORD *__restrict__ to) {
    // One more, so that a column of the tile lies in different banks.
    __shared__ WORD tile[32][33];
    u32 n_down = (ROWS + 31) / 32, n_across = (COLUMNS + 31) / 32;
    u32 first_column = blockIdx.x % n_across * 32, first_row = blockIdx.x / n_across % n_down * 32, outer = blockIdx.x / (n_across * n_down);
    u32 x = threadIdx.x % 32, y = threadIdx.x / 32;
    for (u32 i = y; i < 32; i += 8)
        if (first_row + x < ROWS && first_column + i < COLUMNS) tile[i][x] = from[FROM(outer) + (first_row + x) + (first_column + i) * COLUMN_FROM];
    __syncthreads();
    for (u32 i = y; i < 32; i += 8)
        if (first_row + i < ROWS && first_column + x < COLUMNS) to[TO(outer) + (first_row + i) * ROW_TO + (first_column + x)] = tile[x][i];
}

#else

extern "C" __global__ void __launch_bounds__(256) ENTRY(const WORD *__restrict__ from, WORD *__restrict__ to) {
    u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i < N) to[TO(i)] = from[FROM(i)];
}

#endif
