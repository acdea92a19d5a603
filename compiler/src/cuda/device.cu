// What every generated kernel begins with: types, conversions, asynchronous copies, tensor cores.
// NVRTC comes without CUDA's headers, so the few instructions that have no builtin stand here as PTX.

#pragma nv_diag_suppress 177 // Each kernel uses a part of what follows.

typedef unsigned int u32;
typedef unsigned long long u64;

/// A number of 8 bits of significand, stored as the upper half of a float.
struct bf16 {
    unsigned short bits;
};

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

static __device__ __forceinline__ void store(float *to, float x) { *to = x; }
static __device__ __forceinline__ void store(bf16 *to, float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    to->bits = bits;
}

/// Two numbers in one register, the first in the lower half.
static __device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

/// Rounds to the 11 bits of significand that tensor cores take of a float.
static __device__ __forceinline__ u32 to_tf32(float x) {
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

static __device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ u32 shared_address(const void *at) {
    return u32(__cvta_generic_to_shared(at));
}

/// Copies `BYTES` (4, 8 or 16) from global to shared memory without waiting; zeros where not `valid`.
template <int BYTES>
static __device__ __forceinline__ void copy_async(void *to, const void *from, bool valid) {
    int n_bytes = valid ? BYTES : 0;
    if (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(n_bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(n_bytes) : "memory");
    }
}

static __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `UNDER_WAY` of this thread's committed groups are under way.
template <int UNDER_WAY> static __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(UNDER_WAY) : "memory");
}

/// One or two 8×8 matrices of 16-bit elements for the tensor cores: lane `l` gives the address of row
/// `l mod 8` of matrix `l / 8`, and holds elements `2 (l mod 4)` and the next of row `l / 4` of each.
static __device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

/// The same, each matrix transposed.
static __device__ __forceinline__ void load_matrices_transposed(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

/// c[16, 8] += a[16, 16] b[16, 8] of a warp. Lane `4 g + t` holds c at rows g, g + 8 and columns 2 t, 2 t + 1.
static __device__ __forceinline__ void multiply_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// c[16, 8] += a[16, 8] b[8, 8]; a at rows g, g + 8 and columns t, t + 4, b at rows t, t + 4 and column g.
static __device__ __forceinline__ void multiply_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
