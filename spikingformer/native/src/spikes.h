// Spikes as 64-bit words, lists of the places that fired, and the one inner loop of every spike product:
// add one row of weights for each spike.
#pragma once
#include "common.h"

namespace {

SPK_INLINE long words_of(long channels) { return (channels + 63) / 64; }

// One bit a lane of v >= 0 style masks: the lanes' signs, lane 0 in bit 0.
SPK_INLINE uint32_t lane_bits(Float::Integer mask) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__x86_64__)
  return (uint32_t)_mm_movemask_ps((__m128)(Float::Vector)mask);
#else
  uint32_t bits = 0;
  for (long i = 0; i < Float::lanes; i++) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}

// Appends the places of ones in `word` (plus base) to `list` and returns the new end. May write 16 places too far.
SPK_INLINE uint16_t* list_ones(uint64_t word, uint32_t base, uint16_t* list) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  while (word) {
    long skip = __builtin_ctzll(word) & ~15l;
    uint32_t m = (word >> skip) & 0xffff;
    __m512i places = _mm512_maskz_compress_epi32(m, _mm512_add_epi32(iota, _mm512_set1_epi32(base + skip)));
    _mm256_storeu_si256((__m256i*)list, _mm512_cvtepi32_epi16(places));
    list += __builtin_popcount(m);
    word &= skip == 48 ? 0 : ~0ull << (skip + 16);
  }
  return list;
#else
  while (word) {
    *list++ = (uint16_t)(base + __builtin_ctzll(word));
    word &= word - 1;
  }
  return list;
#endif
}
constexpr long kListSlack = 32;

// n <= 64 bits of a row of words, from any place.
SPK_INLINE uint64_t cut(const uint64_t* row, long bit, long n) {
  const long w = bit / 64, s = bit % 64;
  uint64_t v = row[w] >> s;
  if (s && s + n > 64) v |= row[w + 1] << (64 - s);
  return n == 64 ? v : v & ((1ull << n) - 1);
}

// sums[0..NV) += sum over the list of rows[place], NV vectors each
template <int NV, class Vector, class Scalar>
SPK_INLINE void add_rows(Vector* sums, const Scalar* rows, const uint16_t* list, long count) {
  constexpr long L = sizeof(Vector) / sizeof(Scalar);
  Vector acc[NV];  // locals: through the caller's reference they would live in memory, at four times the cost
  for (int j = 0; j < NV; j++) acc[j] = sums[j];
  for (const uint16_t* end = list + count; list < end; list++) {
    const Scalar* row = rows + (size_t)*list * (NV * L);
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) {
      Vector v;
      memcpy(&v, row + j * L, sizeof v);
      acc[j] += v;
    }
  }
  for (int j = 0; j < NV; j++) sums[j] = acc[j];
}

// Outputs are cut in tiles of equal width, at most `most` vectors: the sums of a tile stay in registers.
constexpr int kMaxVectors = 12;
struct Tiles {
  long count, vectors, lanes;  // tiles, vectors in each, outputs in a vector
  explicit Tiles(long outputs, long lanes = Float::lanes, long most = kMaxVectors) : lanes(lanes) {
    long all = (outputs + lanes - 1) / lanes;
    count = maximum(1, (all + most - 1) / most);
    vectors = maximum(1, (all + count - 1) / count);
  }
  long width() const { return vectors * lanes; }
};
// Turns 1 <= vectors <= most into a compile-time constant.
template <int most, class F> SPK_INLINE void with_vectors(long vectors, F&& f) {
  if constexpr (most > 1)
    if (vectors < most) return with_vectors<most - 1>(vectors, f);
  f(IntConstant<most>{});
}

template <int NV> SPK_INLINE void load_tile(Float::Vector* acc, const float* p, long width) {
  constexpr long L = Float::lanes;
  if (width == NV * L) {
    for (int j = 0; j < NV; j++) acc[j] = load<Float>(p + j * L);
  } else {
    for (int j = 0; j < NV; j++) {
      long m = minimum(L, width - j * L);
      acc[j] = m > 0 ? load_part<Float>(p + j * L, m) : Float::Vector{};
    }
  }
}
template <int NV> SPK_INLINE void store_tile(float* p, const Float::Vector* acc, long width) {
  constexpr long L = Float::lanes;
  if (width == NV * L) {
    for (int j = 0; j < NV; j++) store<Float>(p + j * L, acc[j]);
  } else {
    for (int j = 0; j < NV; j++) {
      long m = minimum(L, width - j * L);
      if (m > 0) store_part<Float>(p + j * L, acc[j], m);
    }
  }
}

}  // namespace
