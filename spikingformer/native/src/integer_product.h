// The integer product of a chunk of tokens and a tile of outputs (spike_product.h): lists, and tables in the cache.
#pragma once
#include "cached_tables.h"
#include "count_product.h"
#include "shuffle_product.h"

namespace {

constexpr long kSafeSpikes = 258;  // 258 * 127 < 2^15: that many int8 weights cannot overflow an int16 sum

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
      p, {p.bits(), 1},
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

// Tokens of a chunk for shuffles: more share a table, fewer keep the indices of many inputs in the second-level cache.
SPK_INLINE long shuffled_chunk(const ProductArgs& a) { return (a.taps * a.channels > 512 ? 2 : 4) * kChunkTokens; }
constexpr long kShuffleGrain = 128;  // tokens that shuffles take at once

// What one thread needs for a chunk of tokens.
struct IntegerProduct {
  static constexpr long lanes = SL;
  static long chunk(const ProductArgs& a) { return a.rows ? shuffled_chunk(a) : kChunkTokens; }
  static long grain(const ProductArgs& a) { return a.rows ? kShuffleGrain : 1; }

  ShuffleChunk shuffle;
  CountChunk bytes;
  IntegerSums sums;
  Scratch block;  // tables, or rows of weights as int16
  IntegerProduct(const ProductArgs& a, long chunk, long)
      : shuffle(a, 1, a.rows ? chunk : 0), bytes(a, 1, chunk), sums(chunk), block(kBlockBytes) {}

  // Crossings are lines fitted to measured ones (shuffles: EPYC 7003, avx2; tables: EPYC 9005, avx512;
  // docs/performance.md): short lists, of few channels, cost more than their additions.
  static Way choose(const ProductArgs& a, const ListBlocks& b, const CountRange& counts, long begin, long end) {
    if (a.counts) return CountChunk::serves(a) && CountChunk::prefers(counts) ? Way::bytes : Way::lists;
    const double list = b.list(a.channels), crossing = a.rows ? (a.taps == 1 ? 0.17 : 0.2) - 3.5 / list : 0.35 - 10 / list;
    return firing_share(a, begin, end) <= crossing ? Way::lists : a.rows ? Way::shuffles : Way::tables;
  }

  void fill(const ProductPiece& p, Way way) {
    if (way == Way::shuffles) shuffle.fill(p.pixels());
    if (way == Way::bytes) bytes.fill(p.pixels());
  }

  void multiply(const ProductPiece& p, Way way, const Tiles& tiles, long tile, long last_tile) {
    const ProductArgs& a = p.a;
    if (way == Way::shuffles || way == Way::bytes) {
      const long first = tile * tiles.width(), last = minimum(a.outputs, last_tile * tiles.width());
      int16_t* out = (int16_t*)a.out + p.begin * a.outputs + first;
      if (way == Way::shuffles) shuffle.multiply(p.pixels(), first, last, out, 0, a.outputs, a.accumulate);
      else bytes.multiply(p.pixels(), first, last, out, 0, a.outputs, a.accumulate);
      return;
    }
    with_vectors<kTileVectors>(tiles.vectors, [&](auto nv) {
      for (; tile < last_tile; tile++) {
        if (way == Way::tables) integer_table_tile<nv.value>(p, sums, block.as<Short>(), tile);
        else integer_list_tile<nv.value>(p, sums, block.as<int16_t>(), tile);
      }
    });
  }
};

}  // namespace
