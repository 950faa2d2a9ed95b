// The integer product of counts of spikes (Spikformer's stream), where the processor multiplies bytes (AVX2, AVX-512).
//
// Lanes are outputs. Four counts of a token meet four weights of each output at once. Sums of products wait in 16 bits for
// as long as these cannot overflow, then in 32. Nothing saturates; every sum is exact.
#pragma once
#include "shuffle_product.h"
#include "spike_lists.h"

namespace {

constexpr int kMostCount = 127;  // two products of such a count and an int8 weight fit 16 bits

#ifdef SPK_HAS_SHUFFLE
#if SPK_VECTOR_BYTES == 64
SPK_INLINE Short multiply_bytes(Int counts, Int weights) {
  return (Short)_mm512_maddubs_epi16((__m512i)counts, (__m512i)weights);
}
SPK_INLINE Int add_pairs(Short v) { return (Int)_mm512_madd_epi16((__m512i)v, _mm512_set1_epi16(1)); }
#else
SPK_INLINE Short multiply_bytes(Int counts, Int weights) {
  return (Short)_mm256_maddubs_epi16((__m256i)counts, (__m256i)weights);
}
SPK_INLINE Int add_pairs(Short v) { return (Int)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi16(1)); }
#endif

constexpr long kCountTokens = SPK_VECTOR_BYTES == 64 ? 12 : 6;  // times two vectors of outputs: sums held in registers
constexpr long kCountLine = 64;                                 // outputs whose weights stay in the first-level cache

// sums[T][2] of T tokens' counts, `pitch` bytes apart, and weights [quads][2][FL][4]. The last quad has `last` counts.
template <int T>
__attribute__((noinline)) void count_block(const uint8_t* counts, long pitch, const int8_t* weights, long quads, long last,
                                           long hold, Int* sums) {
  for (long q0 = 0; q0 < quads; q0 += hold) {
    Short held[T * 2];
#pragma GCC unroll 32
    for (int i = 0; i < T * 2; i++) held[i] = Short{};
    auto add = [&](long q, long n) SPK_INLINE_LAMBDA {
      Int w[2];
      for (int i = 0; i < 2; i++) memcpy(w + i, weights + (2 * q + i) * SPK_VECTOR_BYTES, SPK_VECTOR_BYTES);
#pragma GCC unroll 16
      for (int t = 0; t < T; t++) {
        int32_t four = 0;
        memcpy(&four, counts + t * pitch + q * 4, n);
        const Int c = four - Int{};
        held[2 * t] += multiply_bytes(c, w[0]);
        held[2 * t + 1] += multiply_bytes(c, w[1]);
        asm("" : "+v"(held[2 * t]), "+v"(held[2 * t + 1]));  // else the compiler adds in another order and spills
      }
    };
    const long end = minimum(quads, q0 + hold), full = last == 4 ? end : minimum(end, quads - 1);
    for (long q = q0; q < full; q++) add(q, 4);
    if (full < end) add(full, last);
#pragma GCC unroll 32
    for (int i = 0; i < T * 2; i++) sums[i] = q0 ? sums[i] + add_pairs(held[i]) : add_pairs(held[i]);
  }
}

// What one thread needs for a chunk of pixels over all time steps.
struct CountChunk {
  const ProductArgs& a;
  const long quads;
  long hold = 1;   // products of four that 16 bits hold the sums of
  Scratch weights;  // of a line of outputs: [SL outputs][quads][2][FL][4]
  CountChunk(const ProductArgs& a, long, long tokens)
      : a(a), quads((a.channels + 3) / 4), weights(tokens && serves(a) ? kCountLine * quads * 4 : 0) {}
  // Whether counts can be multiplied here at all, and are faster so than by lists (measured: EPYC 7003, avx2).
  static bool serves(const ProductArgs& a) { return a.counts && a.taps == 1 && a.max_count <= kMostCount; }
  static bool prefers(const CountRange& range) { return range.mean > 0.3; }

  void fill(const Pixels& p) {
    int largest = 1;
    for (long t = 0; t < p.steps; t++)
      largest = maximum(largest, CountRange(a, t * p.total + p.begin, t * p.total + p.end).largest);
    hold = 32767 / (2 * 128 * largest);
  }

  // Currents of the outputs [first, last) to rows: token (t, pixel) at out + t * step + (pixel - begin) * stride, output
  // `first` at its start. `first` is a multiple of SL.
  void multiply(const Pixels& p, long first, long last, int16_t* out, long step, long stride, bool accumulate) {
    for (long line = first; line < last; line += kCountLine) {
      const long line_end = minimum(last, line + kCountLine);
      for (long column = line; column < line_end; column += SL)
        pack(column, weights.as<int8_t>() + (column - line) * quads * 4);
      for (long t = 0; t < p.steps; t++)
        for (long m = p.begin; m < p.end; m += kCountTokens)
          with_vectors<kCountTokens>(minimum(kCountTokens, p.end - m), [&](auto n) {
            Int sums[2 * n.value];
            for (long column = line; column < line_end; column += SL) {
              const uint8_t* counts = (const uint8_t*)a.input + (t * p.total + m) * a.channels;
              count_block<n.value>(counts, a.channels, weights.as<int8_t>() + (column - line) * quads * 4, quads,
                                   a.channels - (quads - 1) * 4, hold, sums);
              for (long i = 0; i < n.value; i++)
                put_currents(a, column, minimum(SL, last - column), sums[2 * i], sums[2 * i + 1], accumulate,
                             out + t * step + (m - p.begin + i) * stride + column - first);
            }
          });
    }
  }

  // Weights [tile][C][tile width] of SL outputs to [quads][2][FL][4].
  void pack(long column, int8_t* to) const {
    const long width = Tiles(a.outputs, SL, kTileVectors).width();
    const int8_t* from = (const int8_t*)a.packed + column / width * a.channels * width + column % width;
    for (long q = 0; q < quads; q++)
      for (long part = 0; part < SL; part += 16) {
        __m128i row[4], pair[4];
        for (long i = 0; i < 4; i++) {
          const long c = q * 4 + i;
          row[i] = c < a.channels ? _mm_loadu_si128((const __m128i*)(from + c * width + part)) : _mm_setzero_si128();
        }
        for (int i = 0; i < 2; i++) {
          pair[2 * i] = _mm_unpacklo_epi8(row[2 * i], row[2 * i + 1]);
          pair[2 * i + 1] = _mm_unpackhi_epi8(row[2 * i], row[2 * i + 1]);
        }
        __m128i* out = (__m128i*)(to + (q * SL + part) * 4);
        for (int i = 0; i < 2; i++) {
          _mm_storeu_si128(out + 2 * i, _mm_unpacklo_epi16(pair[i], pair[i + 2]));
          _mm_storeu_si128(out + 2 * i + 1, _mm_unpackhi_epi16(pair[i], pair[i + 2]));
        }
      }
  }
};
#else
struct CountChunk {  // not here: lists take its place
  CountChunk(const ProductArgs&, long, long) {}
  static bool serves(const ProductArgs&) { return false; }
  static bool prefers(const CountRange&) { return false; }
  void fill(const Pixels&) {}
  void multiply(const Pixels&, long, long, int16_t*, long, long, bool) {}
};
#endif

}  // namespace
