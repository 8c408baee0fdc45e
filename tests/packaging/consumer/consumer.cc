// rms_norm over this program's own memory, checked against a plain loop, and an error that says what is wrong.
#include <mlcore/mlcore.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

DLTensor view(std::vector<float>& data, std::vector<int64_t>& shape, int64_t* strides = nullptr) {
  return {data.data(), {kDLCPU, 0}, static_cast<int32_t>(shape.size()), {kDLFloat, 32, 1}, shape.data(), strides, 0};
}

}  // namespace

int main() {
  constexpr int64_t kRows = 13, kCols = 77, kStride = 80;
  constexpr double kEps = 1e-6;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(kRows * kStride), weight(kCols), y(kRows * kCols), rstd(kRows);
  for (float& v : x) v = normal(random);
  for (float& v : weight) v = normal(random);
  std::vector<int64_t> matrix{kRows, kCols}, columns{kCols}, rows{kRows}, strides{kStride, 1};
  DLTensor x_ = view(x, matrix, strides.data()), weight_ = view(weight, columns), y_ = view(y, matrix),
           rstd_ = view(rstd, rows);

  if (mlc_rms_norm_fwd(&x_, nullptr, &weight_, kEps, &y_, nullptr, &rstd_) != MLC_OK) {
    std::printf("failed: %s\n", mlc_last_error());
    return 1;
  }
  double worst = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < kCols; ++c) sum += double(x[r * kStride + c]) * x[r * kStride + c];
    const double scale = 1 / std::sqrt(sum / kCols + kEps);
    for (int64_t c = 0; c < kCols; ++c)
      worst = std::fmax(worst, std::fabs(x[r * kStride + c] * scale * weight[c] - y[r * kCols + c]));
  }
  std::printf("worst error below 1e-5: %s\n", worst < 1e-5 ? "yes" : "no");

  columns[0] = kCols - 1;
  const int status = mlc_rms_norm_fwd(&x_, nullptr, &weight_, kEps, &y_, nullptr, &rstd_);
  std::printf("status %d: %s\n", status, mlc_last_error());
  std::printf("status %d: %s\n", mlc_rms_norm_fwd(nullptr, nullptr, nullptr, kEps, &y_, nullptr, &rstd_), mlc_last_error());
  return worst < 1e-5 ? 0 : 1;
}
