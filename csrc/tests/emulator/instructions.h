// The emulated wrappers of csrc/cuda/ptx.cuh; see there for what they do, in instructions.cpp for how.
#pragma once

#include "emulator.h"

namespace mesa::emulator {

void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed);
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16);

// d[64 x 64] += A B (= without `add`), with 64 columns more where `right` is not null; A in registers where `a` is not
// null.
struct Wgmma {
    float (*d)[4];
    float (*right)[4];
    const uint32_t* a;
    uint32_t a_descriptor, b_descriptor;  // lower halves
    bool a_transposed, b_transposed, add, bf16;
};
void start(const Wgmma&);
void wait_for_cp_async(int pending);
void wait_for_wgmma(int pending);

}  // namespace mesa::emulator

#define MESA_DYNAMIC_SHARED(name) unsigned char* const name = ::mesa::emulator::shared_base()

namespace mesa::ptx {

constexpr bool kHasHopper = true;

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { emulator::load_matrices(r, address, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) { emulator::load_matrices(r, address, true); }
template <bool Bf16 = false>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::mma(c, a, b0, b1, Bf16);
}

void cp_async16(void* shared, const void* global);
void cp_async16_or_zero(void* shared, const void* global, bool inside);
void cp_async_commit();
template <int N>
void cp_async_wait() { emulator::wait_for_cp_async(N); }

inline float4 load_in_place(const float4* p) { return *p; }
template <int N>
void store_streaming(float* to, const float (&v)[N]) { std::copy(v, v + N, to); }
inline void store_streaming(uint4* to, const uint4& v) { *to = v; }
template <typename T>
T* opaque_global(T* p) { return p; }
template <typename T>
T* opaque_shared(T* p) { return p; }
inline void prefetch_l2(const void*) {}
inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }

inline void fence_async_shared() {}

void wgmma_fence();
void wgmma_commit();
template <int N>
void wgmma_wait() { emulator::wait_for_wgmma(N); }
inline void wgmma_pin(float (&)[8][4]) {}

template <bool TransB, bool Add>
void wgmma_m64n64k16(float (&d)[8][4], const uint32_t (&a)[4], uint32_t b) {
    emulator::start({d, nullptr, a, 0, b, false, TransB, Add, false});
}
template <bool TransA, bool TransB, bool Add, bool Bf16 = false>
void wgmma_m64n64k16(float (&d)[8][4], uint32_t a, uint32_t b) {
    emulator::start({d, nullptr, nullptr, a, b, TransA, TransB, Add, Bf16});
}
template <bool TransB, bool Add>
void wgmma_m64n128k16(float (&d)[8][4], float (&right)[8][4], const uint32_t (&a)[4], uint32_t b) {
    emulator::start({d, right, a, 0, b, false, TransB, Add, false});
}

}  // namespace mesa::ptx
