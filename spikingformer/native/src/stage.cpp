// The pointwise stage between two products: BatchNorm, residual, max-pool, LIF over all time steps, channels last.
//
//   z = (y - mean) * scale + bias [+ residual]      scale = weight / sqrt(variance + eps)
//   pool 0: s = LIF(z)      pool 1 ("cml"): s = LIF(maxpool(z))      pool 2 ("sps"): s = maxpool(LIF(z))
//
// y is [Ty, B, H, W, C] with Ty = T, or 1 for a still picture whose current is the same at every step.
// Pools are 3x3, stride 2, padding 1; of equal maxima the first in reading order gets the gradient.
// The backward computes currents and membranes again from y, so y is all that a stage keeps.
#include "batch_norm.h"

namespace {

struct StageArgs {
  int64_t y_steps, batch, height, width, channels;
  int32_t pool, threads;
};
struct Stage {
  long T, Ty, B, H, W, C, OH, OW, step, pooled_step;  // step: values in one time step
  int pool, threads;
  Stage(const NeuronArgs& n, const StageArgs& a)
      : T(n.steps), Ty(a.y_steps), B(a.batch), H(a.height), W(a.width), C(a.channels), OH((H + 1) / 2),
        OW((W + 1) / 2), step(B * H * W * C), pooled_step(B * OH * OW * C), pool(a.pool), threads(a.threads) {}
};

// Largest current of a window, where it lies (tap = 3 ky + kx) and the y there.
template <class E> struct Peak {
  typename E::Arithmetic::Vector y;
  typename E::Arithmetic::Integer tap;
};
template <class E, bool want_tap = true>
SPK_INLINE Peak<E> find_peak(const Stage& g, const typename E::type* image, long oy, long ox, long c, long m,
                             typename E::Arithmetic::Vector sign) {
  typedef typename E::Arithmetic A;
  Peak<E> peak = {};
  typename A::Vector best = {}, start = {};
  bool first = true;
  for (int ky = 0; ky < 3; ky++) {
    long yy = 2 * oy - 1 + ky;
    if (yy < 0 || yy >= g.H) continue;
    for (int kx = 0; kx < 3; kx++) {
      long xx = 2 * ox - 1 + kx;
      if (xx < 0 || xx >= g.W) continue;
      typename A::Vector value = get_part<E>(image + (yy * g.W + xx) * g.C + c, m);
      typename A::Vector key = value * sign;
      typename A::Integer better = first ? (typename A::Integer){} - 1 : (typename A::Integer)(key > best);
      if (first) start = value;
      best = select<A>(better, key, best);
      if (want_tap) {
        const typename A::Vector here = (typename A::Vector)((typename A::Integer){} + (ky * 3 + kx));
        peak.tap = (typename A::Integer)select<A>(better, here, (typename A::Vector)peak.tap);
      }
      first = false;
    }
  }
  // The sign is 1, -1 or 0; for 0 all currents are equal, and the first one counts.
  peak.y = select<A>(sign * sign > splat<A>(0), best * sign, start);
  return peak;
}
template <class A> SPK_INLINE typename A::Vector sign_of(typename A::Vector v) {
  return only_where<A>(v > splat<A>(0), splat<A>(1)) - only_where<A>(v < splat<A>(0), splat<A>(1));
}

template <class A> SPK_INLINE void put_bytes(uint8_t* p, typename A::Integer v, long m) {
#if SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
  if (A::lanes == 8) {
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(shorts, shorts));
    memcpy(p, &bytes, m);
    return;
  }
#endif
  typedef uint8_t Bytes __attribute__((vector_size(A::lanes)));
  Bytes b = __builtin_convertvector(v, Bytes);
  memcpy(p, &b, m);
}
template <class A> SPK_INLINE typename A::Integer get_bytes(const uint8_t* p, long m) {
#if SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
  if (A::lanes == 8 && m == 8) return (typename A::Integer)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#endif
  typedef uint8_t Bytes __attribute__((vector_size(A::lanes)));
  Bytes b = {};
  memcpy(&b, p, m);
  return __builtin_convertvector(b, typename A::Integer);
}

// The pooled windows that pixel (y, x) lies in: where each starts in [OH, OW, C], and as which of its taps.
struct Windows {
  int count = 0, tap[4];
  long at[4];
  Windows(const Stage& g, long y, long x) {
    for (long oy = y / 2; oy <= (y + 1) / 2 && oy < g.OH; oy++)
      for (long ox = x / 2; ox <= (x + 1) / 2 && ox < g.OW; ox++) {
        at[count] = (oy * g.OW + ox) * g.C;
        tap[count++] = (int)((y + 1 - 2 * oy) * 3 + x + 1 - 2 * ox);
      }
  }
};
// Gradient that pooled values [OH, OW, C] (one image, one step) send to a pixel of the unpooled picture.
template <class E>
SPK_INLINE typename E::Arithmetic::Vector gather(const Windows& windows, const typename E::type* grad, const uint8_t* taps,
                                                 long c, long m) {
  typedef typename E::Arithmetic A;
  typename A::Vector sum = {};
  for (int w = 0; w < windows.count; w++) {
    const long at = windows.at[w] + c;
    typename A::Integer mine = get_bytes<A>(taps + at, m) == (typename A::Integer){} + windows.tap[w];
    sum += only_where<A>(mine, get_part<E>(grad + at, m));
  }
  return sum;
}

// Neurons of one row of output pixels, some columns at a time: all of a time step before the next, so that memory is read
// in order. Values of a block are [column][C padded to whole vectors].
template <class E> struct Block {
  typedef typename E::Arithmetic A;
  typedef typename A::Scalar S;
  static constexpr long L = A::lanes;
  const long pitch, columns;  // of a block, at most
  Block(const Stage& g, long columns_of_row, long bytes)
      : pitch((g.C + L - 1) / L * L), columns(maximum(1, minimum(columns_of_row, bytes / (pitch * (long)sizeof(S))))) {}
  long size() const { return columns * pitch; }
};
template <long L, class F> SPK_INLINE void for_each_place(const Stage& g, long pitch, long column0, long column1, F f) {
  const long channels = g.C;
  for (long column = column0; column < column1; column++)
    for_each_vector<L>(channels, [=](long c, long m) SPK_INLINE_LAMBDA { f(column, c, m, (column - column0) * pitch + c); });
}

template <class E>
void stage_forward(const NeuronArgs& args, const StageArgs& stage_args, const typename E::type* y,
                   const typename E::type* residual, const Affine<typename E::type>& shared_affine, typename E::type* spikes,
                   typename E::type* current, uint8_t* fired_bytes) {
  typedef typename E::Arithmetic A;
  typedef typename A::Vector V;
  typedef typename A::Scalar S;
  constexpr long L = A::lanes;
  const Stage shared(args, stage_args);
#pragma omp parallel num_threads(shared.threads)
  {
    // Copies that no store can alias, here and in the closures: they stay in registers.
    const Stage g = shared;
    const Neuron<A> neuron(args);
    const Affine<typename E::type> affine = shared_affine;
    const bool cml = g.pool == 1;
    const long rows = g.B * (cml ? g.OH : g.H), columns = cml ? g.OW : g.W, z_step = cml ? g.pooled_step : g.step;
    const Block<E> block(g, columns, 16384);
    Scratch memory(2 * block.size() * sizeof(S));
    S *membrane = memory.as<S>(), *held = membrane + block.size();
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++)
      for (long column0 = 0; column0 < columns; column0 += block.columns)
        for (long t = 0; t < g.T; t++)
          for_each_place<L>(g, block.pitch, column0, minimum(columns, column0 + block.columns),
                            [=](long column, long c, long m, long place) SPK_INLINE_LAMBDA {
            const long at = (row * columns + column) * g.C + c;
            V x;
            if (t < g.Ty) {
              const Channel<E> channel(affine, c, m);
              if (cml) {
                const typename E::type* image = y + t * g.step + row / g.OH * g.H * g.W * g.C;
                x = channel.current(find_peak<E, false>(g, image, row % g.OH, column, c, m, sign_of<A>(channel.scale)).y);
              } else {
                x = channel.current(get_part<E>(y + t * g.step + at, m));
                if (residual) x += get_part<E>(residual + t * g.step + at, m);
                if (current) put_part<E>(current + t * g.step + at, x, m);
              }
              if (g.Ty < g.T) store<A>(held + place, x);
            } else {
              x = load<A>(held + place);
            }
            V h = neuron.charge(t ? load<A>(membrane + place) : splat<A>(neuron.v_rest), x);
            auto fired = neuron.fires(h);
            if (g.pool == 2) put_bytes<A>(fired_bytes + t * g.step + at, fired & 1, m);
            else put_part<E>(spikes + t * z_step + at, only_where<A>(fired, splat<A>(1)), m);
            store<A>(membrane + place, neuron.reset(h, fired));
          });
  }
}

// Pools spikes held as bytes: the pooled spikes (or null) and the tap of the first maximum (or null).
template <class E>
void pool_bytes(const NeuronArgs& args, const StageArgs& stage_args, const uint8_t* fired, typename E::type* spikes,
                uint8_t* taps) {
  const Stage g(args, stage_args);
#pragma omp parallel for num_threads(g.threads) schedule(static)
  for (long row = 0; row < g.T * g.B * g.OH; row++) {
    const long oy = row % g.OH;
    const uint8_t* image = fired + row / g.OH * g.H * g.W * g.C;
    for (long ox = 0; ox < g.OW; ox++) {
      const long at = (row * g.OW + ox) * g.C;
      const long y0 = maximum(0, 2 * oy - 1), y1 = minimum(g.H, 2 * oy + 2);
      const long x0 = maximum(0, 2 * ox - 1), x1 = minimum(g.W, 2 * ox + 2);
      for (long c = 0; c < g.C; c++) {
        uint8_t tap = (uint8_t)((y0 - 2 * oy + 1) * 3 + x0 - 2 * ox + 1), value = 0;
        for (long yy = y0; yy < y1; yy++)
          for (long xx = x0; xx < x1; xx++) {
            uint8_t one = image[(yy * g.W + xx) * g.C + c];
            uint8_t here = (uint8_t)((yy - 2 * oy + 1) * 3 + xx - 2 * ox + 1);
            tap = one > value ? here : tap;
            value |= one;
          }
        if (spikes) spikes[at + c] = (typename E::type)value;
        if (taps) taps[at + c] = tap;
      }
    }
  }
}

// Pass 1: gradient of the currents, and its sums over all positions, plain and times (y - mean).
//   pool 1: grad_z is pooled [Ty, B, OH, OW, C] and `taps` is written; else grad_z is [Ty, B, H, W, C] and, for
//   pool 2, `taps` is read and grad_spikes is pooled.
template <class E>
void stage_backward(const NeuronArgs& args, const StageArgs& stage_args, const typename E::type* y,
                    const typename E::type* residual, const Affine<typename E::type>& shared_affine,
                    const typename E::type* grad_spikes, const typename E::type* grad_current,
                    typename E::type* grad_z, uint8_t* taps, double* sums) {
  typedef typename E::Arithmetic A;
  typedef typename A::Vector V;
  typedef typename A::Scalar S;
  constexpr long L = A::lanes;
  const Stage shared(args, stage_args);
  const ThreadSums all(2 * shared.C, shared.threads);
  with_surrogate(args.surrogate, [&](auto kind) {
#pragma omp parallel num_threads(shared.threads)
    {
      const Stage g = shared;
      const Neuron<A> neuron(args);
      const Affine<typename E::type> affine = shared_affine;
      const bool cml = g.pool == 1;
      const long rows = g.B * (cml ? g.OH : g.H), columns = cml ? g.OW : g.W;
      const long z_step = cml ? g.pooled_step : g.step;
      const Block<E> block(g, columns, 65536 / (g.T + g.Ty));
      const long size = block.size();
      Scratch memory(((g.T + g.Ty + 2) * size + 2 * block.pitch) * sizeof(S));
      S *charges = memory.as<S>(), *peaks = charges + g.T * size, *carry = peaks + g.Ty * size, *held = carry + size;
      S *row_sum = held + size, *row_sum_y = row_sum + block.pitch;
      double* my_sums = all.mine();
#pragma omp for schedule(static)
      for (long row = 0; row < rows; row++) {
        memset(row_sum, 0, 2 * block.pitch * sizeof(S));
        for (long column0 = 0; column0 < columns; column0 += block.columns) {
          const long column1 = minimum(columns, column0 + block.columns);
          // carry: the membrane on the way forward, its gradient on the way back
          for (long t = 0; t < g.T; t++)
            for_each_place<L>(g, block.pitch, column0, column1,
                              [=](long column, long c, long m, long place) SPK_INLINE_LAMBDA {
              const long at = (row * columns + column) * g.C + c;
              V x;
              if (t < g.Ty) {
                const Channel<E> channel(affine, c, m);
                V here;
                if (cml) {
                  const typename E::type* image = y + t * g.step + row / g.OH * g.H * g.W * g.C;
                  const Peak<E> peak = find_peak<E>(g, image, row % g.OH, column, c, m, sign_of<A>(channel.scale));
                  put_bytes<A>(taps + t * z_step + at, peak.tap, m);
                  here = peak.y;
                } else {
                  here = get_part<E>(y + t * g.step + at, m);
                }
                store<A>(peaks + t * size + place, here);
                x = channel.current(here);
                if (residual) x += get_part<E>(residual + t * g.step + at, m);
                if (g.Ty < g.T) store<A>(held + place, x);
              } else {
                x = load<A>(held + place);
              }
              const V h = neuron.charge(t ? load<A>(carry + place) : splat<A>(neuron.v_rest), x);
              store<A>(charges + t * size + place, h);
              store<A>(carry + place, neuron.reset(h, neuron.fires(h)));
            });
          memset(carry, 0, 2 * size * sizeof(S));  // held: the sum over the steps that share one current
          for (long t = g.T - 1; t >= 0; t--)
            for_each_place<L>(g, block.pitch, column0, column1,
                              [=](long column, long c, long m, long place) SPK_INLINE_LAMBDA {
              const long at = (row * columns + column) * g.C + c;
              V grad;
              if (g.pool == 2) {
                const long image = (t * g.B + row / g.H) * g.OH * g.OW * g.C;
                grad = gather<E>(Windows(g, row % g.H, column), grad_spikes + image, taps + image, c, m);
              } else {
                grad = get_part<E>(grad_spikes + t * z_step + at, m);
              }
              const V grad_h = neuron.template grad_charge<kind.value>(load<A>(charges + t * size + place), grad,
                                                                       load<A>(carry + place));
              const V share = neuron.over_tau(grad_h);
              store<A>(carry + place, grad_h - share);
              V total = neuron.decay ? share : grad_h;
              if (g.Ty < g.T) {
                total += load<A>(held + place);
                store<A>(held + place, total);
              }
              if (t >= g.Ty) return;
              if (grad_current) total += get_part<E>(grad_current + t * z_step + at, m);
              put_part<E>(grad_z + t * z_step + at, total, m);
              const V centred = load<A>(peaks + t * size + place) - get_part<E>(affine.mean + c, m);
              store<A>(row_sum + c, load<A>(row_sum + c) + total);
              store<A>(row_sum_y + c, load<A>(row_sum_y + c) + total * centred);
            });
        }
        for (long c = 0; c < g.C; c++) {
          my_sums[c] += row_sum[c];
          my_sums[g.C + c] += row_sum_y[c];
        }
      }
    }
  });
  for (long c = 0; c < 2 * shared.C; c++) sums[c] = all.total(c);
}

// Pass 2: grad_y = scale * grad_z + slope * (y - mean) + offset, the last two zero where the statistics are fixed.
template <class E>
void normalisation_backward(const NeuronArgs& args, const StageArgs& stage_args, const typename E::type* y,
                            const typename E::type* mean, const typename E::type* scale, const typename E::type* slope,
                            const typename E::type* offset, const typename E::type* grad_z, const uint8_t* taps,
                            typename E::type* grad_y) {
  typedef typename E::Arithmetic A;
  typedef typename A::Vector V;
  constexpr long L = A::lanes;
  const Stage shared(args, stage_args);
#pragma omp parallel num_threads(shared.threads)
  {
    // Copies that no store can alias: they stay in registers.
    const Stage g = shared;
    const typename E::type *y_ = y, *mean_ = mean, *scale_ = scale, *slope_ = slope, *offset_ = offset;
#pragma omp for schedule(static)
    for (long row = 0; row < g.Ty * g.B * g.H; row++)
      for (long x = 0; x < g.W; x++) {
        const Windows windows(g, row % g.H, x);
        const long image = row / g.H * g.OH * g.OW * g.C, pixel = (row * g.W + x) * g.C;
        const typename E::type* from = grad_z + (g.pool == 1 ? image : pixel);
        const uint8_t* tap = taps + (g.pool == 1 ? image : 0);
        typename E::type* to = grad_y + pixel;
        for_each_vector<L>(g.C, [=](long c, long m) SPK_INLINE_LAMBDA {
          const V grad = g.pool == 1 ? gather<E>(windows, from, tap, c, m) : get_part<E>(from + c, m);
          const V centred = get_part<E>(y_ + pixel + c, m) - get_part<E>(mean_ + c, m);
          put_part<E>(to + c,
                      get_part<E>(scale_ + c, m) * grad + get_part<E>(slope_ + c, m) * centred + get_part<E>(offset_ + c, m),
                      m);
        });
      }
  }
}

}  // namespace

SPK_EXPORT(stage_forward)(const NeuronArgs* n, const StageArgs* s, int element, const void* y, const void* residual,
                          const void* mean, const void* scale, const void* bias, void* spikes, void* current,
                          uint8_t* fired) {
  SPK_BOTH(stage_forward<ElementF32>(*n, *s, (const float*)y, (const float*)residual,
                                     {(const float*)mean, (const float*)scale, (const float*)bias}, (float*)spikes,
                                     (float*)current, fired),
           stage_forward<ElementF64>(*n, *s, (const double*)y, (const double*)residual,
                                     {(const double*)mean, (const double*)scale, (const double*)bias}, (double*)spikes,
                                     (double*)current, fired));
}
SPK_EXPORT(pool_bytes)(const NeuronArgs* n, const StageArgs* s, int element, const uint8_t* fired, void* spikes,
                       uint8_t* taps) {
  SPK_BOTH(pool_bytes<ElementF32>(*n, *s, fired, (float*)spikes, taps),
           pool_bytes<ElementF64>(*n, *s, fired, (double*)spikes, taps));
}
SPK_EXPORT(stage_backward)(const NeuronArgs* n, const StageArgs* s, int element, const void* y, const void* residual,
                           const void* mean, const void* scale, const void* bias, const void* grad_spikes,
                           const void* grad_current, void* grad_z, uint8_t* taps, double* sums) {
  SPK_BOTH(stage_backward<ElementF32>(*n, *s, (const float*)y, (const float*)residual,
                                      {(const float*)mean, (const float*)scale, (const float*)bias},
                                      (const float*)grad_spikes, (const float*)grad_current, (float*)grad_z, taps, sums),
           stage_backward<ElementF64>(*n, *s, (const double*)y, (const double*)residual,
                                      {(const double*)mean, (const double*)scale, (const double*)bias},
                                      (const double*)grad_spikes, (const double*)grad_current, (double*)grad_z, taps,
                                      sums));
}
SPK_EXPORT(normalisation_backward)(const NeuronArgs* n, const StageArgs* s, int element, const void* y,
                                   const void* mean, const void* scale, const void* slope, const void* offset,
                                   const void* grad_z, const uint8_t* taps, void* grad_y) {
  SPK_BOTH(normalisation_backward<ElementF32>(*n, *s, (const float*)y, (const float*)mean, (const float*)scale,
                                              (const float*)slope, (const float*)offset, (const float*)grad_z, taps,
                                              (float*)grad_y),
           normalisation_backward<ElementF64>(*n, *s, (const double*)y, (const double*)mean, (const double*)scale,
                                              (const double*)slope, (const double*)offset, (const double*)grad_z, taps,
                                              (double*)grad_y));
}
