// The kernels of kernels.h for every instruction set that they are compiled for, and the choice among them.
#pragma once

#include "types.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MESA_ISA avx512
#define MESA_TARGET __attribute__((target("avx512f,fma")))
#define MESA_VECTOR_BYTES 64
#include "kernels.h"
#define MESA_ISA avx2
#define MESA_TARGET __attribute__((target("avx2,fma")))
#define MESA_VECTOR_BYTES 32
#include "kernels.h"
#endif
#define MESA_ISA portable
#define MESA_TARGET
#define MESA_VECTOR_BYTES 16
#include "kernels.h"

namespace mesa::cpu {

template <typename T>
const Kernels<T>& choose_kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f")) return avx512::table<T>;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table<T>;
#endif
    return portable::table<T>;
}

template <typename T>
const Kernels<T>& kernels() {
    static const Kernels<T>& chosen = choose_kernels<T>();
    return chosen;
}

}  // namespace mesa::cpu
