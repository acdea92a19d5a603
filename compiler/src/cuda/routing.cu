// Routing of tokens to experts. Indices that do not fall into this rank's part are left out, so that no value leads
// outside of a buffer.
//
// Named parameters: OP, the places of rows, assignments and features (flattened indices), and sizes:
//   OP 0 top_k       (x) -> (values, indices)             N_ROWS SIZE K, X_ROW X_SIDE V_ROW V_CHOICE I_ROW I_CHOICE
//   OP 1 top_k_grad  (dvalues, indices) -> (dx)           the same
//   OP 2 slots       (expert) -> (slot)                   N_GROUPS N_EACH N_EXPERTS CAPACITY, E_GROUP E_EACH S_GROUP S_EACH
//   OP 3 zero        (y)                                  N
//   OP 4 dispatch    (x, expert, slot[, gate], y)         N (assignments) WIDTH FIRST_EXPERT N_EXPERTS EXPERT_STRIDE CAPACITY
//   OP 5 combine     (y, expert, slot[, gate], x)         SLOT_STRIDE, E_AT S_AT G_AT X_AT Y_AT (of an assignment), X_WIDTH
//   OP 6 gate_grad   (y, dout, expert, slot, dgate)       Y_WIDTH (of a feature), GATED, N_CHOICES
// and the element types X, Y and G of tokens, slots and gates; PACK, elements of a token's features that lie next to each
// other in both and are moved at once (WIDTH counts packs).

#define NONE 0xffffffffu
#define WARP_MAX_ROWS 8

#if OP == 0

/// Warp a row. Each round takes the greatest of those that come behind the last one taken, among equals the first.
extern "C" __global__ void __launch_bounds__(32 * WARP_MAX_ROWS) ENTRY(const X *__restrict__ x, X *__restrict__ values, int *__restrict__ indices) {
    u32 row = blockIdx.x * WARP_MAX_ROWS + threadIdx.x / 32;
    if (row >= N_ROWS) return;
    float last = 0.f;
    u32 last_at = NONE;
    for (u32 choice = 0; choice < K; choice++) {
        float best = 0.f;
        u32 best_at = NONE;
        for (u32 i = threadIdx.x % 32; i < SIZE; i += 32) {
            float value = to_float(x[X_ROW(row) + X_SIDE(i)]);
            bool left = last_at == NONE ? value == value : value < last || (value == last && i > last_at);
            if (left && (best_at == NONE || value > best)) {
                best = value;
                best_at = i;
            }
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            float other = __shfl_xor_sync(~0u, best, distance);
            u32 other_at = __shfl_xor_sync(~0u, best_at, distance);
            if (other_at != NONE && (best_at == NONE || other > best || (other == best && other_at < best_at))) {
                best = other;
                best_at = other_at;
            }
        }
        // Scores that are no numbers are never taken; where too few are left, no expert is meant.
        if (threadIdx.x % 32 == 0) {
            store(values + (V_ROW(row) + V_CHOICE(choice)), best_at == NONE ? __int_as_float(0x7fc00000) : best);
            indices[I_ROW(row) + I_CHOICE(choice)] = int(best_at);
        }
        if (best_at == NONE) {
            last = -__int_as_float(0x7f800000);
            last_at = NONE - 1;
        } else {
            last = best;
            last_at = best_at;
        }
    }
}

#elif OP == 1

extern "C" __global__ void __launch_bounds__(256) ENTRY(const X *__restrict__ d_values, const int *__restrict__ indices, X *__restrict__ dx) {
    u32 at = blockIdx.x * 256 + threadIdx.x;
    if (at >= N_ROWS * SIZE) return;
    u32 row = at / SIZE, side = at % SIZE;
    float sum = 0.f;
    for (u32 choice = 0; choice < K; choice++)
        if (indices[I_ROW(row) + I_CHOICE(choice)] == int(side)) sum += to_float(d_values[V_ROW(row) + V_CHOICE(choice)]);
    store(dx + (X_ROW(row) + X_SIDE(side)), sum);
}

#elif OP == 2

/// Block an expert of a group; it counts the expert's assignments in order.
extern "C" __global__ void __launch_bounds__(256) ENTRY(const int *__restrict__ expert, int *__restrict__ slot) {
    __shared__ u32 in_warps[8];
    u32 group = blockIdx.x / N_EXPERTS, own = blockIdx.x % N_EXPERTS;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, before = 0;
    for (u32 first = 0; first < N_EACH; first += 256) {
        u32 each = first + threadIdx.x;
        int wanted = each < N_EACH ? expert[E_GROUP(group) + E_EACH(each)] : -1;
        u32 mine = __ballot_sync(~0u, wanted == int(own));
        if (lane == 0) in_warps[warp] = __popc(mine);
        __syncthreads();
        u32 rank = before + __popc(mine & ((1u << lane) - 1));
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            u32 n = in_warps[i];
            rank += i < warp ? n : 0;
            before += n;
        }
        __syncthreads();
        if (wanted == int(own)) {
            slot[S_GROUP(group) + S_EACH(each)] = rank < CAPACITY ? int(rank) : -1;
        } else if (own == 0 && each < N_EACH && u32(wanted) >= N_EXPERTS) {
            slot[S_GROUP(group) + S_EACH(each)] = -1;
        }
    }
}

#elif OP == 7

/// Block an expert of a group; it counts the expert's slots that are taken.
extern "C" __global__ void __launch_bounds__(256) ENTRY(const int *__restrict__ expert, const int *__restrict__ slot, int *__restrict__ counts) {
    __shared__ u32 in_warps[8];
    u32 group = blockIdx.x / N_EXPERTS, own = blockIdx.x % N_EXPERTS;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, mine = 0;
    for (u32 first = 0; first < N_EACH; first += 256) {
        u32 each = first + threadIdx.x;
        bool lands = false;
        if (each < N_EACH) {
            u32 wanted = u32(expert[E_GROUP(group) + E_EACH(each)]) - FIRST_EXPERT;
            lands = wanted == own && u32(slot[S_GROUP(group) + S_EACH(each)]) < CAPACITY;
        }
        mine += __popc(__ballot_sync(~0u, lands));
    }
    if (lane == 0) in_warps[warp] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 sum = 0;
#pragma unroll
        for (u32 i = 0; i < 8; i++) sum += in_warps[i];
        counts[C_GROUP(group) + own * EXPERT_STRIDE] = int(sum);
    }
}

#elif OP == 3

extern "C" __global__ void __launch_bounds__(256) ENTRY(Y *__restrict__ y) {
    u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i < N) store(y + i, 0.f);
}

#else

/// The place of an assignment's slot; false where it was dropped or belongs to another rank.
static __device__ __forceinline__ bool landed(const int *expert, const int *slot, u32 assignment, PLACE &at) {
    u32 own = u32(expert[E_AT(assignment)]) - FIRST_EXPERT, place = u32(slot[S_AT(assignment)]);
    at = Y_AT(assignment) + own * EXPERT_STRIDE + place * SLOT_STRIDE;
    return own < N_EXPERTS && place < CAPACITY;
}

/// Elements that are loaded and stored at once.
template <class T> struct __align__(PACK * sizeof(T)) Pack {
    T x[PACK];
};
template <class T> static __device__ __forceinline__ Pack<T> load_pack(const T *from) { return *(const Pack<T> *)from; }
template <class T> static __device__ __forceinline__ void store_pack(T *to, const float (&x)[PACK]) {
    Pack<T> pack;
#pragma unroll
    for (int l = 0; l < PACK; l++) store(&pack.x[l], x[l]);
    *(Pack<T> *)to = pack;
}

#if OP == 4

/// Each slot has one assignment at most, so that every element of y is written once.
extern "C" __global__ void __launch_bounds__(256) ENTRY(const X *__restrict__ x, const int *__restrict__ expert, const int *__restrict__ slot,
#if GATED
    const G *__restrict__ gate,
#endif
    Y *__restrict__ y) {
    u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= N * WIDTH) return;
    u32 assignment = i / WIDTH, feature = i % WIDTH;
    PLACE at;
    if (!landed(expert, slot, assignment, at)) return;
    Pack<X> token = load_pack(x + (X_AT(assignment) + X_WIDTH(feature)));
    float value[PACK], factor = 1.f;
#if GATED
    factor = to_float(gate[G_AT(assignment)]);
#endif
#pragma unroll
    for (int l = 0; l < PACK; l++) value[l] = to_float(token.x[l]) * factor;
    store_pack(y + (at + Y_WIDTH(feature)), value);
}

#elif OP == 5

/// A token's choices follow one another.
extern "C" __global__ void __launch_bounds__(256) ENTRY(const Y *__restrict__ y, const int *__restrict__ expert, const int *__restrict__ slot,
#if GATED
    const G *__restrict__ gate,
#endif
    X *__restrict__ x) {
    u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= N / N_CHOICES * WIDTH) return;
    u32 first = i / WIDTH * N_CHOICES, feature = i % WIDTH;
    float sum[PACK] = {};
    for (u32 choice = 0; choice < N_CHOICES; choice++) {
        u32 assignment = first + choice;
        PLACE at;
        if (!landed(expert, slot, assignment, at)) continue;
        Pack<Y> value = load_pack(y + (at + Y_WIDTH(feature)));
        float factor = 1.f;
#if GATED
        factor = to_float(gate[G_AT(assignment)]);
#endif
#pragma unroll
        for (int l = 0; l < PACK; l++) sum[l] = fmaf(to_float(value.x[l]), factor, sum[l]);
    }
    store_pack(x + (X_AT(first) + X_WIDTH(feature)), sum);
}

#else

/// Warp an assignment.
extern "C" __global__ void __launch_bounds__(32 * WARP_MAX_ROWS) ENTRY(const Y *__restrict__ y, const X *__restrict__ d_out, const int *__restrict__ expert, const int *__restrict__ slot, G *__restrict__ d_gate) {
    u32 assignment = blockIdx.x * WARP_MAX_ROWS + threadIdx.x / 32;
    if (assignment >= N) return;
    PLACE at;
    float sum = 0.f;
    if (landed(expert, slot, assignment, at)) {
        for (u32 i = threadIdx.x % 32; i < WIDTH; i += 32) {
            Pack<Y> out = load_pack(y + (at + Y_WIDTH(i)));
            Pack<X> slope = load_pack(d_out + (X_AT(assignment) + X_WIDTH(i)));
#pragma unroll
            for (int l = 0; l < PACK; l++) sum = fmaf(to_float(out.x[l]), to_float(slope.x[l]), sum);
        }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (threadIdx.x % 32 == 0) store(d_gate + G_AT(assignment), sum);
}

#endif
#endif
