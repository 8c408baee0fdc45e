/* Linear attention as CPU loops over tokens do it: a head at a time to a thread, every token updates the state row by row and
 * reads it. A baseline of bench_linear_attention.py, in the structure that fast-transformers' CPU kernel has; contiguous (BH,
 * T, D). */
#include <stdlib.h>

void recurrence_loop(const float* q, const float* k, const float* v, float* o, long BH, long T, long D, long Dv) {
#pragma omp parallel for
  for (long h = 0; h < BH; ++h) {
    float* state = calloc((size_t)(D * Dv), sizeof(float));
    for (long t = 0; t < T; ++t) {
      const float *qt = q + (h * T + t) * D, *kt = k + (h * T + t) * D, *vt = v + (h * T + t) * Dv;
      float* out = o + (h * T + t) * Dv;
      for (long c = 0; c < Dv; ++c) out[c] = 0.0f;
      for (long d = 0; d < D; ++d)
        for (long c = 0; c < Dv; ++c) {
          state[d * Dv + c] += kt[d] * vt[c];
          out[c] += qt[d] * state[d * Dv + c];
        }
    }
    free(state);
  }
}
