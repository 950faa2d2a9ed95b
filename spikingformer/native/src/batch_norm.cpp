// BatchNorm where no neuron follows it: statistics, the normalisation alone, and the sums that its gradient needs.
#include "batch_norm.h"

namespace {

template <class E>
void statistics(const typename E::type* y, long rows, long channels, double* mean, double* variance, int threads) {
  typedef typename E::Arithmetic A;
  typedef typename A::Vector V;
  typedef typename A::Scalar S;
  constexpr long L = A::lanes;
  const ThreadSums all(2 * channels, threads);
  // Sums of differences from the first row: no cancellation when the mean is large beside the deviation.
#pragma omp parallel num_threads(threads)
  {
    Range mine = my_share(rows, 64);
    double* sums = all.mine();
    for (long r0 = mine.begin; r0 < mine.end; r0 += 64) {
      long r1 = minimum(mine.end, r0 + 64);
      for (long c = 0; c < channels; c += L) {
        long m = minimum(L, channels - c);
        V origin = get_part<E>(y + c, m), sum = {}, square = {};
        for (long r = r0; r < r1; r++) {
          V d = get_part<E>(y + r * channels + c, m) - origin;
          sum += d;
          square = multiply_add(d, d, square);
        }
        S a[L], b[L];
        store<A>(a, sum);
        store<A>(b, square);
        for (long i = 0; i < m; i++) {
          sums[c + i] += a[i];
          sums[channels + c + i] += b[i];
        }
      }
    }
  }
  for (long c = 0; c < channels; c++) {
    double shift = all.total(c) / rows;
    double v = all.total(channels + c) / rows - shift * shift;
    mean[c] = (double)y[c] + shift;
    variance[c] = v > 0 ? v : 0;
  }
}

// BatchNorm alone: out = (y - mean) * scale + bias over rows of channels.
template <class E>
void normalise(const typename E::type* y, const Affine<typename E::type>& shared_affine, long rows, long channels,
               typename E::type* out, int threads) {
  constexpr long L = E::Arithmetic::lanes;
#pragma omp parallel num_threads(threads)
  {
    const Affine<typename E::type> affine = shared_affine;  // a copy that no store can alias
    const Range mine = my_share(rows, 1);
    for (long r = mine.begin; r < mine.end; r++)
      for_each_vector<L>(channels, [=](long c, long m) SPK_INLINE_LAMBDA {
        const long at = r * channels + c;
        put_part<E>(out + at, Channel<E>(affine, c, m).current(get_part<E>(y + at, m)), m);
      });
  }
}

// sums: of grad, then of grad * (y - mean), over all rows.
template <class E>
void gradient_sums(const typename E::type* y, const typename E::type* mean, const typename E::type* grad, long rows,
                   long channels, double* sums, int threads) {
  typedef typename E::Arithmetic A;
  typedef typename A::Scalar S;
  constexpr long L = A::lanes;
  const ThreadSums all(2 * channels, threads);
  const long pitch = (channels + L - 1) / L * L;
#pragma omp parallel num_threads(threads)
  {
    Scratch memory(2 * pitch * sizeof(S));
    S *plain = memory.as<S>(), *centred = plain + pitch;
    double* my_sums = all.mine();
    const Range mine = my_share(rows, 64);
    for (long r0 = mine.begin; r0 < mine.end; r0 += 64) {
      memset(plain, 0, 2 * pitch * sizeof(S));
      for (long r = r0; r < minimum(mine.end, r0 + 64); r++)
        for_each_vector<L>(channels, [=](long c, long m) SPK_INLINE_LAMBDA {
          const auto g = get_part<E>(grad + r * channels + c, m);
          const auto d = get_part<E>(y + r * channels + c, m) - get_part<E>(mean + c, m);
          store<A>(plain + c, load<A>(plain + c) + g);
          store<A>(centred + c, load<A>(centred + c) + g * d);
        });
      for (long c = 0; c < channels; c++) {
        my_sums[c] += plain[c];
        my_sums[channels + c] += centred[c];
      }
    }
  }
  for (long c = 0; c < 2 * channels; c++) sums[c] = all.total(c);
}

}  // namespace

SPK_EXPORT(bn_statistics)(int element, const void* y, long rows, long channels, double* mean, double* variance,
                          int threads) {
  SPK_BOTH(statistics<ElementF32>((const float*)y, rows, channels, mean, variance, threads),
           statistics<ElementF64>((const double*)y, rows, channels, mean, variance, threads));
}
SPK_EXPORT(normalise)(int element, const void* y, const void* mean, const void* scale, const void* bias, long rows,
                      long channels, void* out, int threads) {
  SPK_BOTH(normalise<ElementF32>((const float*)y, {(const float*)mean, (const float*)scale, (const float*)bias}, rows,
                                 channels, (float*)out, threads),
           normalise<ElementF64>((const double*)y, {(const double*)mean, (const double*)scale, (const double*)bias}, rows,
                                 channels, (double*)out, threads));
}
SPK_EXPORT(gradient_sums)(int element, const void* y, const void* mean, const void* grad, long rows, long channels,
                          double* sums, int threads) {
  SPK_BOTH(gradient_sums<ElementF32>((const float*)y, (const float*)mean, (const float*)grad, rows, channels, sums, threads),
           gradient_sums<ElementF64>((const double*)y, (const double*)mean, (const double*)grad, rows, channels, sums,
                                     threads));
}
