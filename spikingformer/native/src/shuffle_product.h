// The integer product by byte shuffles, where the processor has them (AVX2, AVX-512): the same time at any firing rate.
//
// Lanes are tokens. Four spikes of a token make an index 0..15; for each output and group of four inputs, the sums of all
// 16 subsets of the four weights are a table that one shuffle looks up for 32 or 64 tokens at once. A sum of four int8
// weights, shifted to be positive, has ten bits: five go into one table of bytes, five into another, so that bytes hold
// the sums of eight groups before they are widened. Nothing saturates; every sum is exact.
//
// Weights are rows [outputs padded to 8][groups padded to 8][4], group = tap * ceil(C / 4) + channel / 4.
#pragma once
#include "product_args.h"

#if (SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)) || (SPK_VECTOR_BYTES == 32 && defined(__AVX2__))
#define SPK_HAS_SHUFFLE 1

namespace {

#if SPK_VECTOR_BYTES == 64
typedef __m512i ByteVector;
SPK_INLINE ByteVector load_bytes(const void* p) { return _mm512_loadu_si512(p); }
SPK_INLINE void store_bytes(void* p, ByteVector v) { _mm512_storeu_si512(p, v); }
SPK_INLINE ByteVector load_table(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)p)); }
SPK_INLINE ByteVector look_up(ByteVector table, ByteVector index) { return _mm512_shuffle_epi8(table, index); }
SPK_INLINE ByteVector add_bytes(ByteVector a, ByteVector b) { return _mm512_add_epi8(a, b); }
SPK_INLINE ByteVector add_shorts(ByteVector a, ByteVector b) { return _mm512_add_epi16(a, b); }
SPK_INLINE ByteVector set_shorts(int v) { return _mm512_set1_epi16((short)v); }
// low + 32 * high as int16, of the lower and upper eight bytes of each 16
SPK_INLINE ByteVector combine_low(ByteVector low, ByteVector high) {
  return _mm512_maddubs_epi16(_mm512_unpacklo_epi8(low, high), _mm512_set1_epi16(32 << 8 | 1));
}
SPK_INLINE ByteVector combine_high(ByteVector low, ByteVector high) {
  return _mm512_maddubs_epi16(_mm512_unpackhi_epi8(low, high), _mm512_set1_epi16(32 << 8 | 1));
}
#else
typedef __m256i ByteVector;
SPK_INLINE ByteVector load_bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
SPK_INLINE void store_bytes(void* p, ByteVector v) { _mm256_storeu_si256((__m256i*)p, v); }
SPK_INLINE ByteVector load_table(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)p)); }
SPK_INLINE ByteVector look_up(ByteVector table, ByteVector index) { return _mm256_shuffle_epi8(table, index); }
SPK_INLINE ByteVector add_bytes(ByteVector a, ByteVector b) { return _mm256_add_epi8(a, b); }
SPK_INLINE ByteVector add_shorts(ByteVector a, ByteVector b) { return _mm256_add_epi16(a, b); }
SPK_INLINE ByteVector set_shorts(int v) { return _mm256_set1_epi16((short)v); }
SPK_INLINE ByteVector combine_low(ByteVector low, ByteVector high) {
  return _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low, high), _mm256_set1_epi16(32 << 8 | 1));
}
SPK_INLINE ByteVector combine_high(ByteVector low, ByteVector high) {
  return _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low, high), _mm256_set1_epi16(32 << 8 | 1));
}
#endif

constexpr long kLanes = SPK_VECTOR_BYTES;    // tokens in a vector of bytes
constexpr long kBlockTokens = 2 * kLanes;    // tokens whose sums are held in registers
constexpr long kByteGroups = 8;              // 8 * 31 < 2^8: groups that a byte holds
constexpr long kSegmentGroups = 64;          // 64 * 4 * 127 < 2^15: groups that an int16 holds
constexpr long kTileOutputs = 8;             // whose tables fit the first-level cache
constexpr long kLineOutputs = 32;            // int16 in a line of the cache: a token's are written together
constexpr long kTableBytes = 32;  // of one group and output: 16 low parts, 16 high parts

SPK_INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }
SPK_INLINE long groups_of(const ProductArgs& a) { return round_up(a.taps * ((a.channels + 3) / 4), kByteGroups); }

// ---- spikes to indices ----------------------------------------------------------------------------------------------

// 16 tokens' words (64 channels) to 16 rows of nibbles, one row a group of four channels, `groups` of them.
SPK_INLINE void nibble_rows(const uint64_t* words, uint8_t* index, long groups) {
  __m128i a[8], b[8];
  for (int i = 0; i < 8; i++)
    a[i] = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)(words + i)), _mm_loadl_epi64((const __m128i*)(words + i + 8)));
  for (int i = 0; i < 4; i++) {
    b[i] = _mm_unpacklo_epi8(a[i], a[i + 4]);
    b[i + 4] = _mm_unpackhi_epi8(a[i], a[i + 4]);
  }
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < 2; i++) {
      a[half * 4 + i] = _mm_unpacklo_epi8(b[half * 4 + i], b[half * 4 + i + 2]);
      a[half * 4 + i + 2] = _mm_unpackhi_epi8(b[half * 4 + i], b[half * 4 + i + 2]);
    }
  for (int quarter = 0; quarter < 4; quarter++) {
    b[quarter * 2] = _mm_unpacklo_epi8(a[quarter * 2], a[quarter * 2 + 1]);
    b[quarter * 2 + 1] = _mm_unpackhi_epi8(a[quarter * 2], a[quarter * 2 + 1]);
  }
  const __m128i fifteen = _mm_set1_epi8(15);
  for (int i = 0; i < 8; i++) {
    if (2 * i < groups) _mm_storeu_si128((__m128i*)(index + 2 * i * kBlockTokens), _mm_and_si128(b[i], fifteen));
    if (2 * i + 1 < groups)
      _mm_storeu_si128((__m128i*)(index + (2 * i + 1) * kBlockTokens), _mm_and_si128(_mm_srli_epi16(b[i], 4), fifteen));
  }
}

// The tokens [begin, end) of a chunk: index [blocks][groups][kBlockTokens], zeros past the last token and outside the
// picture. `bits` are a.input, or one plane of its counts.
void fill_index(const ProductArgs& a, const uint64_t* bits, long begin, long end, int32_t* sources, uint8_t* index) {
  const long words = words_of(a.channels), tap_groups = (a.channels + 3) / 4, count = end - begin;
  const long groups = groups_of(a), used = a.taps * tap_groups, all = round_up(count, kBlockTokens);
  for (long tap = 0; tap < a.taps; tap++) {
    const long dy = a.taps == 9 ? tap / 3 - 1 : 0, dx = a.taps == 9 ? tap % 3 - 1 : 0;
    long x = begin % a.width, y = begin / a.width % a.height;
    for (long i = 0; i < all; i++) {
      const bool inside = i < count && (unsigned long)(y + dy) < (unsigned long)a.height &&
                          (unsigned long)(x + dx) < (unsigned long)a.width;
      sources[i] = inside ? (int32_t)(begin + i + dy * a.width + dx) : -1;
      if (++x == a.width) {
        x = 0;
        if (++y == a.height) y = 0;
      }
    }
    for (long w = 0; w < words; w++)
      for (long i = 0; i < all; i += 16) {
        uint64_t square[16];
        for (long j = 0; j < 16; j++) square[j] = sources[i + j] >= 0 ? bits[(long)sources[i + j] * words + w] : 0;
        uint8_t* block = index + i / kBlockTokens * groups * kBlockTokens + i % kBlockTokens;
        nibble_rows(square, block + (tap * tap_groups + w * 16) * kBlockTokens, tap_groups - w * 16);
      }
  }
  for (long i = 0; i < all / kBlockTokens; i++)
    memset(index + (i * groups + used) * kBlockTokens, 0, (groups - used) * kBlockTokens);
}

// Bit `plane` of every count, as words like those of spikes.
void plane_of_counts(const ProductArgs& a, int plane, uint64_t* bits) {
  const long words = words_of(a.channels), tokens = a.images * a.height * a.width;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (long t = 0; t < tokens; t++) {
    const uint8_t* row = (const uint8_t*)a.input + t * a.channels;
    for (long w = 0; w < words; w++) {
      uint64_t word = 0;
      const long here = minimum(64, a.channels - w * 64);
      long c = 0;
      for (; c + 32 <= here; c += 32) {
        const __m256i v = _mm256_loadu_si256((const __m256i*)(row + w * 64 + c));
        word |= (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(v, 7 - plane)) << c;
      }
      for (; c < here; c++) word |= (uint64_t)((row[w * 64 + c] >> plane) & 1) << c;
      bits[t * words + w] = word;
    }
  }
}

// ---- the product ----------------------------------------------------------------------------------------------------

// Tables [kTileOutputs][groups][kTableBytes] of a segment from rows [kTileOutputs] of `row_bytes`.
void fill_tables(const int8_t* rows, long row_bytes, long groups, uint8_t* tables) {
  // Lane k: the bits 0 and 1, and 2 and 3, of k.
  const __m256i first = _mm256_setr_epi16(0x000, 0x001, 0x100, 0x101, 0x000, 0x001, 0x100, 0x101, 0x000, 0x001, 0x100,
                                          0x101, 0x000, 0x001, 0x100, 0x101);
  const __m256i second = _mm256_setr_epi16(0x000, 0x000, 0x000, 0x000, 0x001, 0x001, 0x001, 0x001, 0x100, 0x100, 0x100,
                                           0x100, 0x101, 0x101, 0x101, 0x101);
  const __m256i shift = _mm256_set1_epi16(512), low_bits = _mm256_set1_epi16(31);
  for (long o = 0; o < kTileOutputs; o++)
    for (long g = 0; g < groups; g++) {
      int16_t pairs[2];
      memcpy(pairs, rows + o * row_bytes + g * 4, 4);
      __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(first, _mm256_set1_epi16(pairs[0])),
                                      _mm256_maddubs_epi16(second, _mm256_set1_epi16(pairs[1])));
      sums = _mm256_add_epi16(sums, shift);
      const __m256i parts = _mm256_packus_epi16(_mm256_and_si256(sums, low_bits), _mm256_srli_epi16(sums, 5));
      _mm256_store_si256((__m256i*)(tables + (o * groups + g) * kTableBytes), _mm256_permute4x64_epi64(parts, 0xd8));
    }
}

// sums[o][token] (+)= (a segment's product << shift) for two outputs and one block of tokens.
// Never inlined: among other code the compiler keeps the sums in memory.
__attribute__((noinline)) void shuffle_block(const uint8_t* index, const uint8_t* table, long groups, int shift, bool fresh,
                              int32_t* sums) {
  alignas(64) int16_t acc[2][2][2][kLanes / 2];  // [output][vector][lower, upper eight of each 16 tokens]
  const ByteVector start = set_shorts(-512 * (int)groups);
  for (int i = 0; i < 8; i++) store_bytes(&acc[0][0][0][0] + i * (kLanes / 2), start);
  for (long g0 = 0; g0 < groups; g0 += kByteGroups) {
    ByteVector low[2][2] = {}, high[2][2] = {};
#pragma GCC unroll 8
    for (long g = g0; g < g0 + kByteGroups; g++) {
      const ByteVector i0 = load_bytes(index + g * kBlockTokens), i1 = load_bytes(index + g * kBlockTokens + kLanes);
#pragma GCC unroll 2
      for (int o = 0; o < 2; o++) {
        const uint8_t* t = table + (o * groups + g) * kTableBytes;
        const ByteVector l = load_table(t), h = load_table(t + 16);
        low[o][0] = add_bytes(low[o][0], look_up(l, i0));
        high[o][0] = add_bytes(high[o][0], look_up(h, i0));
        low[o][1] = add_bytes(low[o][1], look_up(l, i1));
        high[o][1] = add_bytes(high[o][1], look_up(h, i1));
        // The compiler would add in trees, over all groups at once, and run out of registers.
        asm("" : "+x"(low[o][0]), "+x"(high[o][0]), "+x"(low[o][1]), "+x"(high[o][1]));
      }
    }
#pragma GCC unroll 2
    for (int o = 0; o < 2; o++)
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        int16_t *p = acc[o][v][0], *q = acc[o][v][1];
        store_bytes(p, add_shorts(load_bytes(p), combine_low(low[o][v], high[o][v])));
        store_bytes(q, add_shorts(load_bytes(q), combine_high(low[o][v], high[o][v])));
      }
  }
  for (int o = 0; o < 2; o++)
    for (long i = 0; i < kBlockTokens; i += 8) {
      const int16_t* from = &acc[o][i / kLanes][i / 8 % 2][i % kLanes / 16 * 8];
      __m256i wide = _mm256_slli_epi32(_mm256_cvtepi16_epi32(_mm_load_si128((const __m128i*)from)), shift);
      __m256i* to = (__m256i*)(sums + o * kBlockTokens + i);
      if (!fresh) wide = _mm256_add_epi32(wide, _mm256_load_si256(to));
      _mm256_store_si256(to, wide);
    }
}

// Sums [kTileOutputs][kBlockTokens] of up to eight tokens to currents out[token][column..], rounded and held within int16.
SPK_INLINE void finish_tokens(const ProductArgs& a, const int32_t* sums, long begin, long count, long column) {
  const long width = minimum(kTileOutputs, a.outputs - column);
  float scale[kTileOutputs] = {}, bias[kTileOutputs] = {};
  memcpy(scale, a.scale + column, width * sizeof(float));
  memcpy(bias, a.bias + column, width * sizeof(float));
  const __m256 highest = _mm256_set1_ps(32767.f), lowest = _mm256_set1_ps(-32768.f);
  __m256i pairs[4];  // of outputs, one dword a token
  for (int o = 0; o < kTileOutputs; o++) {
    __m256 y = _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i*)(sums + o * kBlockTokens)));
    y = _mm256_add_ps(_mm256_mul_ps(y, _mm256_set1_ps(scale[o])), _mm256_set1_ps(bias[o]));
    const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(y, lowest), highest));
    pairs[o / 2] = o % 2 ? _mm256_blend_epi16(pairs[o / 2], _mm256_slli_epi32(whole, 16), 0xaa) : whole;
  }
  const __m256i a0 = _mm256_unpacklo_epi32(pairs[0], pairs[1]), a1 = _mm256_unpackhi_epi32(pairs[0], pairs[1]);
  const __m256i b0 = _mm256_unpacklo_epi32(pairs[2], pairs[3]), b1 = _mm256_unpackhi_epi32(pairs[2], pairs[3]);
  const __m256i rows[4] = {_mm256_unpacklo_epi64(a0, b0), _mm256_unpackhi_epi64(a0, b0), _mm256_unpacklo_epi64(a1, b1),
                           _mm256_unpackhi_epi64(a1, b1)};  // tokens 0 and 4, 1 and 5, 2 and 6, 3 and 7
  for (long j = 0; j < count; j++) {
    __m128i row = j < 4 ? _mm256_castsi256_si128(rows[j]) : _mm256_extracti128_si256(rows[j - 4], 1);
    int16_t* o = (int16_t*)a.out + (begin + j) * a.outputs + column;
    if (width == kTileOutputs) {
      if (a.accumulate) row = _mm_adds_epi16(row, _mm_loadu_si128((const __m128i*)o));
      _mm_storeu_si128((__m128i*)o, row);
    } else {
      alignas(16) int16_t copy[8] = {};
      if (a.accumulate) {
        memcpy(copy, o, width * 2);
        row = _mm_adds_epi16(row, _mm_load_si128((const __m128i*)copy));
      }
      _mm_store_si128((__m128i*)copy, row);
      memcpy(o, copy, width * 2);
    }
  }
}

// What one thread needs for a chunk of up to `tokens`.
struct ShuffleChunk {
  const ProductArgs& a;
  const int planes;
  const long groups, capacity;  // tokens
  Scratch index, sources, tables, sums;
  ShuffleChunk(const ProductArgs& a, int planes, long tokens)
      : a(a), planes(planes), groups(groups_of(a)), capacity(round_up(tokens, kBlockTokens)),
        index(planes * groups * capacity), sources(capacity * sizeof(int32_t)),
        tables(kTileOutputs * kSegmentGroups * kTableBytes), sums(kLineOutputs * capacity * sizeof(int32_t)) {}

  // bits: [planes][tokens of the input][words]; plane p counts 2^p.
  void fill(const uint64_t* bits, long begin, long end) {
    const long plane_words = a.images * a.height * a.width * words_of(a.channels);
    for (int p = 0; p < planes; p++)
      fill_index(a, bits + p * plane_words, begin, end, sources.as<int32_t>(), index.as<uint8_t>() + p * groups * capacity);
  }

  // Outputs [first, last), `first` a multiple of kTileOutputs, of the tokens that were filled in.
  void multiply(long begin, long end, long first, long last) {
    const long count = end - begin;
    for (long line = first; line < last; line += kLineOutputs) {
      const long line_end = minimum(last, line + kLineOutputs);
      for (long column = line; column < line_end; column += kTileOutputs) add_up(count, column, column - line);
      for (long i = 0; i < count; i += 8)
        for (long column = line; column < line_end; column += kTileOutputs)
          finish_tokens(a, place(i, column - line), begin + i, minimum(8, count - i), column);
    }
  }

  // Sums [blocks][kLineOutputs][kBlockTokens].
  int32_t* place(long token, long output) const {
    return sums.as<int32_t>() + (token / kBlockTokens * kLineOutputs + output) * kBlockTokens + token % kBlockTokens;
  }

  void add_up(long count, long column, long output) {
    const long row_bytes = groups * 4;
    for (long s = 0; s < groups; s += kSegmentGroups) {
      const long here = minimum(kSegmentGroups, groups - s);
      fill_tables((const int8_t*)a.rows + column * row_bytes + s * 4, row_bytes, here, tables.as<uint8_t>());
      for (long i = 0; i < count; i += kBlockTokens)
        for (long o = 0; o < kTileOutputs; o += 2)
          for (int p = 0; p < planes; p++)
            shuffle_block(index.as<uint8_t>() + (p * capacity + i) * groups + s * kBlockTokens,
                          tables.as<uint8_t>() + o * here * kTableBytes, here, p, s == 0 && p == 0,
                          place(i, output + o));
    }
  }
};

}  // namespace
#else
namespace {
void plane_of_counts(const ProductArgs&, int, uint64_t*) {}
struct ShuffleChunk {  // not here: tables of int16 sums take its place
  ShuffleChunk(const ProductArgs&, int, long) {}
  void fill(const uint64_t*, long, long) {}
  void multiply(long, long, long, long) {}
};
}  // namespace
#endif
