// What the instructions of ptx.cuh do, according to the PTX ISA.
// https://docs.nvidia.com/cuda/parallel-thread-execution/
#include "instructions.h"

#include <vector>

namespace mesa::emulator {
namespace {

// Of an operand's element.
float half_value(uint16_t bits, bool bf16) {
    if (bf16) return __uint_as_float(uint32_t(bits) << 16);
    static const std::vector<float> values = [] {
        std::vector<float> v(1 << 16);
        for (size_t i = 0; i < v.size(); ++i) v[i] = __half2float(__half_raw{static_cast<unsigned short>(i)});
        return v;
    }();
    return values[bits];
}

// Row-major operands of one warp.
struct A {
    float at[16][16];
};
template <int Columns>
struct B {
    float at[16][Columns];
};

// Lane l's registers of A hold, of rows l / 4 and l / 4 + 8, columns 2(l % 4) + {0, 1}, then the same 8 columns on.
template <typename Registers>  // Registers(lane) are four
A a_of_lanes(const Registers& registers, bool bf16) {
    A a;
    for (int l = 0; l < 32; ++l)
        for (int r = 0; r < 4; ++r)
            for (int e = 0; e < 2; ++e)
                a.at[l / 4 + r % 2 * 8][l % 4 * 2 + r / 2 * 8 + e] =
                    half_value(registers(l)[r] >> 16 * e & 0xffff, bf16);
    return a;
}

// Adds sixteen products to each of a row of accumulators as tensor cores do: all are aligned to the largest and cut off
// behind its 24th binary place, the sum is cut off to float32; nothing is rounded. (Of A100, after
// https://doi.org/10.7717/peerj-cs.330. So emulated, o of float32 inputs where it cancels most is off by 2.2e-4 before
// it is refined, as on an H200; with sums rounded to float32 it is by 1.4e-4.)
template <int Columns>
void add_aligned(float (&row)[Columns], const float (&a)[16], const float (&b)[16][Columns]) {
    float products[16][Columns], largest[Columns], rounded[Columns];
    int32_t sums[Columns];
    for (int c = 0; c < Columns; ++c) rounded[c] = row[c], largest[c] = std::fabs(row[c]);
    for (int k = 0; k < 16; ++k)
        for (int c = 0; c < Columns; ++c) {
            products[k][c] = a[k] * b[k][c];  // exact
            const float size = std::fabs(products[k][c]);
            largest[c] = size > largest[c] ? size : largest[c];
            rounded[c] += products[k][c];
        }
    float up[Columns];  // the 24th place becomes 1; so many as fit a float
    for (int c = 0; c < Columns; ++c) {
        const int exponent = int(__float_as_uint(largest[c]) >> 23) - 127;
        up[c] = __uint_as_float(uint32_t(127 + (exponent < -102 ? 126 : 24 - exponent)) << 23);
        sums[c] = static_cast<int32_t>(row[c] * up[c]);
    }
    for (int k = 0; k < 16; ++k)
        for (int c = 0; c < Columns; ++c) sums[c] += static_cast<int32_t>(products[k][c] * up[c]);
    for (int c = 0; c < Columns; ++c) {
        constexpr uint64_t kBeyondFloat = (uint64_t(1) << 29) - 1;  // the binary places that only a double has
        const uint64_t sum = emulator_bits<uint64_t>(sums[c] / double(up[c]));
        const float cut_off = static_cast<float>(emulator_bits<double>(sum & ~kBeyondFloat));
        row[c] = std::isfinite(rounded[c]) ? cut_off : rounded[c];
    }
}

// d += A B for the columns of one warp; d(lane) is its accumulators [tile][4]: of 8-column tile n, columns 2(l % 4) +
// {0, 1} of row l / 4, then of row l / 4 + 8.
template <int Columns, typename Accumulators>
void multiply_add(const Accumulators& d, const A& a, const B<Columns>& b) {
    for (int row = 0; row < 16; ++row) {
        float sums[Columns];
        const auto accumulator = [&](int c) -> float& {
            return d(row % 8 * 4 + c % 8 / 2)[c / 8][row / 8 * 2 + c % 2];
        };
        for (int c = 0; c < Columns; ++c) sums[c] = accumulator(c);
        add_aligned(sums, a.at[row], b.at);
        for (int c = 0; c < Columns; ++c) accumulator(c) = sums[c];
    }
}

// What wgmma has been issued by a warp, with its A registers at that time, and is not complete.
struct Pending {
    Wgmma common;
    float (*d[32])[4], (*right[32])[4];
    uint32_t a[32][4];
    int group;
};
struct WarpState {
    std::vector<Pending> pending;
    int groups = 0;  // committed
    size_t issued = 0;
    bool fenced = false;
};
std::vector<WarpState> warps;
std::vector<std::vector<Wgmma>> issued;  // by each warpgroup: its four warps must issue the same

// A thread's cp.async that have been started but not happened.
struct PendingPieces {
    struct Piece {
        void* to;
        const void* from;
        int group;
    };
    std::vector<Piece> queue;
    int groups = 0;
};
std::vector<PendingPieces> pieces;

WarpState& own_warp() { return warps[threadIdx.x / 32]; }

// Element (mn, k) of an operand, mn being the row of A or the column of B. PTX ISA, "Shared memory matrix layout" and
// "Strides", and the canonical layouts that CUTLASS gives in cute/atom/mma_traits_sm90_gmma.hpp agree on this, in
// units of 16 bytes, LBO and SBO being the leading and the stride byte offset:
//     K-major,  128-byte swizzle:  ((8, n), 2) : ((8, SBO), 1)           -- atoms of 8 rows mn, SBO apart along mn
//     MN-major, 128-byte swizzle:  ((8, n), (8, k)) : ((1, LBO), (8, SBO)) -- atoms of 64 mn x 8 k, LBO apart along mn,
//                                                                           SBO along k
// The swizzle exchanges address bits 4-6 by bits 7-9, counted from zero and not from the start of the matrix (base
// offset 0: the pattern begins at multiples of 1024 bytes).
// Here SBO and the swizzle, which the upper half of the descriptor gives, are always the same.
float element(uint32_t descriptor, bool transposed, int mn, int k, bool bf16) {
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = descriptor >> 16 << 4, stride = 1024;
    if (start & 0x380 || (transposed ? start % 128 != 0 : start % 128 > 96))
        fail("wgmma descriptor starts at %#x, not where a row of an atom, or a step of 16 k, begins", start);
    const uint32_t address = start + (transposed ? mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                                                 : mn / 8 * stride + mn % 8 * 128 + k * 2);
    uint16_t bits;
    std::memcpy(&bits, shared_pointer(address ^ (address >> 7 & 7) << 4, 2, 2), 2);
    return half_value(bits, bf16);
}

void complete(const Pending& p) {
    const Wgmma& w = p.common;
    const int first_row = threadIdx.x / 32 % 4 * 16;
    A a;
    B<64> b;
    if (w.a) a = a_of_lanes([&](int l) { return p.a[l]; }, w.bf16);
    for (int k = 0; k < 16; ++k)
        for (int row = 0; row < 16 && !w.a; ++row)
            a.at[row][k] = element(w.a_descriptor, w.a_transposed, first_row + row, k, w.bf16);
    for (int half = 0; half < (w.right ? 2 : 1); ++half) {
        const auto d = [&](int l) { return half ? p.right[l] : p.d[l]; };
        for (int k = 0; k < 16; ++k)
            for (int c = 0; c < 64; ++c)
                b.at[k][c] = element(w.b_descriptor, w.b_transposed, half * 64 + c, k, w.bf16);
        for (int l = 0; l < 32 && !w.add; ++l) std::fill_n(&d(l)[0][0], 32, 0.f);
        multiply_add<64>(d, a, b);
    }
}

// Completes the warp's first `groups` groups, in order.
void complete(WarpState& warp, int groups) {
    size_t done = 0;
    for (; done < warp.pending.size() && warp.pending[done].group < groups; ++done) complete(warp.pending[done]);
    warp.pending.erase(warp.pending.begin(), warp.pending.begin() + done);
}

bool same(const Wgmma& a, const Wgmma& b) {
    return !a.a == !b.a && !a.right == !b.right && a.a_descriptor == b.a_descriptor &&
           a.b_descriptor == b.b_descriptor && a.a_transposed == b.a_transposed && a.b_transposed == b.b_transposed &&
           a.add == b.add && a.bf16 == b.bf16;
}

}  // namespace

void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
    struct Operands {
        uint32_t* r;
        uint32_t address;
    } own{r, address};
    together(transposed ? "ldmatrix.trans" : "ldmatrix", own, [&](Lanes<Operands> lanes) {
        uint16_t m[32][8];  // the rows of the four matrices
        for (int l = 0; l < 32; ++l) std::memcpy(m[l], shared_pointer(lanes[l].address, 16, 16), 16);
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) {
                const int row = i * 8 + l / 4, col = l % 4 * 2;
                lanes[l].r[i] = transposed ? m[i * 8 + col][l / 4] | m[i * 8 + col + 1][l / 4] << 16
                                           : m[row][col] | m[row][col + 1] << 16;
            }
    });
}

void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
    struct Operands {
        float (*c)[4];
        const uint32_t* a;
        uint32_t b[2];
    } own{&c, a, {b0, b1}};
    together("mma.m16n8k16", own, [bf16](Lanes<Operands> lanes) {
        B<8> b;
        for (int l = 0; l < 32; ++l)  // rows 2(l % 4) + {0, 1} and 8 further on, of column l / 4
            for (int r = 0; r < 2; ++r)
                for (int e = 0; e < 2; ++e)
                    b.at[r * 8 + l % 4 * 2 + e][l / 4] = half_value(lanes[l].b[r] >> 16 * e & 0xffff, bf16);
        multiply_add<8>([&](int l) { return lanes[l].c; }, a_of_lanes([&](int l) { return lanes[l].a; }, bf16), b);
    });
}

// ---- wgmma --------------------------------------------------------------------------------------------------------

void start(const Wgmma& wgmma) {
    Wgmma own = wgmma;
    together("wgmma", own, [](Lanes<Wgmma> lanes) {
        WarpState& warp = own_warp();
        if (blockDim.x % 128) fail("wgmma needs whole warpgroups");
        if (!warp.fenced) fail("wgmma without wgmma.fence before it");
        Pending p{lanes[0], {}, {}, {}, warp.groups};
        for (int l = 0; l < 32; ++l) {
            if (!same(lanes[l], lanes[0])) fail("wgmma: lanes %d and 0 have different descriptors", l);
            p.d[l] = lanes[l].d, p.right[l] = lanes[l].right;
            if (lanes[l].a) std::copy_n(lanes[l].a, 4, p.a[l]);
        }
        std::vector<Wgmma>& of_group = issued[threadIdx.x / 128];
        if (warp.issued == of_group.size()) of_group.push_back(lanes[0]);
        else if (!same(lanes[0], of_group[warp.issued]))
            fail("wgmma: the warps of a warpgroup have different descriptors");
        ++warp.issued;
        warp.pending.push_back(p);
    });
}

// Groups complete when they are waited for, or at once: what is read too early or overwritten too early shows in the
// one case, operands that are written too late show in the other.
void wait_for_wgmma(int pending) {
    int nothing;
    together("wgmma.wait_group", nothing, [&](auto) { complete(own_warp(), own_warp().groups - pending); });
}

void wait_for_cp_async(int pending) {
    PendingPieces& own = pieces[threadIdx.x];
    size_t done = 0;
    for (; done < own.queue.size() && own.queue[done].group < own.groups - pending; ++done)
        std::memcpy(own.queue[done].to, own.queue[done].from, 16);
    own.queue.erase(own.queue.begin(), own.queue.begin() + done);
}

void begin_block(int count) {
    warps.assign(count, {});
    issued.assign((count + 3) / 4, {});
    pieces.assign(count * 32, {});
}

void end_thread() {
    if (!pieces[threadIdx.x].queue.empty()) fail("ends before its cp.async are complete");
    if (!own_warp().pending.empty()) fail("ends before its wgmma is complete");
}

}  // namespace mesa::emulator

namespace mesa::ptx {

using namespace emulator;

void wgmma_fence() {
    int nothing;
    together("wgmma.fence", nothing, [](auto) { own_warp().fenced = true; });
}

void wgmma_commit() {
    int nothing;
    together("wgmma.commit_group", nothing, [](auto) {
        ++own_warp().groups;
        if (emulator::random() % 2) complete(own_warp(), own_warp().groups);
    });
}

// Pieces come when they are waited for; until then their place holds NaNs.
void cp_async16(void* shared, const void* global) {
    shared_pointer(shared_address(shared), 16, 16);
    if (reinterpret_cast<uintptr_t>(global) % 16) fail("cp.async from %p, not a multiple of 16", global);
    std::memset(shared, 0xff, 16);
    pieces[threadIdx.x].queue.push_back({shared, global, pieces[threadIdx.x].groups});
}

void cp_async16_or_zero(void* shared, const void* global, bool inside) {
    alignas(16) static const char zeros[16] = {};
    cp_async16(shared, inside ? global : zeros);
}

void cp_async_commit() { ++pieces[threadIdx.x].groups; }

}  // namespace mesa::ptx
