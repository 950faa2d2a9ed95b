// Gradient of a 3x3 convolution (stride 1, padding 1) with respect to its input, channels last: the convolution of the
// output's gradient with the flipped kernel, by Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308): 16
// multiplications a pair of channels for 4 pixels instead of 36.
//
// A tile is 2x2 pixels of the result. Of some tiles at a time, the 4x4 pixels around each are transformed (`spread`), the
// 16 places multiply each their own matrix of transformed weights, and 16 products of a tile give its four pixels (`mix`).
#include "dense_rows.h"

namespace {

typedef Float::Vector V;
constexpr long L = Float::lanes;
constexpr long kWidth = kDenseWidth;
constexpr long kRows = SPK_VECTOR_BYTES == 64 ? 12 : 6;  // tiles at once: their sums fill the registers
constexpr long kTileBytes = 256 * 1024, kMostTiles = 48;  // of a block's transforms (measured, EPYC 7003)

struct Shape {
  long images, height, width, inputs, outputs;  // inputs: channels of the gradient that comes in
  long tiles_y() const { return (height + 1) / 2; }
  long tiles_x() const { return (width + 1) / 2; }
  long panels() const { return (outputs + kWidth - 1) / kWidth; }
  long tiles_of_block() const {
    const long fit = kTileBytes / (16 * 4 * (inputs + outputs)) / kRows * kRows;
    return maximum(2 * kRows, minimum(kMostTiles, fit));
  }
};

// One column or row of the transforms; in place in d[0], d[step], d[2 step], d[3 step].
SPK_INLINE void spread(V* d, long step) {
  const V a = d[0] - d[2 * step], b = d[step] + d[2 * step], c = d[2 * step] - d[step], e = d[step] - d[3 * step];
  d[0] = a, d[step] = b, d[2 * step] = c, d[3 * step] = e;
}
SPK_INLINE void mix(V* m, long step) {
  const V a = m[0] + m[step] + m[2 * step], b = m[step] - m[2 * step] - m[3 * step];
  m[0] = a, m[step] = b;
}

// weight (inputs, outputs, 3, 3) contiguous, taps flipped -> [place][panel][input][kWidth].
void transform_weights(const Shape& s, const float* weight, float* to, int threads) {
  const long panels = s.panels();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long panel = 0; panel < panels; panel++)
    for (long i = 0; i < s.inputs; i++)
      for (long n = 0; n < kWidth; n++) {
        const long o = panel * kWidth + n;
        float g[3][3] = {}, rows[4][3];
        if (o < s.outputs)
          for (long tap = 0; tap < 9; tap++) g[tap / 3][tap % 3] = weight[(i * s.outputs + o) * 9 + 8 - tap];
        for (long x = 0; x < 3; x++) {
          rows[0][x] = g[0][x];
          rows[1][x] = 0.5f * (g[0][x] + g[1][x] + g[2][x]);
          rows[2][x] = 0.5f * (g[0][x] - g[1][x] + g[2][x]);
          rows[3][x] = g[2][x];
        }
        for (long y = 0; y < 4; y++) {
          const float *r = rows[y], all[4] = {r[0], 0.5f * (r[0] + r[1] + r[2]), 0.5f * (r[0] - r[1] + r[2]), r[2]};
          for (long x = 0; x < 4; x++) to[(((y * 4 + x) * panels + panel) * s.inputs + i) * kWidth + n] = all[x];
        }
      }
}

// kRows tiles (rows of `from`, `pitch` apart) times one panel of weights.
SPK_INLINE void multiply(const float* from, long pitch, const float* weights, long inputs, float* to, long to_pitch) {
  V sums[kRows][2] = {};
  add_products<kRows>(sums, from, pitch, 1, weights, kWidth, inputs);
#pragma GCC unroll 12
  for (long r = 0; r < kRows; r++) {
    store<Float>(to + r * to_pitch, sums[r][0]);
    store<Float>(to + r * to_pitch + L, sums[r][1]);
  }
}

struct Place {
  long image, y, x;  // a tile's first pixel
};
SPK_INLINE Place place_of(const Shape& s, long tile) {
  return {tile / (s.tiles_y() * s.tiles_x()), tile / s.tiles_x() % s.tiles_y() * 2, tile % s.tiles_x() * 2};
}

void input_gradient(const Shape& s, const float* grad, const float* weight, float* result, int threads) {
  const long panels = s.panels(), tiles = s.images * s.tiles_y() * s.tiles_x(), block = s.tiles_of_block();
  const long in_pitch = (s.inputs + L - 1) / L * L, out_pitch = panels * kWidth;
  Scratch weight_memory(16 * panels * s.inputs * kWidth * sizeof(float));
  float* transformed = weight_memory.as<float>();
  transform_weights(s, weight, transformed, threads);
#pragma omp parallel num_threads(threads)
  {
    Scratch memory(16 * block * (in_pitch + out_pitch) * sizeof(float));
    memset(memory.memory, 0, 16 * block * in_pitch * sizeof(float));  // rows past the last tile are multiplied too
    float *from = memory.as<float>(), *to = from + 16 * block * in_pitch;
#pragma omp for schedule(static)
    for (long first = 0; first < tiles; first += block) {
      const long here = minimum(block, tiles - first);
      for (long tile = 0; tile < here; tile++) {
        const Place p = place_of(s, first + tile);
        for_each_vector<L>(s.inputs, [&](long c, long m) SPK_INLINE_LAMBDA {
          V d[16];
          for (long y = 0; y < 4; y++)
            for (long x = 0; x < 4; x++) {
              const long yy = p.y + y - 1, xx = p.x + x - 1;
              const bool inside = yy >= 0 && yy < s.height && xx >= 0 && xx < s.width;
              const float* at = grad + ((p.image * s.height + yy) * s.width + xx) * s.inputs + c;
              d[y * 4 + x] = !inside ? V{} : m == L ? load<Float>(at) : load_part<Float>(at, m);
            }
          for (long x = 0; x < 4; x++) spread(d + x, 4);
          for (long y = 0; y < 4; y++) spread(d + y * 4, 1);
          for (long i = 0; i < 16; i++) store<Float>(from + (i * block + tile) * in_pitch + c, d[i]);
        });
      }
      for (long i = 0; i < 16; i++)
        for (long panel = 0; panel < panels; panel++)
          for (long tile = 0; tile < here; tile += kRows)
            multiply(from + (i * block + tile) * in_pitch, in_pitch,
                     transformed + (i * panels + panel) * s.inputs * kWidth, s.inputs,
                     to + (i * block + tile) * out_pitch + panel * kWidth, out_pitch);
      for (long tile = 0; tile < here; tile++) {
        const Place p = place_of(s, first + tile);
        for_each_vector<L>(s.outputs, [&](long c, long m) SPK_INLINE_LAMBDA {
          V d[16];
          for (long i = 0; i < 16; i++) d[i] = load<Float>(to + (i * block + tile) * out_pitch + c);
          for (long x = 0; x < 4; x++) mix(d + x, 4);
          for (long y = 0; y < 2; y++) mix(d + y * 4, 1);
          for (long y = 0; y < 2 && p.y + y < s.height; y++)
            for (long x = 0; x < 2 && p.x + x < s.width; x++) {
              float* at = result + ((p.image * s.height + p.y + y) * s.width + p.x + x) * s.outputs + c;
              if (m == L) store<Float>(at, d[y * 4 + x]);
              else store_part<Float>(at, d[y * 4 + x], m);
            }
        });
      }
    }
  }
}

}  // namespace

// grad [images][height][width][inputs], weight (inputs, outputs, 3, 3) contiguous -> result [images][height][width][outputs].
SPK_EXPORT(conv3x3_input_gradient)(const float* grad, const float* weight, float* result, long images, long height,
                                   long width, long inputs, long outputs, int threads) {
  input_gradient({images, height, width, inputs, outputs}, grad, weight, result, threads);
}
