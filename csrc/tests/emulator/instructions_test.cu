// The wrappers of csrc/cuda/ptx.cuh, and __syncthreads_or, in tiny kernels against plain loops. Under the emulator this
// checks the emulator; the same program on a device checks that the two agree. Exit status 0: right, 1: wrong, 77: no
// device of sm_90.
//
//     nvcc -std=c++17 -O3 -arch=sm_90a -I csrc csrc/tests/emulator/instructions_test.cu
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/chunk.cuh"
#include "tests/arrays.h"

namespace mesa {
namespace {

// ---- products -----------------------------------------------------------------------------------------------------

enum class ASource { mma, registers, shared };  // mma.sync (A in registers), wgmma with A in registers or shared memory

// out[64 x 64] = 1 + A[64 x 64] B[64 x 64]; panels are stored as the kernels store theirs.
struct ProductArgs {
    const __half* a;  // [m][k], or with TransA [k][m]
    const __half* b;  // [n][k], or with TransB [k][n]
    float* out;
};

struct ProductShared {
    __half a[kPanel], b[kPanel];
};

template <ASource Source, bool TransA, bool TransB, bool Bf16>
__global__ void __launch_bounds__(kThreads) product_kernel(const __grid_constant__ ProductArgs args) {
    MESA_DYNAMIC_SHARED(shared_bytes);
    auto& sm = *reinterpret_cast<ProductShared*>(shared_bytes);
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
    for (int i = threadIdx.x; i < kPanel; i += kThreads) {
        sm.a[panel_offset(i / 64, i % 64)] = args.a[i];
        sm.b[panel_offset(i / 64, i % 64)] = args.b[i];
    }
    ptx::fence_async_shared();
    __syncthreads();

    float d[8][4];
    for (int n = 0; n < 8; ++n)
        for (int e = 0; e < 4; ++e) d[n][e] = 1.f;
    Frag a;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if constexpr (TransA) load_strip_t(a.r[k], sm.a, first_row, k, lane);
        else load_strip(a.r[k], sm.a, first_row, k, lane);
    }
    if constexpr (Source != ASource::mma) {
        ptx::wgmma_pin(d);
        ptx::wgmma_fence();
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint32_t a_at = panel_descriptor(sm.a) + k * (TransA ? kStepAcrossRows : kStepAlongRows);
        const uint32_t b_at = panel_descriptor(sm.b) + k * (TransB ? kStepAcrossRows : kStepAlongRows);
        if constexpr (Source == ASource::registers) ptx::wgmma_m64n64k16<TransB, true>(d, a.r[k], b_at);
        else if constexpr (Source == ASource::shared) ptx::wgmma_m64n64k16<TransA, TransB, true, Bf16>(d, a_at, b_at);
        else if constexpr (TransB) mma_AB_step<Bf16>(d, a.r[k], sm.b, k, lane);
        else mma_ABt_step<Bf16>(d, a.r[k], sm.b, k, lane);
    }
    if constexpr (Source != ASource::mma) {
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(d);
    }
    for (int n = 0; n < 8; ++n)
        for (int e = 0; e < 4; ++e)
            args.out[(first_row + acc_row(lane, e / 2)) * 64 + acc_col(lane, n) + e % 2] = d[n][e];
}

// out[64 x 128] = A[64 x 64] B[64 x 128], whatever the accumulators held before; B's panels lie apart.
constexpr int kApart = 3 * kPanel;
struct WideShared {
    __half a[kPanel], b[kApart + kPanel];
};

__global__ void __launch_bounds__(kThreads) wide_kernel(const __grid_constant__ ProductArgs args) {
    MESA_DYNAMIC_SHARED(shared_bytes);
    auto& sm = *reinterpret_cast<WideShared*>(shared_bytes);
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
    for (int i = threadIdx.x; i < kPanel; i += kThreads) {
        const int at = panel_offset(i / 64, i % 64);
        sm.a[at] = args.a[i];
        sm.b[at] = args.b[i], sm.b[kApart + at] = args.b[kPanel + i];
    }
    ptx::fence_async_shared();
    __syncthreads();
    Operand<1> a;
#pragma unroll
    for (int k = 0; k < 4; ++k) load_strip(a.term[0].r[k], sm.a, first_row, k, lane);
    Acc d[2];
    for (int i = 0; i < 2; ++i)
        for (int n = 0; n < 8; ++n)
            for (int e = 0; e < 4; ++e) d[i].c[n][e] = 1.f;
    products_begin<Isa::hopper>(d[0], d[1]);
    mma_AB<Isa::hopper, 1, false>(d, a, sm.b, kApart, lane);
    products_end<Isa::hopper>(d[0], d[1]);
    for (int i = 0; i < 2; ++i)
        for (int n = 0; n < 8; ++n)
            for (int e = 0; e < 4; ++e)
                args.out[(first_row + acc_row(lane, e / 2)) * 128 + i * 64 + acc_col(lane, n) + e % 2] = d[i].c[n][e];
}

// ---- asynchronous copies ------------------------------------------------------------------------------------------

// Every tile backwards, the last with zeros in it; while one is worked on, the next two are on their way.
constexpr int kStages = 3;
struct CopyArgs {
    const float4* in;  // [tiles][kThreads]
    float4* out;
    int tiles;
};

__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyArgs args) {
    MESA_DYNAMIC_SHARED(shared_bytes);
    float4* const stages = reinterpret_cast<float4*>(shared_bytes);
    const auto fetch = [&](int tile) {
        float4* const to = stages + tile % kStages * kThreads + threadIdx.x;
        if (tile < args.tiles - 1) ptx::cp_async16(to, args.in + tile * kThreads + threadIdx.x);
        else if (tile < args.tiles)
            ptx::cp_async16_or_zero(to, args.in + tile * kThreads + threadIdx.x, threadIdx.x % 3);
        ptx::cp_async_commit();  // a group without copies counts too
    };
    for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
    for (int tile = 0; tile < args.tiles; ++tile) {
        fetch(tile + kStages - 1);
        ptx::cp_async_wait<kStages - 1>();
        __syncthreads();
        args.out[tile * kThreads + threadIdx.x] = stages[tile % kStages * kThreads + kThreads - 1 - threadIdx.x];
        __syncthreads();  // this stage is free again
    }
}

// ---- votes --------------------------------------------------------------------------------------------------------

// In round i threads first[i] to last[i] - 1 vote for it; everybody writes down what has come of it.
struct VoteArgs {
    const int* first;
    const int* last;
    int* out;  // [rounds][kThreads]
    int rounds;
};

__global__ void __launch_bounds__(kThreads) vote_kernel(const __grid_constant__ VoteArgs args) {
    const int own = threadIdx.x;
    for (int i = 0; i < args.rounds; ++i) {
        const int any = __syncthreads_or(own >= args.first[i] && own < args.last[i]);
        args.out[i * kThreads + own] = any != 0;
    }
}

// ---- running them -------------------------------------------------------------------------------------------------

bool report(const char* name, size_t wrong) {
    std::printf("%-60s %s (%zu wrong elements)\n", name, wrong ? "WRONG" : "ok", wrong);
    return wrong == 0;
}

// Small integers: every sum is exact in float32, in any order.
std::vector<__half> integers(size_t count) {
    static std::mt19937 random(8);
    std::vector<__half> v(count);
    for (__half& x : v) x = __float2half(static_cast<float>(static_cast<int>(random() % 17)) - 8);
    return v;
}

bool test_wide_product() {
    const std::vector<__half> a = integers(kPanel), b = integers(2 * kPanel);
    const Array<__half> a_there(a), b_there(b);
    const Array<float> out(2 * kPanel);
    check(launch(wide_kernel, ProductArgs{a_there.data, b_there.data, out.data}, 1, sizeof(WideShared), nullptr));
    check(cudaDeviceSynchronize());
    const std::vector<float> actual = out.host();
    size_t wrong = 0;
    for (int m = 0; m < 64; ++m)
        for (int n = 0; n < 128; ++n) {
            float sum = 0;
            for (int k = 0; k < 64; ++k)
                sum += __half2float(a[m * 64 + k]) * __half2float(b[n / 64 * kPanel + k * 64 + n % 64]);
            wrong += !(actual[m * 128 + n] == sum);
        }
    return report("wgmma of 128 columns in two panels, not added", wrong);
}

// The same numbers in bf16, in whatever type panels have.
std::vector<__half> in_bf16(std::vector<__half> v) {
    for (__half& x : v) {
        const float f = __half2float(x);
        uint32_t bits;
        std::memcpy(&bits, &f, sizeof(bits));
        bits >>= 16;
        std::memcpy(&x, &bits, sizeof(x));
    }
    return v;
}

template <ASource Source, bool TransA, bool TransB, bool Bf16>
bool test_product() {
    const std::vector<__half> a = integers(kPanel), b = integers(kPanel);
    const Array<__half> a_there(Bf16 ? in_bf16(a) : a), b_there(Bf16 ? in_bf16(b) : b);
    const Array<float> out(kPanel);
    check(launch(product_kernel<Source, TransA, TransB, Bf16>, ProductArgs{a_there.data, b_there.data, out.data}, 1,
                 sizeof(ProductShared), nullptr));
    check(cudaDeviceSynchronize());
    const std::vector<float> actual = out.host();
    size_t wrong = 0;
    for (int m = 0; m < 64; ++m)
        for (int n = 0; n < 64; ++n) {
            float sum = 1;
            for (int k = 0; k < 64; ++k)
                sum += __half2float(a[TransA ? k * 64 + m : m * 64 + k]) *
                       __half2float(b[TransB ? k * 64 + n : n * 64 + k]);
            wrong += !(actual[m * 64 + n] == sum);
        }
    char name[100];
    std::snprintf(name, sizeof(name), "%s%s, A %s%s, B %s", Bf16 ? "bf16 " : "",
                  Source == ASource::mma ? "mma.sync" : "wgmma",
                  Source == ASource::shared ? "in shared memory " : "in registers ", TransA ? "[k][m]" : "[m][k]",
                  TransB ? "[k][n]" : "[n][k]");
    return report(name, wrong);
}

template <ASource Source, bool Bf16 = false>
bool test_products() {
    bool ok = test_product<Source, false, false, Bf16>();
    ok &= test_product<Source, false, true, Bf16>();
    ok &= test_product<Source, true, false, Bf16>();
    return test_product<Source, true, true, Bf16>() && ok;
}

bool test_copies() {
    const int tiles = 8;
    std::vector<float4> in(tiles * kThreads);
    for (size_t i = 0; i < in.size(); ++i) in[i] = {i + 0.f, i + 0.25f, i + 0.5f, i + 0.75f};
    const Array<float4> in_there(in), out(in.size());
    check(launch(copy_kernel, CopyArgs{in_there.data, out.data, tiles}, 1, kStages * kThreads * sizeof(float4),
                 nullptr));
    check(cudaDeviceSynchronize());
    const std::vector<float4> actual = out.host();
    size_t wrong = 0;
    for (size_t i = 0; i < in.size(); ++i) {
        const size_t from = i / kThreads * kThreads + kThreads - 1 - i % kThreads;
        const bool is_zero = i / kThreads == size_t(tiles) - 1 && from % kThreads % 3 == 0;
        const float4 a = actual[i], e = is_zero ? float4{0, 0, 0, 0} : in[from];
        wrong += !(a.x == e.x && a.y == e.y && a.z == e.z && a.w == e.w);
    }
    return report("cp.async in groups", wrong);
}

bool test_votes() {
    const std::vector<int> first = {0, 5, 0, 0, 127, 64, 0}, last = {0, 6, 0, 128, 128, 96, 0};
    const int rounds = static_cast<int>(first.size());
    const Array<int> first_there(first), last_there(last), out(rounds * kThreads);
    check(launch(vote_kernel, VoteArgs{first_there.data, last_there.data, out.data, rounds}, 1, 0, nullptr));
    check(cudaDeviceSynchronize());
    const std::vector<int> actual = out.host();
    size_t wrong = 0;
    for (size_t i = 0; i < actual.size(); ++i) wrong += actual[i] != (first[i / kThreads] < last[i / kThreads]);
    return report("__syncthreads_or", wrong);
}

}  // namespace
}  // namespace mesa

int main() {
    using namespace mesa;
    int devices = 0, major = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0 ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || major != 9) {
        std::printf("no device of sm_90: nothing was run\n");
        return 77;
    }
    bool ok = test_products<ASource::mma>();
    ok &= test_products<ASource::registers>();
    ok &= test_products<ASource::shared>();
    ok &= test_products<ASource::mma, true>();
    ok &= test_products<ASource::shared, true>();
    ok &= test_wide_product();
    ok &= test_copies();
    ok &= test_votes();
    std::printf(ok ? "all right\n" : "SOMETHING IS WRONG\n");
    return ok ? 0 : 1;
}
