// The integer product by tables of 16-bit sums in registers (register_tables.h), where the processor permutes words fast
// (AMD with AVX-512): six inputs and 32 tokens a permutation. Sums wrap around in 16 bits where their end fits these; where
// it may not, they are carried to 32 bits before they could.
#pragma once
#include "register_tables.h"
#include "shuffle_product.h"

#ifdef SPK_HAS_REGISTER_TABLES

namespace {

// Weights as they are: int8 [outputs][taps][inputs, in whole groups]. A header of four int32: narrow, 1, unused.
struct PackedWords {
  const long row;
  const int8_t* weights;
  PackedWords(const void* memory, long channels, long taps)
      : row(taps * groups_of<int16_t>(channels) * Lanes<int16_t>::group), weights((const int8_t*)memory + 16) {}
  long bytes(long outputs) const { return 16 + round_up(outputs, 2) * row + SPK_VECTOR_BYTES; }
  static bool are(const void* rows) { return rows && ((const int32_t*)rows)[1]; }
};

void pack_words(const int8_t* weight, const float* scale, const float* bias, long outputs, long channels, long taps,
                void* memory) {
  const PackedWords words(memory, channels, taps);
  const long inputs = words.row / maximum(1, taps);
  for (long o = 0; o < outputs; o++)
    for (long tap = 0; tap < taps; tap++)
      memcpy((int8_t*)words.weights + o * words.row + tap * inputs, weight + (o * taps + tap) * channels, channels);
  ((int32_t*)memory)[0] = sums_are_narrow(weight, scale, bias, outputs, channels * taps);
  ((int32_t*)memory)[1] = 1;
}

// What one thread needs for a chunk of pixels over all time steps.
struct WordChunk : IntegerSumRows {
  typedef Lanes<int16_t> L;
  static constexpr long kSafeGroups = 42;  // 42 * 6 * 127 < 2^15; whole words of spikes
  const PackedWords words;
  LookUpSpikes<int16_t> spikes;
  Scratch weights, tables, part;
  WordChunk(const ProductArgs& a, long steps, long tokens)
      : IntegerSumRows(a, tokens && *(const int32_t*)a.rows, tokens), words(a.rows, a.channels, a.taps),
        spikes(a, steps, round_up(tokens, kStepGrain)),
        weights(tokens ? 2 * (words.row + SPK_VECTOR_BYTES) * sizeof(int16_t) : 0),
        tables(tokens ? words.row / L::group * 2 * L::table * sizeof(int16_t) : 0),
        part(2 * kBlockTokens * sizeof(int16_t)) {
    static_assert(kBlockTokens == kLookUpVectors * L::count, "a block of sums is what is looked up at once");
  }

  void fill(const Pixels& p) { spikes.fill(p); }

  // As ShuffleChunk's.
  void multiply(const Pixels& p, long first, long last, int16_t* out, long step, long stride, bool accumulate) {
    for (long line = first; line < last; line += kLineOutputs) {
      const long line_end = minimum(last, line + kLineOutputs);
      for (long o = line; o < line_end; o += 2) {
        int16_t* w = weights.as<int16_t>();
        for (long i = 0; i < 2 * words.row; i += SL) {  // two outputs' rows lie together
          const Short wide = widen(words.weights + o * words.row + i);
          memcpy(w + i, &wide, sizeof wide);
        }
        make_two_tables(w, w + words.row, 1, words.row / L::group, tables.as<int16_t>());
        add_up(p.tokens(), o - line);
      }
      write(p, line, line_end, out - first, step, stride, accumulate);
    }
  }

  void add_up(long tokens, long output) {
    for (long token = 0; token < tokens; token += kBlockTokens)
      with_vectors<kLookUpVectors>(minimum(kLookUpVectors, (tokens - token) / L::count), [&](auto v) {
        const long at = place(token, output);
        if (narrow) return look_up(v, token, 0, a.taps, 0, spikes.groups, sums.as<int16_t>() + at);
        // Whole taps at a time, or parts of one.
        const long taps = maximum(1, kSafeGroups / maximum(1, spikes.groups));
        for (long tap = 0; tap < a.taps; tap += taps)
          for (long g = 0; g < spikes.groups; g += kSafeGroups) {
            look_up(v, token, tap, minimum(taps, a.taps - tap), g, minimum(kSafeGroups, spikes.groups - g), part.as<int16_t>());
            for (long o = 0; o < 2; o++) carry<v.value>(o, sums.as<int32_t>() + at + o * kBlockTokens, tap == 0 && g == 0);
          }
      });
  }

  template <class V> void look_up(V v, long token, long tap, long taps, long group, long groups, int16_t* to) const {
    look_up_block<v.value>(spikes.lanes() + group / L::word_groups * spikes.span, spikes.span,
                           spikes.taps_of(token / kBlockTokens) + tap, taps, groups,
                           tables.as<int16_t>() + (tap * spikes.groups + group) * 2 * L::table, to, kBlockTokens, true);
  }

  template <int V> void carry(long output, int32_t* to, bool fresh) const {
    const int16_t* from = part.as<int16_t>() + output * kBlockTokens;
    for (long i = 0; i < V * L::count; i += FL) {
      const __m512i wide = _mm512_cvtepi16_epi32(_mm256_load_si256((const __m256i*)(from + i)));
      _mm512_store_si512(to + i, fresh ? wide : _mm512_add_epi32(wide, _mm512_load_si512(to + i)));
    }
  }
};

}  // namespace
#else
namespace {
struct WordChunk : ShuffleChunk {  // not here
  using ShuffleChunk::ShuffleChunk;
};
struct PackedWords {
  static bool are(const void*) { return false; }
};
}  // namespace
#endif
