// Products of spikes and weights: linear and 3x3 convolution (stride 1, padding 1). A spike adds one row of weights.
//
// Tokens are pixels of one time step, row by row; spikes are bits [tokens][words_of(C)], or counts of spikes [tokens][C].
// Weights are packed [tile][tap][C][tile width]: a linear product has one tap, a convolution nine, tap (dy, dx) reading
// the pixel at (y+dy-1, x+dx-1). A block of them (some taps, some channels, one tile) that fits the first-level cache
// serves a whole chunk of tokens before the next block is touched; the chunk's sums wait in the second-level cache.
#pragma once
#include "shorts.h"

namespace {

constexpr long kBlockBytes = 32 * 1024;  // of weights: what a first-level cache holds beside the sums passing through
constexpr long kBlockVectors = SPK_VECTOR_BYTES == 64 ? 4 : 8;  // sums held in registers
constexpr long kChunkTokens = 512;
constexpr long kSafeSpikes = 258;  // 258 * 127 < 2^15: that many int8 weights cannot overflow an int16 sum

struct ProductArgs {
  const void* input;  // bits (uint64 words) or counts (uint8)
  const void* packed;
  const float* scale;  // integer form only
  const float* bias;   // the fp32 form takes none as zeros
  void* out;
  int64_t images, height, width, channels, outputs, taps;
  int32_t counts, accumulate, max_count, threads;
};

// Outputs in tiles of equal width, channels and taps in blocks.
struct ProductBlocks {
  long tiles, vectors;           // vectors of `lanes` outputs in a tile
  long words, blocks, tap_group;  // 64-channel words in a block of channels, such blocks, taps in a block
  ProductBlocks(long outputs, long channels, long taps, long lanes) {
    const long all = (outputs + lanes - 1) / lanes;
    tiles = maximum(1, (all + kBlockVectors - 1) / kBlockVectors);
    vectors = maximum(1, (all + tiles - 1) / tiles);
    const long row_bytes = vectors * SPK_VECTOR_BYTES;
    words = maximum(1, minimum(words_of(channels), kBlockBytes / (64 * row_bytes)));
    blocks = (words_of(channels) + words - 1) / words;
    tap_group = maximum(1, minimum(taps, kBlockBytes / (minimum(channels, words * 64) * row_bytes)));
  }
};

// Places that fired, one list per token and block of channels; counts repeat a place.
struct SpikeLists {
  Scratch places, starts;
  long words, blocks, filled_first = -1;
  SpikeLists(const ProductArgs& a, const ProductBlocks& b, long tokens)
      : places((tokens * a.channels * (a.counts ? a.max_count : 1) + kListSlack) * sizeof(uint16_t)),
        starts((tokens * b.blocks + 1) * sizeof(uint32_t)), words(b.words), blocks(b.blocks) {}
  void fill(const ProductArgs& a, long first, long last) {
    if (filled_first == first) return;
    filled_first = first;
    const long all = words_of(a.channels);
    uint16_t *begin = places.as<uint16_t>(), *end = begin;
    uint32_t* start = starts.as<uint32_t>();
    for (long t = first; t < last; t++)
      for (long w0 = 0; w0 < all; w0 += words) {
        *start++ = (uint32_t)(end - begin);
        if (a.counts) {
          const uint8_t* row = (const uint8_t*)a.input + t * a.channels;
          for (long c = w0 * 64; c < minimum(a.channels, (w0 + words) * 64); c++)
            for (int n = row[c]; n; n--) *end++ = (uint16_t)c;
        } else {
          const uint64_t* row = (const uint64_t*)a.input + t * all;
          for (long w = w0; w < minimum(all, w0 + words); w++) end = list_ones(row[w], (uint32_t)(w * 64), end);
        }
      }
    *start = (uint32_t)(end - begin);
  }
};

// What one thread does at a time: a chunk of tokens, some tiles.
struct ProductPiece {
  const ProductArgs& a;
  const ProductBlocks& b;
  const SpikeLists& lists;
  long list_first, begin, end;
};

// f(token, reads): for every token of the piece, reads(g) gives each list of block `block` of the taps [tap0, tap1) as
// g(tap, list, count).
template <class F> SPK_INLINE void for_each_token(const ProductPiece& p, long tap0, long tap1, long block, F&& f) {
  const ProductArgs& a = p.a;
  const uint16_t* places = p.lists.places.as<uint16_t>();
  const uint32_t* starts = p.lists.starts.as<uint32_t>() + block - p.list_first * p.b.blocks;
  const long stride = p.b.blocks;
  if (a.taps == 1) {
    for (long token = p.begin; token < p.end; token++)
      f(token, [&](auto&& g) SPK_INLINE_LAMBDA {
        const uint32_t* s = starts + token * stride;
        g(0, places + s[0], (long)(s[1] - s[0]));
      });
    return;
  }
  long x = p.begin % a.width, y = p.begin / a.width % a.height;
  for (long token = p.begin; token < p.end; token++) {
    f(token, [&](auto&& g) SPK_INLINE_LAMBDA {
      for (long tap = tap0; tap < tap1; tap++) {
        const long dy = tap / 3 - 1, dx = tap % 3 - 1;
        if ((unsigned long)(y + dy) >= (unsigned long)a.height || (unsigned long)(x + dx) >= (unsigned long)a.width) continue;
        const uint32_t* s = starts + (token + dy * a.width + dx) * stride;
        g(tap, places + s[0], (long)(s[1] - s[0]));
      }
    });
    if (++x == a.width) {
      x = 0;
      if (++y == a.height) y = 0;
    }
  }
}

template <int NV> void float_tile(const ProductPiece& p, long tile) {
  const ProductArgs& a = p.a;
  const long column = tile * NV * FL, width = minimum(NV * FL, a.outputs - column);
  const float* packed = (const float*)a.packed + tile * a.taps * a.channels * NV * FL;
  for (long tap0 = 0; tap0 < a.taps; tap0 += p.b.tap_group)
    for (long block = 0; block < p.b.blocks; block++) {
      const bool first = tap0 == 0 && block == 0;
      for_each_token(p, tap0, minimum(a.taps, tap0 + p.b.tap_group), block, [&](long token, auto&& reads) SPK_INLINE_LAMBDA {
        Float::Vector acc[NV];
        float* o = (float*)a.out + token * a.outputs + column;
        if (!first || a.accumulate) load_tile<NV>(acc, o, width);
        else
          for (int j = 0; j < NV; j++) acc[j] = Float::Vector{};
        if (first && a.bias) {
          Float::Vector bias[NV];
          load_tile<NV>(bias, a.bias + column, width);
          for (int j = 0; j < NV; j++) acc[j] += bias[j];
        }
        reads([&](long tap, const uint16_t* list, long count) SPK_INLINE_LAMBDA {
          add_rows<NV>(acc, packed + tap * a.channels * NV * FL, list, count);
        });
        store_tile<NV>(o, acc, width);
      });
    }
}

// fp32 sum * scale + bias, rounded to the nearest even, within int16
SPK_INLINE Int requantize(Int sum, const float* scale, const float* bias, long n) {
  Float::Vector s = n == FL ? load<Float>(scale) : load_part<Float>(scale, maximum(0, n));
  Float::Vector b = n == FL ? load<Float>(bias) : load_part<Float>(bias, maximum(0, n));
  Float::Vector y = __builtin_convertvector(sum, Float::Vector) * s;
  y = y + b;
  y = select<Float>(y < splat<Float>(-32768.f), splat<Float>(-32768.f), y);
  y = select<Float>(y > splat<Float>(32767.f), splat<Float>(32767.f), y);
  return (Int)(y + 12582912.f) - 0x4b400000;
}

// The int16 sums of a chunk's tokens for one tile, and their int32 sums where int16 might not hold them.
struct IntegerSums {
  Scratch shorts, wide, held, spilled, rows;
  explicit IntegerSums(long tokens)
      : shorts(tokens * kBlockVectors * sizeof(Short)), wide(2 * tokens * kBlockVectors * sizeof(Short)),
        held(tokens * sizeof(uint16_t)), spilled(tokens), rows(kBlockBytes + 16 * SPK_VECTOR_BYTES) {}
};

template <int NV>
SPK_INLINE void add_short_rows(Short* sums, const int16_t* rows, const uint16_t* list, long count) {
  Short acc[NV];  // locals: through the caller's reference they would live in memory, at four times the cost
  for (int j = 0; j < NV; j++) acc[j] = sums[j];
  for (long i = 0; i < count; i++) {
    const int16_t* row = rows + (size_t)list[i] * (NV * SL);
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) acc[j] += load_short(row + j * SL);
  }
  for (int j = 0; j < NV; j++) sums[j] = acc[j];
}

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
    const long n = minimum(SL, width - j * SL), place = column + j * SL;
    if (n <= 0) break;
    Int l = low(acc[j]), h = high(acc[j]);
    if (spilled) {
      l += wide[2 * j];
      h += wide[2 * j + 1];
    }
    l = requantize(l, a.scale + place, a.bias + place, minimum(FL, n));
    h = requantize(h, a.scale + place + FL, a.bias + place + FL, minimum(FL, n - FL));
    if (a.accumulate) {
      Short before = n == SL ? load_short(o + j * SL) : load_short(o + j * SL, n);
      l = clamp_int(l + low(before), -32768, 32767);
      h = clamp_int(h + high(before), -32768, 32767);
    }
    Short result = join(l, h);
    if (n == SL) memcpy(o + j * SL, &result, sizeof result);
    else memcpy(o + j * SL, &result, n * 2);
  }
}

template <int NV> void integer_tile(const ProductPiece& p, const IntegerSums& sums, long tile) {
  const ProductArgs& a = p.a;
  const long column = tile * NV * SL;
  const int8_t* packed = (const int8_t*)a.packed + tile * a.taps * a.channels * NV * SL;
  int16_t* rows = sums.rows.as<int16_t>();
  uint16_t* held = sums.held.as<uint16_t>();
  uint8_t* spilled = sums.spilled.as<uint8_t>();
  for (long tap0 = 0; tap0 < a.taps; tap0 += p.b.tap_group)
    for (long block = 0; block < p.b.blocks; block++) {
      const long tap1 = minimum(a.taps, tap0 + p.b.tap_group);
      const long c0 = block * p.b.words * 64, c1 = minimum(a.channels, c0 + p.b.words * 64);
      const bool first = tap0 == 0 && block == 0, last = tap1 == a.taps && block + 1 == p.b.blocks;
      for (long tap = tap0; tap < tap1; tap++)
        for (long i = 0; i < (c1 - c0) * NV; i++) {
          Short v = widen(packed + (tap * a.channels + c0) * NV * SL + i * SL);
          memcpy(rows + ((tap - tap0) * (c1 - c0) * NV + i) * SL, &v, sizeof v);
        }
      for_each_token(p, tap0, tap1, block, [&](long token, auto&& reads) SPK_INLINE_LAMBDA {
        const long at = token - p.begin;
        Short acc[NV], *kept = sums.shorts.as<Short>() + at * NV;
        Int* wide = sums.wide.as<Int>() + at * 2 * NV;
        long n = 0;
        if (first) {
          for (int j = 0; j < NV; j++) acc[j] = Short{};
          spilled[at] = 0;
        } else {
          for (int j = 0; j < NV; j++) acc[j] = kept[j];
          n = held[at];
        }
        reads([&](long tap, const uint16_t* list, long count) SPK_INLINE_LAMBDA {
          const int16_t* from = rows + ((tap - tap0) * (c1 - c0) - c0) * NV * SL;
          while (__builtin_expect(n + count > kSafeSpikes, 0)) {
            const long fits = kSafeSpikes - n;
            add_short_rows<NV>(acc, from, list, fits);
            spill<NV>(acc, wide, spilled[at]);
            for (int j = 0; j < NV; j++) acc[j] = Short{};
            spilled[at] = 1;
            list += fits;
            count -= fits;
            n = 0;
          }
          add_short_rows<NV>(acc, from, list, count);
          n += count;
        });
        if (last) {
          finish_integer<NV>(a, token, column, acc, wide, spilled[at]);
        } else {
          for (int j = 0; j < NV; j++) kept[j] = acc[j];
          held[at] = (uint16_t)n;
        }
      });
    }
}

template <bool integer> void product(const ProductArgs& a) {
  const ProductBlocks b(a.outputs, a.channels, a.taps, integer ? SL : FL);
  const long tokens = a.images * a.height * a.width;
  // A convolution also lists the rows above and below a chunk: several rows at once keep that share small.
  const long most = a.taps == 9 ? maximum(kChunkTokens, 8 * a.width) : kChunkTokens;
  const long chunks = (tokens + most - 1) / most, chunk = (tokens + chunks - 1) / chunks;
  const long reach = a.taps == 9 ? a.width + 1 : 0;
  // Few chunks: several threads share one, so that no thread waits and none walks all weights for a few tokens.
  const long groups = maximum(1, minimum(b.tiles, (4 * a.threads + chunks - 1) / chunks));
#pragma omp parallel num_threads(a.threads)
  {
    SpikeLists lists(a, b, chunk + 2 * reach);
    IntegerSums sums(integer ? chunk : 1);
#pragma omp for schedule(dynamic)
    for (long item = 0; item < chunks * groups; item++) {
      const long c = item / groups, group = item % groups;
      const long begin = c * chunk, end = minimum(tokens, begin + chunk);
      const long list_first = maximum(0, begin - reach);
      lists.fill(a, list_first, minimum(tokens, end + reach));
      const ProductPiece piece{a, b, lists, list_first, begin, end};
      with_vectors(b.vectors, [&](auto nv) {
        constexpr int NV = nv.value;
        if constexpr (NV <= kBlockVectors)
          for (long tile = b.tiles * group / groups; tile < b.tiles * (group + 1) / groups; tile++) {
            if constexpr (integer) integer_tile<NV>(piece, sums, tile);
            else float_tile<NV>(piece, tile);
          }
      });
    }
  }
}

}  // namespace
