// Division by a number that is known before the launch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cg.h"

namespace mesa {

// Divides numbers from 0 to 2^31 - 1 in three instructions instead of twenty: n / d = n factor / 2^(31 + shift), with
// 2^shift >= d and factor = 2^(31 + shift) / d rounded up, which adds less than n / 2^(31 + shift) < 1 / d.
class Divisor {
  public:
    Divisor(int64_t value = 1) : value_(static_cast<int>(value)), shift_(0) {
        const uint64_t d = value < 1 ? 1 : value;  // nothing is divided by none
        while (d > uint64_t(1) << shift_) ++shift_;
        factor_ = static_cast<uint32_t>(((uint64_t(1) << (31 + shift_)) + d - 1) / d);
    }

    MESA_HOST_DEVICE int value() const { return value_; }

    template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
    friend MESA_HOST_DEVICE T operator/(T n, const Divisor& d) {
        return static_cast<T>((uint64_t(static_cast<uint32_t>(n) * 2u) * d.factor_ >> 32) >> d.shift_);
    }
    template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
    friend MESA_HOST_DEVICE T operator%(T n, const Divisor& d) {
        return n - n / d * static_cast<T>(d.value_);
    }

  private:
    int value_, shift_;
    uint32_t factor_;
};

}  // namespace mesa
