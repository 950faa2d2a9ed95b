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

constexpr long kTileVectors = SPK_VECTOR_BYTES == 64 ? 4 : 8;  // of sums held in registers: a tile of outputs
Tiles product_tiles(long outputs, long lanes) { return Tiles(outputs, lanes, kTileVectors); }

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
