// The integer product by byte shuffles, where the processor has them (AVX2, AVX-512): the same time at any firing rate.
//
// Lanes are tokens. Four spikes of a token make an index 0..15; for each output and group of four inputs, the sums of all
// 16 subsets of the four weights are a table that one shuffle looks up for 32 or 64 tokens at once. Tables hold a sum
// less its smallest, 0 to the weights' absolute sum. Where that is below 256 for two groups together, their two bytes are
// added before they are widened to 16 bits; where it is for one, a byte is widened alone; where not, the sum's lower four
// bits and the rest go into two tables of bytes. Groups of an output are sorted so that most find a partner. Nothing
// saturates; every sum is exact.
#pragma once
#include "product_args.h"

#if (SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)) || (SPK_VECTOR_BYTES == 32 && defined(__AVX2__))
#define SPK_HAS_SHUFFLE 1
#include "shuffle_weights.h"

namespace {

#if SPK_VECTOR_BYTES == 64
typedef __m512i ByteVector;
SPK_INLINE ByteVector load_bytes(const void* p) { return _mm512_loadu_si512(p); }
SPK_INLINE ByteVector load_table(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)p)); }
SPK_INLINE ByteVector look_up(ByteVector table, ByteVector index) { return _mm512_shuffle_epi8(table, index); }
SPK_INLINE ByteVector add_bytes(ByteVector a, ByteVector b) { return _mm512_add_epi8(a, b); }
SPK_INLINE ByteVector add_shorts(ByteVector a, ByteVector b) { return _mm512_add_epi16(a, b); }
SPK_INLINE ByteVector subtract_shorts(ByteVector a, ByteVector b) { return _mm512_sub_epi16(a, b); }
template <int bits> SPK_INLINE ByteVector shift_left(ByteVector v) { return _mm512_slli_epi16(v, bits); }
// The odd bytes times `factor`, in 16 bits: a multiplication, since shifts share the shuffles' ports.
SPK_INLINE ByteVector odd_bytes(ByteVector v, int factor) {
  return _mm512_maddubs_epi16(v, _mm512_set1_epi16((short)(factor << 8)));
}
// Sixteen shorts of tokens in order: `part` 0 or 1 of the even lanes' or of the odd lanes' 32.
SPK_INLINE __m256i part_of(ByteVector v, int part) {
  return part ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
}
#else
typedef __m256i ByteVector;
SPK_INLINE ByteVector load_bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
SPK_INLINE ByteVector load_table(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)p)); }
SPK_INLINE ByteVector look_up(ByteVector table, ByteVector index) { return _mm256_shuffle_epi8(table, index); }
SPK_INLINE ByteVector add_bytes(ByteVector a, ByteVector b) { return _mm256_add_epi8(a, b); }
SPK_INLINE ByteVector add_shorts(ByteVector a, ByteVector b) { return _mm256_add_epi16(a, b); }
SPK_INLINE ByteVector subtract_shorts(ByteVector a, ByteVector b) { return _mm256_sub_epi16(a, b); }
template <int bits> SPK_INLINE ByteVector shift_left(ByteVector v) { return _mm256_slli_epi16(v, bits); }
// The odd bytes times `factor`, in 16 bits: a multiplication, since shifts share the shuffles' ports.
SPK_INLINE ByteVector odd_bytes(ByteVector v, int factor) {
  return _mm256_maddubs_epi16(v, _mm256_set1_epi16((short)(factor << 8)));
}
SPK_INLINE __m256i part_of(ByteVector v, int) { return v; }
#endif

constexpr long kLanes = SPK_VECTOR_BYTES;    // tokens in a vector of bytes
constexpr long kVectors = 4;                 // whose sums are held in registers
constexpr long kBlockTokens = kVectors * kLanes;
constexpr long kPair = 32;                   // two units of 16 tokens, in the even and in the odd bytes
constexpr long kTableOutputs = 4;            // whose tables fit the cache
constexpr long kLineOutputs = 32;            // int16 in a line of the cache: a token's are written together

// ---- spikes to indices ----------------------------------------------------------------------------------------------

// 16 tokens' words (64 channels) to 16 rows of nibbles, one row a group of four channels.
SPK_INLINE void nibble_rows(const uint64_t* words, __m128i* rows) {
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
    rows[2 * i] = _mm_and_si128(b[i], fifteen);
    rows[2 * i + 1] = _mm_and_si128(_mm_srli_epi16(b[i], 4), fifteen);
  }
}

// sources[i] = the token that a unit's token i reads through a tap, or -1
SPK_INLINE void find_sources(const ProductArgs& a, const Pixels& p, long unit, long dy, long dx, int32_t* sources) {
  const long first = p.first(unit), count = p.count(unit), base = p.step(unit) * p.total + dy * a.width + dx;
  long x = first % a.width, y = first / a.width % a.height;
  for (long i = 0; i < kUnit; i++) {
    const bool inside = i < count && (unsigned long)(y + dy) < (unsigned long)a.height &&
                        (unsigned long)(x + dx) < (unsigned long)a.width;
    sources[i] = inside ? (int32_t)(base + first + i) : -1;
    if (++x == a.width) {
      x = 0;
      if (++y == a.height) y = 0;
    }
  }
}

// index [blocks][groups][kBlockTokens], two units interleaved; zeros past the last token and outside the picture.
void fill_index(const ProductArgs& a, const Pixels& p, uint8_t* index) {
  const uint64_t* bits = (const uint64_t*)a.input;
  const long words = words_of(a.channels), tap_groups = (a.channels + 3) / 4;
  const Segments s(a.channels, a.taps);
  const long groups = s.padded();
  const long units = p.steps * p.units();
  for (long unit = 0; unit < round_up(units, kBlockTokens / kUnit); unit += 2) {
    uint8_t* block = index + unit * kUnit / kBlockTokens * groups * kBlockTokens + unit * kUnit % kBlockTokens;
    if (unit * kUnit % kBlockTokens == 0)
      memset(block + s.groups * kBlockTokens, 0, (groups - s.groups) * kBlockTokens);
    for (long tap = 0; tap < a.taps; tap++) {
      const long dy = a.taps == 9 ? tap / 3 - 1 : 0, dx = a.taps == 9 ? tap % 3 - 1 : 0;
      int32_t sources[2][kUnit];
      for (long half = 0; half < 2; half++) {
        if (unit + half < units) find_sources(a, p, unit + half, dy, dx, sources[half]);
        else memset(sources[half], 0xff, sizeof sources[half]);
      }
      for (long w = 0; w < words; w++) {
        __m128i rows[2][16];
        for (long half = 0; half < 2; half++) {
          uint64_t square[kUnit];
          for (long j = 0; j < kUnit; j++)
            square[j] = sources[half][j] >= 0 ? bits[(long)sources[half][j] * words + w] : 0;
          nibble_rows(square, rows[half]);
        }
        for (long g = 0; g < minimum(16, tap_groups - w * 16); g++) {
          uint8_t* to = block + (tap * tap_groups + w * 16 + g) * kBlockTokens;
          _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi8(rows[0][g], rows[1][g]));
          _mm_storeu_si128((__m128i*)(to + 16), _mm_unpackhi_epi8(rows[0][g], rows[1][g]));
        }
      }
    }
  }
}

// ---- the product ----------------------------------------------------------------------------------------------------

// How one output's sums over a segment are kept: unsigned ones have `smallest` too much.
struct Keep {
  int smallest;
  bool fresh;  // or added to what is there
};
// A unit's sums modulo 2^16, which the last of them fit.
SPK_INLINE void keep_unit(__m256i values, const Keep& k, int16_t* sums) {
  values = _mm256_add_epi16(values, _mm256_set1_epi16((short)k.smallest));
  if (!k.fresh) values = _mm256_add_epi16(values, _mm256_load_si256((const __m256i*)sums));
  _mm256_store_si256((__m256i*)sums, values);
}
SPK_INLINE void keep_unit(__m256i values, const Keep& k, int32_t* sums) {
  for (int half = 0; half < 2; half++) {
    __m256i* to = (__m256i*)sums + half;
    __m256i wide = _mm256_cvtepu16_epi32(half ? _mm256_extracti128_si256(values, 1) : _mm256_castsi256_si128(values));
    wide = _mm256_add_epi32(wide, _mm256_set1_epi32(k.smallest));
    _mm256_store_si256(to, k.fresh ? wide : _mm256_add_epi32(wide, _mm256_load_si256(to)));
  }
}

// The sums of V vectors of tokens over a segment. In registers: `all` = even + 256 odd, `odd` = odd, of the even and odd
// bytes. Never inlined: among other code the compiler keeps them in memory.
template <int V, class Sum>
__attribute__((noinline)) void add_block(const uint8_t* index, const uint8_t* table, const uint8_t* place, long pairs,
                                         long singles, long splits, const Keep& k, Sum* sums) {
  ByteVector all[V], odd[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) all[v] = odd[v] = ByteVector{};  // a loop: GCC fills arrays that start at {} in memory
  for (; pairs; pairs--, table += 32, place += 2) {
    const uint8_t *a = index + (unsigned long)place[0] * kBlockTokens, *b = index + (unsigned long)place[1] * kBlockTokens;
    const ByteVector ta = load_table(table), tb = load_table(table + 16);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const ByteVector x =
          add_bytes(look_up(ta, load_bytes(a + v * kLanes)), look_up(tb, load_bytes(b + v * kLanes)));
      all[v] = add_shorts(all[v], x);
      odd[v] = add_shorts(odd[v], odd_bytes(x, 1));
      asm("" : "+x"(all[v]), "+x"(odd[v]));  // else the compiler adds in another order and runs out of registers
    }
  }
  for (; singles; singles--, table += 16, place++) {
    const uint8_t* a = index + (unsigned long)place[0] * kBlockTokens;
    const ByteVector ta = load_table(table);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const ByteVector x = look_up(ta, load_bytes(a + v * kLanes));
      all[v] = add_shorts(all[v], x);
      odd[v] = add_shorts(odd[v], odd_bytes(x, 1));
      asm("" : "+x"(all[v]), "+x"(odd[v]));  // else the compiler adds in another order and runs out of registers
    }
  }
  while (splits) {
    ByteVector low[V], high[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) low[v] = ByteVector{};
    for (int part = 0; part < 2 && splits; part++) {  // 2 * kHeld * 15 < 2^8: a byte holds twice as many lower parts
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) high[v] = ByteVector{};
      auto add = [&](long g) SPK_INLINE_LAMBDA {
        const uint8_t *a = index + (unsigned long)place[g] * kBlockTokens, *t = table + g / 2 * 64 + g % 2 * 16;
        const ByteVector l = load_table(t), h = load_table(t + 32);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          const ByteVector i = load_bytes(a + v * kLanes);
          low[v] = add_bytes(low[v], look_up(l, i));
          high[v] = add_bytes(high[v], look_up(h, i));
          asm("" : "+x"(low[v]), "+x"(high[v]));
        }
      };
      const long here = minimum(splits, kHeld);
      if (here == kHeld) {
#pragma GCC unroll 8
        for (long g = 0; g < kHeld; g++) add(g);
      } else {
        for (long g = 0; g < here; g++) add(g);
      }
      splits -= here, table += here * 32, place += here;
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        all[v] = add_shorts(all[v], shift_left<4>(high[v]));
        odd[v] = add_shorts(odd[v], odd_bytes(high[v], 16));
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      all[v] = add_shorts(all[v], low[v]);
      odd[v] = add_shorts(odd[v], odd_bytes(low[v], 1));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const ByteVector even = subtract_shorts(all[v], shift_left<8>(odd[v]));
#pragma GCC unroll 2
    for (long part = 0; part < kLanes / kPair; part++) {
      keep_unit(part_of(even, part), k, sums + v * kLanes + part * kPair);
      keep_unit(part_of(odd[v], part), k, sums + v * kLanes + part * kPair + kUnit);
    }
  }
}

// What one thread needs for a chunk of pixels over all time steps. Sums are [blocks][kLineOutputs][kBlockTokens], int16
// where they fit, else int32.
struct ShuffleChunk {
  const ProductArgs& a;
  const Segments segments;
  const PackedRows rows;
  const bool narrow;
  const long capacity;  // tokens
  Scratch index, tables, sums;
  ShuffleChunk(const ProductArgs& a, long, long tokens)
      : a(a), segments(a.channels, a.taps), rows((void*)a.rows, segments, a.outputs),
        narrow(tokens && *rows.narrow), capacity(round_up(tokens, kBlockTokens)),
        index(segments.padded() * capacity), tables(kTableOutputs * (kSegmentGroups + 2) * kMaxTable),
        sums(kLineOutputs * capacity * (narrow ? sizeof(int16_t) : sizeof(int32_t))) {}

  void fill(const Pixels& p) { fill_index(a, p, index.as<uint8_t>()); }

  // Currents of the outputs [first, last) to rows: token (t, pixel) at out + t * step + (pixel - begin) * stride, output
  // `first` at its start. `first` is a multiple of kTileOutputs.
  void multiply(const Pixels& p, long first, long last, int16_t* out, long step, long stride, bool accumulate) {
    for (long line = first; line < last; line += kLineOutputs) {
      const long line_end = minimum(last, line + kLineOutputs);
      for (long column = line; column < line_end; column += kTileOutputs) add_up(p.tokens(), column, column - line);
      for (long unit = 0; unit < p.steps * p.units(); unit++) {
        int16_t* row = out + p.step(unit) * step + (p.first(unit) - p.begin) * stride - first;
        for (long column = line; column < line_end; column += kTileOutputs) {
          const long width = minimum(kTileOutputs, last - column), count = p.count(unit);
          if (width == kTileOutputs)
            finish<true>(unit * kUnit, column - line, column, width, row + column, stride, count, accumulate);
          else finish<false>(unit * kUnit, column - line, column, width, row + column, stride, count, accumulate);
        }
      }
    }
  }

  long place(long token, long output) const {
    return (token / kBlockTokens * kLineOutputs + output) * kBlockTokens + token % kBlockTokens;
  }

  // Sums of a tile's outputs from `column` on; `output` is the tile's place in the line.
  void add_up(long tokens, long column, long output) {
    const long last = minimum(column + kTileOutputs, a.outputs), table_bytes = (segments.size + 2) * kMaxTable;
    for (long s = 0; s < segments.count; s++)
      for (long first = column; first < last; first += kTableOutputs) {
        const long outputs = minimum(kTableOutputs, last - first);
        for (long o = 0; o < outputs; o++) {
          const RowPlan plan = this->plan(first + o, s);
          const long bytes = 2 * plan.pairs + plan.singles;
          const int8_t* weights = rows.weights + ((first + o) * segments.count + s) * segments.size * 4;
          uint8_t* table = tables.as<uint8_t>() + o * table_bytes;
          fill_byte_tables(weights, bytes, table);
          fill_split_tables(weights + bytes * 4, segments.size - bytes, table + bytes * 16);
        }
        for (long i = 0; i < tokens; i += kBlockTokens)
          with_vectors<kVectors>((minimum(tokens - i, kBlockTokens) + kLanes - 1) / kLanes, [&](auto v) {
            for (long o = 0; o < outputs; o++) {
              const RowPlan plan = this->plan(first + o, s);
              const uint8_t* from = index.as<uint8_t>() + i * segments.padded();
              auto add = [&](auto* sums) SPK_INLINE_LAMBDA {
                add_block<v.value>(from + s * segments.size * kBlockTokens, tables.as<uint8_t>() + o * table_bytes,
                                   rows.places + ((first + o) * segments.count + s) * segments.size, plan.pairs,
                                   plan.singles, segments.size - 2 * plan.pairs - plan.singles, {plan.smallest, s == 0},
                                   sums + place(i, output + first - column + o));
              };
              if (narrow) add(sums.as<int16_t>());
              else add(sums.as<int32_t>());
            }
          });
      }
  }

  RowPlan plan(long output, long segment) const { return rows.plans[output * segments.count + segment]; }

  // Sums of eight of a unit's tokens to whole currents within int32, where need be within int16.
  SPK_INLINE __m256i currents(long at, __m256 scale, __m256 bias) const {
    const __m256i whole = narrow ? _mm256_cvtepi16_epi32(_mm_load_si128((const __m128i*)(sums.as<int16_t>() + at)))
                                 : _mm256_load_si256((const __m256i*)(sums.as<int32_t>() + at));
    __m256 y = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(whole), scale), bias);
    if (!narrow) y = _mm256_min_ps(_mm256_max_ps(y, _mm256_set1_ps(-32768.f)), _mm256_set1_ps(32767.f));
    return _mm256_cvtps_epi32(y);
  }

  // A unit's currents of a tile's outputs, rounded and held within int16, to `count` rows.
  template <bool whole>
  SPK_INLINE void finish(long token, long output, long column, long width, int16_t* out, long stride, long count,
                         bool accumulate) const {
    __m256i y[8], b[8];
    const float *scale = a.scale + column, *bias = a.bias + column;
#pragma GCC unroll 8
    for (long o = 0; o < 8; o++) {
      if (!whole && o >= width) {
        y[o] = _mm256_setzero_si256();
        continue;
      }
      const __m256 s = _mm256_set1_ps(scale[o]), add = _mm256_set1_ps(bias[o]);
      const long at = place(token, output + o);
      y[o] = _mm256_packs_epi32(currents(at, s, add), currents(at + 8, s, add));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      b[2 * i] = _mm256_unpacklo_epi16(y[2 * i], y[2 * i + 1]);
      b[2 * i + 1] = _mm256_unpackhi_epi16(y[2 * i], y[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const int from = i / 2 * 4 + i % 2;
      y[2 * i] = _mm256_unpacklo_epi32(b[from], b[from + 2]);
      y[2 * i + 1] = _mm256_unpackhi_epi32(b[from], b[from + 2]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      b[2 * i] = _mm256_unpacklo_epi64(y[i], y[4 + i]);
      b[2 * i + 1] = _mm256_unpackhi_epi64(y[i], y[4 + i]);
    }
    // The halves that were packed alternate by four: b[i] holds tokens 0..3, 8..11 below and 4..7, 12..15 above.
    if (whole && count == kUnit) {
#pragma GCC unroll 16
      for (long i = 0; i < kUnit; i++) put(out + i * stride, token_of(b, i), kTileOutputs, accumulate);
    } else {
      for (long i = 0; i < count; i++) put(out + i * stride, token_of(b, i), width, accumulate);
    }
  }

  SPK_INLINE static __m128i token_of(const __m256i* rows, long i) {
    const __m256i two = rows[i / 8 * 4 + i % 4];
    return i & 4 ? _mm256_extracti128_si256(two, 1) : _mm256_castsi256_si128(two);
  }

  SPK_INLINE static void put(int16_t* out, __m128i row, long width, bool accumulate) {
    if (width == kTileOutputs) {
      if (accumulate) row = _mm_adds_epi16(row, _mm_loadu_si128((const __m128i*)out));
      _mm_storeu_si128((__m128i*)out, row);
      return;
    }
    alignas(16) int16_t copy[8] = {};
    if (accumulate) {
      memcpy(copy, out, width * 2);
      row = _mm_adds_epi16(row, _mm_load_si128((const __m128i*)copy));
    }
    _mm_store_si128((__m128i*)copy, row);
    memcpy(out, copy, width * 2);
  }
};

}  // namespace
#else
namespace {
struct ShuffleChunk {  // not here: tables of int16 sums take its place
  ShuffleChunk(const ProductArgs&, long, long) {}
  void fill(const Pixels&) {}
  void multiply(const Pixels&, long, long, int16_t*, long, long, bool) {}
};
}  // namespace
#endif
