// The scalar rules of the preconditioned conjugate gradient, for one right-hand side.
//
// Every solver of the package (chunked CUDA, decode CUDA, CPU) keeps one CgRow per token and head and differs only in
// how it forms A p and the dot products. The vectors are, with z = r / lamb:
//
//     x = 0, r = b, p = z;   CgRow row(r.z)
//     per step:  a = row.alpha(p.Ap);  x += a p;  r -= a Ap;  b = row.advance(r.z, tol^2);  p = z + b p
//
// A row that is done gets a = b = 0 from then on, so that it does not change while the rows beside it go on. Callers
// scale b by a power of two so that its largest element is near 1: the squares below then neither overflow nor vanish.
#pragma once

#if defined(__CUDACC__)
#define MESA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MESA_HOST_DEVICE inline
#endif

namespace mesa {

// r.z below this fraction of its first value is rounding noise: further steps would only move x inside its own error.
template <typename T> MESA_HOST_DEVICE T cg_noise_floor();
template <> MESA_HOST_DEVICE float cg_noise_floor<float>() { return 1e-22f; }
template <> MESA_HOST_DEVICE double cg_noise_floor<double>() { return 1e-40; }

// On a GPU without the slow path for quotients near the ends of the range, which the callers' scaling rules out.
template <typename T>
MESA_HOST_DEVICE T cg_divide(T a, T b) {
#if defined(__CUDA_ARCH__)
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

// Where float32 is not enough (see refine.cu and cpu/solve.h): the condition number from which on a system is solved a
// second time for a correction of x, and the tolerance for that, which is small beside x.
constexpr float kHardCondition = 256.f, kCorrectionTolerance = 1e-2f;

template <typename T>
struct CgRow {
    T rz;       // r.z, an upper bound of the squared error of x in the Lambda norm, since A >= Lambda
    T rz_stop;  // noise floor for r.z
    T pp;       // p.Lambda p    } kept by recurrence (exact while r_{k+1}.p_k = 0, as in Steihaug's method),
    T xp;       // x.Lambda p    } so that the stopping rule costs no reduction
    T xx;       // x.Lambda x, which grows from step to step
    T step;     // length of the step under way
    int progress;  // steps taken, or the complement of their number once the row has ended

    CgRow() = default;

    // A NaN must come out as NaN, not as a silent zero: only a right-hand side that is exactly zero is done at once.
    MESA_HOST_DEVICE explicit CgRow(T first_rz)
        : rz(first_rz), rz_stop(cg_noise_floor<T>() * first_rz), pp(first_rz), xp(0), xx(0), step(0),
          progress(first_rz == T(0) ? ~0 : 0) {}

    MESA_HOST_DEVICE bool active() const { return progress >= 0; }
    MESA_HOST_DEVICE int steps() const { return active() ? progress : ~progress; }

    // Step length along p; a direction without positive curvature (rounding noise) ends the row instead.
    MESA_HOST_DEVICE T alpha(T pAp) {
        if (pAp <= T(0) && active()) progress = ~progress;
        step = active() ? cg_divide(rz, pAp) : T(0);
        return step;
    }

    // Takes the new r.z after the step; returns beta. The row ends once |error|_Lambda <= tol |x|_Lambda is certain.
    MESA_HOST_DEVICE T advance(T new_rz, T tol_squared) {
        if (!active()) return T(0);
        xx += step * (T(2) * xp + step * pp);
        const T beta = cg_divide(new_rz, rz);
        xp = beta * (xp + step * pp);
        pp = new_rz + beta * beta * pp;
        rz = new_rz;
        ++progress;
        if (rz > tol_squared * xx && rz > rz_stop) return beta;
        progress = ~progress;  // for NaN, too
        return T(0);
    }

    // Square of the guaranteed relative error of x in the Lambda norm.
    MESA_HOST_DEVICE T bound_squared() const { return rz == T(0) ? T(0) : rz / xx; }
};

}  // namespace mesa
