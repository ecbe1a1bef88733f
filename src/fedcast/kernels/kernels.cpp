// Kernels of a training step between its matrix products: bfloat16 storage, float32 arithmetic, AVX-512, one thread.
//
// Called through ctypes, which releases the interpreter lock. Widths are multiples of 16, widths of a head multiples of 32.
// Nothing here reads or writes outside of what its arguments describe; callers check shapes (blocks.py).
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;

inline __m512 load(const bf16 *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

inline void store(bf16 *p, __m512 v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }

// exp(x) by range reduction to 2^n * p(f), |f| <= 0.5; relative error about 2e-7.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.f)), _mm512_set1_ps(-87.f));
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(t, 0);
  const __m512 f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.8775767e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.9893397e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5826318e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4015361e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9315308e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.9999994e-1f));
  return _mm512_scalef_ps(p, n);
}

// An odd function of x as x * p(2 (x / 4.5)^2 - 1), its argument clamped to +-4.5; coefficients from the constant on.
template <int N>
inline __m512 odd(__m512 x, const float (&coefficients)[N]) {
  const __m512 c = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(4.5f)), _mm512_set1_ps(-4.5f));
  const __m512 t = _mm512_fmsub_ps(_mm512_mul_ps(c, _mm512_set1_ps(2.f / 20.25f)), c, _mm512_set1_ps(1.f));
  __m512 p = _mm512_set1_ps(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; i--) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(coefficients[i]));
  return _mm512_mul_ps(p, c);
}

// The standard normal's distribution function; minimax fit, absolute error 4e-6.
inline __m512 normal_distribution(__m512 x) {
  static constexpr float fit[] = {1.569060443e-01f, -7.718588245e-02f, 5.463748887e-02f, -4.023698584e-02f, 2.885766002e-02f,
                                  -1.848393022e-02f, 9.653207929e-03f, -6.070262444e-03f, 4.962711909e-03f, -1.930497389e-03f};
  return _mm512_add_ps(_mm512_set1_ps(.5f), odd(x, fit));
}

// The derivative of GELU; minimax fit, absolute error 7e-5 (bfloat16 rounds to 4e-3).
inline __m512 gelu_slope(__m512 x) {
  static constexpr float fit[] = {1.594315441e-01f, -9.001319998e-02f, 8.698739113e-02f,  -9.392201007e-02f, 9.789963712e-02f, -9.383736600e-02f,
                                  6.976138240e-02f, -3.621133954e-02f, 2.846069398e-02f, -2.936287575e-02f, 1.193506640e-02f};
  return _mm512_add_ps(_mm512_set1_ps(.5f), odd(x, fit));
}

inline void write_sums(const std::vector<float> &sums, bf16 *out) {
  for (size_t c = 0; c < sums.size(); c += 16) store(out + c, _mm512_loadu_ps(&sums[c]));
}

inline void add_to(float *sums, __m512 v) { _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), v)); }

// Transposes a 16 x 16 tile.
inline void transpose16(const float *a, size_t lda, float *b, size_t ldb) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(a + i * lda);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_ps(b + (i)*ldb, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(b + (i + 4) * ldb, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_ps(b + (i + 8) * ldb, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_ps(b + (i + 12) * ldb, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

inline void transpose(const float *a, int rows, int columns, float *b) {
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < columns; j += 16) transpose16(a + (size_t)i * columns + j, columns, b + (size_t)j * rows + i, rows);
}

// C [I, 16 V] = A B over K; A[i, k] lies at a[i * ai + k * ak], so a transposed A costs nothing.
template <int R, int V>
inline void product_columns(const float *a, size_t ai, size_t ak, const float *b, size_t ldb, float *c, size_t ldc, int I, int K) {
  for (int i = 0; i < I; i += R) {
    __m512 sum[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_ps();
    for (int k = 0; k < K; k++) {
      __m512 row[V];
      for (int v = 0; v < V; v++) row[v] = _mm512_loadu_ps(b + k * ldb + 16 * v);
      for (int r = 0; r < R; r++) {
        const __m512 x = _mm512_set1_ps(a[(i + r) * ai + k * ak]);
        for (int v = 0; v < V; v++) sum[r][v] = _mm512_fmadd_ps(x, row[v], sum[r][v]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) _mm512_storeu_ps(c + (i + r) * ldc + 16 * v, sum[r][v]);
  }
}

// I a multiple of 8, J of 16.
void product(const float *a, size_t ai, size_t ak, const float *b, float *c, int I, int J, int K) {
  int j = 0;
  for (; j + 64 <= J; j += 64) product_columns<4, 4>(a, ai, ak, b + j, J, c + j, J, I, K);
  for (; j + 32 <= J; j += 32) product_columns<8, 2>(a, ai, ak, b + j, J, c + j, J, I, K);
  for (; j < J; j += 16) product_columns<8, 1>(a, ai, ak, b + j, J, c + j, J, I, K);
}

// Rows of one head as float32, bias added and turned by the rotary table where there is one; rows up to `padded` are zero.
void load_head(const bf16 *p, size_t stride, const bf16 *bias, const bf16 *cosines, const bf16 *sines, float *out, int rows, int padded, int e) {
  const int half = e / 2;
  for (int i = 0; i < rows; i++) {
    const bf16 *x = p + i * stride;
    float *o = out + (size_t)i * e;
    for (int c = 0; c < half; c += 16) {
      __m512 low = load(x + c), high = load(x + half + c);
      if (bias) low = _mm512_add_ps(low, load(bias + c)), high = _mm512_add_ps(high, load(bias + half + c));
      if (cosines) {
        const bf16 *cs = cosines + (size_t)i * e, *sn = sines + (size_t)i * e;
        const __m512 first = _mm512_fmadd_ps(high, load(sn + c), _mm512_mul_ps(low, load(cs + c)));
        high = _mm512_fmadd_ps(low, load(sn + half + c), _mm512_mul_ps(high, load(cs + half + c)));
        low = first;
      }
      _mm512_storeu_ps(o + c, low);
      _mm512_storeu_ps(o + half + c, high);
    }
  }
  if (padded > rows) std::memset(out + (size_t)rows * e, 0, sizeof(float) * (padded - rows) * e);
}

// The reverse for a gradient: turned back, written as bfloat16 (or added to what is there), and added to the bias' gradient.
void store_head(const float *g, bf16 *p, size_t stride, const bf16 *cosines, const bf16 *sines, float *sums, int rows, int e, bool add) {
  const int half = e / 2;
  for (int i = 0; i < rows; i++) {
    const float *x = g + (size_t)i * e;
    bf16 *o = p + i * stride;
    for (int c = 0; c < half; c += 16) {
      __m512 low = _mm512_loadu_ps(x + c), high = _mm512_loadu_ps(x + half + c);
      if (cosines) {
        const bf16 *cs = cosines + (size_t)i * e, *sn = sines + (size_t)i * e;
        const __m512 first = _mm512_fmadd_ps(high, load(sn + half + c), _mm512_mul_ps(low, load(cs + c)));
        high = _mm512_fmadd_ps(low, load(sn + c), _mm512_mul_ps(high, load(cs + half + c)));
        low = first;
      }
      add_to(sums + c, low);
      add_to(sums + half + c, high);
      store(o + c, add ? _mm512_add_ps(load(o + c), low) : low);
      store(o + half + c, add ? _mm512_add_ps(load(o + half + c), high) : high);
    }
  }
}

struct Heads {
  const bf16 *q, *k, *v;            // first row of the batch's first window, without the head's offset
  size_t q_stride, kv_stride;       // elements between rows
  const bf16 *q_bias, *k_bias, *v_bias;
  const bf16 *q_cos, *q_sin, *k_cos, *k_sin;  // rows of the rotary table, or null
  size_t q_table, k_table;          // elements between the tables of two windows; 0: one for all
  const bf16 *mask;                 // additive, [windows, mask_rows, keys]
  const int64_t *rows;              // the row of keys and values of each window, or null: its own
  int mask_rows;
  int windows, heads, queries, keys, e;
};

struct Buffers {
  std::vector<float> q, k, v, t, s, d, g, o;
  void fit(int n, int m, int e) {
    const size_t ne = (size_t)n * e, me = (size_t)m * e, nm = (size_t)n * m;
    for (auto *x : {&q, &g, &o}) x->resize(std::max(x->size(), std::max(ne, me)));
    for (auto *x : {&k, &v, &t}) x->resize(std::max(x->size(), me));
    for (auto *x : {&s, &d}) x->resize(std::max(x->size(), nm));
  }
};

inline size_t row_of(const Heads &h, int b) { return h.rows ? (size_t)h.rows[b] : (size_t)b; }

inline int up16(int n) { return (n + 15) / 16 * 16; }

// Probabilities of one head: softmax(q k' / sqrt(e) + mask), zero for padded keys.
void probabilities(const Heads &h, Buffers &w, int b, int n, int m) {
  transpose(w.k.data(), m, h.e, w.t.data());
  product(w.q.data(), h.e, 1, w.t.data(), w.s.data(), n, m, h.e);
  const __m512 scale = _mm512_set1_ps(1.f / std::sqrt((float)h.e));
  for (int i = 0; i < n; i++) {
    float *row = w.s.data() + (size_t)i * m;
    const int line = h.mask_rows == 1 ? 0 : std::min(i, h.queries - 1);
    const bf16 *bias = h.mask + ((size_t)b * h.mask_rows + line) * h.keys;
    __m512 top = _mm512_set1_ps(-3.0e38f);
    for (int j = 0; j < m; j += 16) {
      const int left = h.keys - j;
      const __mmask16 some = left >= 16 ? 0xffff : (__mmask16)((1u << std::max(left, 0)) - 1);
      const __m512 add = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, bias + j)), 16));
      const __m512 x = _mm512_mask_fmadd_ps(_mm512_loadu_ps(row + j), some, scale, add);
      const __m512 y = _mm512_mask_mov_ps(_mm512_set1_ps(-3.0e38f), some, x);
      _mm512_storeu_ps(row + j, y);
      top = _mm512_max_ps(top, y);
    }
    const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < m; j += 16) {
      const int left = h.keys - j;
      const __mmask16 some = left >= 16 ? 0xffff : (__mmask16)((1u << std::max(left, 0)) - 1);
      const __m512 distance = _mm512_sub_ps(_mm512_loadu_ps(row + j), peak);
      // exactly 0 for a masked key, as torch's softmax has it
      const __mmask16 seen = _mm512_mask_cmp_ps_mask(some, distance, _mm512_set1_ps(-87.f), _CMP_GT_OQ);
      const __m512 x = _mm512_maskz_mov_ps(seen, exponential(distance));
      _mm512_storeu_ps(row + j, x);
      sum = _mm512_add_ps(sum, x);
    }
    const __m512 inverse = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(sum));
    for (int j = 0; j < m; j += 16) _mm512_storeu_ps(row + j, _mm512_mul_ps(_mm512_loadu_ps(row + j), inverse));
  }
}

void load_all(const Heads &h, Buffers &w, int b, int head, int n, int m) {
  const size_t off = (size_t)head * h.e, q = (size_t)b * h.queries * h.q_stride + off, kv = row_of(h, b) * h.keys * h.kv_stride + off;
  const bf16 *qc = h.q_cos ? h.q_cos + b * h.q_table : nullptr, *qs = h.q_cos ? h.q_sin + b * h.q_table : nullptr;
  const bf16 *kc = h.k_cos ? h.k_cos + row_of(h, b) * h.k_table : nullptr, *ks = h.k_cos ? h.k_sin + row_of(h, b) * h.k_table : nullptr;
  load_head(h.q + q, h.q_stride, h.q_bias + off, qc, qs, w.q.data(), h.queries, n, h.e);
  load_head(h.k + kv, h.kv_stride, h.k_bias + off, kc, ks, w.k.data(), h.keys, m, h.e);
  load_head(h.v + kv, h.kv_stride, h.v_bias + off, nullptr, nullptr, w.v.data(), h.keys, m, h.e);
}

thread_local Buffers buffers;

}  // namespace

extern "C" {

int fedcast_kernels_version() { return 1; }

// out [windows, queries, heads * e] = attention of every head.
void attention_forward(const Heads *h, bf16 *out) {
  const int n = up16(h->queries), m = up16(h->keys), e = h->e;
  Buffers &w = buffers;
  w.fit(n, m, e);
  for (int b = 0; b < h->windows; b++)
    for (int head = 0; head < h->heads; head++) {
      load_all(*h, w, b, head, n, m);
      probabilities(*h, w, b, n, m);
      product(w.s.data(), m, 1, w.v.data(), w.o.data(), n, e, m);
      bf16 *o = out + (size_t)b * h->queries * h->heads * e + (size_t)head * e;
      for (int i = 0; i < h->queries; i++)
        for (int c = 0; c < e; c += 16) store(o + (size_t)i * h->heads * e + c, _mm512_loadu_ps(&w.o[(size_t)i * e + c]));
    }
}

// Where windows share rows of keys and values, `dk` and `dv` must hold zeros.
// Gradients of q, k, v (strides as the inputs') and of their biases (bfloat16, [heads * e] each) from the gradient of `out`.
void attention_backward(const Heads *h, const bf16 *gradient, bf16 *dq, bf16 *dk, bf16 *dv, bf16 *dq_bias, bf16 *dk_bias, bf16 *dv_bias) {
  const int n = up16(h->queries), m = up16(h->keys), e = h->e;
  const size_t width = (size_t)h->heads * e;
  Buffers &w = buffers;
  w.fit(n, m, e);
  std::vector<float> q_sum(width), k_sum(width), v_sum(width);
  const __m512 scale = _mm512_set1_ps(1.f / std::sqrt((float)e));
  for (int b = 0; b < h->windows; b++)
    for (int head = 0; head < h->heads; head++) {
      const size_t off = (size_t)head * e;
      const size_t q_at = (size_t)b * h->queries * h->q_stride + off, kv_at = row_of(*h, b) * h->keys * h->kv_stride + off;
      load_all(*h, w, b, head, n, m);
      probabilities(*h, w, b, n, m);
      load_head(gradient + (size_t)b * h->queries * width + off, width, nullptr, nullptr, nullptr, w.g.data(), h->queries, n, e);
      product(w.s.data(), 1, m, w.g.data(), w.o.data(), m, e, n);  // dV = P' dO
      store_head(w.o.data(), dv + kv_at, h->kv_stride, nullptr, nullptr, &v_sum[off], h->keys, e, h->rows);
      transpose(w.v.data(), m, e, w.t.data());
      product(w.g.data(), e, 1, w.t.data(), w.d.data(), n, m, e);  // dP = dO V'
      for (int i = 0; i < n; i++) {
        const float *p = &w.s[(size_t)i * m];
        float *d = &w.d[(size_t)i * m];
        __m512 dot = _mm512_setzero_ps();
        for (int j = 0; j < m; j += 16) dot = _mm512_fmadd_ps(_mm512_loadu_ps(p + j), _mm512_loadu_ps(d + j), dot);
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot));
        for (int j = 0; j < m; j += 16)
          _mm512_storeu_ps(d + j, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(p + j), scale), _mm512_sub_ps(_mm512_loadu_ps(d + j), mean)));
      }
      product(w.d.data(), m, 1, w.k.data(), w.o.data(), n, e, m);  // dQ = dS K
      store_head(w.o.data(), dq + q_at, h->q_stride, h->q_cos ? h->q_cos + b * h->q_table : nullptr,
                 h->q_cos ? h->q_sin + b * h->q_table : nullptr, &q_sum[off], h->queries, e, false);
      product(w.d.data(), 1, m, w.q.data(), w.o.data(), m, e, n);  // dK = dS' Q
      store_head(w.o.data(), dk + kv_at, h->kv_stride, h->k_cos ? h->k_cos + row_of(*h, b) * h->k_table : nullptr,
                 h->k_cos ? h->k_sin + row_of(*h, b) * h->k_table : nullptr, &k_sum[off], h->keys, e, h->rows);
    }
  write_sums(q_sum, dq_bias);
  write_sums(k_sum, dk_bias);
  write_sums(v_sum, dv_bias);
}

// y = LayerNorm(x) [rows, width]; stats [rows, 2]: mean and 1 / deviation. Where `residual` is not null: residual = x + residual_bias.
void layer_norm_forward(const bf16 *x, const bf16 *weight, const bf16 *bias, bf16 *y, float *stats, const bf16 *residual_bias, bf16 *residual,
                        size_t rows, size_t width, float eps) {
  for (size_t r = 0; r < rows; r++) {
    const bf16 *p = x + r * width;
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (size_t c = 0; c < width; c += 16) sum = _mm512_add_ps(sum, load(p + c));
    const float mean = _mm512_reduce_add_ps(sum) / width;
    const __m512 m = _mm512_set1_ps(mean);
    for (size_t c = 0; c < width; c += 16) {
      const __m512 d = _mm512_sub_ps(load(p + c), m);
      squares = _mm512_fmadd_ps(d, d, squares);
    }
    const float inverse = 1.f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps);
    stats[2 * r] = mean;
    stats[2 * r + 1] = inverse;
    const __m512 s = _mm512_set1_ps(inverse);
    for (size_t c = 0; c < width; c += 16) {
      const __m512 v = load(p + c);
      store(y + r * width + c, _mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(v, m), s), load(weight + c), load(bias + c)));
      if (residual) store(residual + r * width + c, _mm512_add_ps(v, load(residual_bias + c)));
    }
  }
}

// dx = residual + LayerNorm's gradient (residual may be null); dweight, dbias: its parameters'; dx_sum (may be null): column sums of dx.
void layer_norm_backward(const bf16 *dy, const bf16 *x, const float *stats, const bf16 *weight, const bf16 *residual, bf16 *dx, bf16 *dweight,
                         bf16 *dbias, bf16 *dx_sum, size_t rows, size_t width) {
  std::vector<float> dw(width), db(width), total(dx_sum ? width : 0);
  for (size_t r = 0; r < rows; r++) {
    const bf16 *g = dy + r * width, *p = x + r * width;
    const __m512 m = _mm512_set1_ps(stats[2 * r]), s = _mm512_set1_ps(stats[2 * r + 1]);
    __m512 a = _mm512_setzero_ps(), b = a;
    for (size_t c = 0; c < width; c += 16) {
      const __m512 v = load(g + c), n = _mm512_mul_ps(_mm512_sub_ps(load(p + c), m), s), vw = _mm512_mul_ps(v, load(weight + c));
      a = _mm512_add_ps(a, vw);
      b = _mm512_fmadd_ps(vw, n, b);
      _mm512_storeu_ps(&dw[c], _mm512_fmadd_ps(v, n, _mm512_loadu_ps(&dw[c])));
      add_to(&db[c], v);
    }
    const __m512 ma = _mm512_set1_ps(_mm512_reduce_add_ps(a) / width), mb = _mm512_set1_ps(_mm512_reduce_add_ps(b) / width);
    for (size_t c = 0; c < width; c += 16) {
      const __m512 n = _mm512_mul_ps(_mm512_sub_ps(load(p + c), m), s), vw = _mm512_mul_ps(load(g + c), load(weight + c));
      __m512 d = _mm512_mul_ps(s, _mm512_sub_ps(vw, _mm512_fmadd_ps(n, mb, ma)));
      if (residual) d = _mm512_add_ps(d, load(residual + r * width + c));
      store(dx + r * width + c, d);
      if (dx_sum) add_to(&total[c], d);
    }
  }
  write_sums(dw, dweight);
  write_sums(db, dbias);
  if (dx_sum) write_sums(total, dx_sum);
}

// u += bias (kept for the backward pass), a = GELU(u).
void gelu_forward(bf16 *u, const bf16 *bias, bf16 *a, size_t rows, size_t width) {
  for (size_t r = 0; r < rows; r++)
    for (size_t c = 0; c < width; c += 16) {
      bf16 *p = u + r * width + c;
      store(p, _mm512_add_ps(load(p), load(bias + c)));
      const __m512 x = load(p);
      store(a + r * width + c, _mm512_mul_ps(x, normal_distribution(x)));
    }
}

// du = da * GELU'(u); dbias: its column sums.
void gelu_backward(const bf16 *da, const bf16 *u, bf16 *du, bf16 *dbias, size_t rows, size_t width) {
  std::vector<float> sums(width);
  for (size_t r = 0; r < rows; r++)
    for (size_t c = 0; c < width; c += 16) {
      const size_t at = r * width + c;
      const __m512 g = _mm512_mul_ps(load(da + at), gelu_slope(load(u + at)));
      store(du + at, g);
      add_to(&sums[c], g);
    }
  write_sums(sums, dbias);
}

void column_sums(const bf16 *g, bf16 *out, size_t rows, size_t width) {
  std::vector<float> sums(width);
  for (size_t r = 0; r < rows; r++)
    for (size_t c = 0; c < width; c += 16) add_to(&sums[c], load(g + r * width + c));
  write_sums(sums, out);
}

// Sum of squares, in float64 over blocks.
double sum_of_squares(const bf16 *g, size_t n) {
  double total = 0;
  for (size_t start = 0; start < n; start += 4096) {
    const size_t stop = std::min(n, start + 4096);
    __m512 a = _mm512_setzero_ps(), b = a;
    size_t i = start;
    for (; i + 32 <= stop; i += 32) {
      const __m512 x = load(g + i), y = load(g + i + 16);
      a = _mm512_fmadd_ps(x, x, a);
      b = _mm512_fmadd_ps(y, y, b);
    }
    double part = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
    for (; i < stop; i++) {
      const uint32_t bits = (uint32_t)g[i] << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      part += (double)x * x;
    }
    total += part;
  }
  return total;
}

// AdamW over flat vectors in one pass: gradient (bfloat16, times `scale`) -> weights and moments (float32) -> compute weights (bfloat16).
void adamw(const bf16 *gradient, float *weight, float *first, float *second, bf16 *compute, size_t n, float scale, float rate, float beta1,
           float beta2, float eps, float decay, float correction1, float correction2) {
  const __m512 b1 = _mm512_set1_ps(beta1), b2 = _mm512_set1_ps(beta2), o1 = _mm512_set1_ps(1 - beta1), o2 = _mm512_set1_ps(1 - beta2);
  const __m512 step = _mm512_set1_ps(rate / correction1), keep = _mm512_set1_ps(1 - rate * decay), e = _mm512_set1_ps(eps);
  const __m512 root = _mm512_set1_ps(1 / std::sqrt(correction2)), factor = _mm512_set1_ps(scale);
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 some = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    __m512 g = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, gradient + i)), 16));
    g = _mm512_mul_ps(g, factor);
    const __m512 m = _mm512_fmadd_ps(b1, _mm512_maskz_loadu_ps(some, first + i), _mm512_mul_ps(o1, g));
    const __m512 v = _mm512_fmadd_ps(b2, _mm512_maskz_loadu_ps(some, second + i), _mm512_mul_ps(o2, _mm512_mul_ps(g, g)));
    _mm512_mask_storeu_ps(first + i, some, m);
    _mm512_mask_storeu_ps(second + i, some, v);
    const __m512 spread = _mm512_fmadd_ps(_mm512_sqrt_ps(v), root, e);
    const __m512 w = _mm512_fnmadd_ps(step, _mm512_div_ps(m, spread), _mm512_mul_ps(keep, _mm512_maskz_loadu_ps(some, weight + i)));
    _mm512_mask_storeu_ps(weight + i, some, w);
    _mm256_mask_storeu_epi16(compute + i, some, (__m256i)_mm512_cvtneps_pbh(w));
  }
}

}  // extern "C"
