// Products of a warp group (128 threads) on the tensor cores of compute capability 9.0, which read operands from shared
// memory by descriptors and work while the threads go on. Sections are those of the PTX ISA 8.7.
//
// A tile in shared memory is blocks of so many lines of 128 bytes (64 elements), 128-byte swizzled: sixteen bytes at
// place p of line l stand at place p ^ (l mod 8). It begins at a multiple of 1024 bytes. Lines run along the depth of a
// product (K-major) or along its rows or columns (MN-major); how a product reads it is told by a descriptor.

#define LINE_BYTES 128
/// Elements of a line.
#define LINE 64
/// Bytes from eight lines to the next eight.
#define LINES_BYTES 1024

/// Starts the copy of `LINES` lines of `WIDTH` elements (a multiple of 64) by `N_THREADS` threads, of which this is `thread`;
/// `source(line, place, valid)` gives an element's address and says whether it and the seven behind it exist.
template <int LINES, int WIDTH, int N_THREADS, class Source>
static __device__ __forceinline__ void copy_lines(u32 tile, u32 thread, Source source) {
    constexpr int PER_LINE = WIDTH / 8, N_COPIES = LINES * PER_LINE;
    static_assert(N_COPIES % N_THREADS == 0, "threads copy equally much");
#pragma unroll
    for (int i = 0; i < N_COPIES / N_THREADS; i++) {
        u32 copy = thread + i * N_THREADS, line = copy / PER_LINE, place = copy % PER_LINE;
        bool valid;
        const bf16 *from = source(line, place * 8, valid);
        u32 to = tile + place / 8 * (LINES * LINE_BYTES) + line * LINE_BYTES + (place % 8 ^ line % 8) * 16;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
    }
}

/// What the threads wrote and copied becomes visible to the tensor cores (9.7.15.4, async proxy).
static __device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Registers that were touched are given to the products that follow.
static __device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most `UNDER_WAY` committed groups of products are under way.
template <int UNDER_WAY> static __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(UNDER_WAY) : "memory");
}
/// Keeps what is done with a product's registers where it stands: uses of results behind the wait before this, and values
/// for a product before the fence behind this.
template <int N> static __device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> static __device__ __forceinline__ void settle(u32 (&a)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i])::"memory");
}

/// A matrix descriptor (9.7.15.5.1.2.2): bits 0–13 the address, 16–29 the leading and 32–45 the stride dimension's byte
/// offset, each without its four lowest bits; 62–63 the swizzling, 1 for 128 bytes. The stride is that from eight lines to
/// the next eight; the leading offset, which K-major layouts do not use, is that from 64 rows or columns to the next.
template <int LEADING> static __device__ __forceinline__ u64 descriptor(u32 address) {
    return u64(1) << 62 | u64(LINES_BYTES >> 4) << 32 | u64(LEADING >> 4) << 16 | address >> 4;
}

/// What a descriptor grows by from the beginning of a tile to `depth` in it: along lines that run along the depth, else
/// down whole lines.
template <bool IS_INNER> static __device__ __forceinline__ constexpr u64 along_depth(int depth) {
    return (IS_INNER ? depth * 2 : depth * LINE_BYTES) >> 4;
}

#define OPERANDS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
    "%25, %26, %27, %28, %29, %30, %31"
#define OPERANDS_64 \
    OPERANDS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPERANDS_128 \
    OPERANDS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
    "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, " \
    "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, " \
    "%125, %126, %127"
#define REGISTERS_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define REGISTERS_32(d, i) REGISTERS_8(d, i), REGISTERS_8(d, i + 8), REGISTERS_8(d, i + 16), REGISTERS_8(d, i + 24)
#define REGISTERS_64(d) REGISTERS_32(d, 0), REGISTERS_32(d, 32)
#define REGISTERS_128(d) REGISTERS_64(d), REGISTERS_32(d, 64), REGISTERS_32(d, 96)

/// d[64, N] = a[64, 16] b[16, N], onto d where `ONTO` is 1 (9.7.15.5.2); a and b in shared memory, `A_MN` and `B_MN` say
/// which of them are MN-major. Thread `4 g + t` of warp `w` of the group holds d at row 16 w + g + 8 i, column
/// 8 j + 2 t + l as d[4 j + 2 i + l].
template <int N, int ONTO, int A_MN, int B_MN>
static __device__ __forceinline__ void multiply(float (&d)[N / 2], u64 a, u64 b) {
    static_assert(N == 64 || N == 128 || N == 256, "columns of a product");
    if constexpr (N == 64) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" OPERANDS_32 "}, %32, %33, %34, 1, 1, %35, %36;"
                     : REGISTERS_32(d, 0) : "l"(a), "l"(b), "n"(ONTO), "n"(A_MN), "n"(B_MN));
    } else if constexpr (N == 128) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" OPERANDS_64 "}, %64, %65, %66, 1, 1, %67, %68;"
                     : REGISTERS_64(d) : "l"(a), "l"(b), "n"(ONTO), "n"(A_MN), "n"(B_MN));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" OPERANDS_128 "}, %128, %129, %130, 1, 1, %131, %132;"
                     : REGISTERS_128(d) : "l"(a), "l"(b), "n"(ONTO), "n"(A_MN), "n"(B_MN));
    }
}

/// d[64, N] += a[64, 16] b[16, N], a in registers: thread `4 g + t` of warp `w` holds, in the register 2 i + h, rows
/// 16 w + g + 8 h and depths 8 i + 2 t and the next.
template <int N, int B_MN>
static __device__ __forceinline__ void multiply(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    static_assert(N == 64 || N == 128, "columns of a product");
    if constexpr (N == 64) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" OPERANDS_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
                     : REGISTERS_32(d, 0) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(B_MN));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" OPERANDS_64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
                     : REGISTERS_64(d) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(B_MN));
    }
}
