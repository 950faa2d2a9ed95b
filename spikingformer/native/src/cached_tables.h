// Sums of subsets of four rows of weights, tabulated in the first-level cache: one addition for four inputs.
#pragma once
#include "spike_lists.h"

namespace {

// What tables read: bits [tokens from the piece's `first`][words], `per` of them a channel.
struct TableInputs {
  const uint64_t* bits;
  long per;
};

// Groups of four inputs whose tables fit the first-level cache together: a power of two, at most 16 (64 bits).
template <int NV> constexpr long table_groups() {
  const long fit = kBlockBytes / (16 * NV * SPK_VECTOR_BYTES);
  return fit >= 16 ? 16 : fit >= 8 ? 8 : fit >= 4 ? 4 : 2;
}

// table[group][subset][NV] = sum of the subset's rows; vector_of(i, j): vector j of row i, zeros past the last row.
template <int NV, class Vector, class F> SPK_INLINE void make_tables(long groups, F&& vector_of, Vector* table) {
  for (long g = 0; g < groups; g++)
    for (int j = 0; j < NV; j++) {
      Vector sums[16];
      sums[0] = Vector{};
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const Vector v = vector_of(g * 4 + i, j);
#pragma GCC unroll 8
        for (int k = 0; k < (1 << i); k++) sums[k + (1 << i)] = sums[k] + v;
      }
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) table[(g * 16 + k) * NV + j] = sums[k];
    }
}

template <int NV, class Vector> SPK_INLINE void add_table_rows(Vector* sums, const Vector* table, uint64_t bits, long groups) {
  constexpr long G = table_groups<NV>();
  Vector acc[NV];
  for (int j = 0; j < NV; j++) acc[j] = sums[j];
  auto add = [&](long g) SPK_INLINE_LAMBDA {
    const Vector* row = table + (g * 16 + ((bits >> (4 * g)) & 15)) * NV;
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) acc[j] += row[j];
  };
  if (groups == G) {  // a count that the compiler knows, so that it unrolls
#pragma GCC unroll 16
    for (long g = 0; g < G; g++) add(g);
  } else {
    for (long g = 0; g < groups; g++) add(g);
  }
  for (int j = 0; j < NV; j++) sums[j] = acc[j];
}

// pass(tap, groups, first, last, bits): every block of inputs of a tile once, its tables made by make(tap, c0, groups);
// bits(source) are the spikes of the block's inputs at a token.
template <int NV, class Make, class Pass>
SPK_INLINE void for_each_table(const ProductPiece& p, const TableInputs& in, Make&& make, Pass&& pass) {
  constexpr long step = table_groups<NV>() * 4;
  const long inputs = p.a.channels * in.per, words = words_of(inputs);
  const uint64_t* bits = in.bits - p.first * words;
  for (long tap = 0; tap < p.a.taps; tap++)
    for (long c0 = 0; c0 < inputs; c0 += step) {
      const long here = minimum(step, inputs - c0), groups = (here + 3) / 4;
      make(tap, c0, groups);
      pass(tap, groups, tap == 0 && c0 == 0, tap + 1 == p.a.taps && c0 + step >= inputs,
           [=](long source) SPK_INLINE_LAMBDA { return cut(bits + source * words, c0, here); });
    }
}

}  // namespace
