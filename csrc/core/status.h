// Errors inside mlcore are one exception type; guard() turns it into a status and a per-thread text at the C API.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "mlcore/api.h"

namespace mlcore {

struct Error : std::runtime_error {
  Error(mlc_status code, std::string text) : std::runtime_error(std::move(text)), code(code) {}
  mlc_status code;
};

void set_last_error(const char* text) noexcept;

template <class... Parts>
[[noreturn]] void fail(mlc_status code, const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  throw Error(code, out.str());
}

template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) fail(MLC_INVALID_ARGUMENT, parts...);
}

template <class F>
int guard(F&& body) noexcept {
  try {
    body();
    return MLC_OK;
  } catch (const Error& e) {
    set_last_error(e.what());
    return e.code;
  } catch (const std::exception& e) {
    set_last_error(e.what());
    return MLC_RUNTIME_ERROR;
  }
}

}  // namespace mlcore
