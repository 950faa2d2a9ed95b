// The integer form's first product: a dense 3x3 convolution (stride 1, padding 1) of pictures rounded to int16.
//
// As in stem.cpp, the 3 C numbers that a row of the kernel reads lie side by side, those of the next pixel C further on.
// They are multiplied in pairs; where 3 C is odd, the last pair's second weight is 0.
#include "pictures.h"
#include "product_args.h"

namespace {

constexpr long kBand = 8;    // rows of pixels in one unit of work
constexpr long kPixels = 4;  // at once: their sums and a tile of weights fill the registers
constexpr long kStemVectors = SPK_VECTOR_BYTES == 64 ? 4 : 3;

struct IntegerStem {
  const int16_t* weight;  // [3 rows][pairs][padded outputs][2]
  const float *scale, *bias;
  long images, height, width, channels, outputs, padded;
  int16_t* out;
  long bands() const { return (height + kBand - 1) / kBand; }
  long pairs() const { return (3 * channels + 1) / 2; }
  long pitch() const { return (width + 2 + kPixels) * channels + 2; }  // of a row; zeros behind the last pixel
};

// To the nearest, halves to even, within int16
SPK_INLINE int16_t to_short(float v) {
  v = v < 32767.f ? v : 32767.f;
  v = v > -32768.f ? v : -32768.f;
  return (int16_t)__builtin_lrintf(v);
}

// Sums of products of neighbouring int16 lanes.
SPK_INLINE Int multiply_pairs(Short a, Short b) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  return (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  Int sum;
  for (long i = 0; i < FL; i++) sum[i] = (int)a[2 * i] * b[2 * i] + (int)a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

// Currents of kPixels pixels, `count` of which are written to out + pixel * outputs, and NV vectors of outputs.
template <int NV>
SPK_INLINE void stem_tile(const IntegerStem& s, const int16_t* rows, long column, long count, int16_t* out) {
  Int sums[kPixels][NV];
#pragma GCC unroll 4
  for (long r = 0; r < kPixels; r++)
    for (int j = 0; j < NV; j++) sums[r][j] = Int{};
  const int16_t* weight = s.weight + column * 2;
  for (long ky = 0; ky < 3; ky++, rows += s.pitch())
    for (long pair = 0; pair < s.pairs(); pair++, weight += s.padded * 2) {
      Short w[NV];
      for (int j = 0; j < NV; j++) w[j] = load_short(weight + j * SL);
#pragma GCC unroll 4
      for (long r = 0; r < kPixels; r++) {
        int32_t two;
        memcpy(&two, rows + r * s.channels + 2 * pair, sizeof two);
        const Short both = (Short)(two - (Int){});
        for (int j = 0; j < NV; j++) sums[r][j] += multiply_pairs(both, w[j]);
      }
    }
  for (long r = 0; r < count; r++)
    for (int j = 0; j < NV; j++) {
      const long place = column + j * FL, n = minimum(FL, s.outputs - place);
      if (n <= 0) break;
      const ShortHalf h = __builtin_convertvector(requantize(sums[r][j], s.scale + place, s.bias + place, n), ShortHalf);
      if (n == FL) memcpy(out + r * s.outputs + place, &h, sizeof h);
      else memcpy(out + r * s.outputs + place, &h, n * 2);
    }
}

void integer_stem(const IntegerStem& s, const Pictures<float>& x, float one, int threads) {
  const Tiles tiles(s.outputs, FL, kStemVectors);
  const long pitch = s.pitch();
#pragma omp parallel num_threads(threads)
  {
    Scratch memory((kBand + 2) * pitch * sizeof(int16_t));  // rows with zeros around
    int16_t* band = memory.as<int16_t>();
    memset(band, 0, (kBand + 2) * pitch * sizeof(int16_t));
#pragma omp for schedule(static)
    for (long item = 0; item < s.images * s.bands(); item++) {
      const long image = item / s.bands(), y0 = item % s.bands() * kBand, rows = minimum(kBand, s.height - y0);
      x.copy_band(image, y0, rows, s.height, s.width, s.channels, band, pitch, [&](float v) { return to_short(v * one); });
      with_vectors<kStemVectors>(tiles.vectors, [&](auto nv) {
        for (long y = 0; y < rows; y++)
          for (long first = 0; first < s.width; first += kPixels)
            for (long tile = 0; tile < tiles.count; tile++)
              stem_tile<nv.value>(s, band + y * pitch + first * s.channels, tile * tiles.width(),
                                  minimum(kPixels, s.width - first),
                                  s.out + ((image * s.height + y0 + y) * s.width + first) * s.outputs);
      });
    }
  }
}

}  // namespace

// x: images x channels x height x width, at any strides, in units of 1 / `one`
SPK_EXPORT(engine_integer_stem)(const float* x, long image, long channel, long row, long column, float one,
                                const int16_t* weight, const float* scale, const float* bias, long images, long height,
                                long width, long channels, long outputs, long padded, int16_t* out, int threads) {
  integer_stem({weight, scale, bias, images, height, width, channels, outputs, padded, out},
               {x, image, channel, row, column}, one, threads);
}
