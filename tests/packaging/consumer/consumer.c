/* The headers are C, and a C program links. */
#include <mlcore/mlcore.h>
#include <stdio.h>

int main(void) {
  float data[4] = {3.0f, 4.0f, 0.0f, 0.0f}, out[4], rstd[1];
  int64_t matrix[2] = {1, 4}, rows[1] = {1};
  DLTensor x = {data, {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, matrix, NULL, 0};
  DLTensor y = x, r = x;
  y.data = out;
  r.data = rstd, r.ndim = 1, r.shape = rows;
  if (mlc_rms_norm_fwd(&x, NULL, NULL, 0.0, &y, NULL, &r) != MLC_OK) return 1;
  printf("%.3f %.3f %.3f %.3f, rstd %.3f\n", out[0], out[1], out[2], out[3], rstd[0]);
  return 0;
}
