// Collectives between ranks that share a device: they read each other's buffers in place.
// `collective.ptx` is this file compiled for sm_80, which later devices run too.

typedef unsigned long long u64;

// A number of 8 bits of significand: the upper half of a float.
struct bf16 {
    unsigned short bits;
};

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

static __device__ __forceinline__ void store(float* to, float x) { *to = x; }
static __device__ __forceinline__ void store(bf16* to, float x) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}

// Copies n2 × n1 × n0 elements; rows of n0 elements lie together on both sides.
template <class T>
static __device__ __forceinline__ void copy(
    T* __restrict__ to, const T* __restrict__ from,
    long long n2, long long n1, long long n0,
    long long to2, long long to1, long long from2, long long from1)
{
    u64 n = (u64)n2 * (u64)n1 * (u64)n0;
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        u64 i0 = i % (u64)n0, row = i / (u64)n0;
        u64 i1 = row % (u64)n1, i2 = row / (u64)n1;
        to[i2 * (u64)to2 + i1 * (u64)to1 + i0] = from[i2 * (u64)from2 + i1 * (u64)from1 + i0];
    }
}

// Combines rows × width elements of all sources, in their order and in f32, into every target.
// kind: 0 sum, 1 max, 2 logarithm of the sum of exponentials.
template <class T>
static __device__ __forceinline__ void reduce(
    const T* const* sources, long long n_sources,
    T* const* targets, long long n_targets,
    long long rows, long long width,
    long long source_pitch, long long source_offset, long long target_pitch, long long kind)
{
    u64 n = (u64)rows * (u64)width;
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        u64 column = i % (u64)width, row = i / (u64)width;
        u64 at = (u64)source_offset + row * (u64)source_pitch + column;
        float total = to_float(sources[0][at]);
        for (int member = 1; member < (int)n_sources; member++) {
            float next = to_float(sources[member][at]);
            if (kind == 0) {
                total += next;
            } else if (kind == 1) {
                total = fmaxf(total, next);
            } else {
                float top = fmaxf(total, next);
                // Two empty sums stay empty; without this, ∞ − ∞ would follow.
                if (top != -__int_as_float(0x7f800000))
                    top += logf(expf(total - top) + expf(next - top));
                total = top;
            }
        }
        for (int target = 0; target < (int)n_targets; target++)
            store(targets[target] + (row * (u64)target_pitch + column), total);
    }
}

#define COPY(NAME, T)                                                                                        \
    extern "C" __global__ void NAME(                                                                         \
        T* to, const T* from, long long n2, long long n1, long long n0,                                      \
        long long to2, long long to1, long long from2, long long from1)                                      \
    {                                                                                                        \
        copy<T>(to, from, n2, n1, n0, to2, to1, from2, from1);                                               \
    }

#define REDUCE(NAME, T)                                                                                      \
    extern "C" __global__ void NAME(                                                                         \
        const T* const* sources, long long n_sources, T* const* targets, long long n_targets,                \
        long long rows, long long width, long long source_pitch, long long source_offset,                    \
        long long target_pitch, long long kind)                                                              \
    {                                                                                                        \
        reduce<T>(sources, n_sources, targets, n_targets, rows, width, source_pitch, source_offset,          \
                  target_pitch, kind);                                                                       \
    }

COPY(meshweave_copy, unsigned)
COPY(meshweave_copy_half, unsigned short)
REDUCE(meshweave_reduce, float)
REDUCE(meshweave_reduce_bf16, bf16)
