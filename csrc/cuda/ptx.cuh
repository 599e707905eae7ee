// One wrapper per PTX instruction. https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cstdint>

#if defined(MESA_EMULATE)  // the same functions for a test without a GPU
#include "../tests/emulator/instructions.h"
#else

// Declares the block's dynamic shared memory. (Returned by a function, it costs some kernels registers.)
#define MESA_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace mesa::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// c[16x8] += a[16x16] b[16x8], fp16 or bf16 in, fp32 out.
template <bool Bf16 = false>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define MESA_MMA(type)                                                              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "        \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (Bf16) MESA_MMA("bf16");
    else MESA_MMA("f16");
#undef MESA_MMA
}

// 16 bytes from global to shared memory without a register in between; both addresses are multiples of 16.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same where `inside`, else 16 zero bytes; nothing is read from `global` then.
__device__ __forceinline__ void cp_async16_or_zero(void* shared, const void* global, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the thread's last N groups are complete.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A cached read that stays where it is written: hoisted out of a loop, such constants would fill the registers.
__device__ __forceinline__ float4 load_in_place(const float4* p) {
    float4 v;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}

// Writes of what will not be read again for long: the caches may drop it first. (The compiler may take float4 stores
// apart, into four that write a quarter of every sector each; not these.)
__device__ __forceinline__ void store_streaming(float* to, const float (&v)[4]) {
    asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
}
__device__ __forceinline__ void store_streaming(float* to, const float (&v)[2]) {
    asm volatile("st.global.cs.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(v[0]), "f"(v[1]) : "memory");
}
__device__ __forceinline__ void store_streaming(float* to, const float (&v)[1]) {
    asm volatile("st.global.cs.f32 [%0], %1;" ::"l"(to), "f"(v[0]) : "memory");
}
__device__ __forceinline__ void store_streaming(uint4* to, const uint4& v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// p, whose origin is forgotten: addresses come from here by additions, not each from the kernel's argument.
template <typename T>
__device__ __forceinline__ T* opaque_global(T* p) {
    size_t address = __cvta_generic_to_global(p);
    asm volatile("" : "+l"(address));
    return static_cast<T*>(__cvta_global_to_generic(address));
}
// The same for shared memory, whose addresses would be put together from special registers every time.
template <typename T>
__device__ __forceinline__ T* opaque_shared(T* p) {
    size_t address = __cvta_generic_to_shared(p);
    asm volatile("" : "+l"(address));
    return static_cast<T*>(__cvta_shared_to_generic(address));
}

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- Hopper -------------------------------------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasHopper = true;
#define MESA_SM90_ASM(...) asm volatile(__VA_ARGS__)
#else  // other devices' code has these kernels too, but does not launch them
constexpr bool kHasHopper = false;
#define MESA_SM90_ASM(...) __trap()
#endif

// What the thread has written to shared memory is seen by wgmma after this (and a barrier).
__device__ __forceinline__ void fence_async_shared() { MESA_SM90_ASM("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first wgmma and whenever accumulators or A operands in registers have been written since.
__device__ __forceinline__ void wgmma_fence() { MESA_SM90_ASM("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { MESA_SM90_ASM("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last N groups are complete.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    MESA_SM90_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Reads and writes of these accumulators stay on their side of this. One belongs before the fence, or the compiler
// may set them behind it, and one behind the wait: to the compiler they are finished as soon as wgmma has been
// issued.
__device__ __forceinline__ void wgmma_pin(float (&d)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
}

// d[64 x 64] += A[64 x 16] B[16 x 64] (= without Add), by a warpgroup: of each warp's 16 rows, d and A are as with
// mma.m16n8k16. A and B in shared memory are given by the lower halves of their descriptors: with Trans = false stored
// [row of A or column of B][k], with Trans = true [k][row of A or column of B]. n128 has 64 columns more, on the right.
// fp16 in, or with Bf16 bf16.
#define MESA_D4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define MESA_D32(d)                                                                                 \
    MESA_D4(d, 0), MESA_D4(d, 1), MESA_D4(d, 2), MESA_D4(d, 3), MESA_D4(d, 4), MESA_D4(d, 5), MESA_D4(d, 6), \
        MESA_D4(d, 7)
#define MESA_WGMMA(columns, type, registers, add, matrices, operands)                 \
    "{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.s32 add, " add ", 0;\n" matrices     \
    "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers "}, " operands ";\n}"
// The upper half of every descriptor: 128-byte swizzle, 1024 bytes from 8 rows to the next 8.
#define MESA_MATRIX(name, low) "mov.b64 " name ", {" low ", 0x40000040};\n"
#define MESA_R32                                                                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MESA_R64                                                                                                   \
    MESA_R32                                                                                                       \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

template <bool TransB, bool Add>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[8][4], const uint32_t (&a)[4], uint32_t b) {
    MESA_SM90_ASM(MESA_WGMMA("64", "f16", MESA_R32, "%38", MESA_MATRIX("b", "%36"),
                             "{%32, %33, %34, %35}, b, add, 1, 1, %37")
                  : MESA_D32(d)
                  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(int(TransB)), "n"(int(Add)));
}
template <bool TransA, bool TransB, bool Add, bool Bf16 = false>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[8][4], uint32_t a, uint32_t b) {
#define MESA_FROM_SHARED(type)                                                                                   \
    MESA_SM90_ASM(MESA_WGMMA("64", type, MESA_R32, "%36", MESA_MATRIX("a", "%32") MESA_MATRIX("b", "%33"),        \
                             "a, b, add, 1, 1, %34, %35")                                                        \
                  : MESA_D32(d)                                                                                  \
                  : "r"(a), "r"(b), "n"(int(TransA)), "n"(int(TransB)), "n"(int(Add)))
    if constexpr (Bf16) MESA_FROM_SHARED("bf16");
    else MESA_FROM_SHARED("f16");
#undef MESA_FROM_SHARED
}
template <bool TransB, bool Add>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[8][4], float (&right)[8][4], const uint32_t (&a)[4],
                                                 uint32_t b) {
    MESA_SM90_ASM(MESA_WGMMA("128", "f16", MESA_R64, "%70", MESA_MATRIX("b", "%68"),
                             "{%64, %65, %66, %67}, b, add, 1, 1, %69")
                  : MESA_D32(d), MESA_D32(right)
                  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(int(TransB)), "n"(int(Add)));
}
#undef MESA_R64
#undef MESA_MATRIX
#undef MESA_R32
#undef MESA_WGMMA
#undef MESA_D32
#undef MESA_D4
#undef MESA_SM90_ASM

}  // namespace mesa::ptx

#endif

namespace mesa::ptx {

// x, but what is made of it is made in this place: hoisted out of loops, addresses would fill the registers.
template <typename T>
__device__ __forceinline__ T opaque(T x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The lower half of the descriptor of a matrix in shared memory with the 128-byte swizzle, in panels of 64 columns that
// lie at multiples of 1024 bytes.
//   Stored [row or column][k] ("K-major"): 1024 bytes from 8 rows to the next 8 (the "stride"). The next 16 k are 32
//   bytes on.
//   Stored [k][row or column] ("MN-major"): 1024 bytes from 8 k to the next 8. The next 16 k are 2048 bytes on, the
//   next 64 rows or columns (the "leading" offset) `panel_bytes`.
// In units of 16 bytes, so that n bytes on is n / 16 more; shared memory ends long before the address field does.
__device__ __forceinline__ uint32_t wgmma_descriptor(const void* shared, uint32_t panel_bytes) {
    return opaque(shared_address(shared)) >> 4 | panel_bytes >> 4 << 16;
}

}  // namespace mesa::ptx
