// Products of spikes and weights: linear and 3x3 convolution (stride 1, padding 1). A spike adds one row of weights.
//
// Tokens are pixels of one time step, row by row; spikes are bits [tokens][words_of(C)], or counts of spikes [tokens][C].
// Weights are packed [tile][tap][C][tile width]: a linear product has one tap, a convolution nine, tap (dy, dx) reading
// the pixel at (y+dy-1, x+dx-1). A block of them (some taps, some channels, one tile) that fits the first-level cache
// serves a whole chunk of tokens before the next block is touched; the chunk's sums wait in the second-level cache.
//
// Where few inputs fire, each token has a list of those that did, and adds their rows. Where many do, the sums of every
// subset of four rows are tabulated, and four bits of spikes pick one: one addition for four inputs at any rate (the
// "method of four Russians", Arlazarov et al., 1970). Counts go through tables by their two lower bits, each channel
// standing for two: its row, and twice its row; lists hold what counts have above three.
#pragma once
#include "count_product.h"
#include "float_tables.h"

namespace {

constexpr long kBlockBytes = 48 * 1024;  // of weights or tables: a first-level cache (measured, EPYC 9005)
constexpr long kChunkTokens = 512;
// Tokens of a chunk for shuffles: more share a table, fewer keep the indices of many inputs in the second-level cache.
SPK_INLINE long shuffled_chunk(const ProductArgs& a) { return (a.taps * a.channels > 512 ? 2 : 4) * kChunkTokens; }
constexpr long kChunkGrain = 128;  // tokens that shuffles take at once
constexpr double kTableMean = 0.5;  // counts above it go through tables (measured: EPYC 7003, avx2)
constexpr long kSafeSpikes = 258;  // 258 * 127 < 2^15: that many int8 weights cannot overflow an int16 sum

// How lists walk a tile's weights.
struct ListBlocks {
  long words, count, tap_group;  // 64-channel words in a block of channels, such blocks, taps in a block
  ListBlocks(const Tiles& tiles, long channels, long taps) {
    const long row_bytes = tiles.vectors * SPK_VECTOR_BYTES;
    words = maximum(1, minimum(words_of(channels), kBlockBytes / (64 * row_bytes)));
    count = (words_of(channels) + words - 1) / words;
    tap_group = taps == 9 && 3 * minimum(channels, words * 64) * row_bytes <= kBlockBytes ? 3 : 1;
  }
};

// Places that fired, one list per token and block of channels; counts repeat a place. `above`: of counts, only how many
// fours are in them.
struct SpikeLists {
  Scratch places, starts;
  long words;
  SpikeLists(const ProductArgs& a, const ListBlocks& b, long tokens)
      : places((tokens * a.channels * (a.counts ? a.max_count : 1) + kListSlack) * sizeof(uint16_t)),
        starts((tokens * b.count + 1) * sizeof(uint32_t)), words(b.words) {}
  void fill(const ProductArgs& a, long first, long last, bool above = false) {
    const long all = words_of(a.channels);
    uint16_t *begin = places.as<uint16_t>(), *end = begin;
    uint32_t* start = starts.as<uint32_t>();
    for (long t = first; t < last; t++)
      for (long w0 = 0; w0 < all; w0 += words) {
        *start++ = (uint32_t)(end - begin);
        if (a.counts) {
          const uint8_t* row = (const uint8_t*)a.input + t * a.channels;
          for (long c = w0 * 64; c < minimum(a.channels, (w0 + words) * 64); c++)
            for (int n = above ? row[c] >> 2 : row[c]; n; n--) *end++ = (uint16_t)c;
        } else {
          const uint64_t* row = (const uint64_t*)a.input + t * all;
          for (long w = w0; w < minimum(all, w0 + words); w++) end = list_ones(row[w], (uint32_t)(w * 64), end);
        }
      }
    *start = (uint32_t)(end - begin);
  }
};

#ifndef SPK_HAS_REGISTER_TABLES
// The two lower bits of counts, one row of words a token.
struct LowerBits {
  Scratch memory;
  long words;
  LowerBits(const ProductArgs& a, long tokens) : memory(tokens * words_of(2 * a.channels) * 8), words(words_of(2 * a.channels)) {}
  void fill(const ProductArgs& a, long first, long last) {
    for (long t = first; t < last; t++)
      lower_bits((const uint8_t*)a.input + t * a.channels, a.channels, memory.as<uint64_t>() + (t - first) * words);
  }
};
#endif

// What one thread does at a time: a chunk of tokens, some tiles.
struct ProductPiece {
  const ProductArgs& a;
  const ListBlocks& b;
  const SpikeLists& lists;
  long list_first, begin, end;
  // What tables read: bits [tokens from `list_first`][words], `per` bits a channel; `above`: lists have come before.
  const uint64_t* bits;
  long per;
  bool above;
};

// Whether tables or shuffles are faster than lists here. The lines were fitted to measured crossings (tables in registers
// and in the cache: an EPYC 9005 with avx512; shuffles: an EPYC 7003 with avx2; docs/performance.md): short lists, of few
// channels, cost more than their additions, and few tokens share a table.
template <bool integer> bool many_fire(const ProductArgs& a, const ListBlocks& b, long begin, long end) {
  const long words = words_of(a.channels);
  const uint64_t* bits = (const uint64_t*)a.input;
  long ones = 0;
  for (long i = begin * words; i < end * words; i++) ones += __builtin_popcountll(bits[i]);
  const double list = (double)minimum(a.channels, b.words * 64);
#ifdef SPK_HAS_REGISTER_TABLES
  constexpr bool in_registers = !integer;
#else
  constexpr bool in_registers = false;
#endif
  const double crossing = a.rows        ? (a.taps == 1 ? 0.17 : 0.2) - 3.5 / list
                          : in_registers ? 0.2 + 10. / (double)minimum(kChunkTokens, end - begin) - 4. / list
                                         : 0.35 - 10. / list;
  return (double)ones > crossing * (double)((end - begin) * a.channels);
}

// f(token, reads): for every token of the piece, reads(g) calls g(tap, source) for each tap of [tap0, tap1) that lies
// inside the picture, `source` being the token that it reads.
template <class F> SPK_INLINE void for_each_token(const ProductPiece& p, long tap0, long tap1, F&& f) {
  const ProductArgs& a = p.a;
  if (a.taps == 1) {
    for (long token = p.begin; token < p.end; token++) f(token, [&](auto&& g) SPK_INLINE_LAMBDA { g(0, token); });
    return;
  }
  long x = p.begin % a.width, y = p.begin / a.width % a.height;
  for (long token = p.begin; token < p.end; token++) {
    f(token, [&](auto&& g) SPK_INLINE_LAMBDA {
      for (long tap = tap0; tap < tap1; tap++) {
        const long dy = tap / 3 - 1, dx = tap % 3 - 1;
        if ((unsigned long)(y + dy) < (unsigned long)a.height && (unsigned long)(x + dx) < (unsigned long)a.width)
          g(tap, token + dy * a.width + dx);
      }
    });
    if (++x == a.width) {
      x = 0;
      if (++y == a.height) y = 0;
    }
  }
}
// The same with the list of block `block` of each source: g(tap, list, count).
template <class F> SPK_INLINE void for_each_list(const ProductPiece& p, long tap0, long tap1, long block, F&& f) {
  const uint16_t* places = p.lists.places.as<uint16_t>();
  const long stride = p.b.count;
  const uint32_t* starts = p.lists.starts.as<uint32_t>() + block - p.list_first * stride;
  for_each_token(p, tap0, tap1, [&](long token, auto&& reads) SPK_INLINE_LAMBDA {
    f(token, [&](auto&& g) SPK_INLINE_LAMBDA {
      reads([&](long tap, long source) SPK_INLINE_LAMBDA {
        const uint32_t* s = starts + source * stride;
        g(tap, places + s[0], (long)(s[1] - s[0]));
      });
    });
  });
}

// ---- tables ---------------------------------------------------------------------------------------------------------

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
template <int NV, class Make, class Pass> SPK_INLINE void for_each_table(const ProductPiece& p, Make&& make, Pass&& pass) {
  constexpr long step = table_groups<NV>() * 4;
  const long inputs = p.a.channels * p.per, words = words_of(inputs);
  const uint64_t* bits = p.bits - p.list_first * words;
  for (long tap = 0; tap < p.a.taps; tap++)
    for (long c0 = 0; c0 < inputs; c0 += step) {
      const long here = minimum(step, inputs - c0), groups = (here + 3) / 4;
      make(tap, c0, groups);
      pass(tap, groups, tap == 0 && c0 == 0, tap + 1 == p.a.taps && c0 + step >= inputs,
           [=](long source) SPK_INLINE_LAMBDA { return cut(bits + source * words, c0, here); });
    }
}

// ---- fp32 -----------------------------------------------------------------------------------------------------------
//
// Weights are 32-bit fixed point, a power of two per output so large that no sum of its weights overflows. Sums are then
// exact: the same whatever the order, so whatever the batch, the threads, the instruction set, lists or tables. What is
// rounded is each weight once, about as much as a float sum of them would round.

// The sums of a chunk wait in `sums` [token][NV], close together: rows of `out` lie far apart, and often in the same sets
// of the cache.
template <int NV> struct FixedToken {
  Int acc[NV], *kept;
  SPK_INLINE FixedToken(Int* sums, long at, bool first, bool above = false) : kept(sums + at * NV) {
    for (int j = 0; j < NV; j++) acc[j] = !first ? kept[j] : above ? kept[j] << 2 : Int{};
  }
  SPK_INLINE void end(const ProductArgs& a, long token, long column, bool last) {
    if (!last) {
      for (int j = 0; j < NV; j++) kept[j] = acc[j];
      return;
    }
    const long width = minimum(NV * FL, a.outputs - column);
    float* o = (float*)a.out + token * a.outputs + column;
    Float::Vector y[NV], other[NV];
    load_tile<NV>(other, a.scale + column, width);
    for (int j = 0; j < NV; j++) y[j] = __builtin_convertvector(acc[j], Float::Vector) * other[j];
    if (a.bias) {
      load_tile<NV>(other, a.bias + column, width);
      for (int j = 0; j < NV; j++) y[j] += other[j];
    }
    if (a.accumulate) {
      load_tile<NV>(other, o, width);
      for (int j = 0; j < NV; j++) y[j] += other[j];
    }
    store_tile<NV>(o, y, width);
  }
};

#ifndef SPK_HAS_REGISTER_TABLES
template <int NV> void float_table_tile(const ProductPiece& p, Int* sums, Int* table, long tile) {
  const ProductArgs& a = p.a;
  const int32_t* packed = (const int32_t*)a.packed + tile * a.taps * a.channels * NV * FL;
  const long shift = p.per - 1;
  for_each_table<NV>(
      p,
      [&](long tap, long c0, long groups) SPK_INLINE_LAMBDA {
        make_tables<NV>(groups, [&](long i, int j) SPK_INLINE_LAMBDA {
          Int v = {};
          const long c = (c0 + i) >> shift;
          if (c < a.channels) memcpy(&v, packed + ((tap * a.channels + c) * NV + j) * FL, sizeof v);
          return v << (int)(i & shift);
        }, table);
      },
      [&](long tap, long groups, bool first, bool last, auto&& bits) SPK_INLINE_LAMBDA {
        for_each_token(p, tap, tap + 1, [&](long token, auto&& reads) SPK_INLINE_LAMBDA {
          FixedToken<NV> sum(sums, token - p.begin, first, p.above);
          reads([&](long, long source) SPK_INLINE_LAMBDA {
            add_table_rows<NV>(sum.acc, table, bits(source), groups);
          });
          sum.end(a, token, tile * NV * FL, last);
        });
      });
}

#endif

template <int NV> void float_list_tile(const ProductPiece& p, Int* sums, long tile) {
  const ProductArgs& a = p.a;
  const int32_t* packed = (const int32_t*)a.packed + tile * a.taps * a.channels * NV * FL;
  for (long tap0 = 0; tap0 < a.taps; tap0 += p.b.tap_group)
    for (long block = 0; block < p.b.count; block++) {
      const long tap1 = minimum(a.taps, tap0 + p.b.tap_group);
      const bool first = tap0 == 0 && block == 0, last = tap1 == a.taps && block + 1 == p.b.count;
      for_each_list(p, tap0, tap1, block, [&](long token, auto&& reads) SPK_INLINE_LAMBDA {
        FixedToken<NV> sum(sums, token - p.begin, first);
        reads([&](long tap, const uint16_t* list, long count) SPK_INLINE_LAMBDA {
          add_rows<NV>(sum.acc, packed + tap * a.channels * NV * FL, list, count);
        });
        sum.end(a, token, tile * NV * FL, last && !p.above);
      });
    }
}

// ---- the integer form -----------------------------------------------------------------------------------------------

// The int16 sums of a chunk's tokens for one tile, and their int32 sums where int16 might not hold them.
struct IntegerSums {
  Scratch shorts, wide, held, spilled;
  explicit IntegerSums(long tokens)
      : shorts(tokens * kTileVectors * sizeof(Short)), wide(2 * tokens * kTileVectors * sizeof(Short)),
        held(tokens * sizeof(uint16_t)), spilled(tokens) {}
};

template <int NV> SPK_INLINE void spill(const Short* acc, Int* wide, bool add) {
  for (int j = 0; j < NV; j++) {
    Int l = low(acc[j]), h = high(acc[j]);
    wide[2 * j] = add ? wide[2 * j] + l : l;
    wide[2 * j + 1] = add ? wide[2 * j + 1] + h : h;
  }
}

template <int NV>
SPK_INLINE void finish_integer(const ProductArgs& a, long token, long column, const Short* acc, const Int* wide, bool spilled) {
  const long width = minimum(NV * SL, a.outputs - column);
  int16_t* o = (int16_t*)a.out + token * a.outputs + column;
  for (int j = 0; j < NV; j++) {
    const long n = minimum(SL, width - j * SL);
    if (n <= 0) break;
    Int l = low(acc[j]), h = high(acc[j]);
    if (spilled) {
      l += wide[2 * j];
      h += wide[2 * j + 1];
    }
    put_currents(a, column + j * SL, n, l, h, a.accumulate, o + j * SL);
  }
}

// One token's sums during a pass: they start at rest or where the last pass left them.
template <int NV> struct IntegerToken {
  Short acc[NV];
  Short* kept;
  Int* wide;
  uint16_t* held;
  uint8_t* spilled;
  long n;  // spikes in acc
  SPK_INLINE IntegerToken(const IntegerSums& sums, long at, bool first)
      : kept(sums.shorts.as<Short>() + at * NV), wide(sums.wide.as<Int>() + at * 2 * NV),
        held(sums.held.as<uint16_t>() + at), spilled(sums.spilled.as<uint8_t>() + at), n(first ? 0 : *held) {
    if (first) {
      for (int j = 0; j < NV; j++) acc[j] = Short{};
      *spilled = 0;
    } else {
      for (int j = 0; j < NV; j++) acc[j] = kept[j];
    }
  }
  SPK_INLINE void empty() {
    spill<NV>(acc, wide, *spilled);
    for (int j = 0; j < NV; j++) acc[j] = Short{};
    *spilled = 1;
    n = 0;
  }
  SPK_INLINE void end(const ProductArgs& a, long token, long column, bool last) {
    if (last) {
      finish_integer<NV>(a, token, column, acc, wide, *spilled);
    } else {
      for (int j = 0; j < NV; j++) kept[j] = acc[j];
      *held = (uint16_t)n;
    }
  }
};

template <int NV> void integer_table_tile(const ProductPiece& p, const IntegerSums& sums, Short* table, long tile) {
  const ProductArgs& a = p.a;
  const long column = tile * NV * SL;
  const int8_t* packed = (const int8_t*)a.packed + tile * a.taps * a.channels * NV * SL;
  for_each_table<NV>(
      p,
      [&](long tap, long c0, long groups) SPK_INLINE_LAMBDA {
        make_tables<NV>(groups, [&](long i, int j) SPK_INLINE_LAMBDA {
          return c0 + i < a.channels ? widen(packed + ((tap * a.channels + c0 + i) * NV + j) * SL) : Short{};
        }, table);
      },
      [&](long tap, long groups, bool first, bool last, auto&& bits) SPK_INLINE_LAMBDA {
        for_each_token(p, tap, tap + 1, [&](long token, auto&& reads) SPK_INLINE_LAMBDA {
          IntegerToken<NV> sum(sums, token - p.begin, first);
          reads([&](long, long source) SPK_INLINE_LAMBDA {
            const uint64_t now = bits(source);
            const long count = __builtin_popcountll(now);
            if (__builtin_expect(sum.n + count > kSafeSpikes, 0)) sum.empty();
            add_table_rows<NV>(sum.acc, table, now, groups);
            sum.n += count;
          });
          sum.end(a, token, column, last);
        });
      });
}

template <int NV> void integer_list_tile(const ProductPiece& p, const IntegerSums& sums, int16_t* rows, long tile) {
  const ProductArgs& a = p.a;
  const long column = tile * NV * SL;
  const int8_t* packed = (const int8_t*)a.packed + tile * a.taps * a.channels * NV * SL;
  for (long tap0 = 0; tap0 < a.taps; tap0 += p.b.tap_group)
    for (long block = 0; block < p.b.count; block++) {
      const long tap1 = minimum(a.taps, tap0 + p.b.tap_group);
      const long c0 = block * p.b.words * 64, c1 = minimum(a.channels, c0 + p.b.words * 64);
      const bool first = tap0 == 0 && block == 0, last = tap1 == a.taps && block + 1 == p.b.count;
      for (long tap = tap0; tap < tap1; tap++)
        for (long i = 0; i < (c1 - c0) * NV; i++) {
          Short v = widen(packed + ((tap * a.channels + c0) * NV + i) * SL);
          memcpy(rows + ((tap - tap0) * (c1 - c0) * NV + i) * SL, &v, sizeof v);
        }
      for_each_list(p, tap0, tap1, block, [&](long token, auto&& reads) SPK_INLINE_LAMBDA {
        IntegerToken<NV> sum(sums, token - p.begin, first);
        reads([&](long tap, const uint16_t* list, long count) SPK_INLINE_LAMBDA {
          const int16_t* from = rows + ((tap - tap0) * (c1 - c0) - c0) * NV * SL;
          while (__builtin_expect(sum.n + count > kSafeSpikes, 0)) {
            const long fits = kSafeSpikes - sum.n;
            add_rows<NV>(sum.acc, from, list, fits);
            sum.empty();
            list += fits;
            count -= fits;
          }
          add_rows<NV>(sum.acc, from, list, count);
          sum.n += count;
        });
        sum.end(a, token, column, last);
      });
    }
}

// How a chunk's product is taken: by lists, by tables (of bits, or of counts' lower bits), shuffled, or multiplied.
enum class Way { lists, tables, shuffles, bytes };
template <bool integer>
Way choose_way(const ProductArgs& a, const ListBlocks& b, const CountRange& counts, long begin, long end) {
  if (!a.counts) return !many_fire<integer>(a, b, begin, end) ? Way::lists : integer && a.rows ? Way::shuffles : Way::tables;
  if (integer) return CountChunk::serves(a) && CountChunk::prefers(counts) ? Way::bytes : Way::lists;
  return counts.mean > kTableMean ? Way::tables : Way::lists;
}

template <bool integer> void product(const ProductArgs& a) {
  const bool shuffled = integer && a.rows;
  const Tiles tiles = product_tiles(a.outputs, integer ? SL : FL);
  const ListBlocks b(tiles, a.channels, a.taps);
  const long tokens = a.images * a.height * a.width;
  // A convolution also lists the rows above and below a chunk: several rows at once keep that share small.
  const long usual = shuffled ? shuffled_chunk(a) : kChunkTokens, most = a.taps == 9 ? maximum(usual, 8 * a.width) : usual;
  const long least = (tokens + most - 1) / most, even = (tokens + maximum(1, least) - 1) / maximum(1, least);
  const long chunk = shuffled ? (even + kChunkGrain - 1) / kChunkGrain * kChunkGrain : even;
  const long chunks = chunk ? (tokens + chunk - 1) / chunk : 0;
  const long reach = a.taps == 9 ? a.width + 1 : 0;
  // Few chunks: several threads share one, so that no thread waits and none walks all weights for a few tokens.
  const long groups = maximum(1, minimum(tiles.count, (4 * a.threads + chunks - 1) / chunks));
#pragma omp parallel num_threads(a.threads)
  {
    SpikeLists lists(a, b, chunk + 2 * reach);
#ifdef SPK_HAS_REGISTER_TABLES
    FloatChunk floats(a, 1, integer ? 0 : chunk);
#else
    LowerBits lower(a, a.counts && !integer ? chunk + 2 * reach : 0);
#endif
    ShuffleChunk shuffle(a, 1, shuffled ? chunk : 0);
    CountChunk bytes(a, 1, integer ? chunk : 0);
    IntegerSums sums(integer ? chunk : 1);
    Scratch fixed_sums(integer ? 0 : chunk * kTileVectors * SPK_VECTOR_BYTES);
    Scratch block(kBlockBytes);  // tables, or rows of int8 weights as int16
    long listed = -1;  // the chunk that `lists` and what follows are about
    Way way = Way::lists;
    bool above = false;
#pragma omp for schedule(dynamic)
    for (long item = 0; item < chunks * groups; item++) {
      const long c = item / groups, group = item % groups;
      const long begin = c * chunk, end = minimum(tokens, begin + chunk);
      const long first = maximum(0, begin - reach), last = minimum(tokens, end + reach);
      const Pixels pixels{begin, end, 1, tokens};
      const uint64_t* bits = (const uint64_t*)a.input + first * words_of(a.channels);
      if (c != listed) {
        listed = c;
        const CountRange counts(a, first, a.counts ? last : first);
        way = choose_way<integer>(a, b, counts, begin, end);
        above = way == Way::tables && counts.largest > 3;
        if (way == Way::lists || above) lists.fill(a, first, last, above);
#ifdef SPK_HAS_REGISTER_TABLES
        if (way == Way::tables && !integer) floats.fill(pixels);
#else
        if (way == Way::tables && a.counts) lower.fill(a, first, last);
#endif
        if (way == Way::shuffles) shuffle.fill(pixels);
        if (way == Way::bytes) bytes.fill(pixels);
      }
      const long tile0 = tiles.count * group / groups, tile1 = tiles.count * (group + 1) / groups;
      if (way == Way::shuffles || way == Way::bytes) {
        const long column = tile0 * tiles.width(), to = minimum(a.outputs, tile1 * tiles.width());
        int16_t* out = (int16_t*)a.out + begin * a.outputs + column;
        if (way == Way::shuffles) shuffle.multiply(pixels, column, to, out, 0, a.outputs, a.accumulate);
        else bytes.multiply(pixels, column, to, out, 0, a.outputs, a.accumulate);
        continue;
      }
#ifndef SPK_HAS_REGISTER_TABLES
      if (a.counts) bits = lower.memory.as<uint64_t>();
#endif
      const ProductPiece piece{a, b, lists, first, begin, end, bits, a.counts ? 2 : 1, above};
      with_vectors<kTileVectors>(tiles.vectors, [&](auto nv) {
        constexpr int NV = nv.value;
        for (long tile = tile0; tile < tile1; tile++) {
          if constexpr (integer) {
            if (way == Way::tables) integer_table_tile<NV>(piece, sums, block.as<Short>(), tile);
            else integer_list_tile<NV>(piece, sums, block.as<int16_t>(), tile);
          } else {
            if (way == Way::lists || above) float_list_tile<NV>(piece, fixed_sums.as<Int>(), tile);
#ifdef SPK_HAS_REGISTER_TABLES
            const long column = tile * NV * FL, to = minimum(a.outputs, column + NV * FL);
            float* out = (float*)a.out + begin * a.outputs + column;
            if (way == Way::tables)
              floats.multiply(pixels, column, to, out, 0, a.outputs, a.accumulate, above ? fixed_sums.as<Int>() : nullptr, NV);
#else
            if (way == Way::tables) float_table_tile<NV>(piece, fixed_sums.as<Int>(), block.as<Int>(), tile);
#endif
          }
        }
      });
    }
  }
}

}  // namespace
