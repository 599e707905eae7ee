// What the CPU backend and its per-instruction-set kernels share.
//
// Matrices are row-major scratch memory: rows start at multiples of 64 bytes (a line), are padded with zeros to whole
// lines, and lie an odd number of lines apart, so that a column block of a matrix product does not fall into a few
// sets of the cache.
#pragma once

#include <cstdint>
#include <utility>

#include "../cg.h"

namespace mesa {

constexpr int kChunk = 64;  // tokens of a chunk

template <typename T> constexpr int64_t kLine = 64 / sizeof(T);

// Width of a row of n numbers with its padding, and the distance between such rows.
template <typename T> int64_t padded(int64_t n) { return (n + kLine<T> - 1) / kLine<T> * kLine<T>; }
template <typename T> int64_t pitch(int64_t n) { return (padded<T>(n) / kLine<T> | 1) * kLine<T>; }

// Which part of a factor A over the tokens of a chunk is known to be zero.
enum class Part {
    all,
    lower,  // A[i,p] = 0 for p > i
    upper,  // A[i,p] = 0 for p < i
};

// A B, with A[i,p] = a[i * a_row + p * a_col], so that A may be a transpose, for p < k.
template <typename T>
struct Term {
    const T* a;
    int64_t a_row, a_col;
    const T* b;
    int64_t ldb;
    int64_t k;
    Part part = Part::all;
};

// C = mask o (row_scale o (A B) + A2 B2) + add_scale * add: a sum stays in registers until all of it is there.
template <typename T>
struct Product {
    Term<T> term;
    T* c;
    int64_t ldc;
    int64_t n;  // columns of B and C (whole lines)
    bool lower = false;  // C[i,j] is wanted for j <= i only; the rest is left undefined
    const T* row_scale = nullptr;
    Term<T> second = {};      // A2 B2
    const T* mask = nullptr;  // laid out as C; where it is 0 the result is, whatever A B
    const T* add = nullptr;   // may be C itself
    int64_t ldadd = 0;
    T add_scale = 1;
};

// The inner loops, compiled for several instruction sets. Every number of a result is summed in one fixed order, that
// depends neither on the other rows taking part nor on threads: this makes results independent of the rest of the
// batch bit for bit, and lets the solver drop finished rows.
template <typename T>
struct Kernels {
    // The given rows of C, in ascending order.
    void (*multiply)(const Product<T>& product, const int* rows, int count);
    // Scales the right-hand side r of a row; x = 0, p = r / Lambda. Returns r.p.
    T (*cg_start)(int64_t n, T scale, const T* inverse_lamb, T* p, T* x, T* r);
    // One step of the conjugate gradient for one row, given ap = (A - Lambda) p.
    void (*cg_step)(int64_t n, const T* lamb, const T* inverse_lamb, T* p, const T* ap, T* x, T* r, CgRow<T>& row,
                    T tol2);
    T (*dot)(int64_t n, const T* a, const T* b);
    double (*wide_dot)(int64_t n, const T* a, const T* b);  // summed in float64
    // Of the magnitudes; NaN counts as nothing.
    T (*largest)(int64_t n, const T* a);
    // to = factor * from, anywhere and of any width; both may be the same.
    void (*scale)(int64_t n, T factor, const T* from, T* to);
    // to[j,i] = from[i,j], rows of both on lines.
    void (*transpose)(const T* from, int64_t ldfrom, int64_t rows, int64_t columns, T* to, int64_t ldto);
    // L[i,j] = product of decay over j < t <= i, 0 above the diagonal, and M[i,j] = L[i,j] beta_j, [kChunk, kChunk].
    void (*decays)(const double* decay, const T* beta, int64_t ld, T* l, T* m);
    // inside += keys * residuals * mask in float64, then keys and residuals *= decay.
    void (*weigh_scores)(int64_t n, const T* decay, const T* mask, T* keys, T* residuals, double* inside);
    void (*add_products)(int64_t n, const T* a, const T* b, T* sum);  // sum += a b
    // to = factor * (a + b), anywhere and of any width; `to` may be a or b.
    void (*scaled_sum)(int64_t n, T factor, const T* a, const T* b, T* to);
};

}  // namespace mesa
