// Runs CUDA kernels on the CPU, thread by thread, so that their logic can be tested where there is no GPU.
//
// The kernels' sources are compiled unchanged, as C++, with this header included before everything else
// (g++ -x c++ -include emulator.h). It supplies what nvcc has built in; instructions.h has the PTX wrappers of ptx.cuh.
//
// Each thread of a block is a fiber that runs until it waits for others: at a barrier, or at an instruction of the
// whole warp, where the last lane to come computes for all. Which fiber goes on is drawn from MESA_EMULATE_SEED, one
// warp being preferred for long stretches, so that warps drift far apart and missing barriers show. What cp.async
// copies comes as late as it may, when it is waited for; a group of wgmma runs when it is committed or when it is
// waited for, as drawn. Blocks run one after the other, in drawn order. Shared memory starts as NaNs. What aborts,
// naming the thread: deadlocks, threads that meet at different instructions, addresses outside of global arrays or
// shared memory, misuse of the emulated instructions.
//
// Not emulated: time, the caches and the weak memory model (a missing fence.proxy.async does not show), the errors of
// the approximate functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <typeinfo>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // one block runs at a time; unlike dynamic shared memory, it keeps what the last one left

extern uint3 threadIdx, blockIdx;  // of the running fiber; blocks and grids have one dimension here
extern dim3 blockDim, gridDim;

namespace mesa::emulator {

// ---- what the instructions need of the scheduler ------------------------------------------------------------------

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
uint64_t random();

// Waits for all lanes of `mask`. The last one gets all lanes' operands and must then call `release`; the others get
// null after that.
void* const* meet(const char* name, void* operands, uint32_t mask);
void release();

template <typename T>
struct Lanes {
    void* const* operands;
    T& operator[](int lane) const { return *static_cast<T*>(operands[lane]); }
};

// An instruction of the whole warp: the last lane to come runs compute(Lanes<T>) for all.
template <typename T, typename Compute>
void together(const char* name, T& own, const Compute& compute, uint32_t mask = 0xffffffff) {
    if (void* const* all = meet(name, &own, mask)) {
        compute(Lanes<T>{all});
        release();
    }
}

// The barrier of all threads of the block; returns whether any of them has come with `predicate`.
bool barrier(const char* name, bool predicate);

unsigned char* shared_base();
// Addresses begin behind the kilobyte that the system keeps for itself on sm_90.
constexpr uint32_t kFirstSharedAddress = 1024;
uint32_t shared_address(const void*);
void* shared_pointer(uint32_t address, uint32_t bytes, uint32_t alignment);

// ---- and the scheduler of the instructions ------------------------------------------------------------------------

void begin_block(int warps);
void end_thread();

// ---- launching ----------------------------------------------------------------------------------------------------

cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t run(const void* kernel, const char* name, const cudaLaunchConfig_t&, const std::function<void()>& thread);

template <typename T>
T shuffle(const char* name, uint32_t mask, T value, int source) {
    struct Operands {
        T value, result;
        int source;
    } own{value, value, source};
    together(name, own, [&](Lanes<Operands> lanes) {
        for (int l = 0; l < 32; ++l) {
            if (!(mask >> l & 1)) continue;
            if (!(mask >> lanes[l].source & 1)) fail("%s from lane %d, which takes no part", name, lanes[l].source);
            lanes[l].result = lanes[lanes[l].source].value;
        }
    }, mask);
    return own.result;
}

inline int lane() { return threadIdx.x % 32; }

}  // namespace mesa::emulator

// ---- what nvcc has built in ---------------------------------------------------------------------------------------

using std::max;
using std::min;

template <typename To, typename From>
To emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __int_as_float(int i) { return emulator_bits<float>(i); }
inline float __uint_as_float(unsigned i) { return emulator_bits<float>(i); }
inline int __float_as_int(float f) { return emulator_bits<int>(f); }
inline unsigned __float_as_uint(float f) { return emulator_bits<unsigned>(f); }
inline float __fdividef(float a, float b) { return a / b; }
#define __builtin_assume(condition)
inline float __frcp_rn(float a) { return 1 / a; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {  // products are exact in double, sums all but
    const auto fma = [](__half x, __half y, __half z) {
        return __double2half(double(__half2float(x)) * __half2float(y) + __half2float(z));
    };
    return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)};
}
template <typename T>
T __ldg(const T* p) { return *p; }

inline void __syncthreads() { mesa::emulator::barrier("__syncthreads", false); }
inline int __syncthreads_or(int predicate) { return mesa::emulator::barrier("__syncthreads_or", predicate != 0); }
inline void __syncwarp(unsigned mask = 0xffffffff) {
    int nothing;
    mesa::emulator::together("__syncwarp", nothing, [](auto) {}, mask);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
    return mesa::emulator::shuffle("__shfl_sync", mask, value, source & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return mesa::emulator::shuffle("__shfl_xor_sync", mask, value, mesa::emulator::lane() ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
    const int lane = mesa::emulator::lane(), source = lane - static_cast<int>(distance);
    return mesa::emulator::shuffle("__shfl_up_sync", mask, value, source < 0 ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
    const int lane = mesa::emulator::lane(), source = lane + static_cast<int>(distance);
    return mesa::emulator::shuffle("__shfl_down_sync", mask, value, source > 31 ? lane : source);
}
template <typename Choose>
unsigned emulator_reduce(const char* name, unsigned mask, unsigned value, const Choose& choose) {
    unsigned own = value;
    mesa::emulator::together(name, own, [&](mesa::emulator::Lanes<unsigned> lanes) {
        unsigned result = value;
        for (int l = 0; l < 32; ++l)
            if (mask >> l & 1) result = choose(result, lanes[l]);
        for (int l = 0; l < 32; ++l)
            if (mask >> l & 1) lanes[l] = result;
    }, mask);
    return own;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    return emulator_reduce("__reduce_min_sync", mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    return emulator_reduce("__reduce_max_sync", mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    struct Operands {
        bool predicate;
        unsigned result;
    } own{predicate != 0, 0};
    mesa::emulator::together("__ballot_sync", own, [&](mesa::emulator::Lanes<Operands> lanes) {
        unsigned result = 0;
        for (int l = 0; l < 32; ++l)
            if (mask >> l & 1) result |= unsigned(lanes[l].predicate) << l;
        for (int l = 0; l < 32; ++l)
            if (mask >> l & 1) lanes[l].result = result;
    }, mask);
    return own.result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// The parts of cuda_runtime.h that only nvcc can compile.
template <typename Args>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Args), cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    return mesa::emulator::allow_shared(reinterpret_cast<const void*>(kernel), value);
}
template <typename Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const Args& args) {
    return mesa::emulator::run(reinterpret_cast<const void*>(kernel), typeid(Args).name(), *config,
                               [&] { kernel(args); });
}
