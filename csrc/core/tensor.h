// A checked view of a DLTensor. It is built once per argument at the head of a C API function: after that, kernels take
// raw pointers, sizes and strides. Every check throws one line: op, argument, rule, value.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "core/status.h"

namespace mlcore {

enum class Dtype : uint8_t { f32, bf16, f16, f64, i8, u8, i16, i32, i64, boolean, u64, unknown };

inline const char* name_of(Dtype d) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "float64", "int8",   "uint8",
                                   "int16",   "int32",    "int64",   "bool",    "uint64", "an unknown dtype"};
  return names[static_cast<int>(d)];
}

inline Dtype dtype_of(const DLDataType& t) {
  if (t.lanes != 1) return Dtype::unknown;
  switch (t.code) {
    case kDLFloat: return t.bits == 32 ? Dtype::f32 : t.bits == 16 ? Dtype::f16 : t.bits == 64 ? Dtype::f64 : Dtype::unknown;
    case kDLBfloat: return t.bits == 16 ? Dtype::bf16 : Dtype::unknown;
    case kDLInt:
      return t.bits == 8    ? Dtype::i8
             : t.bits == 16 ? Dtype::i16
             : t.bits == 32 ? Dtype::i32
             : t.bits == 64 ? Dtype::i64
                            : Dtype::unknown;
    case kDLUInt: return t.bits == 8 ? Dtype::u8 : t.bits == 64 ? Dtype::u64 : Dtype::unknown;
    case kDLBool: return t.bits == 8 ? Dtype::boolean : Dtype::unknown;
    default: return Dtype::unknown;
  }
}

class Tensor {
 public:
  static constexpr int kMaxRank = 8;

  // name is the argument's public name. A NULL tensor is an argument left out: ask present() before anything else where that
  // is allowed; every check below refuses it.
  Tensor(const DLTensor* t, const char* op, const char* name) : t_(t), op_(op), name_(name) {
    if (t == nullptr) return;
    require(t->ndim >= 0 && t->ndim <= kMaxRank, op, ": ", name, " has ", t->ndim, " dimensions; at most ", kMaxRank,
            " are supported");
    int64_t compact = 1;
    for (int i = t->ndim - 1; i >= 0; --i) {
      strides_[i] = t->strides ? t->strides[i] : compact;
      compact *= t->shape[i];
    }
    numel_ = compact;
    require(numel_ == 0 || t->data != nullptr, op, ": ", name, " has no data");
    dtype_ = dtype_of(t->dtype);
  }

  bool present() const { return t_ != nullptr; }
  int rank() const { return t_->ndim; }
  int64_t size(int i) const { return t_->shape[i < 0 ? t_->ndim + i : i]; }
  int64_t stride(int i) const { return strides_[i < 0 ? t_->ndim + i : i]; }
  int64_t numel() const { return numel_; }
  Dtype dtype() const { return dtype_; }
  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(t_->data) + t_->byte_offset);
  }
  void* raw() const { return data<void>(); }

  const Tensor& on(DLDeviceType device) const {
    const DLDeviceType got = given().device.device_type;
    require(got == device, op_, ": ", name_, " must be on ", device == kDLCPU ? "the CPU" : "a CUDA device",
            "; got DLPack device type ", static_cast<int>(got));
    return *this;
  }
  const Tensor& dtype_in(std::initializer_list<Dtype> allowed) const {
    const DLDataType got = given().dtype;
    for (Dtype d : allowed)
      if (d == dtype_) return *this;
    std::ostringstream text;
    for (Dtype d : allowed) text << (text.tellp() > 0 ? ", " : "") << name_of(d);
    text << "; got " << name_of(dtype_);
    if (dtype_ == Dtype::unknown)
      text << " (DLPack code " << int{got.code} << ", " << int{got.bits} << " bits, " << got.lanes << " lanes)";
    fail(MLC_INVALID_ARGUMENT, op_, ": ", name_, " must be ", text.str());
  }
  const Tensor& shape_is(std::initializer_list<int64_t> want, const char* layout) const {
    bool same = given().ndim == static_cast<int>(want.size());
    int i = 0;
    for (int64_t n : want) same = same && t_->shape[i++] == n;
    if (!same) fail(MLC_INVALID_ARGUMENT, op_, ": ", name_, " must be ", layout, " = ", list_of(want), "; got ", shape_text());
    return *this;
  }
  const Tensor& shape_like(const Tensor& other) const {
    bool same = given().ndim == other.given().ndim;
    for (int i = 0; same && i < t_->ndim; ++i) same = t_->shape[i] == other.t_->shape[i];
    if (!same)
      fail(MLC_INVALID_ARGUMENT, op_, ": ", name_, " must have ", other.name_, "'s shape ", other.shape_text(), "; got ",
           shape_text());
    return *this;
  }
  const Tensor& rank_at_least(int n) const {
    if (given().ndim < n)
      fail(MLC_INVALID_ARGUMENT, op_, ": ", name_, " must have at least ", n, n == 1 ? " dimension" : " dimensions",
           "; got shape ", shape_text());
    return *this;
  }
  const Tensor& rank_is(int n, const char* layout) const {
    if (given().ndim != n) fail(MLC_INVALID_ARGUMENT, op_, ": ", name_, " must be ", layout, "; got shape ", shape_text());
    return *this;
  }
  const Tensor& last_dim_contiguous() const {
    const int rank = given().ndim;
    require(rank > 0 && (numel_ == 0 || size(-1) == 1 || stride(-1) == 1), op_, ": ", name_,
            " must be contiguous in its last dimension; got stride ", rank > 0 ? stride(-1) : 0);
    return *this;
  }
  const Tensor& contiguous() const {
    int64_t compact = 1;
    for (int i = given().ndim - 1; i >= 0; --i) {
      if (numel_ > 0 && size(i) != 1 && stride(i) != compact)
        fail(MLC_INVALID_ARGUMENT, op_, ": ", name_, " must be contiguous; got strides ",
             list_of(strides_, strides_ + t_->ndim));
      compact *= size(i);
    }
    return *this;
  }
  std::string shape_text() const { return list_of(t_->shape, t_->shape + t_->ndim); }

 private:
  const DLTensor& given() const {
    require(present(), op_, ": ", name_, " must be given");
    return *t_;
  }
  static std::string list_of(const int64_t* begin, const int64_t* end) {
    std::ostringstream out;
    out << "(";
    for (const int64_t* p = begin; p != end; ++p) out << (p == begin ? "" : ", ") << *p;
    out << ")";
    return out.str();
  }
  static std::string list_of(std::initializer_list<int64_t> v) { return list_of(v.begin(), v.end()); }

  const DLTensor* t_;
  const char* op_;
  const char* name_;
  int64_t strides_[kMaxRank] = {};
  int64_t numel_ = 0;
  Dtype dtype_ = Dtype::unknown;
};

}  // namespace mlcore
