// The float32 product of a chunk of tokens and a tile of outputs (spike_product.h): lists, and tables.
//
// Weights are 32-bit fixed point, a power of two per output so large that no sum of its weights overflows. Sums are then
// exact: the same whatever the order, so whatever the batch, the threads, the instruction set, lists or tables. What is
// rounded is each weight once, about as much as a float sum of them would round.
#pragma once
#include "cached_tables.h"
#include "float_tables.h"

namespace {

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

// Tables for a chunk of tokens, those of `reach` pixels around it read as well: in registers where there are such.
#ifdef SPK_HAS_REGISTER_TABLES
struct FloatTables {
  static constexpr bool in_registers = true;
  FloatChunk chunk;
  FloatTables(const ProductArgs& a, long tokens, long) : chunk(a, 1, tokens) {}
  void fill(const ProductPiece& p) { chunk.fill(p.pixels()); }

  template <int NV> void multiply(const ProductPiece& p, Int* sums, long tile) {
    const long first = tile * NV * FL, last = minimum(p.a.outputs, first + NV * FL);
    float* out = (float*)p.a.out + p.begin * p.a.outputs + first;
    chunk.multiply(p.pixels(), first, last, out, 0, p.a.outputs, p.a.accumulate, p.above ? sums : nullptr, NV);
  }
};
#else
struct FloatTables {
  static constexpr bool in_registers = false;
  Scratch lower, tables;  // the two lower bits of counts, [tokens][words]; a block of tables
  FloatTables(const ProductArgs& a, long tokens, long reach)
      : lower(a.counts && tokens ? (tokens + 2 * reach) * words_of(2 * a.channels) * sizeof(uint64_t) : 0),
        tables(tokens ? kBlockBytes : 0) {}

  void fill(const ProductPiece& p) {
    if (!p.a.counts) return;
    uint64_t* to = lower.as<uint64_t>();
    for (long t = p.first; t < p.last; t++, to += words_of(2 * p.a.channels))
      lower_bits((const uint8_t*)p.a.input + t * p.a.channels, p.a.channels, to);
  }

  template <int NV> void multiply(const ProductPiece& p, Int* sums, long tile) {
    const ProductArgs& a = p.a;
    const int32_t* packed = (const int32_t*)a.packed + tile * a.taps * a.channels * NV * FL;
    const TableInputs in = a.counts ? TableInputs{lower.as<uint64_t>(), 2} : TableInputs{p.bits(), 1};
    const long shift = in.per - 1;
    Int* table = tables.as<Int>();
    for_each_table<NV>(
        p, in,
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
};
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

constexpr double kTableMean = 0.5;  // counts above it go through tables (measured: EPYC 7003, avx2)

// What one thread needs for a chunk of tokens.
struct FloatProduct {
  static constexpr long lanes = FL;
  static long chunk(const ProductArgs&) { return kChunkTokens; }
  static long grain(const ProductArgs&) { return 1; }

  FloatTables tables;
  Scratch sums;
  FloatProduct(const ProductArgs& a, long chunk, long reach)
      : tables(a, chunk, reach), sums(chunk * kTileVectors * SPK_VECTOR_BYTES) {}

  // Crossings are lines fitted to measured ones (EPYC 9005, avx512; docs/performance.md): short lists, of few channels,
  // cost more than their additions, and few tokens share a table.
  static Way choose(const ProductArgs& a, const ListBlocks& b, const CountRange& counts, long begin, long end) {
    if (a.counts) return counts.mean > kTableMean ? Way::tables : Way::lists;
    const double tokens = (double)minimum(kChunkTokens, end - begin);
    const double crossing =
        FloatTables::in_registers ? 0.2 + 10 / tokens - 4 / b.list(a.channels) : 0.35 - 10 / b.list(a.channels);
    return firing_share(a, begin, end) > crossing ? Way::tables : Way::lists;
  }

  void fill(const ProductPiece& p, Way way) {
    if (way == Way::tables) tables.fill(p);
  }

  void multiply(const ProductPiece& p, Way way, const Tiles& tiles, long tile, long last_tile) {
    with_vectors<kTileVectors>(tiles.vectors, [&](auto nv) {
      for (; tile < last_tile; tile++) {
        if (way == Way::lists || p.above) float_list_tile<nv.value>(p, sums.as<Int>(), tile);
        if (way == Way::tables) tables.template multiply<nv.value>(p, sums.as<Int>(), tile);
      }
    });
  }
};

}  // namespace
