// Places that fired, as lists, and walks over a chunk's tokens and what they read.
#pragma once
#include "product_args.h"

namespace {

constexpr long kBlockBytes = 48 * 1024;  // of weights or tables: a first-level cache (measured, EPYC 9005)
constexpr long kChunkTokens = 512;

// How a chunk's product is taken: by lists, by tables (of bits, or of counts' lower bits), shuffled, or multiplied.
enum class Way { lists, tables, shuffles, bytes };

// What counts of the tokens [begin, end) look like.
struct CountRange {
  int largest = 0;
  double mean = 0;
  CountRange(const ProductArgs& a, long begin, long end) {
    const uint8_t* c = (const uint8_t*)a.input + begin * a.channels;
    const long n = (end - begin) * a.channels;
    long total = 0;
    for (long i = 0; i < n; i += 4096) {
      uint32_t sum = 0;
      uint8_t most = 0;
      for (long j = i; j < minimum(n, i + 4096); j++) {
        sum += c[j];
        most = c[j] > most ? c[j] : most;
      }
      total += sum;
      largest = most > largest ? most : largest;
    }
    mean = n ? (double)total / (double)n : 0;
  }
};

// How lists walk a tile's weights.
struct ListBlocks {
  long words, count, tap_group;  // 64-channel words in a block of channels, such blocks, taps in a block
  ListBlocks(const Tiles& tiles, long channels, long taps) {
    const long row_bytes = tiles.vectors * SPK_VECTOR_BYTES;
    words = maximum(1, minimum(words_of(channels), kBlockBytes / (64 * row_bytes)));
    count = (words_of(channels) + words - 1) / words;
    tap_group = taps == 9 && 3 * minimum(channels, words * 64) * row_bytes <= kBlockBytes ? 3 : 1;
  }
  double list(long channels) const { return (double)minimum(channels, words * 64); }  // inputs that a list is about
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

// The share of inputs of the tokens [begin, end) that fired; input: bits.
inline double firing_share(const ProductArgs& a, long begin, long end) {
  const long words = words_of(a.channels);
  const uint64_t* bits = (const uint64_t*)a.input;
  long ones = 0;
  for (long i = begin * words; i < end * words; i++) ones += __builtin_popcountll(bits[i]);
  return (double)ones / (double)((end - begin) * a.channels);
}

// What one thread does at a time: a chunk of tokens, some tiles.
struct ProductPiece {
  const ProductArgs& a;
  const ListBlocks& b;
  const SpikeLists& lists;
  long begin, end, first, last, total;  // tokens: those whose sums are taken, those that these read, all
  bool above = false;                   // tables take the lower bits of counts, after lists of what lies above

  Pixels pixels() const { return {begin, end, 1, total}; }
  const uint64_t* bits() const { return (const uint64_t*)a.input + first * words_of(a.channels); }
};

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
  const uint32_t* starts = p.lists.starts.as<uint32_t>() + block - p.first * stride;
  for_each_token(p, tap0, tap1, [&](long token, auto&& reads) SPK_INLINE_LAMBDA {
    f(token, [&](auto&& g) SPK_INLINE_LAMBDA {
      reads([&](long tap, long source) SPK_INLINE_LAMBDA {
        const uint32_t* s = starts + source * stride;
        g(tap, places + s[0], (long)(s[1] - s[0]));
      });
    });
  });
}

}  // namespace
