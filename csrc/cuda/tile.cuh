// Matrix products on tiles: fp16 panels of 64 x 64 in shared memory, 16-row strips of accumulators in registers.
// (Panels of bf16 have the same type; products that take them say so.)
//
// A warp owns 16 rows; its accumulators and A operands have the layout of mma.m16n8k16, which is also that of one warp
// of wgmma.m64nNk16. Numbers that need more than fp16's 11 bits are held as two terms, hi + lo (22 bits), of one
// common scale, so that all their products add up in one accumulator.
#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../mesa.h"
#include "ptx.cuh"

namespace mesa {

constexpr int kThreads = 128;  // 4 warps of 16 rows each

// 16 x 64 accumulators. Lane l holds, of each 8-column tile n, columns 8n + 2(l % 4) + {0, 1} of row l / 4 in
// c[n][0..1] and of row l / 4 + 8 in c[n][2..3].
struct Acc {
    float c[8][4];
};

// 16 x 64 A operand: four steps of 16 along the contraction.
struct Frag {
    uint32_t r[4][4];
};

template <int Terms>
struct Operand {
    Frag term[Terms];
};

// The row (0 or 1: l / 4 or l / 4 + 8) and column within a strip of accumulator element (n, e).
__device__ __forceinline__ int acc_row(int lane, int half) { return lane / 4 + half * 8; }
__device__ __forceinline__ int acc_col(int lane, int n) { return n * 8 + (lane % 4) * 2; }

__device__ __forceinline__ void zero(Acc& acc) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc.c[n][e] = 0.f;
}

// Panels are [row][64] with the eight 16-byte pieces of a row exchanged by row % 8 (the 128-byte swizzle), which keeps
// every 8x8 matrix free of bank conflicts in both orientations.
__device__ __forceinline__ int panel_offset(int row, int col) { return row * kChunk + ((col ^ ((row & 7) << 3))); }

__device__ __forceinline__ uint32_t pack(float a, float b) {
    const __half2 h = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(h);
}

__device__ __forceinline__ uint32_t pack_bf16(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ float2 unpack(uint32_t u) { return __half22float2(reinterpret_cast<const __half2&>(u)); }

__device__ __forceinline__ float2 unpack_bf16(uint32_t u) {
    return {__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u)};
}

// a b + c of pairs, rounded once.
__device__ __forceinline__ uint32_t fma_pairs(uint32_t a, __half2 b, uint32_t c) {
    const __half2 sum = __hfma2(reinterpret_cast<const __half2&>(a), b, reinterpret_cast<const __half2&>(c));
    return reinterpret_cast<const uint32_t&>(sum);
}

// hi + lo = (a, b) to 22 bits, or in bf16, which has float32's range, to 16 or 17.
template <bool Bf16 = false>
__device__ __forceinline__ void split(float a, float b, uint32_t& hi, uint32_t& lo) {
    hi = Bf16 ? pack_bf16(a, b) : pack(a, b);
    const float2 h = Bf16 ? unpack_bf16(hi) : unpack(hi);
    lo = Bf16 ? pack_bf16(a - h.x, b - h.y) : pack(a - h.x, b - h.y);
}

// Step k of 16 along the contraction of A = rows row0 .. row0+15 of a panel.
__device__ __forceinline__ void load_strip(uint32_t (&a)[4], const __half* panel, int row0, int k, int lane) {
    const int row = row0 + (lane & 15), piece = lane >> 4;
    ptx::ldmatrix_x4(a, ptx::shared_address(panel) + row * 128 + (((k * 2 + piece) ^ (row & 7)) << 4));
}

// The same of A = columns col0 .. col0+15 of a panel, transposed.
__device__ __forceinline__ void load_strip_t(uint32_t (&a)[4], const __half* panel, int col0, int k, int lane) {
    const int row = (lane >> 4) * 8 + (lane & 7), piece = col0 / 8 + ((lane >> 3) & 1);
    ptx::ldmatrix_x4_trans(a, ptx::shared_address(panel) + (k * 16 + row) * 128 + ((piece ^ (row & 7)) << 4));
}

// One step of 16 along the contraction of c[16 x 8 Tiles] += A[16 x 64] B, B (part of) a panel stored
// [contraction][column].
template <bool Bf16 = false, int Tiles>
__device__ __forceinline__ void mma_AB_step(float (&c)[Tiles][4], const uint32_t (&a)[4], const __half* b, int k,
                                            int lane) {
    const int row = lane & 15, piece = lane >> 4;
    const uint32_t base = ptx::shared_address(b) + (k * 16 + row) * 128;
#pragma unroll
    for (int n = 0; n < Tiles / 2; ++n) {
        uint32_t r[4];
        ptx::ldmatrix_x4_trans(r, base + (((n * 2 + piece) ^ (row & 7)) << 4));
        ptx::mma_m16n8k16<Bf16>(c[n * 2], a, r[0], r[1]);
        ptx::mma_m16n8k16<Bf16>(c[n * 2 + 1], a, r[2], r[3]);
    }
}

// The same for acc += A B', B a panel stored [column][contraction].
template <bool Bf16 = false, int Tiles>
__device__ __forceinline__ void mma_ABt_step(float (&c)[Tiles][4], const uint32_t (&a)[4], const __half* b, int k,
                                             int lane) {
    const int row = (lane >> 4) * 8 + (lane & 7), piece = (lane >> 3) & 1;
    const uint32_t base = ptx::shared_address(b) + row * 128 + (((k * 2 + piece) ^ (row & 7)) << 4);
#pragma unroll
    for (int n = 0; n < Tiles / 2; ++n) {
        uint32_t r[4];
        ptx::ldmatrix_x4(r, base + n * 16 * 128);
        ptx::mma_m16n8k16<Bf16>(c[n * 2], a, r[0], r[1]);
        ptx::mma_m16n8k16<Bf16>(c[n * 2 + 1], a, r[2], r[3]);
    }
}

// How the matrix products are done: every warp by itself with mma.sync (from sm_80 on), or the four warps of a block
// together with wgmma (Hopper), whose accumulators and A operands lie in the same places. Products of either kind stand
// between products_begin and products_end: wgmma runs on by itself in between, and neither the accumulators nor the
// operands may be touched. All four warps of a block must come along.
enum class Isa { portable, hopper };

template <Isa isa, typename... Accs>
__device__ __forceinline__ void products_begin(Accs&... accumulators) {
    if constexpr (isa == Isa::hopper) {
        (ptx::wgmma_pin(accumulators.c), ...);  // written before the fence
        ptx::wgmma_fence();
    }
}

// Ends a group of products.
template <Isa isa>
__device__ __forceinline__ void products_commit() {
    if constexpr (isa == Isa::hopper) ptx::wgmma_commit();
}

// Waits until at most `Groups` groups are under way; `done` are the accumulators that may be read from then on.
template <Isa isa, int Groups, typename... Accs>
__device__ __forceinline__ void products_wait(Accs&... done) {
    if constexpr (isa == Isa::hopper) {
        ptx::wgmma_wait<Groups>();
        (ptx::wgmma_pin(done.c), ...);
    }
}

template <Isa isa, typename... Accs>
__device__ __forceinline__ void products_end(Accs&... done) {
    products_commit<isa>();
    products_wait<isa, 0>(done...);
}

// After writes to shared memory (by st.shared or cp.async) and before the barrier that ends them. It seems to wait for
// all of the thread's cp.async that are under way.
template <Isa isa>
__device__ __forceinline__ void publish_shared() {
    if constexpr (isa == Isa::hopper) ptx::fence_async_shared();
}

// A panel as wgmma's operand; the next step of 16 along the contraction is so many units further on. Where the operand
// is wider than the panel, the next one lies `distance` elements away.
__device__ __forceinline__ uint32_t panel_descriptor(const __half* panel, int distance = kPanel) {
    return ptx::wgmma_descriptor(panel, distance * sizeof(__half));
}
constexpr uint32_t kStepAlongRows = 32 >> 4, kStepAcrossRows = (16 * 128) >> 4;

// The products below add to their accumulators; without Add they need not be zeroed before.
template <Isa isa, bool Add>
__device__ __forceinline__ void products_zero(Acc& acc) {
    if constexpr (isa == Isa::portable && !Add) zero(acc);
}

// acc[i] += A B_i and acc[i] += A B_i' with operands of one or two terms; lo * lo is below the last bit. Neighbouring
// B_i lie `distance` elements apart (of the second kind one behind the other), and a B's second term `term` elements
// behind the first.
template <Isa isa, int BTerms, bool Add = true, int Tiles, int ATerms>
__device__ __forceinline__ void mma_AB(Acc (&acc)[Tiles], const Operand<ATerms>& a, const __half* b, int distance,
                                       int lane, int term = kPanel) {
#pragma unroll
    for (int i = 0; i < Tiles; ++i) products_zero<isa, Add>(acc[i]);
    const auto product = [&](auto add, const uint32_t(&strip)[4], const __half* b_term, int k) {
        if constexpr (isa == Isa::hopper) {
            const uint32_t descriptor = panel_descriptor(b_term, distance) + k * kStepAcrossRows;
            static_assert(Tiles <= 2);
            constexpr bool kAdd = decltype(add)::value;
            if constexpr (Tiles == 2) ptx::wgmma_m64n128k16<true, kAdd>(acc[0].c, acc[1].c, strip, descriptor);
            else ptx::wgmma_m64n64k16<true, kAdd>(acc[0].c, strip, descriptor);
        } else {
#pragma unroll
            for (int i = 0; i < Tiles; ++i) mma_AB_step(acc[i].c, strip, b_term + i * distance, k, lane);
        }
    };
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (k == 0) product(std::bool_constant<Add>(), a.term[0].r[k], b, k);
        else product(std::true_type(), a.term[0].r[k], b, k);
        if constexpr (BTerms == 2) product(std::true_type(), a.term[0].r[k], b + term, k);
        if constexpr (ATerms == 2) product(std::true_type(), a.term[1].r[k], b, k);
    }
}

template <Isa isa, int BTerms, bool Add = true, int ATerms>
__device__ __forceinline__ void mma_AB(Acc& acc, const Operand<ATerms>& a, const __half* b, int lane) {
    mma_AB<isa, BTerms, Add>(reinterpret_cast<Acc(&)[1]>(acc), a, b, 0, lane);
}

template <Isa isa, int BTerms, bool Add = true, int Tiles, int ATerms>
__device__ __forceinline__ void mma_ABt(Acc (&acc)[Tiles], const Operand<ATerms>& a, const __half* b, int lane,
                                        int term = kPanel) {
#pragma unroll
    for (int i = 0; i < Tiles; ++i) products_zero<isa, Add>(acc[i]);
    const auto product = [&](auto add, const uint32_t(&strip)[4], const __half* b_term, int k) {
        if constexpr (isa == Isa::hopper) {
            const uint32_t descriptor = panel_descriptor(b_term) + k * kStepAlongRows;
            static_assert(Tiles <= 2);
            constexpr bool kAdd = decltype(add)::value;
            if constexpr (Tiles == 2) ptx::wgmma_m64n128k16<false, kAdd>(acc[0].c, acc[1].c, strip, descriptor);
            else ptx::wgmma_m64n64k16<false, kAdd>(acc[0].c, strip, descriptor);
        } else {
#pragma unroll
            for (int i = 0; i < Tiles; ++i) mma_ABt_step(acc[i].c, strip, b_term + i * kPanel, k, lane);
        }
    };
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (k == 0) product(std::bool_constant<Add>(), a.term[0].r[k], b, k);
        else product(std::true_type(), a.term[0].r[k], b, k);
        if constexpr (BTerms == 2) product(std::true_type(), a.term[0].r[k], b + term, k);
        if constexpr (ATerms == 2) product(std::true_type(), a.term[1].r[k], b, k);
    }
}

template <Isa isa, int BTerms, bool Add = true, int ATerms>
__device__ __forceinline__ void mma_ABt(Acc& acc, const Operand<ATerms>& a, const __half* b, int lane) {
    mma_ABt<isa, BTerms, Add>(reinterpret_cast<Acc(&)[1]>(acc), a, b, lane);
}

// acc += A B with both in panels, of fp16 or bf16, for the warp's 16 rows from row0 on. A is stored [row][contraction]
// or, TransA, [contraction][row]; B is stored [contraction][column] or, TransB, [column][contraction].
template <Isa isa, bool TransA, bool TransB, int ATerms, int BTerms, bool Add = true, bool Bf16 = false>
__device__ __forceinline__ void mma_panels(Acc& acc, const __half* a, int row0, const __half* b, int lane) {
    if constexpr (isa == Isa::hopper) {
        const auto product = [&](auto add, const __half* a_term, const __half* b_term, int k) {
            ptx::wgmma_m64n64k16<TransA, !TransB, decltype(add)::value, Bf16>(
                acc.c, panel_descriptor(a_term) + k * (TransA ? kStepAcrossRows : kStepAlongRows),
                panel_descriptor(b_term) + k * (TransB ? kStepAlongRows : kStepAcrossRows));
        };
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (k == 0) product(std::bool_constant<Add>(), a, b, k);
            else product(std::true_type(), a, b, k);
            if constexpr (BTerms == 2) product(std::true_type(), a, b + kPanel, k);
            if constexpr (ATerms == 2) product(std::true_type(), a + kPanel, b, k);
        }
    } else {
        products_zero<isa, Add>(acc);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int t = 0; t < ATerms; ++t) {
                uint32_t strip[4];
                if constexpr (TransA) load_strip_t(strip, a + t * kPanel, row0, k, lane);
                else load_strip(strip, a + t * kPanel, row0, k, lane);
#pragma unroll
                for (int u = 0; u < (t == 0 ? BTerms : 1); ++u) {
                    if constexpr (TransB) mma_ABt_step<Bf16>(acc.c, strip, b + u * kPanel, k, lane);
                    else mma_AB_step<Bf16>(acc.c, strip, b + u * kPanel, k, lane);
                }
            }
    }
}

// Two neighbouring 8-column tiles of accumulators are one 16-wide step of an A operand.
template <int Terms>
__device__ __forceinline__ void acc_step_operand(uint32_t (&hi)[4], uint32_t (&lo)[4], const float (&left)[4],
                                                 const float (&right)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if constexpr (Terms == 2) {
            split(left[half * 2], left[half * 2 + 1], hi[half], lo[half]);
            split(right[half * 2], right[half * 2 + 1], hi[2 + half], lo[2 + half]);
        } else {
            hi[half] = pack(left[half * 2], left[half * 2 + 1]);
            hi[2 + half] = pack(right[half * 2], right[half * 2 + 1]);
        }
    }
}

// Accumulators of an earlier product as an A operand.
template <int Terms>
__device__ __forceinline__ void acc_operand(Operand<Terms>& out, const Acc& a) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
        acc_step_operand<Terms>(out.term[0].r[k], out.term[Terms - 1].r[k], a.c[k * 2], a.c[k * 2 + 1]);
}

// Sum and maximum over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// The two rows of a lane share their scalars with the other lanes of the quad; to save registers lane l keeps those of
// row l % 2 only. own_sum: the quad's sum of that row; of_row: either row's scalar.
__device__ __forceinline__ float own_sum(const float (&v)[2], int lane) {
    const float sum = (lane & 1 ? v[1] : v[0]) + __shfl_xor_sync(0xffffffffu, lane & 1 ? v[0] : v[1], 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

__device__ __forceinline__ float of_row(float own, int half, int lane) {
    return __shfl_sync(0xffffffffu, own, (lane & ~1) | half);
}

// 2^e for e in [-126, 127].
__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }

__device__ __forceinline__ float pow2_inverse(float p) { return __int_as_float(0x7f000000 - __float_as_int(p)); }

// Three powers of two in one register: the first as a float, whose mantissa takes the exponents of the others.
struct PowersOfTwo {
    uint32_t bits;

    __device__ __forceinline__ void set_first(float p) { bits = __float_as_uint(p); }
    __device__ __forceinline__ void add_second(float p) { bits |= __float_as_uint(p) >> 15; }
    __device__ __forceinline__ void add_third(float p) { bits |= __float_as_uint(p) >> 23; }
    __device__ __forceinline__ float first() const { return __uint_as_float(bits & 0x7f800000); }
    __device__ __forceinline__ float second() const { return __uint_as_float(bits << 15 & 0x7f800000); }
    __device__ __forceinline__ float third() const { return __uint_as_float(bits << 23 & 0x7f800000); }
};

// The power of two that brings a largest magnitude `amax` into [2^target, 2^(target + 1)), and its inverse. Powers of
// two leave every bit of what they scale, so that no result depends on the choice. Zero keeps scale 1.
struct Pow2Scale {
    float up, down;
};
__device__ __forceinline__ Pow2Scale scale_to(float amax, int target) {
    const int exponent = static_cast<int>((__float_as_uint(amax) >> 23) & 0xff) - 127;
    int e = target - exponent;
    if (amax == 0.f) e = 0;
    e = min(max(e, -126), 126);
    return {pow2(e), pow2(-e)};
}

__device__ __forceinline__ void scale_rows(Acc& acc, float first, float second) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        acc.c[n][0] *= first, acc.c[n][1] *= first;
        acc.c[n][2] *= second, acc.c[n][3] *= second;
    }
}

// Scales the two rows of a strip, 64 Tiles columns wide, by powers of two to fit fp16 and returns the inverse factors;
// as if there were numbers of size `at_least` in them.
template <int Tiles>
__device__ __forceinline__ void normalise_rows(Acc (&acc)[Tiles], float (&down)[2], int target,
                                               float2 at_least = {0.f, 0.f}) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float amax = half ? at_least.y : at_least.x;
#pragma unroll
        for (int i = 0; i < Tiles; ++i)
#pragma unroll
            for (int n = 0; n < 8; ++n)
                amax = fmaxf(amax, fmaxf(fabsf(acc[i].c[n][half * 2]), fabsf(acc[i].c[n][half * 2 + 1])));
        const Pow2Scale s = scale_to(quad_max(amax), target);
        down[half] = s.down;
#pragma unroll
        for (int i = 0; i < Tiles; ++i)
#pragma unroll
            for (int n = 0; n < 8; ++n) acc[i].c[n][half * 2] *= s.up, acc[i].c[n][half * 2 + 1] *= s.up;
    }
}

__device__ __forceinline__ void normalise_rows(Acc& acc, float (&down)[2], int target,
                                               float2 at_least = {0.f, 0.f}) {
    normalise_rows(reinterpret_cast<Acc(&)[1]>(acc), down, target, at_least);
}

}  // namespace mesa
