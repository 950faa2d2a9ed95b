// What a product of spikes and weights is called with; layouts: spike_product.h.
#pragma once
#include "shorts.h"

namespace {

struct ProductArgs {
  const void* input;  // bits (uint64 words) or counts (uint8)
  const void* packed;
  const float* scale;  // what a unit of an output's sum is worth
  const float* bias;   // the fp32 form takes none as zeros
  void* out;
  int64_t images, height, width, channels, outputs, taps;
  int32_t counts, accumulate, max_count, threads;
  const void* rows = nullptr;  // integer form: `PackedRows` of shuffle_weights.h, or none
};

// The pixels [begin, end) of all images at each of `steps` time steps, in units of 16: unit = t * units + i.
constexpr long kUnit = 16;
SPK_INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }
struct Pixels {
  long begin, end, steps, total;  // total: pixels of a time step
  long units() const { return (end - begin + kUnit - 1) / kUnit; }
  long tokens() const { return steps * units() * kUnit; }
  long first(long unit) const { return begin + unit % units() * kUnit; }  // its first pixel
  long step(long unit) const { return unit / units(); }
  long count(long unit) const { return minimum(kUnit, end - first(unit)); }
};

// Which tokens of a chunk have a pixel above, below, left and right of them; one bit a token.
struct Neighbours {
  long blocks;
  Scratch memory;
  explicit Neighbours(long blocks) : blocks(blocks), memory(4 * blocks * sizeof(uint64_t)) {}
  void find(long height, long width, long first, long here) {
    uint64_t* masks = memory.as<uint64_t>();
    memset(masks, 0, 4 * blocks * sizeof(uint64_t));
    long x = first % width, y = first / width % height;
    for (long i = 0; i < here; i++) {
      const uint64_t bit = 1ull << (i & 63);
      uint64_t* at = masks + i / 64 * 4;
      at[0] |= y > 0 ? bit : 0;
      at[1] |= y + 1 < height ? bit : 0;
      at[2] |= x > 0 ? bit : 0;
      at[3] |= x + 1 < width ? bit : 0;
      if (++x == width) x = 0, y = y + 1 == height ? 0 : y + 1;
    }
  }
  uint64_t has(long block, long dy, long dx) const {
    const uint64_t* at = memory.as<uint64_t>() + block * 4;
    return (dy ? at[dy > 0] : ~0ull) & (dx ? at[2 + (dx > 0)] : ~0ull);
  }
};

// The two lower bits of a token's counts, side by side.
SPK_INLINE void lower_bits(const uint8_t* counts, long channels, uint64_t* to) {
  memset(to, 0, words_of(2 * channels) * 8);
  for (long c = 0; c < channels; c += 8) {
    uint64_t v = 0;
    memcpy(&v, counts + c, minimum(8, channels - c));
    v &= 0x0303030303030303;
    v = (v | v >> 6) & 0x000f000f000f000f;
    v = (v | v >> 12) & 0x000000ff000000ff;
    v = (v | v >> 24) & 0xffff;
    to[c / 32] |= v << (2 * (c % 32));
  }
}

constexpr long kTileVectors = SPK_VECTOR_BYTES == 64 ? 4 : 8;  // of sums held in registers: a tile of outputs
Tiles product_tiles(long outputs, long lanes) { return Tiles(outputs, lanes, kTileVectors); }

// Groups of tiles that threads take one by one. Few chunks of tokens: several threads share one, about eight groups each,
// so that none waits long for the others and none walks all weights for a few tokens.
SPK_INLINE long groups_of_tiles(long tiles, long chunks, long threads) {
  if (chunks >= 4 * threads) return 1;
  const long tiles_of_group = maximum(1, tiles * chunks / (8 * threads));
  return (tiles + tiles_of_group - 1) / tiles_of_group;
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

// The sums `l` and `h` of n <= SL outputs from `column` on, as currents to `out`.
SPK_INLINE void put_currents(const ProductArgs& a, long column, long n, Int l, Int h, bool accumulate, int16_t* out) {
  l = requantize(l, a.scale + column, a.bias + column, minimum(FL, n));
  h = requantize(h, a.scale + column + FL, a.bias + column + FL, minimum(FL, n - FL));
  if (accumulate) {
    const Short before = n == SL ? load_short(out) : load_short(out, n);
    l = clamp_int(l + low(before), -32768, 32767);
    h = clamp_int(h + high(before), -32768, 32767);
  }
  const Short result = join(l, h);
  if (n == SL) memcpy(out, &result, sizeof result);
  else memcpy(out, &result, n * 2);
}

}  // namespace
