// Inner loops of the CPU backend for one instruction set. Included once for each of them with
//   MESA_ISA           namespace of the result
//   MESA_TARGET        function attribute that selects the instructions
//   MESA_VECTOR_BYTES  width of a register; a line holds a whole number of them
// No lambdas and no library functions here: they would not inherit MESA_TARGET.

namespace mesa {
namespace MESA_ISA {

template <typename T>
struct VectorOf {
    typedef T type __attribute__((vector_size(MESA_VECTOR_BYTES), may_alias));
    static constexpr int width = MESA_VECTOR_BYTES / sizeof(T);
};

// sum += A B for R rows by NV registers.
template <typename T, int R, int NV>
MESA_TARGET __attribute__((always_inline)) inline void add_term(const Term<T>& term, const int* rows, int64_t column,
                                                                typename VectorOf<T>::type (&sum)[R][NV]) {
    using V = typename VectorOf<T>::type;
    constexpr int W = VectorOf<T>::width;
    const int64_t past_last = rows[R - 1] + 1;
    const int64_t k0 = term.part == Part::upper ? rows[0] : 0;
    const int64_t k1 = term.part == Part::lower && past_last < term.k ? past_last : term.k;
    const T* a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = term.a + rows[r] * term.a_row;
    const T* b = term.b + k0 * term.ldb + column;
    int64_t offset = k0 * term.a_col;
#pragma GCC unroll 4
    for (int64_t p = k0; p < k1; ++p, b += term.ldb, offset += term.a_col) {
        V bv[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) bv[v] = *reinterpret_cast<const V*>(b + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[r][v] += a[r][offset] * bv[v];
    }
}

// R rows by NV registers of a product.
template <typename T, int R, int NV>
MESA_TARGET void multiply_tile(const Product<T>& m, const int* rows, int64_t column) {
    using V = typename VectorOf<T>::type;
    constexpr int W = VectorOf<T>::width;
    V sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[r][v] = V{};
    if (m.add) {  // on its way while the sums are formed
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) __builtin_prefetch(m.add + rows[r] * m.ldadd + column + v * W);
    }
    add_term<T, R, NV>(m.term, rows, column, sum);
    if (m.row_scale) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[r][v] *= m.row_scale[rows[r]];
    }
    if (m.second.a) add_term<T, R, NV>(m.second, rows, column, sum);
    if (m.mask) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {  // a select, so that nothing of a later token passes, not even NaN
                const V mask = *reinterpret_cast<const V*>(m.mask + rows[r] * m.ldc + column + v * W);
                sum[r][v] = mask != 0 ? sum[r][v] * mask : V{};
            }
    }
    if (m.add) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v)
                sum[r][v] += m.add_scale * *reinterpret_cast<const V*>(m.add + rows[r] * m.ldadd + column + v * W);
    }
    T* c[R];  // all before the first store, after which nothing is known to be as it was
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) c[r] = m.c + rows[r] * m.ldc + column;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) *reinterpret_cast<V*>(c[r] + v * W) = sum[r][v];
}

// Rows in tiles of R, for a stripe of NV registers that stays in the first-level cache.
template <typename T, int R, int NV>
MESA_TARGET int multiply_rows(const Product<T>& m, const int* rows, int count, int64_t column) {
    int i = 0;
    for (; i + R <= count; i += R) {
        // Whole registers above the diagonal are left out.
        const int64_t wanted = m.lower ? (rows[i + R - 1] - column + VectorOf<T>::width) / VectorOf<T>::width : NV;
        if (wanted >= NV)
            multiply_tile<T, R, NV>(m, rows + i, column);
        else if (NV > 2 && wanted == 2)
            multiply_tile<T, R, 2>(m, rows + i, column);
        else if (NV > 1 && wanted == 1)
            multiply_tile<T, R, 1>(m, rows + i, column);
    }
    return i;
}

constexpr int kTallest = MESA_VECTOR_BYTES == 64 ? 8 : 6;  // so that sums fit 32 registers, or 16
constexpr int kWidest = MESA_VECTOR_BYTES == 64 ? 3 : 2;

template <typename T, int NV>
MESA_TARGET void multiply_stripe(const Product<T>& m, const int* rows, int count, int64_t column) {
    int i = multiply_rows<T, kTallest, NV>(m, rows, count, column);
    i += multiply_rows<T, 4, NV>(m, rows + i, count - i, column);
    i += multiply_rows<T, 2, NV>(m, rows + i, count - i, column);
    multiply_rows<T, 1, NV>(m, rows + i, count - i, column);
}

template <typename T>
MESA_TARGET void multiply(const Product<T>& m, const int* rows, int count) {
    constexpr int W = VectorOf<T>::width;
    int64_t column = 0;
    if (count == 1 && !m.lower) {  // wide, to hide the latency of the additions
        for (; column + 8 * W <= m.n; column += 8 * W) multiply_rows<T, 1, 8>(m, rows, count, column);
    }
    if (kWidest == 3) {  // but two stripes of 2 rather than one of 3 and one of 1
        for (; column + 3 * W <= m.n && column + 4 * W != m.n; column += 3 * W)
            multiply_stripe<T, kWidest>(m, rows, count, column);
    }
    for (; column + 2 * W <= m.n; column += 2 * W) multiply_stripe<T, 2>(m, rows, count, column);
    if (column < m.n) multiply_stripe<T, 1>(m, rows, count, column);
}

template <typename T>
MESA_TARGET T sum_lanes(const T* lanes) {
    T sum[VectorOf<T>::width];
#pragma GCC unroll 16
    for (int i = 0; i < VectorOf<T>::width; ++i) sum[i] = lanes[i];
#pragma GCC unroll 4
    for (int half = VectorOf<T>::width / 2; half > 0; half /= 2)  // by halves: a chain of additions would be waited for
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    return sum[0];
}

template <typename T>
MESA_TARGET T dot(int64_t n, const T* a, const T* b) {
    using V = typename VectorOf<T>::type;
    V sum = V{};
    for (int64_t i = 0; i < n; i += VectorOf<T>::width)
        sum += *reinterpret_cast<const V*>(a + i) * *reinterpret_cast<const V*>(b + i);
    return sum_lanes<T>(reinterpret_cast<const T*>(&sum));
}

template <typename T>
MESA_TARGET double wide_dot(int64_t n, const T* a, const T* b) {
    using V = typename VectorOf<double>::type;
    constexpr int W = VectorOf<double>::width, kSums = kLine<T> / W;  // several: one chain would be waited for
    typedef T Narrow __attribute__((vector_size(W * sizeof(T)), may_alias));
    V sum[kSums] = {};
    for (int64_t i = 0; i < n; i += kLine<T>)
#pragma GCC unroll 8
        for (int s = 0; s < kSums; ++s)
            sum[s] += __builtin_convertvector(*reinterpret_cast<const Narrow*>(a + i + s * W), V) *
                      __builtin_convertvector(*reinterpret_cast<const Narrow*>(b + i + s * W), V);
#pragma GCC unroll 8
    for (int s = 1; s < kSums; ++s) sum[0] += sum[s];
    return sum_lanes<double>(reinterpret_cast<const double*>(&sum[0]));
}

template <typename T>
MESA_TARGET void cg_step(int64_t n, const T* lamb, const T* inverse_lamb, T* p, const T* ap, T* x, T* r,
                         CgRow<T>& row, T tol2) {
    using V = typename VectorOf<T>::type;
    constexpr int W = VectorOf<T>::width;
    V sum = V{};
    for (int64_t i = 0; i < n; i += W) {
        const V pv = *reinterpret_cast<const V*>(p + i);
        const V v = *reinterpret_cast<const V*>(ap + i) + pv * *reinterpret_cast<const V*>(lamb + i);
        sum += pv * v;
    }
    const T alpha = row.alpha(sum_lanes<T>(reinterpret_cast<const T*>(&sum)));
    sum = V{};
    for (int64_t i = 0; i < n; i += W) {
        const V pv = *reinterpret_cast<const V*>(p + i);
        const V v = *reinterpret_cast<const V*>(ap + i) + pv * *reinterpret_cast<const V*>(lamb + i);
        *reinterpret_cast<V*>(x + i) += alpha * pv;
        const V rv = *reinterpret_cast<const V*>(r + i) - alpha * v;
        *reinterpret_cast<V*>(r + i) = rv;
        sum += rv * (rv * *reinterpret_cast<const V*>(inverse_lamb + i));
    }
    const T beta = row.advance(sum_lanes<T>(reinterpret_cast<const T*>(&sum)), tol2);
    for (int64_t i = 0; i < n; i += W) {
        V& pv = *reinterpret_cast<V*>(p + i);
        pv = *reinterpret_cast<const V*>(r + i) * *reinterpret_cast<const V*>(inverse_lamb + i) + beta * pv;
    }
}

template <typename T>
MESA_TARGET T largest(int64_t n, const T* a) {
    using V = typename VectorOf<T>::type;
    V result = V{};
    for (int64_t i = 0; i < n; i += VectorOf<T>::width) {
        const V v = *reinterpret_cast<const V*>(a + i);
        result = v > result ? v : result;
        result = -v > result ? -v : result;
    }
    T most[VectorOf<T>::width];
#pragma GCC unroll 16
    for (int i = 0; i < VectorOf<T>::width; ++i) most[i] = result[i];
#pragma GCC unroll 4
    for (int half = VectorOf<T>::width / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) most[i] = most[i] > most[i + half] ? most[i] : most[i + half];
    return most[0];
}

template <typename T>
MESA_TARGET T cg_start(int64_t n, T scale, const T* inverse_lamb, T* p, T* x, T* r) {
    for (int64_t i = 0; i < n; ++i) {
        r[i] *= scale;
        p[i] = r[i] * inverse_lamb[i];
        x[i] = 0;
    }
    return dot(n, r, p);
}

template <typename T>
MESA_TARGET void scale(int64_t n, T factor, const T* from, T* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = factor * from[i];
}

// Exchanges the upper right and lower left quarters of all squares of 2 S by 2 S in a square of registers, two of whose
// rows are given.
template <int S, typename V, int... lane>
MESA_TARGET __attribute__((always_inline)) inline void swap_quarters(V& upper, V& lower,
                                                                     std::integer_sequence<int, lane...>) {
    constexpr int W = sizeof...(lane);
    const V before = upper;
#ifdef __clang__
    upper = __builtin_shufflevector(before, lower, (lane & S ? W + lane - S : lane)...);
    lower = __builtin_shufflevector(before, lower, (lane & S ? W + lane : lane + S)...);
#else
    typedef decltype(before < before) Lanes;
    upper = __builtin_shuffle(before, lower, Lanes{(lane & S ? W + lane - S : lane)...});
    lower = __builtin_shuffle(before, lower, Lanes{(lane & S ? W + lane : lane + S)...});
#endif
}

template <typename T, int S>
MESA_TARGET __attribute__((always_inline)) inline void swap_all_quarters(typename VectorOf<T>::type* square) {
    constexpr int W = VectorOf<T>::width;
    if constexpr (S < W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
            if (!(i & S)) swap_quarters<S>(square[i], square[i + S], std::make_integer_sequence<int, W>());
        swap_all_quarters<T, 2 * S>(square);
    }
}

template <typename T>
MESA_TARGET void transpose(const T* from, int64_t ldfrom, int64_t rows, int64_t columns, T* to, int64_t ldto) {
    using V = typename VectorOf<T>::type;
    constexpr int W = VectorOf<T>::width;
    for (int64_t i = 0; i < rows; i += W)
        for (int64_t j = 0; j < columns; j += W) {
            if (i + W > rows || j + W > columns) {
                for (int64_t b = j; b < columns && b < j + W; ++b)
                    for (int64_t a = i; a < rows && a < i + W; ++a) to[b * ldto + a] = from[a * ldfrom + b];
                continue;
            }
            V square[W];
#pragma GCC unroll 16
            for (int a = 0; a < W; ++a) square[a] = *reinterpret_cast<const V*>(from + (i + a) * ldfrom + j);
            swap_all_quarters<T, 1>(square);
#pragma GCC unroll 16
            for (int b = 0; b < W; ++b) *reinterpret_cast<V*>(to + (j + b) * ldto + i) = square[b];
        }
}

template <typename T>
MESA_TARGET void decays(const double* decay, const T* beta, int64_t ld, T* l, T* m) {
    double row[kChunk] = {};
    for (int i = 0; i < kChunk; ++i, l += ld, m += ld) {
        for (int j = 0; j < i; ++j) row[j] *= decay[i];
        row[i] = 1;
        for (int j = 0; j < kChunk; ++j) {
            l[j] = static_cast<T>(row[j]);
            m[j] = l[j] * beta[j];
        }
    }
}

template <typename T>
MESA_TARGET void add_products(int64_t n, const T* a, const T* b, T* sum) {
    for (int64_t j = 0; j < n; ++j) sum[j] += a[j] * b[j];
}

template <typename T>
MESA_TARGET void weigh_scores(int64_t n, const T* decay, const T* mask, T* keys, T* residuals, double* inside) {
    for (int64_t j = 0; j < n; ++j) {
        inside[j] += static_cast<double>(keys[j]) * residuals[j] * mask[j];
        keys[j] *= decay[j];
        residuals[j] *= decay[j];
    }
}

template <typename T>
MESA_TARGET void scaled_sum(int64_t n, T factor, const T* a, const T* b, T* to) {
    for (int64_t j = 0; j < n; ++j) to[j] = factor * (a[j] + b[j]);
}

template <typename T>
constexpr Kernels<T> table{multiply<T>, cg_start<T>,  cg_step<T>, dot<T>,          wide_dot<T>,    largest<T>,
                           scale<T>,    transpose<T>, decays<T>,  weigh_scores<T>, add_products<T>, scaled_sum<T>};

}  // namespace MESA_ISA
}  // namespace mesa

#undef MESA_ISA
#undef MESA_TARGET
#undef MESA_VECTOR_BYTES
