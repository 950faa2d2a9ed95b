// The float32 product by tables in registers (register_tables.h). Sums are of 32-bit fixed point, as spike_product.h says.
#pragma once
#include "register_tables.h"

#ifdef SPK_HAS_REGISTER_TABLES

namespace {

// What one thread needs for a chunk of pixels over all time steps.
struct FloatChunk {
  static constexpr long kSlice = 16;                 // outputs that are turned to rows of tokens together
  static constexpr long kLine = kTileVectors * FL;   // outputs whose sums wait, so that a token's are written together
  typedef Lanes<int32_t> L;
  const ProductArgs& a;
  LookUpSpikes spikes;
  const long row, pitch;
  Scratch weights, tables, sums;
  FloatChunk(const ProductArgs& a, long steps, long tokens)
      : a(a), spikes(a, steps, round_up(tokens, kUnit)), row(a.taps * spikes.groups * kGroup + 2 * kSlice),
        pitch(round_up(tokens, kUnit) | FL),  // odd in lines: rows in sets of the cache of their own
        weights(tokens ? kSlice * row * sizeof(int32_t) : 0),
        tables(tokens ? a.taps * spikes.groups * 2 * kTable * sizeof(int32_t) : 0),
        sums(tokens ? kLine * pitch * sizeof(int32_t) : 0) {}

  void fill(const Pixels& p) { spikes.fill(p); }

  // Weights [tap][C][width] of a slice to [output][tap][input]; of counts, each one and its double.
  void pack(const int32_t* packed, long width) {
    const long inputs = spikes.groups * kGroup, per = a.counts ? 2 : 1;
    const __m512i halves = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    int32_t* to = weights.as<int32_t>();
    for (long tap = 0; tap < a.taps; tap++, to += inputs)
      for (long c0 = 0; c0 * per < inputs; c0 += kSlice) {  // zeros behind the last input
        __m512i rows[kSlice];
#pragma GCC unroll 16
        for (long i = 0; i < kSlice; i++)
          rows[i] = c0 + i < a.channels ? L::load(packed + (tap * a.channels + c0 + i) * width) : L::zero();
        transpose(rows);
        for (long i = 0; i < kSlice; i++)
          for (long half = 0; half < per; half++) {
            __m512i v = rows[i];
            if (per == 2) {
              v = _mm512_permutexvar_epi32(_mm512_add_epi32(halves, _mm512_set1_epi32(8 * (int)half)), v);
              v = _mm512_mask_add_epi32(v, 0xaaaa, v, v);
            }
            L::store(to + i * row + c0 * per + half * kSlice, v);
          }
      }
  }

  // Currents of the outputs [first, last) to rows: token (t, pixel) at out + t * step + (pixel - begin) * stride, output
  // `first` at its start, which is a multiple of kSlice. `above`: sums of the fours in counts of one time step,
  // [pixel - begin][above_stride].
  void multiply(const Pixels& p, long first, long last, float* out, long step, long stride, bool accumulate,
                const Int* above = nullptr, long above_stride = 0) {
    const long width = product_tiles(a.outputs, FL).width();
    for (long line = first; line < last; line += kLine) {
      const long line_end = minimum(last, line + kLine);
      for (long o = line; o < line_end; o += 2) {
        if ((o - line) % kSlice == 0)
          pack((const int32_t*)a.packed + o / width * a.taps * a.channels * width + o % width, width);
        const int32_t* w = weights.as<int32_t>() + (o - line) % kSlice * row;
        make_two_tables(w, w + row, a.taps * spikes.groups, tables.as<int32_t>());
        spikes.add_up(p, tables.as<int32_t>(), sums.as<int32_t>() + (o - line) * pitch, pitch);
      }
      for (long unit = 0; unit < p.steps * p.units(); unit++) {
        const long place = p.first(unit) - p.begin, count = p.count(unit);
        float* to = out + p.step(unit) * step + place * stride - first;
        for (long column = line; column < line_end; column += kSlice) {
          const int32_t* from = sums.as<int32_t>() + (column - line) * pitch + unit * kUnit;
          const Int* fours = above ? above + place * above_stride + (column - first) / FL : nullptr;
          const long outputs = minimum(kSlice, line_end - column);
          if (count == kUnit && outputs == kSlice)
            finish<true>(from, column, outputs, count, to + column, stride, accumulate, fours, above_stride);
          else finish<false>(from, column, outputs, count, to + column, stride, accumulate, fours, above_stride);
        }
      }
    }
  }

  // Currents of a unit's tokens and a slice of outputs, as many as there are.
  template <bool whole>
  SPK_INLINE void finish(const int32_t* from, long column, long outputs, long count, float* out, long stride,
                         bool accumulate, const Int* above, long above_stride) const {
    const __mmask16 valid = whole ? 0xffff : (__mmask16)((1u << outputs) - 1);
    const __m512 scale = _mm512_maskz_loadu_ps(valid, a.scale + column);
    const __m512 bias = a.bias ? _mm512_maskz_loadu_ps(valid, a.bias + column) : _mm512_setzero_ps();
    __m512i rows[16];
#pragma GCC unroll 16
    for (long i = 0; i < 16; i++) rows[i] = L::load(from + i * pitch);
    transpose(rows);
#pragma GCC unroll 16
    for (long i = 0; i < 16; i++) {
      if (!whole && i >= count) break;
      if (above) rows[i] = _mm512_add_epi32(rows[i], _mm512_slli_epi32((__m512i)above[i * above_stride], 2));
      __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(rows[i]), scale), bias);
      if (accumulate) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(valid, out + i * stride));
      _mm512_mask_storeu_ps(out + i * stride, valid, y);
    }
  }
};

}  // namespace
#endif
