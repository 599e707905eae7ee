// The CUDA kernels without torch: every launcher against a plain float64 computation, and with --bench their times.
//
//     mesa_kernels_test [GROUP..]    all tests, or those groups: divisors, chunks, segments, hard-rows, decode, pieces;
//                                exit status 0: right, 1: wrong, 77: no CUDA device
//     mesa_kernels_test --bench [B T H K V [n [steps]]]
//                                median of n runs in milliseconds (default 8 2048 16 128 128, 20), with exactly so
//                                many solver steps if given
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "reference.h"

namespace {

// ---- the kernels ---------------------------------------------------------------------------------------------------

// Which kernels, how long the segments of the states are and whether they come in turn, and how many groups of heads are
// worked on one after the other.
struct Variant {
    bool hopper;
    int segment_chunks = kSegmentChunks;
    int head_groups = 1;
    bool in_turn = false;
};

// All device arrays of one forward and backward pass, and its launches.
struct Pass {
    Problem problem;
    int H, HS;
    Array<int64_t> bounds;
    Matrix q, k, v, d_o;
    Array<float> g, beta, lamb, start_kk, start_kv, end_dkk, end_dkv;
    Array<__half> state_panels, adjoint_panels;
    Array<float> state_scales, adjoint_scales, segment_sums, segment_decays;
    Array<LambPair> lamb_pairs;
    Output x, o, dq, dk, dv;
    Array<float> dg, dbeta, from_start, overlaps, dlamb_parts, dlamb, end_kk, end_kv, dh_kk, dh_kv, bound;
    Array<int> steps;
    Array<uint16_t> rounded;  // dq in bf16
    Array<HardRows> hard_rows;
    Array<Crossings> crossings;
    Output correction;
    bool with_states;
    int max_iterations;
    float tolerance;
    int head_groups, head_group = 0;  // how many, and the one at hand
    bool in_turn, starts_known = false;

    // Rounds q, k, v and d_o of `in` to its dtype.
    Pass(Inputs& in, int max_iterations, float tolerance, Variant variant)
        : problem{in.T, in.sequences(), nullptr, in.K, in.V, variant.hopper, variant.segment_chunks},
          H(in.H), HS(in.HS), bounds(in.bounds),
          q(in.q, in.dtype, in.T, H, in.K), k(in.k, in.dtype, in.T, HS, in.K), v(in.v, in.dtype, in.T, HS, in.V),
          d_o(in.d_o, in.dtype, in.T, H, in.V), g(floats(in.g)), beta(floats(in.beta)), lamb(floats(in.lamb)),
          start_kk(floats(in.h_kk)), start_kv(floats(in.h_kv)), end_dkk(floats(in.end_dkk)),
          end_dkv(floats(in.end_dkv)), state_panels(panels(in) * HS * kPanel),
          adjoint_panels(panels(in) * H * kPanel), state_scales(scales(in) * HS), adjoint_scales(scales(in) * H),
          segment_sums(segments(in, variant) * H * segment_sum_size(shape(in))),
          segment_decays(segments(in, variant) * H), lamb_pairs(size_t(HS) * tiles(in.K) * kChunk / 2),
          x(in.B, in.T, H, in.K), o(in.B, in.T, H, in.V), dq(in.B, in.T, H, in.K), dk(in.B, in.T, H, in.K),
          dv(in.B, in.T, H, in.V),
          dg(in.B * in.T * H), dbeta(dg.count), from_start(dg.count),
          overlaps(slots(in) * H * overlap_parts(shape(in))), dlamb_parts(slots(in) * H * in.K),
          dlamb(size_t(H) * in.K),
          end_kk(size_t(in.sequences()) * HS * in.K * in.K), end_kv(size_t(in.sequences()) * HS * in.K * in.V),
          dh_kk(size_t(in.sequences()) * H * in.K * in.K), dh_kv(size_t(in.sequences()) * H * in.K * in.V),
          bound(dg.count), steps(dg.count), rounded(dq.data.count), hard_rows(slots(in) * H), crossings(slots(in) * H),
          correction(in.B, in.T, H, in.K), with_states(!in.h_kk.empty()), max_iterations(max_iterations),
          tolerance(tolerance), head_groups(variant.head_groups), in_turn(variant.in_turn) {
        if (bounds.count) problem.cu_seqlens = bounds.data;
        check(cudaMemset(dlamb_parts.data, 0, dlamb_parts.count * sizeof(float)), "cudaMemset");  // slots may be unused
    }

    static Problem shape(const Inputs& in, int segment_chunks = kSegmentChunks) {
        return {in.T, in.sequences(), in.bounds.empty() ? nullptr : in.bounds.data(), in.K, in.V, false,
                segment_chunks};
    }
    static size_t segments(const Inputs& in, Variant variant) {
        return shape(in, variant.segment_chunks).segment_count();
    }
    static size_t slots(const Inputs& in) { return shape(in).slots(); }
    static size_t panels(const Inputs& in) { return slots(in) * split_state_panels(shape(in)); }  // of a head
    static size_t scales(const Inputs& in) { return slots(in) * (tiles(in.V) + tiles(in.K)); }
    // What the state heads have, as seen by a kernel that works on all output heads.
    Rows grouped(Rows rows) const { return rows.group = H / HS, rows; }
    Rows keys() const { return grouped(k.rows); }
    Rows values() const { return grouped(v.rows); }
    Gates gates() const { return {g.data, beta.data, HS, H / HS}; }
    Heads heads_at_hand(int all) const {
        return {all, all / head_groups * head_group, all / head_groups};
    }
    // Every group's states in the same place.
    SplitStates states_of(const Array<__half>& panels, const Array<float>& scales, int all, int group) const {
        const Heads heads = heads_at_hand(all);
        return {panels.data, scales.data, heads.count.value(), group, heads.first};
    }
    SplitStates states() const { return states_of(state_panels, state_scales, HS, H / HS); }
    SplitStates adjoints() const {
        if (H == HS) return states();  // in their place
        return states_of(adjoint_panels, adjoint_scales, H, 1);
    }

    void chunk_states() const {
        check(launch_chunk_states({problem, k.rows, {v.rows, k.rows}, {g.data, beta.data, HS, 1},
                                   with_states ? start_kv.data : nullptr, with_states ? start_kk.data : nullptr,
                                   end_kv.data, end_kk.data, states_of(state_panels, state_scales, HS, 1),
                                   heads_at_hand(HS), 1, false, segment_sums.data, segment_decays.data, lamb.data,
                                   lamb_pairs.data, {}, nullptr, in_turn && !starts_known, starts_known},
                                  nullptr), "chunk states");
    }
    SolveArgs solve_args(Solve kind, const Rows& rhs, const Rows& to) const {
        SolveArgs args{};
        args.problem = problem, args.kind = kind, args.rhs = rhs, args.keys = keys(), args.values = values();
        args.gates = gates(), args.lamb = lamb_pairs.data, args.states = states(), args.x = to;
        args.heads = heads_at_hand(H);
        args.max_iterations = max_iterations, args.tolerance = tolerance;
        return args;
    }
    bool float32() const { return k.rows.dtype == DType::f32; }
    void solve_once() const {
        SolveArgs args = solve_args(Solve::forward, q.rows, x.rows);
        args.out = o.rows, args.steps = steps.data, args.bound = bound.data;
        args.hard_rows = float32() ? hard_rows.data : nullptr;
        check(launch_solve(args, nullptr), "solve and read-out");
    }
    void refine() const {
        const RefineArgs args{problem, q.rows, keys(), values(), gates(), lamb_pairs.data,
                              with_states ? start_kv.data : nullptr, with_states ? start_kk.data : nullptr,
                              hard_rows.data, x.rows, correction.rows, o.rows, heads_at_hand(H)};
        check(launch_residuals(args, nullptr), "residuals");
        SolveArgs corrected = solve_args(Solve::correction, correction.rows, correction.rows);
        corrected.tolerance = kCorrectionTolerance, corrected.hard_rows = hard_rows.data;
        check(launch_solve(corrected, nullptr), "solve for a correction");
        check(launch_refined(args, nullptr), "refined read-out");
    }
    void solve_forward() const {
        solve_once();
        if (float32()) refine();
    }
    void solve_backward() const {
        SolveArgs args = solve_args(Solve::adjoint, d_o.rows, dq.rows);
        args.rounded = rounded_rows(), args.forward_x = x.rows, args.from_start = from_start.data;
        args.steps = steps.data, args.bound = bound.data;
        check(launch_solve(args, nullptr), "solve (backward)");
    }
    void adjoint_states() const {
        check(launch_chunk_states({problem, x.rows, {d_o.rows, dq.rows}, gates(), with_states ? end_dkv.data : nullptr,
                                   with_states ? end_dkk.data : nullptr, dh_kv.data, dh_kk.data, adjoints(),
                                   heads_at_hand(H), H / HS, true, segment_sums.data, segment_decays.data, nullptr,
                                   nullptr, states(), overlaps.data, in_turn},
                                  nullptr), "adjoint states");
    }
    void gradients() const {
        check(launch_grad({problem, x.rows, dq.rows, d_o.rows, keys(), values(), gates(), adjoints(),
                           from_start.data, overlaps.data, crossings.data, dk.rows, dv.rows, dg.data, dbeta.data,
                           dlamb_parts.data, dlamb.data, heads_at_hand(H)},
                          nullptr),
              "grad");
    }

    Rows rounded_rows() const {
        Rows rows = dq.rows;
        rows.data = rounded.data, rows.dtype = DType::bf16;
        return rows;
    }
    bool rounded_is_dq() const {
        const std::vector<float> exact = dq.data.host();
        const std::vector<uint16_t> bits = rounded.host();
        bool equal = true;
        for (size_t i = 0; i < exact.size(); ++i)
            equal = equal && __bfloat16_as_ushort(__float2bfloat16(exact[i])) == bits[i];
        return equal;
    }

    struct Stage {
        const char* name;
        void (Pass::*launch)() const;
    };
    static constexpr Stage stages[] = {
        {"chunk states", &Pass::chunk_states}, {"solve and read-out", &Pass::solve_forward},
        {"solve (backward)", &Pass::solve_backward}, {"adjoint states", &Pass::adjoint_states},
        {"gradients", &Pass::gradients}};

    Results run() {
        for (head_group = 0; head_group < head_groups; ++head_group)
            for (const Stage& stage : stages) (this->*stage.launch)();
        check(cudaDeviceSynchronize(), "the kernels");
        return {o.doubles(), x.doubles(), dq.doubles(), dk.doubles(), dv.doubles(), dg.doubles(), dbeta.doubles(),
                dlamb.doubles(), end_kk.doubles(), end_kv.doubles(), dh_kk.doubles(), dh_kv.doubles()};
    }
};

// ---- tests ---------------------------------------------------------------------------------------------------------

double relative_error(const Vec& actual, const Vec& expected) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
        error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
        norm += expected[i] * expected[i];
    }
    return actual.size() == expected.size() ? std::sqrt(error / norm) : INFINITY;
}

struct Comparison {
    const char* name;
    const Vec& actual;
    const Vec& expected;
};

bool report(const std::string& title, std::initializer_list<Comparison> comparisons, double bar) {
    bool ok = true;
    std::printf("%-34s", title.c_str());
    for (const Comparison& c : comparisons) {
        const double error = relative_error(c.actual, c.expected);
        std::printf(" %s %.0e%s", c.name, error, error <= bar ? "" : "(!)");
        ok = ok && error <= bar;  // false for NaN
    }
    std::printf("  %s\n", ok ? "ok" : "WRONG");
    return ok;
}

const char* name(DType d) { return d == DType::f16 ? "f16" : d == DType::bf16 ? "bf16" : "f32"; }

bool test_chunks(Variant variant, int B, int64_t T, int H, int K, int V, DType dtype, std::vector<int64_t> bounds,
                 int group = 1) {
    Inputs in(B, T, H, K, V, dtype, std::move(bounds), group);
    Pass pass(in, 50, 1e-5f, variant);
    const Results a = pass.run();
    const Results e = reference(in);  // after Pass has rounded the inputs
    const std::string title = std::string(variant.hopper ? "hopper " : "") + name(dtype) + " B=" + std::to_string(B) +
                              " T=" + std::to_string(T) + " K=" + std::to_string(K) + " V=" + std::to_string(V) +
                              (in.bounds.empty() ? "" : " packed") + (group == 1 ? "" : " groups") +
                              (variant.head_groups == 1 ? "" : " heads apart") +
                              (Pass::shape(in, variant.segment_chunks).segmented() ? " segments" : "");
    if (!pass.rounded_is_dq()) std::printf("dq in bf16 is not dq rounded\n");
    return pass.rounded_is_dq() & report(title,
                                         {{"o", a.o, e.o},
                                          {"x", a.x, e.x},
                                          {"h_kk", a.h_kk, e.h_kk},
                                          {"h_kv", a.h_kv, e.h_kv},
                                          {"dq", a.dq, e.dq},
                                          {"dk", a.dk, e.dk},
                                          {"dv", a.dv, e.dv},
                                          {"dg", a.dg, e.dg},
                                          {"dbeta", a.dbeta, e.dbeta},
                                          {"dlamb", a.dlamb, e.dlamb},
                                          {"dh_kk", a.dh_kk, e.dh_kk},
                                          {"dh_kv", a.dh_kv, e.dh_kv}},
                                         1e-3);
}

// Two segments of 18 chunks, and decays with which nothing is left of a segment's first chunk at its end, or of its last
// one at its beginning.
constexpr int kForgetfulChunks = 18;
Inputs forgetful(int K, int V, DType dtype, bool with_states) {
    Inputs in(1, 2 * kForgetfulChunks * kChunk - 20, 1, K, V, dtype, {}, 1, with_states);
    std::fill(in.g.begin(), in.g.end(), -0.105);
    return in;
}

// Segments in turn give what segments beside each other give, bit for bit.
bool test_in_turn(bool hopper, Inputs in, int segment_chunks = 2) {
    const auto run = [&](bool in_turn) { return Pass(in, 50, 1e-5f, {hopper, segment_chunks, 1, in_turn}).run(); };
    const Results a = run(true), b = run(false);
    const std::pair<const Vec*, const Vec*> results[] = {
        {&a.o, &b.o},   {&a.x, &b.x},         {&a.dq, &b.dq},       {&a.dk, &b.dk},       {&a.dv, &b.dv},
        {&a.dg, &b.dg}, {&a.dbeta, &b.dbeta}, {&a.dlamb, &b.dlamb}, {&a.h_kk, &b.h_kk},   {&a.h_kv, &b.h_kv},
        {&a.dh_kk, &b.dh_kk}, {&a.dh_kv, &b.dh_kv}};
    bool ok = true;
    for (const auto& [turn, beside] : results) ok = ok && *turn == *beside && !turn->empty();  // false for NaN
    std::printf("%s%s T=%d K=%d V=%d%s segments in turn  %s\n", hopper ? "hopper " : "", name(in.dtype), int(in.T),
                in.K, in.V, in.H == in.HS ? "" : " groups", ok ? "ok" : "WRONG");
    return ok;
}

// The states from the starts that a launch before has left are that launch's, bit for bit.
bool test_known_starts(bool hopper, int64_t T, int K, int V, DType dtype, bool in_turn) {
    Inputs in(2, T, 2, K, V, dtype, {}, 1, !in_turn);
    Pass pass(in, 30, 1e-3f, {hopper, 2, 1, in_turn});
    const auto states = [&](bool starts_known) {
        pass.starts_known = starts_known;
        pass.state_panels.spoil(), pass.state_scales.spoil(), pass.end_kk.spoil(), pass.end_kv.spoil();
        pass.chunk_states();
        check(cudaDeviceSynchronize(), "the kernels");
        return std::make_tuple(pass.state_panels.bytes(), pass.state_scales.bytes(), pass.end_kk.bytes(),
                               pass.end_kv.bytes());
    };
    const auto first = states(false), second = states(true);
    const Vec end = pass.end_kv.doubles();
    const bool ok = first == second && std::all_of(end.begin(), end.end(), [](double x) { return std::isfinite(x); });
    std::printf("%s%s T=%d K=%d V=%d known starts%s  %s\n", hopper ? "hopper " : "", name(dtype), int(T), K, V,
                in_turn ? " from segments in turn" : "", ok ? "ok" : "WRONG");
    return ok;
}

// Chunks of which nothing is left at their segment's end are not even looked at when its sum is made: NaN there stays
// in the segment.
bool test_forgotten(bool hopper, int K, DType dtype) {
    Inputs in = forgetful(K, 16, dtype, true);
    const Variant variant{hopper, kForgetfulChunks};
    const Results a = Pass(in, 50, 1e-5f, variant).run(), e = reference(in);
    in.v.front() = in.d_o.back() = std::numeric_limits<double>::quiet_NaN();
    const Results spoilt = Pass(in, 50, 1e-5f, variant).run();
    const bool kept = spoilt.h_kk == a.h_kk && spoilt.h_kv == a.h_kv && spoilt.dh_kv == a.dh_kv;
    const bool spreads = std::isnan(spoilt.o[17 * kChunk * 16]) && std::isnan(spoilt.dv[19 * kChunk * 16 + 15]);
    const std::string title = std::string(hopper ? "hopper " : "") + name(dtype) + " K=" + std::to_string(K) +
                              (kept ? " forgotten chunks" : " forgotten chunks are not") +
                              (spreads ? "" : " NaN does not spread in its segment");
    return kept & spreads & report(title,
                                   {{"o", a.o, e.o},
                                    {"h_kv", a.h_kv, e.h_kv},
                                    {"dk", a.dk, e.dk},
                                    {"dg", a.dg, e.dg},
                                    {"dh_kk", a.dh_kk, e.dh_kk},
                                    {"dh_kv", a.dh_kv, e.dh_kv}},
                                   1e-3);
}

// Keys that share a direction, values that are linear in them, and no decay, after a long text: o = G'x cancels by a
// factor of 1000, and is right only if such rows are refined. Of two sequences the first has no such text before it, so
// that it has rows of either kind. (Of the others one just short of being refined may be off by 2e-5 of all the rows.)
bool test_hard_rows(int K, int V, std::vector<int64_t> bounds, int group = 1) {
    const int H = 2;
    const int64_t T = bounds.empty() ? 150 : bounds.back();
    Inputs in(bounds.empty() ? 2 : 1, T, H, K, V, DType::f32, bounds, group);
    std::mt19937_64 random(11);
    std::normal_distribution<double> normal;
    const auto draw = [&](int n, double scale) {
        Vec out(n);
        for (double& x : out) x = scale * normal(random);
        return out;
    };
    const Vec shared = draw(K, 1 / std::sqrt(K)), linear = draw(K * V, 1 / std::sqrt(K));
    const auto make_token = [&](double* k, double* v) {
        const Vec own = draw(K, 0.1 / std::sqrt(K)), noise = draw(V, 0.01);
        for (int i = 0; i < K; ++i) k[i] = static_cast<float>(0.9 * shared[i] + own[i]);
        for (int c = 0; c < V; ++c) {
            v[c] = noise[c];
            for (int i = 0; i < K; ++i) v[c] += k[i] * linear[i * V + c];
        }
    };
    for (size_t t = 0; t < in.k.size() / K; ++t) make_token(&in.k[t * K], &in.v[t * V]);
    std::fill(in.g.begin(), in.g.end(), 0.);
    std::fill(in.h_kk.begin(), in.h_kk.end(), 0.), std::fill(in.h_kv.begin(), in.h_kv.end(), 0.);
    Vec k(K), v(V);
    for (int64_t s = in.HS; s < int64_t(in.sequences()) * in.HS; ++s)
        for (int t = 0; t < 3000; ++t) {
            make_token(k.data(), v.data());
            for (int i = 0; i < K; ++i) {
                for (int j = 0; j < K; ++j) in.h_kk[(s * K + i) * K + j] += k[i] * k[j];
                for (int c = 0; c < V; ++c) in.h_kv[(s * K + i) * V + c] += k[i] * v[c];
            }
        }
    Inputs::round_to_float(in.h_kk), Inputs::round_to_float(in.h_kv);

    const Pass pass(in, 256, 1e-5f, {false});
    pass.chunk_states();
    pass.solve_once();
    const Vec o_before = pass.o.doubles();
    pass.refine();
    check(cudaDeviceSynchronize(), "the kernels");
    const Results e = reference(in);
    const auto refined = [&](const Vec& all, int width) {  // those of [B, T, H, width]
        const std::vector<HardRows> rows = pass.hard_rows.host();
        Vec out;
        for (int n = 0; n < in.sequences(); ++n) {
            const int64_t start = bounds.empty() ? n * T : bounds[n], length = bounds.empty() ? T : bounds[n + 1] - start;
            const int64_t slot = bounds.empty() ? n * ((T + kChunk - 1) / kChunk) : start / kChunk + n;
            for (int64_t t = 0; t < length; ++t)
                for (int head = 0; head < H; ++head)
                    if (rows[(slot + t / kChunk) * H + head] >> t % kChunk & 1)
                        for (int i = 0; i < width; ++i) out.push_back(all[((start + t) * H + head) * width + i]);
        }
        return out;
    };
    const Vec o = pass.o.doubles(), x = pass.x.doubles();
    const std::string name = "hard rows K=" + std::to_string(K) + " V=" + std::to_string(V) +
                             (bounds.empty() ? "" : " packed") + (group == 1 ? "" : " groups");
    const double before = relative_error(o_before, e.o);
    if (before < 3e-5) std::printf("o was right before the refinement: these rows are not hard\n");
    return (before >= 3e-5) & report(name, {{"o", o, e.o}, {"x", x, e.x}}, 3e-5) &
           report(name + ", refined", {{"o", refined(o, V), refined(e.o, V)}, {"x", refined(x, K), refined(e.x, K)}},
                  1e-6);
}

template <typename T>
bool equal(const Array<T>& a, const Array<T>& b) {
    return a.bytes() == b.bytes();
}

// The tiles of symmetric matrices [.., K, K].
Vec packed(const Vec& full, int K) {
    const int rows = static_cast<int>(tile_rows(K));
    Vec out;
    for (size_t first = 0; first < full.size(); first += size_t(K) * K)
        for (int i = 0; i < rows; ++i)
            for (int j = i; j < rows; ++j)
                for (int e = 0; e < kTile * kTile; ++e) {
                    const int row = i * kTile + e / kTile, col = j * kTile + e % kTile;
                    out.push_back(row < K && col < K ? full[first + row * K + col] : 0);
                }
    return out;
}

// Decode takes sequences of one token: rows 2 and 0 of a pool of three; the middle one of three sequences is skipped.
bool test_decode(int K, int V, DType dtype, int group = 1) {
    const int HS = 2, H = HS * group, B = 3, pool = 3;
    Inputs in(B, 1, H, K, V, dtype, {}, group);
    Matrix q(in.q, dtype, 1, H, K), k(in.k, dtype, 1, HS, K), v(in.v, dtype, 1, HS, V);
    const std::vector<int64_t> indices = {2, -1, 0};
    const Results expected = reference(in);

    // The pool holds the start of sequence b at row indices[b], and of the skipped one at the row that is left, 1.
    const auto pooled = [&](const Vec& states) {
        Vec out(states.size());
        const size_t row = states.size() / B;
        for (int b = 0; b < B; ++b) std::copy_n(&states[b * row], row, &out[(indices[b] < 0 ? 1 : indices[b]) * row]);
        return out;
    };
    const auto without_skipped = [&](Vec results, const Vec& skipped) {
        const size_t row = results.size() / B;
        std::copy_n(skipped.empty() ? Vec(row).data() : &skipped[row], row, &results[row]);
        return results;
    };
    Array<float> g = floats(in.g), beta = floats(in.beta), lamb = floats(in.lamb), h_kk = floats(pooled(in.h_kk)),
                 h_kv = floats(pooled(in.h_kv));
    Output o(B, 1, H, V, V);
    Array<int64_t> state_indices(indices);
    DecodeArgs args{q.rows, k.rows, v.rows, o.rows, g.data, beta.data, lamb.data, h_kk.data, h_kv.data, h_kk.data,
                    h_kv.data, false, state_indices.data, pool, nullptr, nullptr, B, 1, HS, H, K, V, 50, 1e-5f};
    check(launch_decode(args, nullptr), "decode");

    Array<float> packed_kk = floats(packed(pooled(in.h_kk), K)), other_kv = floats(pooled(in.h_kv));
    Output other_o(B, 1, H, V, V);
    args.out = other_o.rows, args.packed = true;
    args.start_kk = args.end_kk = packed_kk.data, args.start_kv = args.end_kv = other_kv.data;
    check(launch_decode(args, nullptr), "packed decode");
    check(cudaDeviceSynchronize(), "decode");
    const bool same = equal(o.data, other_o.data) && equal(h_kv, other_kv) &&
                      equal(packed_kk, floats(packed(h_kk.doubles(), K)));
    if (!same) std::printf("packed or not, the bits differ\n");
    return same & report(std::string("decode ") + name(dtype) + " K=" + std::to_string(K) + " V=" + std::to_string(V) +
                      (group == 1 ? "" : " groups"),
                  {{"o", o.doubles(), without_skipped(expected.o, {})},
                   {"h_kk", h_kk.doubles(), pooled(without_skipped(expected.h_kk, in.h_kk))},
                   {"h_kv", h_kv.doubles(), pooled(without_skipped(expected.h_kv, in.h_kv))}}, 1e-3);
}

// A piece of T tokens to a state of its own, and the states along the way; the same bits as T single steps. From
// nothing, if there is no start.
bool test_piece(int T, int K, int V, DType dtype, int group = 1, bool with_start = true) {
    const int HS = 2, H = HS * group, B = 2, steps = 50;
    const float tolerance = 1e-5f;
    Inputs in(B, T, H, K, V, dtype, {}, group);
    if (!with_start) std::fill(in.h_kk.begin(), in.h_kk.end(), 0.), std::fill(in.h_kv.begin(), in.h_kv.end(), 0.);
    Matrix q(in.q, dtype, T, H, K), k(in.k, dtype, T, HS, K), v(in.v, dtype, T, HS, V);
    const Results expected = reference(in);
    const Array<float> g = floats(in.g), beta = floats(in.beta), lamb = floats(in.lamb);
    Array<float> h_kk = floats(in.h_kk), h_kv = floats(in.h_kv), end_kk(h_kk.count), end_kv(h_kv.count),
                 bound(B * T * H), step_bound(bound.count);
    Array<int> taken(bound.count);
    Output o(B, T, H, V, V), step_o(B, T, H, V, V);
    DecodeArgs args{q.rows, k.rows, v.rows, o.rows, g.data, beta.data, lamb.data, with_start ? h_kk.data : nullptr,
                    with_start ? h_kv.data : nullptr, end_kk.data, end_kv.data, false, nullptr, B, taken.data,
                    bound.data, B, T, HS, H, K, V, steps, tolerance};
    check(launch_decode(args, nullptr), "piece");

    // States after 0, 1, .. T tokens, and numbers beyond either end.
    std::vector<int64_t> counts;
    for (int n = 0; n < B; ++n)
        for (int t = -1; t <= T + 1; ++t) counts.push_back(t);
    const int M = T + 3;
    Array<int64_t> state_at(counts);
    const size_t kk_size = h_kk.count / B, kv_size = h_kv.count / B;
    Array<float> kk(B * M * kk_size), kv(B * M * kv_size);
    const Problem problem{T, B, nullptr, K, V, false, kSegmentChunks};
    check(launch_state_at({problem, k.rows, v.rows, {g.data, beta.data, HS, 1}, args.start_kk, args.start_kv,
                           state_at.data, kk.data, kv.data, HS, M}, nullptr), "state_at");
    check(cudaDeviceSynchronize(), "piece");
    const std::vector<float> kks = kk.host(), kvs = kv.host();

    // The steps, each a call with the gates of its token alone.
    bool same = true;
    const auto is_state = [&](int m) {
        const std::vector<float> now_kk = h_kk.host(), now_kv = h_kv.host();
        for (int n = 0; n < B; ++n)
            same &= std::equal(&now_kk[n * kk_size], &now_kk[n * kk_size] + kk_size, &kks[(n * M + m) * kk_size]) &&
                    std::equal(&now_kv[n * kv_size], &now_kv[n * kv_size] + kv_size, &kvs[(n * M + m) * kv_size]);
    };
    is_state(0), is_state(1);
    for (int t = 0; t < T; ++t) {
        const auto of_token = [&](const Vec& all) {
            Vec out;
            for (int n = 0; n < B; ++n) out.insert(out.end(), &all[(n * T + t) * HS], &all[(n * T + t) * HS] + HS);
            return floats(out);
        };
        const auto token = [&](Rows rows, int element) {
            rows.data = static_cast<char*>(rows.data) + t * rows.token_stride * element;
            return rows;
        };
        const int element = dtype == DType::f32 ? 4 : 2;
        const Array<float> g1 = of_token(in.g), beta1 = of_token(in.beta);
        check(launch_decode({token(q.rows, element), token(k.rows, element), token(v.rows, element),
                             token(step_o.rows, 4), g1.data, beta1.data, lamb.data, h_kk.data, h_kv.data, h_kk.data,
                             h_kv.data, false, nullptr, B, nullptr, nullptr, B, 1, HS, H, K, V, steps, tolerance},
                            nullptr), "decode");
        check(cudaDeviceSynchronize(), "decode");
        is_state(t + 2);
    }
    is_state(T + 2);
    same &= equal(o.data, step_o.data) && equal(end_kk, h_kk) && equal(end_kv, h_kv);
    for (const float b : bound.host()) same &= b >= 0 && b <= tolerance;
    for (const int s : taken.host()) same &= s > 0 && s < steps;
    if (!same) std::printf("a piece, single steps and the states along the way differ\n");
    return same & report(std::string("piece ") + name(dtype) + " T=" + std::to_string(T) + " K=" + std::to_string(K) +
                             " V=" + std::to_string(V) + (group == 1 ? "" : " groups") + (with_start ? "" : " from 0"),
                         {{"o", o.doubles(), expected.o},
                          {"h_kk", end_kk.doubles(), expected.h_kk},
                          {"h_kv", end_kv.doubles(), expected.h_kv}}, 1e-3);
}

// The states after some tokens of packed sequences, one longer than a piece.
bool test_state_at(int K, int V, DType dtype) {
    const int HS = 2;
    const std::vector<int64_t> bounds = {0, 70, 70, 100}, counts = {33, 7, 30};
    Inputs in(1, 100, HS, K, V, dtype, bounds);
    Matrix k(in.k, dtype, 100, HS, K), v(in.v, dtype, 100, HS, V);
    const Array<float> g = floats(in.g), beta = floats(in.beta), h_kk = floats(in.h_kk), h_kv = floats(in.h_kv);
    const Array<int64_t> offsets(bounds), state_at(counts);
    Array<float> kk(h_kk.count), kv(h_kv.count);
    check(launch_state_at({{100, 3, offsets.data, K, V, false, kSegmentChunks}, k.rows, v.rows,
                           {g.data, beta.data, HS, 1}, h_kk.data, h_kv.data, state_at.data, kk.data, kv.data, HS, 1},
                          nullptr), "state_at");
    check(cudaDeviceSynchronize(), "state_at");
    // The reference ends its sequences where they are cut: what is behind that is made to change nothing.
    for (int n = 0; n < 3; ++n)
        for (int64_t t = std::min(bounds[n] + counts[n], bounds[n + 1]); t < bounds[n + 1]; ++t)
            for (int h = 0; h < HS; ++h) in.g[t * HS + h] = in.beta[t * HS + h] = 0;
    const Results expected = reference(in);
    return report(std::string("state_at ") + name(dtype) + " packed",
                  {{"h_kk", kk.doubles(), expected.h_kk}, {"h_kv", kv.doubles(), expected.h_kv}}, 1e-5);
}

bool has_hopper() {
    int device = 0, major = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    return major == 9;
}

bool test_divisors() {
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    std::mt19937 random(1);
    std::vector<int64_t> divisors = {kMost, kMost - 1};
    for (int64_t d = 1; d <= 300; ++d) divisors.push_back(d);
    for (int64_t power = 512; power < kMost; power *= 2)
        for (int64_t d : {power - 1, power, power + 1, power + int64_t(random() % power)}) divisors.push_back(d);
    for (int64_t d : divisors) {
        const Divisor divisor(d);
        for (int i = 0; i < 1000; ++i) {
            const int64_t multiple = kMost / d - (i < 100 ? i : random() % (kMost / d + 1));
            for (int64_t n : {multiple * d, multiple * d - 1, multiple * d + int64_t(random() % d)}) {
                if (n < 0 || n > kMost) continue;
                const int m = static_cast<int>(n);
                if (m / divisor == n / d && m % divisor == n % d && uint32_t(m) / divisor == uint32_t(n / d)) continue;
                std::printf("%d / %d is not %d  WRONG\n", m, int(d), m / divisor);
                return false;
            }
        }
    }
    return true;
}

// `groups`: those to run, or none for all of them.
bool test(const std::set<std::string>& groups) {
    std::set<std::string> unknown = groups;
    const auto wanted = [&](const char* group) {
        unknown.erase(group);
        return groups.empty() || groups.count(group);
    };
    bool ok = !wanted("divisors") || test_divisors();
    for (DType dtype : {DType::f16, DType::bf16, DType::f32}) {
        for (bool hopper : {false, true}) {
            if (hopper && !has_hopper()) continue;
            if (wanted("chunks")) {
                ok &= test_chunks({hopper}, 2, 150, 2, 128, 128, dtype, {});
                ok &= test_chunks({hopper}, 1, 200, 2, 64, 96, dtype, {0, 70, 70, 200});
                ok &= test_chunks({hopper}, 1, 100, 1, 37, 21, dtype, {});
                ok &= test_chunks({hopper, 1}, 1, 300, 1, 70, 30, dtype, {});
                ok &= test_chunks({hopper, 2}, 1, 700, 1, 16, 16, dtype, {0, 10, 330, 330, 700});
                ok &= test_chunks({hopper, 1}, 2, 150, 6, 37, 70, dtype, {}, 3);
                ok &= test_chunks({hopper, 1, 2}, 1, 150, 4, 70, 37, dtype, {0, 20, 150});
                ok &= test_chunks({hopper, kSegmentChunks, 2}, 2, 100, 4, 16, 64, dtype, {}, 2);
            }
            if (wanted("segments")) {
                ok &= test_in_turn(hopper, Inputs(2, 250, 2, 16, 70, dtype, {}, 2, false));
                ok &= test_in_turn(hopper, Inputs(2, 150, 2, 70, 16, dtype, {}, 1, false));
                ok &= test_in_turn(hopper, forgetful(16, 16, dtype, false), kForgetfulChunks);
                ok &= test_known_starts(hopper, 400, 70, 16, dtype, false);
                ok &= test_known_starts(hopper, 200, 16, 70, dtype, true);
                if (dtype != DType::f16) ok &= test_forgotten(hopper, dtype == DType::f32 ? 70 : 16, dtype);
            }
        }
        if (wanted("hard-rows") && dtype == DType::f32) {
            ok &= test_hard_rows(128, 128, {});
            ok &= test_hard_rows(37, 70, {0, 30, 30, 170}, 2);
        }
        if (wanted("decode")) {
            ok &= test_decode(128, 128, dtype);
            ok &= test_decode(37, 70, dtype);
            ok &= test_decode(128, 50, dtype, 6);  // more queries than are read out together
            ok &= test_decode(128, 128, dtype, 6);
            ok &= test_decode(64, 128, dtype, 2);
            ok &= test_decode(100, 36, dtype, 3);
            ok &= test_decode(50, 100, dtype, 5);
            ok &= test_decode(127, 128, dtype);
            ok &= test_decode(1, 1, dtype);
            ok &= test_decode(2, 4, dtype);
            ok &= test_decode(32, 64, dtype, 3);
            ok &= test_decode(23, 64, dtype);
            ok &= test_decode(32, 65, dtype);  // wider values than the narrow kernel takes
            ok &= test_decode(16, 128, dtype, 2);
            ok &= test_decode(16, 16, dtype, 2);
            ok &= test_decode(15, 50, dtype);
            ok &= test_decode(32, 32, dtype);
        }
        if (wanted("pieces")) {
            ok &= test_piece(3, 128, 128, dtype);
            ok &= test_piece(4, 64, 96, dtype, 1, false);
            ok &= test_piece(3, 37, 70, dtype, 2);
            ok &= test_piece(2, 128, 50, dtype, 6);
            ok &= test_piece(16, 16, 16, dtype, 5);
            ok &= test_piece(3, 30, 64, dtype, 2, false);
            ok &= test_piece(1, 100, 36, dtype, 1, false);
            ok &= test_state_at(50, 40, dtype);
        }
    }
    for (const std::string& group : unknown) {
        std::printf("there is no group '%s'  WRONG\n", group.c_str());
        ok = false;
    }
    std::printf(ok ? "all right\n" : "SOMETHING IS WRONG\n");
    return ok;
}

// ---- times ---------------------------------------------------------------------------------------------------------

float median_ms(int runs, const std::function<void()>& work) {
    cudaEvent_t start, stop;
    check(cudaEventCreate(&start), "cudaEventCreate");
    check(cudaEventCreate(&stop), "cudaEventCreate");
    std::vector<float> ms(runs);
    for (int i = -2; i < runs; ++i) {  // two to warm up
        check(cudaEventRecord(start, nullptr), "cudaEventRecord");
        work();
        check(cudaEventRecord(stop, nullptr), "cudaEventRecord");
        check(cudaEventSynchronize(stop), "the kernels");
        if (i >= 0) check(cudaEventElapsedTime(&ms[i], start, stop), "cudaEventElapsedTime");
    }
    cudaEventDestroy(start), cudaEventDestroy(stop);
    std::sort(ms.begin(), ms.end());
    return ms[runs / 2];
}

void bench(bool hopper, int B, int64_t T, int H, int K, int V, int runs, int steps) {
    std::printf("%s B=%d T=%lld H=%d K=%d V=%d, f16, median of %d\n", hopper ? "hopper" : "portable", B,
                static_cast<long long>(T), H, K, V, runs);
    Inputs in(B, T, H, K, V, DType::f16, {}, 1, false);
    const Pass pass(in, steps ? steps : 30, steps ? 0.f : 1e-3f, {hopper});
    float total = 0;
    for (const Pass::Stage& stage : Pass::stages) {
        const float ms = median_ms(runs, [&] { (pass.*stage.launch)(); });
        total += ms;
        std::printf("%-18s %8.3f ms", stage.name, ms);
        if (std::strstr(stage.name, "solve")) {
            const Vec steps = pass.steps.doubles();
            double sum = 0;
            for (double s : steps) sum += s;
            std::printf("   %.1f steps", sum / steps.size());
        }
        std::printf("\n");
    }
    std::printf("%-18s %8.3f ms\n", "sum", total);
}

}  // namespace

int main(int argc, char** argv) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("no CUDA device: nothing was run\n");
        return 77;
    }
    if (argc > 1 && std::strcmp(argv[1], "--bench") == 0) {
        const auto number = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
        for (bool hopper : {false, true})
            if (!hopper || has_hopper())
                bench(hopper, number(2, 8), number(3, 2048), number(4, 16), number(5, 128), number(6, 128),
                      number(7, 20), number(8, 0));
        return 0;
    }
    return test({argv + 1, argv + argc}) ? 0 : 1;
}
