// The states along the sequences: each from the one before it, with the chunk's work done where the state is at hand.
#pragma once

#include <atomic>

#include "chunks.h"

namespace mesa::cpu {

// Calls body(i) for all i < count, handed out one after another; make_body makes a body for each thread.
template <typename MakeBody>
void for_each_task(int64_t count, const MakeBody& make_body) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
        auto body = make_body();
        for (int64_t i; (i = next++) < count;) body(i);
    });
}

// Consecutive chunks of a sequence, worked through in order, forwards or backwards.
struct Segment {
    int64_t sequence;
    int64_t begin, end;  // chunk numbers; none in an empty sequence
};

// Whole sequences if they give all threads the same work, else parts of them, so that each thread gets several. States
// that parts start from cost an extra pass over the states. No result depends on where the cuts are.
struct Segments {
    std::vector<Segment> list;
    std::vector<int64_t> first;  // [N + 1] first segment of each sequence

    Segments(const ProblemSize& p, const Layout& layout, bool equal) {
        constexpr int64_t kPerThread = 4;
        const int64_t threads = at::get_num_threads(), chunks = layout.chunks.size();
        const bool whole = equal && p.N * p.HS % threads == 0;
        const int64_t longest = whole ? chunks : chunks * p.HS / (threads * kPerThread);
        for (int64_t n = 0; n < p.N; ++n) {
            first.push_back(list.size());
            int64_t begin = layout.first[n];
            do {
                const int64_t end = std::min(layout.first[n + 1], begin + std::max<int64_t>(1, longest));
                list.push_back({n, begin, end});
                begin = end;
            } while (begin < layout.first[n + 1]);
        }
        first.push_back(list.size());
    }
};

// States [slot, state head, K, G | H].
template <typename T>
struct States {
    const ProblemSize& p;
    Tensor memory;

    States(const ProblemSize& p, int64_t slots, const at::TensorOptions& options)
        : p(p), memory(at::empty({slots * p.HS * p.K, ld()}, options)) {}

    int64_t ld() const { return pitch<T>(padded<T>(p.V) + p.K); }
    View<T> at(int64_t slot, int64_t head) const {
        return {memory.data_ptr<T>() + (slot * p.HS + head) * p.K * ld(), ld()};
    }
};

// One part of a joint state, G or H.
template <typename T>
struct ScanPart {
    Heads<T> values;
    T sign;           // of the values
    const T* start;   // [N, HS, K, width] where the scan starts, or null for zeros
    T* end;           // and where it ends, or null if not wanted
    bool transposed;  // both are stored as transposes
};

// S = total S + sum_t weight_t a_t values_t' over the chunks of every sequence. Forwards these are the states, with
// weights from the token to the end of the chunk, times beta; backwards they are the adjoints, with weights from the
// beginning of the chunk to the token.
template <typename T>
struct Scan {
    const ProblemSize& p;
    const Layout& layout;
    const Segments& segments;
    Heads<T> g, beta, a;
    ScanPart<T> parts[2];
    bool backwards;

    // Calls body(segment number, chunk number, head, goes on) in the order of the chunks. The state that a segment
    // starts from is at place(segment number, head), and where one is wanted at the end it is taken from there; without
    // "goes on" nobody wants the state behind the chunk. make_body makes a body for each thread.
    template <typename Place, typename MakeBody>
    void run(const Place& place, const MakeBody& make_body) const {
        start_segments(place);
        for_each_task(segments.list.size() * p.HS, [&] {
            return [&, body = make_body()](int64_t task) mutable {
                const int64_t number = task / p.HS, head = task % p.HS;
                const Segment& segment = segments.list[number];
                const bool ends = is_last(segment) && (parts[0].end || parts[1].end);
                for (int64_t i = 0; i < segment.end - segment.begin; ++i)
                    body(number, backwards ? segment.end - 1 - i : segment.begin + i, head,
                         ends || i + 1 < segment.end - segment.begin);
                if (ends) finish(segment.sequence, head, place(number, head));
            };
        });
    }

   private:
    int64_t width(int part) const { return part ? p.K : p.V; }
    View<T> view(View<T> state, int part) const { return state.columns_from(part ? padded<T>(p.V) : 0); }

    // Where the part of a state is stored outside.
    int64_t stored(int64_t sequence, int64_t head, int part, int64_t i, int64_t j) const {
        const int64_t n = width(part);
        return (sequence * p.HS + head) * p.K * n + (parts[part].transposed ? j * n + i : i * n + j);
    }

    void start(int64_t sequence, int64_t head, int part, View<T> to) const {
        for (int64_t i = 0; i < p.K; ++i) {
            std::fill_n(to.row(i), padded<T>(width(part)), T(0));
            if (!parts[part].start) continue;
            for (int64_t j = 0; j < width(part); ++j)
                to.row(i)[j] = parts[part].start[stored(sequence, head, part, i, j)];
        }
    }

    // On the way through its sequence.
    bool is_last(const Segment& segment) const {
        const int64_t n = segment.sequence;
        return backwards ? segment.begin == layout.first[n] : segment.end == layout.first[n + 1];
    }

    // Stores the state at the end of sequence n.
    void finish(int64_t n, int64_t head, View<T> state) const {
        for (int part = 0; part < 2; ++part) {
            if (!parts[part].end) continue;
            const View<T> from = view(state, part);
            for (int64_t i = 0; i < p.K; ++i)
                for (int64_t j = 0; j < width(part); ++j)
                    parts[part].end[stored(n, head, part, i, j)] = from.row(i)[j];
        }
    }

    // Writes the state that every segment starts from to its place.
    template <typename Place>
    void start_segments(const Place& place) const {
        for_each_task(p.N * p.HS * 2, [&] {
            return [&, rows = row_numbers(p.K), weighted = Matrix<T>(kChunk, p.K),
                    values = Matrix<T>(kChunk, std::max(p.K, p.V)), gates = Gates<T>()](int64_t task) mutable {
                const int64_t n = task / (p.HS * 2), head = task / 2 % p.HS;
                const int part = task % 2;
                const int64_t count = segments.first[n + 1] - segments.first[n];
                // An empty sequence has a final state but no chunks, and where states lie by chunks no place.
                if (layout.first[n] == layout.first[n + 1] && !parts[part].end) return;
                const auto number = [&](int64_t i) {  // of the i-th segment on the way
                    return backwards ? segments.first[n + 1] - 1 - i : segments.first[n] + i;
                };
                View<T> state = view(place(number(0), head), part);
                start(n, head, part, state);
                for (int64_t i = 1; i < count; ++i) {
                    const View<T> next = view(place(number(i), head), part);
                    const Segment& segment = segments.list[number(i - 1)];
                    for (int64_t c = 0; c < segment.end - segment.begin; ++c, state = next) {
                        const Chunk chunk = layout.chunks[backwards ? segment.end - 1 - c : segment.begin + c];
                        gates.load(g, beta, chunk, head);
                        add_chunk(chunk, head, part, gates, state, next, weighted, values, rows);
                    }
                }
            };
        });
    }

    void add_chunk(Chunk chunk, int64_t head, int part, const Gates<T>& gates, View<T> before, View<T> after,
                   View<T> weighted, View<T> values, const std::vector<int>& rows) const {
        const auto& kernel = kernels<T>();
        const int64_t n = width(part);
        for (int64_t h = 0; h < std::max<int64_t>(1, a.heads / p.HS); ++h) {
            const int64_t a_head = a.of_state(p, head, h), value_head = parts[part].values.of_state(p, head, h);
            for (int t = 0; t < chunk.count; ++t) {
                kernel.scale(n, parts[part].sign, parts[part].values.at(chunk.token + t, value_head), values.row(t));
                std::fill(values.row(t) + n, values.row(t) + padded<T>(n), T(0));
            }
            const View<T> keys = a.rows(chunk.token, a_head);
            if (backwards) {
                for (int t = 0; t < chunk.count; ++t) kernel.scale(p.K, gates.in[t], keys.row(t), weighted.row(t));
                advance_state<T>(weighted, values, chunk.count, h ? T(1) : gates.total, h ? after : before, after,
                                 padded<T>(n), rows);
                continue;
            }
            const int tokens = part ? part_tokens<T>(p.K) : kChunk;  // as the solver makes it
            for (int first = 0; first < chunk.count; first += tokens)
                add_tokens<T>(gates, first, std::min(first + tokens, chunk.count), keys.rows_from(first),
                              values.rows_from(first), first ? after : before, after, padded<T>(n), weighted, rows);
        }
    }
};

}  // namespace mesa::cpu
