// Spike attention with its neuron: LIF(q (k^T v) * scale) over all time steps, forward and backward.
//
// q, k, v are bits [T][B][N][words_of(C)]; head h owns the channels [h d, (h + 1) d). Spikes and gradients are
// [T][B][N][C]. Counts are small integers, exact in any order, so the cheap one is taken: k^T v first. The backward
// computes them again: the bits are all that is kept.
#include "spikes.h"

namespace {

struct AttentionArgs {
  int64_t batch, tokens, channels, heads;
  double scale;
  int32_t threads, unused;
};

// f(i) for every place of the d bits of a row from `bit` on.
template <class F> SPK_INLINE void for_each_spike(const uint64_t* row, long bit, long d, F&& f) {
  for (long i0 = 0; i0 < d; i0 += 64) {
    uint64_t word = cut(row, bit + i0, minimum(64, d - i0));
    for (; word; word &= word - 1) f(i0 + __builtin_ctzll(word));
  }
}

// One head of one sample. Rows are padded to whole vectors; the padding holds zeros.
template <class A> struct Head {
  typedef typename A::Scalar S;
  typedef typename A::Vector V;
  static constexpr long L = A::lanes;
  const NeuronArgs& neuron_args;
  const AttentionArgs& a;
  const long T, N, C, d, pitch, words;
  Scratch kv_memory, y_memory, other_memory, row_memory;
  S *kv, *y;             // [T][d][pitch], [T][N][pitch]
  S *sums, *transposed;  // [d][pitch] each
  S* row;                // [pitch]
  Head(const NeuronArgs& n, const AttentionArgs& a)
      : neuron_args(n), a(a), T(n.steps), N(a.tokens), C(a.channels), d(a.channels / a.heads), pitch((d + L - 1) / L * L),
        words(words_of(C)), kv_memory(T * d * pitch * sizeof(S)), y_memory(T * N * pitch * sizeof(S)),
        other_memory(2 * d * pitch * sizeof(S)), row_memory(pitch * sizeof(S)), kv(kv_memory.as<S>()),
        y(y_memory.as<S>()), sums(other_memory.as<S>()), transposed(sums + d * pitch), row(row_memory.as<S>()) {}

  SPK_INLINE void add(S* to, const S* from) const {
    for (long j = 0; j < pitch; j += L) store<A>(to + j, load<A>(to + j) + load<A>(from + j));
  }
  SPK_INLINE void add_times(S* to, S factor, const S* from) const {
    for (long j = 0; j < pitch; j += L) store<A>(to + j, load<A>(to + j) + load<A>(from + j) * factor);
  }
  SPK_INLINE void clear(S* to, long rows) const { memset(to, 0, rows * pitch * sizeof(S)); }
  SPK_INLINE const uint64_t* bits(const uint64_t* all, long t, long b, long n) const {
    return all + ((t * a.batch + b) * N + n) * words;
  }

  // kv and y = q kv * scale of all steps
  void counts(const uint64_t* q, const uint64_t* k, const uint64_t* v, long b, long head) {
    const long bit = head * d;
    clear(kv, T * d);
    clear(y, T * N);
    for (long t = 0; t < T; t++) {
      S* kv_t = kv + t * d * pitch;
      for (long n = 0; n < N; n++) {
        clear(row, 1);
        bool any = false;
        for_each_spike(bits(v, t, b, n), bit, d, [&](long j) SPK_INLINE_LAMBDA { row[j] = 1, any = true; });
        if (any)
          for_each_spike(bits(k, t, b, n), bit, d, [&](long i) SPK_INLINE_LAMBDA { add(kv_t + i * pitch, row); });
      }
      for (long n = 0; n < N; n++) {
        S* out = y + (t * N + n) * pitch;
        for_each_spike(bits(q, t, b, n), bit, d, [&](long i) SPK_INLINE_LAMBDA { add(out, kv_t + i * pitch); });
        for (long j = 0; j < pitch; j += L) store<A>(out + j, load<A>(out + j) * (S)a.scale);
      }
    }
  }

  // y becomes the spikes.
  void fire() {
    const Neuron<A> neuron(neuron_args);
    for (long i = 0; i < N * pitch; i += L) {
      V v = splat<A>(neuron.v_rest);
      for (long t = 0; t < T; t++) {
        S* at = y + t * N * pitch + i;
        const V h = neuron.charge(v, load<A>(at));
        const auto fired = neuron.fires(h);
        store<A>(at, only_where<A>(fired, splat<A>(1)));
        v = neuron.reset(h, fired);
      }
    }
  }

  // y becomes the gradient of q kv.
  void fire_backward(const S* grad_spikes, long b, long head, V* h) {
    const Neuron<A> neuron(neuron_args);
    with_surrogate(neuron_args.surrogate, [&](auto kind) {
      for (long n = 0; n < N; n++)
        for (long j = 0; j < pitch; j += L) {
          const long lanes = minimum(L, d - j);
          V v = splat<A>(neuron.v_rest), carry = {};
          for (long t = 0; t < T; t++) {
            h[t] = neuron.charge(v, load<A>(y + (t * N + n) * pitch + j));
            v = neuron.reset(h[t], neuron.fires(h[t]));
          }
          for (long t = T - 1; t >= 0; t--) {
            const V grad = load_part<A>(grad_spikes + ((t * a.batch + b) * N + n) * C + head * d + j, lanes);
            const V grad_h = neuron.template grad_charge<kind.value>(h[t], grad, carry);
            const V share = neuron.over_tau(grad_h);
            // Padded lanes have no gradient of a spike, and theirs through time stays zero.
            store<A>(y + (t * N + n) * pitch + j, (neuron.decay ? share : grad_h) * (S)a.scale);
            carry = grad_h - share;
          }
        }
    });
  }

  void transpose(const S* from) {
    clear(transposed, d);
    for (long i = 0; i < d; i++)
      for (long j = 0; j < d; j++) transposed[j * pitch + i] = from[i * pitch + j];
  }

  void put(S* out, long t, long b, long n, long head, const S* values) const {
    memcpy(out + ((t * a.batch + b) * N + n) * C + head * d, values, d * sizeof(S));
  }

  void gradients(const uint64_t* q, const uint64_t* k, const uint64_t* v, S* grad_q, S* grad_k, S* grad_v, long b, long head) {
    const long bit = head * d;
    for (long t = 0; t < T; t++) {
      transpose(kv + t * d * pitch);
      clear(sums, d);
      for (long n = 0; n < N; n++) {
        const S* grad = y + (t * N + n) * pitch;
        clear(row, 1);
        for (long j = 0; j < d; j++) add_times(row, grad[j], transposed + j * pitch);
        put(grad_q, t, b, n, head, row);
        for_each_spike(bits(q, t, b, n), bit, d, [&](long i) SPK_INLINE_LAMBDA { add(sums + i * pitch, grad); });
      }
      transpose(sums);  // sums: the gradient of k^T v
      for (long n = 0; n < N; n++) {
        clear(row, 1);
        for_each_spike(bits(k, t, b, n), bit, d, [&](long i) SPK_INLINE_LAMBDA { add(row, sums + i * pitch); });
        put(grad_v, t, b, n, head, row);
        clear(row, 1);
        for_each_spike(bits(v, t, b, n), bit, d, [&](long j) SPK_INLINE_LAMBDA { add(row, transposed + j * pitch); });
        put(grad_k, t, b, n, head, row);
      }
    }
  }
};

template <class A>
void attention_forward(const NeuronArgs& neuron, const AttentionArgs& a, const uint64_t* q, const uint64_t* k,
                       const uint64_t* v, typename A::Scalar* spikes) {
#pragma omp parallel num_threads(a.threads)
  {
    Head<A> head(neuron, a);
#pragma omp for schedule(static)
    for (long item = 0; item < a.batch * a.heads; item++) {
      const long b = item / a.heads, h = item % a.heads;
      head.counts(q, k, v, b, h);
      head.fire();
      for (long t = 0; t < head.T; t++)
        for (long n = 0; n < head.N; n++) head.put(spikes, t, b, n, h, head.y + (t * head.N + n) * head.pitch);
    }
  }
}

template <class A>
void attention_backward(const NeuronArgs& neuron, const AttentionArgs& a, const uint64_t* q, const uint64_t* k,
                        const uint64_t* v, const typename A::Scalar* grad_spikes, typename A::Scalar* grad_q,
                        typename A::Scalar* grad_k, typename A::Scalar* grad_v) {
#pragma omp parallel num_threads(a.threads)
  {
    Head<A> head(neuron, a);
    Scratch h_memory(neuron.steps * sizeof(typename A::Vector));
#pragma omp for schedule(static)
    for (long item = 0; item < a.batch * a.heads; item++) {
      const long b = item / a.heads, h = item % a.heads;
      head.counts(q, k, v, b, h);
      head.fire_backward(grad_spikes, b, h, h_memory.as<typename A::Vector>());
      head.gradients(q, k, v, grad_q, grad_k, grad_v, b, h);
    }
  }
}

}  // namespace

// element: 0 float32, 1 float64
SPK_EXPORT(attention_forward)(const NeuronArgs* neuron, const AttentionArgs* a, int element, const uint64_t* q,
                              const uint64_t* k, const uint64_t* v, void* spikes) {
  if (element == 0) attention_forward<Float>(*neuron, *a, q, k, v, (float*)spikes);
  else attention_forward<Double>(*neuron, *a, q, k, v, (double*)spikes);
}
SPK_EXPORT(attention_backward)(const NeuronArgs* neuron, const AttentionArgs* a, int element, const uint64_t* q,
                               const uint64_t* k, const uint64_t* v, const void* grad_spikes, void* grad_q, void* grad_k,
                               void* grad_v) {
  if (element == 0)
    attention_backward<Float>(*neuron, *a, q, k, v, (const float*)grad_spikes, (float*)grad_q, (float*)grad_k,
                              (float*)grad_v);
  else
    attention_backward<Double>(*neuron, *a, q, k, v, (const double*)grad_spikes, (double*)grad_q, (double*)grad_k,
                               (double*)grad_v);
}
