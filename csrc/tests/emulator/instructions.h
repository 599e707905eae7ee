// The emulated wrappers of csrc/cuda/ptx.cuh; see there for what they do, in instructions.cpp for how.
#pragma once

#include "emulator.h"

namespace mesa::emulator {

void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed);
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// d[64 x 64] += A B; A in registers where `a` is not null.
struct Wgmma {
    float (*d)[4];
    const uint32_t* a;
    uint64_t a_descriptor, b_descriptor;
    bool a_transposed, b_transposed;
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
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::mma(c, a, b0, b1);
}

void cp_async16(void* shared, const void* global);
void cp_async_commit();
template <int N>
void cp_async_wait() { emulator::wait_for_cp_async(N); }

inline float4 load_in_place(const float4* p) { return *p; }
inline void prefetch_l2(const void*) {}
inline float exp2_approx(float x) { return exp2f(x); }

inline void fence_async_shared() {}

void wgmma_fence();
void wgmma_commit();
template <int N>
void wgmma_wait() { emulator::wait_for_wgmma(N); }
inline void wgmma_pin(float (&)[8][4]) {}

template <bool TransB>
void wgmma_m64n64k16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
    emulator::start({d, a, 0, b, false, TransB});
}
template <bool TransA, bool TransB>
void wgmma_m64n64k16(float (&d)[8][4], uint64_t a, uint64_t b) {
    emulator::start({d, nullptr, a, b, TransA, TransB});
}

}  // namespace mesa::ptx
