// The arguments of a row-wise op: (R, C) tensors that agree with the op's main one and the vectors beside them, checked once
// and handed to the kernels as plain pointers. Used with row_blocks.h; the loops over a row are simd/rows.h.
#pragma once
#include "core/tensor.h"

namespace mlcore {

// (R, C), contiguous in C, any row stride. data is null where the argument was left out.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
};

// (C), contiguous. data is null where the argument was left out.
struct RowVector {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

// What the other arguments must agree with, taken from the main tensor: (R, C), or contiguous (..., C) with R the product of
// the rest.
struct RowArgs {
  const Tensor& main;
  int64_t rows = 1, cols;
  Dtype dtype;
  DLDeviceType device;

  explicit RowArgs(const Tensor& main, DLDeviceType device = kDLCPU) : main(main), device(device) {
    main.on(device).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_at_least(1);
    check_layout(main);
    for (int i = 0; i + 1 < main.rank(); ++i) rows *= main.size(i);
    cols = main.size(-1), dtype = main.dtype();
  }

  Rows required(const Tensor& t) const {
    t.on(device).dtype_in({dtype}).shape_like(main);
    check_layout(t);
    return {t.raw(), t.rank() == 2 ? t.stride(0) : cols};
  }
  Rows optional(const Tensor& t) const { return t.present() ? required(t) : Rows{}; }

  // A weight, a bias or the gradient of one: of the main dtype or float32.
  RowVector vector(const Tensor& t) const {
    if (!t.present()) return {nullptr, dtype};
    (dtype == Dtype::f32 ? t.on(device).dtype_in({dtype}) : t.on(device).dtype_in({dtype, Dtype::f32}))
        .shape_is({cols}, "(C)")
        .contiguous();
    return {t.raw(), t.dtype()};
  }

  // One number a row, as the backward pass reads it.
  float* statistic(const Tensor& t) const {
    t.on(device).dtype_in({Dtype::f32}).shape_is({rows}, "(R)").contiguous();
    return t.data<float>();
  }
  float* optional_statistic(const Tensor& t) const { return t.present() ? statistic(t) : nullptr; }

 private:
  static void check_layout(const Tensor& t) { t.rank() == 2 ? t.last_dim_contiguous() : t.contiguous(); }
};

}  // namespace mlcore
