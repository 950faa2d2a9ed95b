// Multi-step leaky integrate-and-fire neuron, forward and backward, one pass each.
//
//   h_t = v_{t-1} + (x_t - (v_{t-1} - v_reset)) / tau      s_t = h_t >= v_threshold
//   hard reset: v_t = v_reset where s_t, else h_t      soft reset: v_t = h_t - s_t * v_threshold
//
// x [T, n] may have any time stride (0: the same current at every step); spikes and gradients are dense [T, n].
// The forward keeps nothing; the backward computes h again from x.
#include "common.h"

namespace {

// Neurons in one unit of work: their states stay in the first-level cache while x and spikes are walked step by step.
// In float32 a step's part is one page, where the prefetcher stops: the next one is asked for while this one is worked on.
constexpr long kBlock = 1024;
// Forward, a few time steps are walked at once, the fastest way from memory; with more, or backward, so many streams lose
// the prefetcher.
constexpr long kColumn = 2;  // vectors walked at once
constexpr long kColumnSteps = 4;
constexpr long kBlockStates = 8192;  // h of a block at all time steps, for the backward

template <class S> SPK_INLINE void fill(S* p, S value, long n) {
  for (long i = 0; i < n; i++) p[i] = value;
}

template <class E, class N>
SPK_INLINE void fire_column(const N& neuron, long T, const typename E::type* x, long x_stride,
                            const typename E::Arithmetic::Scalar* v0, typename E::type* spikes,
                            typename E::Arithmetic::Scalar* v_last, long n) {
  typedef typename E::Arithmetic A;
  constexpr long L = A::lanes;
  typename A::Vector v[kColumn];
  for (int w = 0; w < kColumn; w++) v[w] = v0 ? load<A>(v0 + w * L) : splat<A>(neuron.v_rest);
  for (long t = 0; t < T; t++) {
    for (int w = 0; w < kColumn; w++) {
      typename A::Vector h = neuron.charge(v[w], E::get(x + t * x_stride + w * L));
      auto fired = neuron.fires(h);
      E::put(spikes + t * n + w * L, only_where<A>(fired, splat<A>(1)));
      v[w] = neuron.reset(h, fired);
    }
  }
  if (v_last)
    for (int w = 0; w < kColumn; w++) store<A>(v_last + w * L, v[w]);
}

template <class E, class N>
void lif_forward_body(const N& neuron, long T, const typename E::type* x, long x_stride,
                 const typename E::Arithmetic::Scalar* v0, typename E::type* spikes,
                 typename E::Arithmetic::Scalar* v_last, long n, int threads) {
  typedef typename E::Arithmetic A;
  typedef typename A::Vector V;
  typedef typename A::Scalar S;
  constexpr long L = A::lanes;
#pragma omp parallel num_threads(threads) if (n * T > 32768)
  {
    const N local = neuron;  // a copy that no store can alias: its constants stay in registers
    Range mine = my_share(n, kBlock);
    for (long& i = mine.begin; T <= kColumnSteps && i + kColumn * L <= mine.end; i += kColumn * L)
      fire_column<E>(local, T, x + i, x_stride, v0 ? v0 + i : v0, spikes + i, v_last ? v_last + i : v_last, n);
    Scratch scratch(kBlock * sizeof(S));
    S* v = scratch.as<S>();
    for (long i0 = mine.begin; i0 < mine.end; i0 += kBlock) {
      const long count = minimum(kBlock, mine.end - i0);
      if (v0) memcpy(v, v0 + i0, count * sizeof(S));
      else fill(v, local.v_rest, count);
      for (long t = 0; t < T; t++) {
        const typename E::type* xt = x + t * x_stride + i0;
        typename E::type* st = spikes + t * n + i0;
        const typename E::type *next_x = t + 1 < T ? xt + x_stride : x + i0 + kBlock, *next_s = t + 1 < T ? st + n : st;
        for_each_vector<L>(count, [=](long i, long m) SPK_INLINE_LAMBDA {
          __builtin_prefetch(next_x + i);
          __builtin_prefetch(next_s + i, 1);
          V h = local.charge(load<A>(v + i), get_part<E>(xt + i, m));
          auto fired = local.fires(h);
          put_part<E>(st + i, only_where<A>(fired, splat<A>(1)), m);
          store<A>(v + i, local.reset(h, fired));
        });
      }
      if (v_last) memcpy(v_last + i0, v, count * sizeof(S));
    }
  }
}

template <class E, int kind, class N>
void lif_backward_body(const N& neuron, long T, const typename E::type* x, long x_stride,
                       const typename E::Arithmetic::Scalar* v0, const typename E::type* grad_spikes,
                       const typename E::Arithmetic::Scalar* grad_v_last, typename E::type* grad_x,
                       typename E::Arithmetic::Scalar* grad_v0, long n, int threads) {
  typedef typename E::Arithmetic A;
  typedef typename A::Vector V;
  typedef typename A::Scalar S;
  constexpr long L = A::lanes;
  const long block = maximum(L * 4, minimum(kBlock, kBlockStates / maximum(T, 1)) / L * L);
#pragma omp parallel num_threads(threads) if (n * T > 16384)
  {
    const N local = neuron;  // a copy that no store can alias: its constants stay in registers
    Range mine = my_share(n, block);
    Scratch scratch((T + 1) * block * sizeof(S));
    S* h_all = scratch.as<S>();
    S* carry = h_all + T * block;  // v on the way forward, gradient of v on the way back
    for (long i0 = mine.begin; i0 < mine.end; i0 += block) {
      long count = minimum(block, mine.end - i0);
      if (v0) memcpy(carry, v0 + i0, count * sizeof(S));
      else fill(carry, local.v_rest, count);
      for (long t = 0; t < T; t++) {
        const typename E::type* xt = x + t * x_stride + i0;
        const typename E::type* next = t + 1 < T ? xt + x_stride : grad_spikes + t * n + i0;
        for_each_vector<L>(count, [=](long i, long m) SPK_INLINE_LAMBDA {
          __builtin_prefetch(next + i);
          V h = local.charge(load<A>(carry + i), get_part<E>(xt + i, m));
          store<A>(h_all + t * block + i, h);
          store<A>(carry + i, local.reset(h, local.fires(h)));
        });
      }
      if (grad_v_last) memcpy(carry, grad_v_last + i0, count * sizeof(S));
      else memset(carry, 0, block * sizeof(S));
      for (long t = T - 1; t >= 0; t--) {
        const typename E::type* gt = grad_spikes + t * n + i0;
        typename E::type* ot = grad_x + t * n + i0;
        const typename E::type *next_g = t ? gt - n : x + i0 + block, *next_o = t ? ot - n : ot;
        for_each_vector<L>(count, [=](long i, long m) SPK_INLINE_LAMBDA {
          __builtin_prefetch(next_g + i);
          __builtin_prefetch(next_o + i, 1);
          V grad_h = local.template grad_charge<kind>(load<A>(h_all + t * block + i), get_part<E>(gt + i, m),
                                                      load<A>(carry + i));
          V share = local.over_tau(grad_h);
          put_part<E>(ot + i, local.decays_input() ? share : grad_h, m);
          store<A>(carry + i, grad_h - share);
        });
      }
      if (grad_v0) memcpy(grad_v0 + i0, carry, count * sizeof(S));
    }
  }
}

template <class E>
void lif_forward(const NeuronArgs& args, const typename E::type* x, long x_stride,
                 const typename E::Arithmetic::Scalar* v0, typename E::type* spikes,
                 typename E::Arithmetic::Scalar* v_last, long n, int threads) {
  with_neuron<typename E::Arithmetic>(args, [&](const auto& neuron) {
    lif_forward_body<E>(neuron, args.steps, x, x_stride, v0, spikes, v_last, n, threads);
  });
}

template <class E>
void lif_backward(const NeuronArgs& args, const typename E::type* x, long x_stride,
                  const typename E::Arithmetic::Scalar* v0, const typename E::type* grad_spikes,
                  const typename E::Arithmetic::Scalar* grad_v_last, typename E::type* grad_x,
                  typename E::Arithmetic::Scalar* grad_v0, long n, int threads) {
  with_neuron<typename E::Arithmetic>(args, [&](const auto& neuron) {
    with_surrogate(args.surrogate, [&](auto kind) {
      lif_backward_body<E, kind.value>(neuron, args.steps, x, x_stride, v0, grad_spikes, grad_v_last, grad_x, grad_v0,
                                       n, threads);
    });
  });
}

}  // namespace

// element: 0 float32, 1 float64, 2 bfloat16, 3 float16. State (v0, v_last) is float64 for float64 and float32 otherwise.
SPK_EXPORT(lif_forward)(const NeuronArgs* args, int element, const void* x, long x_stride, const void* v0, void* spikes,
                        void* v_last, long n, int threads) {
  switch (element) {
    case 0:
      lif_forward<ElementF32>(*args, (const float*)x, x_stride, (const float*)v0, (float*)spikes, (float*)v_last, n,
                              threads);
      break;
    case 1:
      lif_forward<ElementF64>(*args, (const double*)x, x_stride, (const double*)v0, (double*)spikes, (double*)v_last, n,
                              threads);
      break;
    case 2:
      lif_forward<ElementBF16>(*args, (const uint16_t*)x, x_stride, (const float*)v0, (uint16_t*)spikes,
                               (float*)v_last, n, threads);
      break;
    default:
      lif_forward<ElementF16>(*args, (const uint16_t*)x, x_stride, (const float*)v0, (uint16_t*)spikes, (float*)v_last,
                              n, threads);
  }
}

SPK_EXPORT(lif_backward)(const NeuronArgs* args, int element, const void* x, long x_stride, const void* v0,
                         const void* grad_spikes, const void* grad_v_last, void* grad_x, void* grad_v0, long n,
                         int threads) {
  switch (element) {
    case 0:
      lif_backward<ElementF32>(*args, (const float*)x, x_stride, (const float*)v0, (const float*)grad_spikes,
                               (const float*)grad_v_last, (float*)grad_x, (float*)grad_v0, n, threads);
      break;
    case 1:
      lif_backward<ElementF64>(*args, (const double*)x, x_stride, (const double*)v0, (const double*)grad_spikes,
                               (const double*)grad_v_last, (double*)grad_x, (double*)grad_v0, n, threads);
      break;
    case 2:
      lif_backward<ElementBF16>(*args, (const uint16_t*)x, x_stride, (const float*)v0, (const uint16_t*)grad_spikes,
                                (const float*)grad_v_last, (uint16_t*)grad_x, (float*)grad_v0, n, threads);
      break;
    default:
      lif_backward<ElementF16>(*args, (const uint16_t*)x, x_stride, (const float*)v0, (const uint16_t*)grad_spikes,
                               (const float*)grad_v_last, (uint16_t*)grad_x, (float*)grad_v0, n, threads);
  }
}
