// The fp32 product of spikes and weights, and what packs both for it. Layouts: spike_product.h.
#include "spike_product.h"

#include <cmath>

namespace {

void pack_spikes(const float* spikes, long rows, long channels, uint64_t* bits, int64_t* ones, int32_t* not_binary,
                 int threads) {
  constexpr long L = Float::lanes;
  const long words = words_of(channels);
  int64_t total = 0;
  int32_t bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total) reduction(| : bad)
  for (long r = 0; r < rows; r++) {
    const float* row = spikes + r * channels;
    for (long w = 0; w < words; w++) {
      uint64_t word = 0;
      long end = minimum(64, channels - w * 64);
      Float::Integer wrong = {};
      for (long i = 0; i < end; i += L) {
        long m = minimum(L, end - i);
        Float::Vector v = m == L ? load<Float>(row + w * 64 + i) : load_part<Float>(row + w * 64 + i, m);
        Float::Integer one = v == splat<Float>(1);
        wrong |= (v != splat<Float>(0)) & ~one;
        word |= (uint64_t)lane_bits(one) << i;
      }
      bits[r * words + w] = word;
      total += __builtin_popcountll(word);
      bad |= lane_bits(wrong) != 0;
    }
  }
  *ones = total;
  *not_binary = bad;
}

void unpack_spikes(const uint64_t* bits, long rows, long channels, float* spikes, int threads) {
  const long words = words_of(channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long r = 0; r < rows; r++)
    for (long c = 0; c < channels; c++) spikes[r * channels + c] = (float)((bits[r * words + c / 64] >> (c & 63)) & 1);
}

// weight (outputs, channels, taps) with any strides -> fixed point [tile][tap][channel][tile width], zeros past the last
// output, and what a unit of each output is worth. Where a weight is not finite, neither are that output's currents.
void pack_weight(const float* weight, long stride_output, long stride_channel, long stride_tap, long outputs,
                 long channels, long taps, int32_t* packed, float* scale, int threads) {
  const Tiles tiles = product_tiles(outputs, FL);
  const long width = tiles.width(), block = 16, blocks = (width + block - 1) / block;
  Scratch unit_memory(tiles.count * width * sizeof(double));
  double* units = unit_memory.as<double>();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long o = 0; o < tiles.count * width; o++) {
      double total = 0;
      if (o < outputs)
        for (long c = 0; c < channels; c++)
          for (long tap = 0; tap < taps; tap++)
            total += fabs((double)weight[o * stride_output + c * stride_channel + tap * stride_tap]);
      int exponent = 0;
      const bool finite = total <= 1e300;
      if (finite) frexp(total, &exponent);  // total < 2^exponent; rounding adds at most half a unit a weight: a bit is left
      const int shift = minimum(30 - exponent, 120);
      units[o] = finite && total > 0 ? ldexp(1., shift) : 0;
      if (o < outputs) scale[o] = finite ? (float)ldexp(1., -shift) : NAN;
    }
#pragma omp for schedule(static) collapse(2)
    for (long tile = 0; tile < tiles.count; tile++)
      for (long b = 0; b < blocks; b++) {
        const long n0 = b * block, n1 = minimum(width, n0 + block);
        for (long c0 = 0; c0 < channels; c0 += block)
          for (long tap = 0; tap < taps; tap++)
            for (long c = c0; c < minimum(channels, c0 + block); c++) {
              int32_t* to = packed + ((tile * taps + tap) * channels + c) * width;
              for (long n = n0; n < n1; n++) {
                const long o = tile * width + n;
                const double unit = units[o];
                to[n] = unit ? (int32_t)nearbyint((double)weight[o * stride_output + c * stride_channel + tap * stride_tap] * unit)
                             : 0;
              }
            }
      }
  }
}

}  // namespace

SPK_EXPORT(pack_spikes)(const float* spikes, long rows, long channels, uint64_t* bits, int64_t* ones,
                        int32_t* not_binary, int threads) {
  pack_spikes(spikes, rows, channels, bits, ones, not_binary, threads);
}
SPK_EXPORT(unpack_spikes)(const uint64_t* bits, long rows, long channels, float* spikes, int threads) {
  unpack_spikes(bits, rows, channels, spikes, threads);
}
// *size = numbers that pack_weight writes
SPK_EXPORT(packed_size)(long outputs, long channels, long taps, int64_t* size) {
  const Tiles tiles = product_tiles(outputs, FL);
  *size = tiles.count * tiles.width() * channels * taps;
}
SPK_EXPORT(pack_weight)(const float* weight, long stride_output, long stride_channel, long stride_tap, long outputs,
                        long channels, long taps, int32_t* packed, float* scale, int threads) {
  pack_weight(weight, stride_output, stride_channel, stride_tap, outputs, channels, taps, packed, scale, threads);
}
SPK_EXPORT(product_forward)(const uint64_t* bits, const int32_t* packed, const float* scale, const float* bias, float* out,
                            long images, long height, long width, long channels, long outputs, long taps, int threads) {
  product<FloatProduct>({bits, packed, scale, bias, out, images, height, width, channels, outputs, taps, 0, 0, 1, threads});
}
