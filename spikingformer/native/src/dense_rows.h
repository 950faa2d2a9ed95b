// The inner loop of the dense products: rows of numbers times two vectors, summed in registers.
#pragma once
#include "common.h"

namespace {

constexpr long kDenseWidth = 2 * Float::lanes;  // numbers of the result at once

// sums[r] += value(r, i) * vectors(i) over i < count, with value(r, i) at values[r * row_step + i * step].
template <long rows>
SPK_INLINE void add_products(Float::Vector (*sums)[2], const float* values, long row_step, long step, const float* vectors,
                             long vector_step, long count) {
  for (long i = 0; i < count; i++) {
    const Float::Vector left = load<Float>(vectors + i * vector_step);
    const Float::Vector right = load<Float>(vectors + i * vector_step + Float::lanes);
#pragma GCC unroll 12
    for (long r = 0; r < rows; r++) {
      const Float::Vector value = splat<Float>(values[r * row_step + i * step]);
      sums[r][0] = multiply_add(value, left, sums[r][0]);
      sums[r][1] = multiply_add(value, right, sums[r][1]);
    }
  }
}

}  // namespace
