// The stem's dense 3x3 convolution (stride 1, padding 1) of few channels, channels last: output and weight gradient.
//
// With channels last, the three pixels that a row of the kernel reads are 3 C numbers in a row, and those of the next pixel
// start C further on: rows of pixels with a border of zeros are matrices already, and nothing is rearranged.
#include "dense_rows.h"
#include "pictures.h"

namespace {

typedef Float::Vector V;
constexpr long L = Float::lanes;
constexpr long kWidth = kDenseWidth;
constexpr long kRows = 6;        // pixels (or weights of the gradient) at once: their sums fill the registers
constexpr long kBand = 8;        // rows of pixels in one unit of work

struct Shape {
  long images, height, width, channels, outputs;
  long bands() const { return (height + kBand - 1) / kBand; }
  long panels() const { return (outputs + kWidth - 1) / kWidth; }
  long reads() const { return 3 * channels; }                         // numbers that a row of the kernel reads
  long pitch() const { return (width + 2 + kRows) * channels + kRows; }  // of a row; some more zeros for the last block
};

// Rows [y0 - 1, y0 + rows + 1) of an image, channels last, with zeros around: `band` was cleared before.
void copy_band(const Shape& s, const Pictures<float>& x, long image, long y0, long rows, float* band) {
  x.copy_band(image, y0, rows, s.height, s.width, s.channels, band, s.pitch(), [](float v) { return v; });
}
void clear_band(const Shape& s, float* band) { memset(band, 0, (kBand + 2) * s.pitch() * sizeof(float)); }

// weight (outputs, channels, 3, 3) -> [panel][ky][kx][channel][kWidth], zeros past the last output.
void pack(const Shape& s, const float* weight, float* packed) {
  for (long panel = 0; panel < s.panels(); panel++)
    for (long tap = 0; tap < 9; tap++)
      for (long c = 0; c < s.channels; c++)
        for (long n = 0; n < kWidth; n++) {
          const long o = panel * kWidth + n;
          *packed++ = o < s.outputs ? weight[(o * s.channels + c) * 9 + tap] : 0;
        }
}

void forward(const Shape& s, const Pictures<float>& x, const float* weight, const float* bias, float* out, int threads) {
  const long panels = s.panels(), reads = s.reads(), pitch = s.pitch();
  Scratch weight_memory(panels * 3 * reads * kWidth * sizeof(float)), bias_memory(panels * kWidth * sizeof(float));
  float *packed = weight_memory.as<float>(), *biases = bias_memory.as<float>();
  pack(s, weight, packed);
  for (long o = 0; o < panels * kWidth; o++) biases[o] = bias && o < s.outputs ? bias[o] : 0;
#pragma omp parallel num_threads(threads)
  {
    Scratch memory((kBand + 2) * pitch * sizeof(float));
    float* band = memory.as<float>();
    clear_band(s, band);
#pragma omp for schedule(static)
    for (long item = 0; item < s.images * s.bands(); item++) {
      const long image = item / s.bands(), y0 = item % s.bands() * kBand, rows = minimum(kBand, s.height - y0);
      copy_band(s, x, image, y0, rows, band);
      for (long y = 0; y < rows; y++)
        for (long first = 0; first < s.width; first += kRows)
          for (long panel = 0; panel < panels; panel++) {
            V sums[kRows][2];
            for (long r = 0; r < kRows; r++) {
              sums[r][0] = load<Float>(biases + panel * kWidth);
              sums[r][1] = load<Float>(biases + panel * kWidth + L);
            }
            const float* w = packed + panel * 3 * reads * kWidth;
            for (long ky = 0; ky < 3; ky++) {
              add_products<kRows>(sums, band + (y + ky) * pitch + first * s.channels, s.channels, 1, w, kWidth, reads);
              w += reads * kWidth;
            }
            const long o = panel * kWidth, lanes = minimum(kWidth, s.outputs - o);
            for (long r = 0; r < minimum(kRows, s.width - first); r++) {
              float* to = out + ((image * s.height + y0 + y) * s.width + first + r) * s.outputs + o;
              if (lanes == kWidth) store<Float>(to, sums[r][0]), store<Float>(to + L, sums[r][1]);
              else memcpy(to, sums[r], lanes * sizeof(float));
            }
          }
    }
  }
}

// gradient [ky][3 C][outputs] += x times the output's gradient, summed over all pixels; doubles a thread, then together.
void weight_gradient(const Shape& s, const Pictures<float>& x, const float* grad, float* gradient, int threads) {
  const long panels = s.panels(), reads = s.reads(), pitch = s.pitch(), size = 3 * reads * s.outputs;
  Scratch all(threads * size * sizeof(double));
  memset(all.memory, 0, threads * size * sizeof(double));
#pragma omp parallel num_threads(threads)
  {
    Scratch memory((kBand + 2) * pitch * sizeof(float)), row_memory(s.width * panels * kWidth * sizeof(float));
    float *band = memory.as<float>(), *row = row_memory.as<float>();
    clear_band(s, band);
    memset(row, 0, s.width * panels * kWidth * sizeof(float));
    double* mine = all.as<double>() + omp_get_thread_num() * size;
#pragma omp for schedule(static)
    for (long item = 0; item < s.images * s.bands(); item++) {
      const long image = item / s.bands(), y0 = item % s.bands() * kBand, rows = minimum(kBand, s.height - y0);
      copy_band(s, x, image, y0, rows, band);
      for (long y = 0; y < rows; y++) {
        const float* from_row = grad + (image * s.height + y0 + y) * s.width * s.outputs;
        const bool whole = s.outputs % kWidth == 0;
        if (!whole)  // outputs padded to whole panels
          for (long p = 0; p < s.width; p++) memcpy(row + p * panels * kWidth, from_row + p * s.outputs, s.outputs * sizeof(float));
        const float* gradients = whole ? from_row : row;
        for (long panel = 0; panel < panels; panel++)
          for (long ky = 0; ky < 3; ky++)
            for (long i0 = 0; i0 < reads; i0 += kRows) {
              V sums[kRows][2] = {};
              add_products<kRows>(sums, band + (y + ky) * pitch + i0, 1, s.channels, gradients + panel * kWidth,
                                  panels * kWidth, s.width);
              for (long r = 0; r < minimum(kRows, reads - i0); r++) {
                float row_sums[kWidth];
                memcpy(row_sums, sums[r], sizeof row_sums);
                double* to = mine + (ky * reads + i0 + r) * s.outputs + panel * kWidth;
                for (long n = 0; n < minimum(kWidth, s.outputs - panel * kWidth); n++) to[n] += row_sums[n];
              }
            }
      }
    }
  }
  for (long i = 0; i < size; i++) {
    double sum = 0;
    for (long t = 0; t < threads; t++) sum += all.as<double>()[t * size + i];
    gradient[i] = (float)sum;
  }
}

}  // namespace

// x: images x channels x height x width, at any strides; weight (outputs, channels, 3, 3), bias or null
// -> out [images][height][width][outputs]
SPK_EXPORT(stem_forward)(const float* x, long image, long channel, long row, long column, const float* weight,
                         const float* bias, float* out, long images, long height, long width, long channels, long outputs,
                         int threads) {
  forward({images, height, width, channels, outputs}, {x, image, channel, row, column}, weight, bias, out, threads);
}
// x as in stem_forward; gradient: [3][3][channels][outputs]
SPK_EXPORT(stem_weight_gradient)(const float* x, long image, long channel, long row, long column, const float* grad,
                                 float* gradient, long images, long height, long width, long channels, long outputs,
                                 int threads) {
  weight_gradient({images, height, width, channels, outputs}, {x, image, channel, row, column}, grad, gradient, threads);
}
